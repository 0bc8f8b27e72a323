//! Promise: what explains routes agrees with what follows them: a running sidecar explains its own, and the routes of the
//! documentation and of the examples do what is written beside them. The other `routes_*` files compare each call with
//! `explain` and `test`.

use outrigger_api::compile::load;
use outrigger_api::resource::SourceFile;

use outrigger_tests::process::{Program, command};
use outrigger_tests::routes::{Echo, V1, V2, route, said};
use outrigger_tests::under_test;
use outrigger_tests::wire::text;

#[tokio::test]
async fn a_running_sidecar_explains_its_routes() {
    let echo =
        Echo::start(&route(&format!("[{{matches: [{{path: {{type: PathPrefix, value: /v2}}}}], {V2}}}, {{{V1}}}]")))
            .await;
    assert_eq!(said(&echo.ask("GET /").await), "v1");
    let question = |target: &str| {
        serde_json::json!({
            "from": "spiffe://outrigger.local/ns/shop/sa/client", "fromIp": null, "to": "echo.shop", "port": 80,
            "request": {"method": "GET", "target": target, "headers": []}, "at": 0,
        })
    };
    let told = echo.client.admin_post_json("/explain", &question("/v2/x")).await;
    assert_eq!((&told["route"]["name"], &told["route"]["rule"]), (&"echo".into(), &0.into()), "{told}");
    assert_eq!(told["backends"][0]["service"], "echo-v2.shop");
    let told = echo.client.admin_post_json("/explain", &question("/other")).await;
    assert_eq!((&told["route"]["rule"], &told["backends"][0]["endpoints"]), (&1.into(), &1.into()), "{told}");
}

/// The examples of the documentation are whole: they are valid, without a warning, and their tests pass.
#[test]
fn what_the_documentation_shows_holds() {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/routes.md");
    let text = std::fs::read_to_string(page).unwrap();
    let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split_once("```").map(|(block, _)| block));
    let yaml = blocks.collect::<Vec<_>>().join("---\n");
    let parsed = load(&[SourceFile { name: "routes.yaml".to_owned(), text: yaml.clone() }]);
    assert_eq!((parsed.errors.as_slice(), parsed.warnings.as_slice()), (&[][..], &[][..]));
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("routes.yaml"), yaml).unwrap();
    let ran = command(under_test!(), Program::Outrigger).arg("test").arg(directory.path()).output().unwrap();
    let text = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && text.contains("2 as expected") && !text.contains("no case reached"), "{text}");
}

#[test]
fn the_canary_of_the_examples_holds() {
    let config = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/policies/canary/config");
    for word in ["validate", "test"] {
        let ran = command(under_test!(), Program::Outrigger).arg(word).arg(&config).output().unwrap();
        assert!(ran.status.success(), "{word}: {}{}", text(&ran.stdout), text(&ran.stderr));
    }
}
