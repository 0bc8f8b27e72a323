//! Golden files: each `bad/X.yaml` gives exactly the problems in `bad/X.out`, everything in `good/` none.
//! `UPDATE_GOLDEN=1 cargo test -p outrigger-api --test yaml` writes the `.out` files anew, for reading in the diff.

#![expect(clippy::unwrap_used, reason = "what is missing here fails the test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use outrigger_api::compile::load as parse;
use outrigger_api::resource::{
    AccessLogMode, KeyAlgorithm, LoadBalancerType, OutboundTraffic, Parsed, SourceFile, TargetPort,
};
use outrigger_api::snapshot::MtlsMode;

fn testdata(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/resource/testdata").join(folder);
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    paths.sort();
    assert!(!paths.is_empty());
    paths
}

fn source(path: &Path) -> SourceFile {
    SourceFile { name: path.file_name().unwrap().to_str().unwrap().to_owned(), text: fs::read_to_string(path).unwrap() }
}

fn printed(parsed: &Parsed) -> String {
    let errors = parsed.errors.iter().map(|problem| format!("error   {problem}\n"));
    errors.chain(parsed.warnings.iter().map(|problem| format!("warning {problem}\n"))).collect()
}

#[test]
fn bad_files_give_exactly_their_problems() {
    for path in testdata("bad") {
        let actual = printed(&parse(&[source(&path)]));
        let golden = path.with_extension("out");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&golden, &actual).unwrap();
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        assert_eq!(actual, expected, "{}", path.display());
    }
}

#[test]
fn good_files_mean_what_they_say() {
    let files: Vec<SourceFile> = testdata("good").iter().map(|path| source(path)).collect();
    let parsed = parse(&files);
    assert_eq!(printed(&parsed), "");
    assert_eq!(parsed.objects, 11);
    let all = parsed.resources;

    let route = &all.http_routes[&("shop".to_owned(), "pay".to_owned())];
    assert_eq!((route.metadata.created.as_deref(), route.spec.rules.len()), (Some("2026-11-28T14:30:00Z"), 3));
    assert_eq!(route.spec.rules[0].matches.len(), 2);
    assert_eq!(route.spec.rules[0].timeouts.backend_request, Some(500));
    assert_eq!((all.grpc_routes.len(), all.reference_grants.len()), (1, 1));

    let mesh = all.mesh;
    assert_eq!(mesh.trust_domain.as_ref().unwrap().as_str(), "example.org");
    assert_eq!(mesh.leaf_lifetime_seconds, Some(5400));
    assert_eq!(mesh.renew_grace_seconds, Some(43_200));
    assert_eq!(mesh.key_algorithm, KeyAlgorithm::Ed25519);
    assert_eq!(mesh.outbound, OutboundTraffic::RegistryOnly);
    assert_eq!(mesh.tracing.otlp_endpoint.as_deref(), Some("http://jaeger:4317"));
    assert_eq!(mesh.tracing.random_sampling_percentage, Some(12.5));
    assert_eq!(mesh.access_log, AccessLogMode::Off);
    assert_eq!(mesh.max_series, Some(500));
    assert_eq!(mesh.opaque_ports, Some(vec![3306, 5672]));
    assert_eq!(mesh.defaults.load_balancer, LoadBalancerType::RoundRobin);

    let key = |namespace: &str, name: &str| (namespace.to_owned(), name.to_owned());
    let service = &all.services[&key("shop", "catalog")];
    assert_eq!(service.load_balancer(), Some(LoadBalancerType::Random));
    assert!(service.service_accounts().unwrap().iter().eq(["catalog", "catalog-batch"].iter()));
    let addresses: Vec<String> = service.spec.cluster_ips.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.96.0.10", "fd00::10"]);
    assert_eq!(service.spec.ports[0].target_port, TargetPort::Number(8080));
    assert_eq!(service.spec.ports[1].target_port, TargetPort::Name("api".into()));
    assert_eq!(service.spec.ports[1].app_protocol.as_deref(), Some("grpc"));
    assert!(all.service_accounts.contains_key(&key("shop", "catalog")));

    let workload = &all.workloads[&key("shop", "catalog-1")].spec;
    let labels = BTreeMap::from([("app".into(), "catalog".into()), ("tier".into(), "back".into())]);
    assert_eq!(workload.labels, labels);
    assert_eq!((workload.service_account.as_str(), workload.weight, workload.mesh), ("catalog", 3, true));
    assert_eq!(workload.ports, BTreeMap::from([("api".into(), 9000), ("http".into(), 8080)]));
    let plain = &all.workloads[&key("default", "catalog-2")].spec;
    assert_eq!((plain.service_account.as_str(), plain.weight, plain.mesh), ("default", 1, false));

    assert_eq!(all.peer_authentications[&key("outrigger-system", "default")].spec.mode, Some(MtlsMode::Strict));
    let ports = &all.peer_authentications[&key("shop", "catalog.ports")].spec;
    assert_eq!(ports.mode, None);
    assert_eq!(ports.port_level, BTreeMap::from([(8080, MtlsMode::Disable), (9000, MtlsMode::Strict)]));
}

#[test]
fn objects_are_unique_across_files_and_the_rest_stays() {
    let workload = |name: &str, address: &str| SourceFile {
        name: name.to_owned(),
        text: format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata:\n  name: a\nspec: {{address: {address}}}\n"
        ),
    };
    let parsed = parse(&[workload("one.yaml", "10.0.0.1"), workload("two.yaml", "10.0.0.2")]);
    assert_eq!(printed(&parsed), "error   two.yaml:4:9: Workload default/a stands already in one.yaml:4\n");
    assert_eq!(parsed.resources.workloads.len(), 1);
}

