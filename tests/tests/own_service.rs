//! Promise: a workload that calls a service of which it is an endpoint itself reaches its own application through inbound
//! policy, in this process: no TLS through itself, the caller is itself, and whatever it claims to be is removed.

use bytes::Bytes;
use outrigger_tests::application::Backend;
use outrigger_tests::grpc::Http2;
use outrigger_tests::mesh::STRICT;
use outrigger_tests::{Application, Connection, End, Mesh, MeshOptions, Sidecar, eventually};

const CATALOG: &str = "spiffe://outrigger.local/ns/shop/sa/catalog";
const DISABLE: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: mesh, namespace: outrigger-system}
spec: {mtls: {mode: DISABLE}}
";

async fn start(yaml: &str, app: std::net::SocketAddr, protocol: Option<&str>) -> (Mesh, Sidecar) {
    let mesh = Mesh::start(MeshOptions { yaml: yaml.to_owned(), ..MeshOptions::default() }).await;
    mesh.service("catalog.shop", 80, app.port(), protocol);
    let sidecar = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).outbound("catalog:80").start().await;
    (mesh, sidecar)
}

#[tokio::test]
async fn requests_arrive_as_its_own_in_every_mode() {
    for yaml in [STRICT, "", DISABLE] {
        let app = Application::start("catalog").await;
        let (_mesh, sidecar) = start(yaml, app.address(), None).await;
        let mut client = Connection::open(sidecar.outbound()).await;
        let forged = "X-Outrigger-Identity: spiffe://outrigger.local/ns/shop/sa/admin\r\nx_outrigger_identity: admin";
        for _ in 0..3 {
            let answer = client.ask(format!("GET /echo HTTP/1.1\r\nHost: catalog\r\n{forged}\r\n\r\n")).await;
            assert_eq!(answer.status, 200, "{yaml}: {}", answer.text());
            let seen = app.last();
            assert_eq!(seen.all("x-outrigger-identity"), [CATALOG]);
            assert_eq!(seen.all("x-forwarded-client-cert"), [format!("By={CATALOG};URI={CATALOG}")]);
            assert!(seen.all("x_outrigger_identity").is_empty());
        }
        assert_eq!(app.connections(), 1, "it is kept");
        let grpc = Http2::open(sidecar.outbound()).await;
        let answer = grpc.unary("/test.Echo/Unary", b"hello").await.unwrap();
        assert_eq!((answer.grpc_status(), answer.messages()), (Some("0"), vec![Bytes::from_static(b"hello")]));
        for direction in ["outbound", "inbound"] {
            let labels = [
                ("direction", direction),
                ("source_principal", CATALOG),
                ("destination_service", "catalog.shop"),
                ("destination_workload", "catalog"),
                ("mtls", "false"),
                ("reason", ""),
            ];
            eventually(&format!("{direction} is counted"), async || {
                (sidecar.metrics().await.sum("outrigger_http_requests_total", &labels) == 4.0).then_some(())
            })
            .await;
        }
        let callers = sidecar.admin_get("/plaintext-callers").await;
        assert_eq!(callers, serde_json::json!({"callers": [], "unlisted": 0}));
    }
}

#[tokio::test]
async fn bytes_that_are_not_parsed_end_as_they_do_elsewhere() {
    let app = Backend::start().await;
    let (_mesh, sidecar) = start(STRICT, app.address(), Some("tcp")).await;
    // Half-close in both directions.
    let mut client = Connection::open(sidecar.outbound()).await;
    client.send("question").await;
    client.finish().await;
    let mut served = app.accept().await;
    assert_eq!(served.take_to_end().await, (b"question".to_vec(), End::Closed));
    served.send(vec![7; 300_000]).await;
    served.finish().await;
    let (answer, end) = client.take_to_end().await;
    assert_eq!((answer.len(), end), (300_000, End::Closed));
    // A reset is no end, whoever makes it.
    let mut client = Connection::open(sidecar.outbound()).await;
    client.send("x").await;
    let mut served = app.accept().await;
    assert_eq!(served.take(1).await, b"x");
    served.reset();
    assert_eq!(client.expect_end().await, End::Reset);
    let mut client = Connection::open(sidecar.outbound()).await;
    client.send("x").await;
    let mut served = app.accept().await;
    assert_eq!(served.take(1).await, b"x");
    client.reset();
    assert_eq!(served.expect_end().await, End::Reset);
}

#[tokio::test]
async fn an_application_that_is_not_there_is_told_as_by_any_other() {
    let app = Application::start("catalog").await;
    let address = app.address();
    let (_mesh, sidecar) = start(STRICT, address, Some("http")).await;
    drop(app);
    let answer = eventually("nobody listens", async || {
        let mut client = Connection::open(sidecar.outbound()).await;
        let answer = client.ask("GET / HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
        (answer.status != 200).then_some(answer)
    })
    .await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "connection_refused"), "{}", answer.text());
}
