//! Promise: two services under STRICT talk HTTP/1.1 through their sidecars. Bodies stream both ways, the application
//! learns who calls, and both sides count the same exchange under the labels of the contract.

use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Sidecar, eventually};

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";
const CATALOG: &str = "spiffe://outrigger.local/ns/shop/sa/catalog";

struct Pair {
    catalog: Application,
    near: Sidecar,
    far: Sidecar,
    _mesh: Mesh,
}

async fn pair() -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let catalog = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, catalog.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(catalog.address()).start().await;
    let near = mesh.sidecar("cart-1").label("app", "cart").outbound("catalog:80").start().await;
    Pair { catalog, near, far, _mesh: mesh }
}

#[tokio::test]
async fn a_request_arrives_with_the_callers_identity() {
    let pair = pair().await;
    let mut client = Connection::open(pair.near.outbound()).await;
    let answer = client
        .ask(
            "GET /items?q=1 HTTP/1.1\r\nHost: catalog.shop\r\nX-Outrigger-Identity: admin\r\nX-Mixed-Case: Yes\r\n\r\n",
        )
        .await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "GET /items?q=1 0\n"));
    assert_eq!(answer.header("x-app"), Some("catalog"));
    let seen = pair.catalog.last();
    assert_eq!((seen.method.as_str(), seen.target.as_str()), ("GET", "/items?q=1"));
    assert_eq!(seen.header("host"), Some("catalog.shop"), "Host goes through unchanged");
    assert_eq!(seen.all("x-outrigger-identity"), [CART], "set by the mesh, never by the caller");
    assert_eq!(seen.all("x-forwarded-client-cert"), [format!("By={CATALOG};URI={CART}")]);
    assert_eq!(seen.header("x-mixed-case"), Some("Yes"));
    assert!(seen.headers.iter().any(|(name, _)| name == "X-Mixed-Case"), "{:?}", seen.headers);
    assert!(answer.headers.iter().any(|(name, _)| name == "X-App"), "{:?}", answer.headers);
}

#[tokio::test]
async fn bodies_stream_both_ways() {
    let pair = pair().await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("POST /echo HTTP/1.1\r\nHost: catalog\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    client.send("5\r\nfirst\r\n").await;
    let head = client.take_until(b"\r\n\r\n").await;
    assert!(head.starts_with(b"HTTP/1.1 200"), "the answer begins before the request ends");
    assert_eq!(client.take_until(b"first\r\n").await, b"5\r\nfirst\r\n");
    client.send("6\r\nsecond\r\n").await;
    assert_eq!(client.take_until(b"second\r\n").await, b"6\r\nsecond\r\n");
    client.send("0\r\n\r\n").await;
    assert_eq!(client.take_until(b"0\r\n\r\n").await, b"0\r\n\r\n");
    let seen = pair.catalog.last();
    assert_eq!((seen.body.as_slice(), seen.whole), (b"firstsecond".as_slice(), true));
}

#[tokio::test]
async fn both_sides_count_the_same_exchange() {
    let pair = pair().await;
    let mut client = Connection::open(pair.near.outbound()).await;
    let answer = client.ask("POST /bytes/300 HTTP/1.1\r\nHost: catalog\r\nContent-Length: 5\r\n\r\nhello").await;
    assert_eq!((answer.status, answer.body.len()), (200, 300));
    let common = [
        ("source_workload", "cart"),
        ("source_namespace", "shop"),
        ("source_principal", CART),
        ("destination_service", "catalog.shop"),
        ("destination_workload", "catalog"),
        ("destination_namespace", "shop"),
        ("protocol", "http1"),
        ("method", "POST"),
        ("code", "200"),
        ("grpc_status", ""),
        ("mtls", "true"),
        ("reason", ""),
    ];
    for (sidecar, direction) in [(&pair.near, "outbound"), (&pair.far, "inbound")] {
        let mut labels = common.to_vec();
        labels.push(("direction", direction));
        let samples = eventually(&format!("{direction} is counted"), async || {
            let samples = sidecar.metrics().await;
            (samples.sum("outrigger_http_requests_total", &[]) > 0.0).then_some(samples)
        })
        .await;
        assert_eq!(samples.sum("outrigger_http_requests_total", &labels), 1.0, "{direction}: {:#?}", samples.0);
        assert_eq!(samples.sum("outrigger_http_requests_total", &[]), 1.0, "{direction}: counted once");
        // Histograms and bytes are without the labels that cost most.
        let labels = [("direction", direction), ("destination_service", "catalog.shop"), ("mtls", "true")];
        assert_eq!(samples.sum("outrigger_http_request_duration_seconds_count", &labels), 1.0);
        assert_eq!(samples.sum("outrigger_http_request_bytes_total", &labels), 5.0, "{direction}");
        assert_eq!(samples.sum("outrigger_http_response_bytes_total", &labels), 300.0, "{direction}");
        assert_eq!(samples.sum("outrigger_http_requests_in_flight", &labels), 0.0);
        assert_eq!(samples.sum("outrigger_control_plane_connected", &[]), 1.0);
        let left = samples.sum("outrigger_certificate_expiry_seconds", &[]);
        assert!((86_000.0..=86_400.0).contains(&left), "{left}");
        assert_eq!(samples.sum("outrigger_build_info", &[]), 1.0);
    }
}

#[tokio::test]
async fn the_short_name_and_the_long_one_are_the_same_service() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let catalog = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, catalog.port(), None);
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(catalog.address()).start().await;
    for (name, instance) in
        [("catalog:80", "a-1"), ("catalog.shop:80", "b-1"), ("catalog.shop.svc.cluster.local:80", "c-1")]
    {
        let near = mesh.sidecar(instance).outbound(name).start().await;
        let answer = outrigger_tests::wire::get(near.outbound(), "/").await;
        assert_eq!(answer.status, 200, "{name}");
    }
}
