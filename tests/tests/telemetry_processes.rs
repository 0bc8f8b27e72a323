//! Promise: what a person sees without a Prometheus. The access log is one JSON object per line on stderr, failures
//! only unless MeshConfig says more; `outrigger stat` shows every edge within a few seconds, from the sidecars' reports.

use std::net::SocketAddr;

use outrigger_tests::application::Backend;
use outrigger_tests::process::{Process, Program};
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, Mesh, MeshOptions, eventually, under_test};
use serde_json::Value;

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";
const CATALOG: &str = "spiffe://outrigger.local/ns/shop/sa/catalog";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

async fn sidecar(mesh: &Mesh, name: &str, more: &[&str]) -> Process {
    let account = name.split('-').next().unwrap();
    let token_file = mesh.path(&format!("{name}.token"));
    std::fs::write(&token_file, mesh.token("shop", account, &[("app", account)])).unwrap();
    let text = |path: std::path::PathBuf| path.to_str().unwrap().to_owned();
    let mut arguments: Vec<String> = [
        ("--control-plane", mesh.control_plane().to_string()),
        ("--trust-bundle", text(mesh.trust_bundle())),
        ("--token-file", text(token_file)),
        ("--name", name.to_owned()),
        ("--namespace", "shop".to_owned()),
        ("--service-account", account.to_owned()),
        ("--label", format!("app={account}")),
        ("--state", text(mesh.path(&format!("state-{name}")))),
    ]
    .into_iter()
    .flat_map(|(flag, value)| [flag.to_owned(), value])
    .collect();
    arguments.insert(0, "run".to_owned());
    for flag in ["--admin-listen", "--metrics-listen", "--health-listen"] {
        arguments.extend([flag.to_owned(), "127.0.0.1:0".to_owned()]);
    }
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    let mut process = Process::run(under_test!(), Program::Sidecar, arguments);
    process.ready().await;
    process
}