#[test]
fn nothing_is_fine() {
    for text in ["", "---\n", "# only a comment\n", "---\n---\n...\n", "\u{feff}", "null\n"] {
        let parsed = parse(&[SourceFile { name: "empty.yaml".into(), text: text.into() }]);
        assert_eq!(parsed, Parsed::default(), "{text:?}");
    }
    assert_eq!(parse(&[]), Parsed::default());
}

#[test]
fn files_of_other_systems() {
    let lines =
        ["apiVersion: outrigger.dev/v1alpha1", "kind: Workload", "metadata: {name: a}", "spec: {adress: 10.0.0.1}"];
    for (what, text) in [("CRLF", lines.join("\r\n")), ("BOM", format!("\u{feff}{}\n", lines.join("\n")))] {
        let errors = problems(text);
        assert!(
            errors.iter().any(|error| error.starts_with("hostile.yaml:4:8: spec: unknown field")),
            "{what}: {errors:?}"
        );
    }
}

fn problems(text: String) -> Vec<String> {
    let parsed = parse(&[SourceFile { name: "hostile.yaml".into(), text }]);
    parsed.errors.iter().map(ToString::to_string).collect()
}

#[test]
fn hostile_files_end_in_an_error() {
    let bomb = |name: &str| {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let below = format!("*a{}, ", level - 1).repeat(10);
            text.push_str(&format!("a{level}: &a{level} [{below}]\n"));
        }
        text + name
    };
    let wide = format!("a: &a [{}]\nb: [{}]\n", "x, ".repeat(50_000), "*a, ".repeat(50_000));
    let fat = format!("a: &a \"\\n{}\"\nb: [{}]\n", "x".repeat(500_000), "*a, ".repeat(50_000));
    let cases = [
        ("more bytes than allowed", "#".repeat((1 << 20) + 1), "1:1: the file is larger than 1048576 bytes"),
        ("a bomb of aliases", bomb("\n"), "repetition limit exceeded"),
        ("a wide bomb", wide, "the file expands to too much"),
        ("a fat bomb", fat, "the file expands to too much"),
        ("an alias to itself", "a: &a [*a]\n".to_owned(), "nest deeper than 100 levels"),
        ("deep lists", "[".repeat(1 << 20), "1:101: lists and maps nest deeper than 100 levels"),
        ("deep lists, closed", format!("{}{}", "[".repeat(5_000), "]".repeat(5_000)), "nest deeper than 100 levels"),
        ("deep maps", "{a: ".repeat(1 << 18), "nest deeper than 100 levels"),
        ("deep maps at the end", format!("{}{}", "- [a]\n".repeat(10_000), "- {a: ".repeat(50_000)), ""),
        ("deep blocks", (0..2_000).map(|depth| format!("{}a:\n", " ".repeat(depth % 600))).collect(), ""),
        ("deep sequences", "- ".repeat(50_000), "nest deeper than 100 levels"),
        ("directives", (0..1_000).map(|nth| format!("%TAG !a{nth}! b\n")).collect(), "too many directives"),
        ("no UTF-8", "a: b\nc: d\u{fffd}\n".to_owned(), "2:5: these bytes are not UTF-8 text"),
        ("control characters", "a: \u{1}\n".to_owned(), "control characters are not allowed"),
        ("NUL", "a: b\0c\n".to_owned(), "control characters are not allowed"),
        ("an end without a start", "}\n".to_owned(), "1:1: "),
        ("keys that are lists", "? [a]\n: b\n".to_owned(), "expected a key"),
    ];
    for (what, text, expected) in cases {
        let errors = problems(text);
        assert!(errors.iter().any(|error| error.contains(expected)), "{what}: {errors:?}");
    }
}

#[test]
fn many_problems_are_cut_short() {
    let mut text = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {name: a}\nspec:\n".to_owned();
    text.extend((0..5_000).map(|nth| format!("  unknown{nth}: 1\n")));
    let errors = problems(text);
    assert_eq!(errors.len(), 21);
    assert!(errors[20].ends_with("and 4981 more errors in this file"), "{}", errors[20]);
}

/// Every golden file with bytes replaced, removed, repeated: whatever comes out, it is an answer and no panic.
#[test]
fn mutated_files_never_panic() {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let alphabet = b"\x00\t\n\r -:,[]{}&*!|>'\"%@`#?~<=.a0\xc3\xbf\xef\xbb";
    for path in testdata("good").into_iter().chain(testdata("bad")) {
        let original = fs::read(&path).unwrap();
        for _ in 0..300 {
            let mut bytes = original.clone();
            for _ in 0..=random(4) {
                let at = random(bytes.len().max(1));
                match random(4) {
                    0 if at < bytes.len() => bytes[at] = alphabet[random(alphabet.len())],
                    0 | 1 => bytes.insert(at, alphabet[random(alphabet.len())]),
                    2 => drop(bytes.drain(at..(at + random(8)).min(bytes.len()))),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            let text = String::from_utf8_lossy(&bytes).into_owned();
            for problem in parse(&[SourceFile { name: "x".into(), text: text.clone() }]).errors {
                assert!(problem.line >= 1 && problem.line <= text.lines().count() + 2, "{problem}\n{text}");
            }
        }
    }
}