/// The lines of the access log; every line on stderr that says it is one must be whole.
fn access_log(process: &Process) -> Vec<Value> {
    let stderr = process.stderr();
    let lines = stderr.lines().filter(|line| line.contains("\"log\":\"access\""));
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

async fn logged(process: &Process, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    eventually(&format!("{what} in the access log"), async || access_log(process).into_iter().find(&wanted)).await
}

async fn get(address: SocketAddr, path: &str) -> u16 {
    let fields = format!("Host: catalog\r\ntraceparent: 00-{TRACE}-00f067aa0ba902b7-01\r\nConnection: close");
    wire::ask(address, format!("GET {path} HTTP/1.1\r\n{fields}\r\n\r\n")).await.status
}

/// Changes MeshConfig and waits until the sidecar works with it.
async fn set_access_log(mesh: &Mesh, process: &Process, mode: &str) {
    let config = format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default, namespace: \
         outrigger-system}}\nspec: {{accessLog: {mode}}}\n"
    );
    mesh.write("mesh-config.yaml", &config);
    let admin = process.address("admin").await;
    eventually(&format!("accessLog is {mode}"), async || {
        let request = "GET /config HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        let config: Value = serde_json::from_slice(&wire::ask(admin, request).await.body).unwrap();
        (config["workload"]["access_log"] == mode).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_access_log_says_what_failed_and_why() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    mesh.service("gone.shop", 80, 8080, Some("http"));
    let far = sidecar(&mesh, "catalog-1", &["--inbound", &format!("127.0.0.1:0={}", app.address())]).await;
    let near =
        sidecar(&mesh, "cart-1", &["--outbound", "127.0.0.1:0=catalog:80", "--outbound", "127.0.0.1:0=gone:80"]).await;
    let outbound = near.address("outbound:catalog.shop:80").await;
    let gone = near.address("outbound:gone.shop:80").await;

    // Failures only.
    assert_eq!(get(outbound, "/fine").await, 200);
    assert_eq!(get(outbound, "/status/500").await, 500);
    assert_eq!(get(gone, "/x\"y?secret=1").await, 503);
    let inbound = far.address(&format!("inbound:{}", app.port())).await;
    let mut intruder = Connection::open(inbound).await;
    intruder.send("GET / HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    intruder.take_to_end().await;

    for (process, direction) in [(&near, "outbound"), (&far, "inbound")] {
        let line = logged(process, "the application's 500", |line| line["status"] == 500).await;
        for (field, value) in [
            ("direction", direction),
            ("protocol", "http1"),
            ("method", "GET"),
            ("path", "/status/500"),
            ("trace_id", TRACE),
            ("reason", ""),
            ("policy", ""),
            ("rule", ""),
            ("source_workload", "cart-1"),
            ("source_principal", CART),
            ("destination_service", "catalog.shop"),
            ("destination_workload", "catalog-1"),
            ("destination_principal", CATALOG),
        ] {
            assert_eq!(line[field], value, "{field} of {line}");
        }
        assert_eq!(line["mtls"], true);
    }
    let line = logged(&near, "what the mesh refused", |line| line["status"] == 503).await;
    assert_eq!(
        (&line["reason"], &line["destination_service"]),
        (&"destination_unavailable".into(), &"gone.shop".into())
    );
    assert_eq!(line["path"], "/x\"y", "no query, and nothing breaks the line");
    let line = logged(&far, "the intruder", |line| line["reason"] == "mtls_required").await;
    assert_eq!((&line["status"], &line["source_workload"]), (&Value::Null, &"unknown".into()));
    for process in [&near, &far] {
        assert!(access_log(process).iter().all(|line| line["path"] != "/fine"), "not a failure");
    }

    set_access_log(&mesh, &near, "Off").await;
    assert_eq!(get(outbound, "/status/501").await, 501);
    set_access_log(&mesh, &near, "All").await;
    assert_eq!(get(outbound, "/all").await, 200);
    let line = logged(&near, "a success", |line| line["path"] == "/all").await;
    assert_eq!((&line["status"], &line["reason"]), (&200.into(), &"".into()));
    assert!(access_log(&near).iter().all(|line| line["status"] != 501), "off is off");
    let all = access_log(&near);
    assert_eq!(all.len(), 3, "one line each: {all:#?}");
}

#[tokio::test]
async fn a_refusal_names_its_trace_also_where_traces_are_exported() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("gone.shop", 80, 8080, Some("http"));
    let config = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: \
                  outrigger-system}\nspec: {tracing: {otlpEndpoint: 'http://127.0.0.1:1'}}\n";
    mesh.write("mesh-config.yaml", config);
    let near = sidecar(&mesh, "cart-1", &["--outbound", "127.0.0.1:0=gone:80"]).await;
    let gone = near.address("outbound:gone.shop:80").await;
    let admin = near.address("admin").await;
    eventually("traces are on", async || {
        let request = "GET /config HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        let config: Value = serde_json::from_slice(&wire::ask(admin, request).await.body).unwrap();
        (config["workload"]["otlp_endpoint"] == "http://127.0.0.1:1").then_some(())
    })
    .await;
    assert_eq!(get(gone, "/").await, 503);
    let line = logged(&near, "the refusal", |line| line["status"] == 503).await;
    assert_eq!((&line["trace_id"], &line["reason"]), (&TRACE.into(), &"destination_unavailable".into()));
}

#[tokio::test]
async fn stat_shows_an_edge_within_seconds() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let quiet = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: \
                 outrigger-system}\nspec: {accessLog: Off}\n";
    mesh.write("mesh-config.yaml", quiet);
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let _far =
        mesh.sidecar("catalog-1").label("app", "catalog").workload("catalog-api").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").workload("cart-web").outbound("catalog:80").start().await;
    let begun = std::time::Instant::now();
    let edges = eventually("both sides of the edge", async || {
        let mut client = Connection::open(near.outbound()).await;
        for path in ["/", "/", "/", "/status/500"] {
            client.ask(format!("GET {path} HTTP/1.1\r\nHost: c\r\n\r\n")).await;
        }
        let stats = mesh.control_plane_get("/stats").await;
        let edges = stats["edges"].as_array().unwrap().clone();
        // A window that ends between two of the requests has another share of failures.
        let settled =
            |edge: &Value| edge["success_percent"].as_f64().is_some_and(|share| (70.0..80.0).contains(&share));
        (edges.len() == 2 && edges.iter().all(settled)).then_some(edges)
    })
    .await;
    assert!(begun.elapsed().as_secs() < 15, "within a few seconds, not {:?}", begun.elapsed());
    let directions: Vec<_> = edges.iter().map(|edge| edge["direction"].as_str().unwrap()).collect();
    assert!(directions.contains(&"inbound") && directions.contains(&"outbound"), "{directions:?}");
    for edge in &edges {
        for (field, value) in [
            ("source_workload", "cart-web"),
            ("source_namespace", "shop"),
            ("source_identity", CART),
            ("destination_service", "catalog.shop"),
            ("destination_workload", "catalog-api"),
            ("destination_identity", CATALOG),
            ("protocol", "http1"),
        ] {
            assert_eq!(edge[field], value, "{field} of {edge}");
        }
        assert_eq!(edge["mtls"], true);
        assert!(edge["requests_per_second"].as_f64().unwrap() > 0.0, "{edge}");
        let (p50, p99) = (edge["p50"].as_f64().unwrap(), edge["p99"].as_f64().unwrap());
        assert!(0.0 < p50 && p50 <= p99 && p99 < 5.0, "{edge}");
    }

    let admin = mesh.admin().to_string();
    let mut stat = Process::run(under_test!(), Program::Outrigger, ["stat", "--control-plane-admin", &admin]);
    assert!(stat.wait(std::time::Duration::from_secs(10)).await.success(), "{}", stat.stderr());
    let table = eventually("the table", async || {
        let table = stat.stdout();
        table.contains("catalog.shop").then_some(table)
    })
    .await;
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["FROM", "TO", "PROTOCOL", "REQ/S", "SUCCESS", "P50", "P99", "MTLS", "TOTAL", "FAILED"]);
    assert_eq!(words.len(), 2, "both sides are one row:\n{table}");
    assert_eq!(words[1][..3], ["cart-web.shop", "catalog.shop", "http1"]);
    // TOTAL and FAILED stand behind it; a latency is two words.
    assert_eq!(words[1].iter().rev().nth(2), Some(&"yes"), "{table}");
    println!("{table}");
}

/// What an endpoint with a sidecar, by its document, does instead of a handshake, and how that is told.
const NO_HANDSHAKE: [(&str, Option<&[u8]>, &str); 7] = [
    ("http", Some(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"), PLAINTEXT),
    ("mail", Some(b"220 mail.shop ESMTP\r\n"), PLAINTEXT),
    ("garbage", Some(&[0xff; 64]), PLAINTEXT),
    ("zeros", Some(&[0; 64]), PLAINTEXT),
    ("alert", Some(&[0x15, 3, 3, 0, 2, 2, 40]), ": the peer ended the handshake with the alert HandshakeFailure"),
    ("broken", Some(b"\x16\x03\x03\x00\x05hello"), ": the handshake failed: "),
    ("closes", None, ": the handshake broke off: "),
];
const PLAINTEXT: &str = " answered in plaintext: is its sidecar's redirect in place? run `redirect check` there";

#[tokio::test]
async fn an_endpoint_that_makes_no_handshake_is_told_with_its_address_and_what_it_did() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let mut servers = tokio::task::JoinSet::new();
    let mut addresses = Vec::new();
    for (name, says, _) in NO_HANDSHAKE {
        let server = Backend::start().await;
        let port = server.port();
        mesh.write(
            &format!("{name}.yaml"),
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{selector: {{app: {name}}}, \
                 ports: [{{port: 80, targetPort: {port}, appProtocol: http}}]}}\n---\napiVersion: outrigger.dev/v1alpha1\nkind: \
                 Workload\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{address: 127.0.0.1, serviceAccount: {name}, \
                 mesh: true, labels: {{app: {name}}}, ports: {{main: {port}}}}}\n"
            ),
        );
        addresses.push(server.address());
        servers.spawn(async move {
            loop {
                let mut connection = server.wait().await;
                let _ = connection.read_some().await;
                if let Some(says) = says {
                    let _ = connection.try_send(says).await;
                }
                connection.finish().await;
                connection.take_to_end().await;
            }
        });
    }
    let outbound: Vec<String> = NO_HANDSHAKE.iter().map(|(name, ..)| format!("127.0.0.1:0={name}:80")).collect();
    let flags: Vec<&str> = outbound.iter().flat_map(|outbound| ["--outbound", outbound]).collect();
    let near = sidecar(&mesh, "cart-1", &flags).await;
    for ((name, _, words), endpoint) in NO_HANDSHAKE.into_iter().zip(addresses) {
        let address = near.address(&format!("outbound:{name}.shop:80")).await;
        let answer = wire::get(address, "/").await;
        assert_eq!((answer.status, &*answer.reason()), (503, "tls_handshake"), "{name}: {}", answer.text());
        let told: Value = serde_json::from_slice(&answer.body).unwrap();
        let detail = told["detail"].as_str().unwrap().to_owned();
        assert!(detail.starts_with(&format!("{endpoint}{words}")), "{name}: {detail}");
        let line =
            logged(&near, name, |line| line["detail"].as_str().is_some_and(|said| said.ends_with(&detail))).await;
        assert_eq!(line["reason"], "tls_handshake", "{name}: {line}");
    }
}
