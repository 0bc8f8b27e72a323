//! Promise: with nothing but `http_proxy=` a client reaches every service: absolute-form requests and CONNECT, by name
//! and by address; what is not registered goes where `outbound.mode` says.

use outrigger_tests::application::Backend;
use outrigger_tests::grpc::Http2;
use outrigger_tests::wire::{Connection, End};
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually};

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";

struct Pair {
    app: Application,
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair() -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").http_proxy().start().await;
    Pair { app, near, far, mesh }
}

#[tokio::test]
async fn absolute_form_reaches_a_service_by_each_of_its_names() {
    let pair = pair().await;
    let mut client = Connection::open(pair.near.http_proxy()).await;
    for name in ["catalog", "catalog.shop", "catalog.shop:80", "catalog.shop.svc.cluster.local", "CATALOG.shop"] {
        let request = format!(
            "GET http://{name}/x?y=1 HTTP/1.1\r\nHost: other.test\r\nProxy-Authorization: Basic eDp5\r\n\
             Proxy-Connection: keep-alive\r\n\r\n"
        );
        let answer = client.ask(request).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "GET /x?y=1 0\n"), "{name}");
        let seen = pair.app.last();
        assert_eq!(seen.header("host"), Some(name), "the target's authority replaces Host");
        assert_eq!((seen.header("proxy-authorization"), seen.header("proxy-connection")), (None, None));
        assert_eq!(seen.all("x-outrigger-identity"), [CART]);
    }
}

async fn tunnel(pair: &Pair, authority: &str) -> Connection {
    let mut client = Connection::open(pair.near.http_proxy()).await;
    client.send(format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n")).await;
    let head = client.take_until(b"\r\n\r\n").await;
    let head = String::from_utf8_lossy(&head).to_lowercase();
    assert!(head.starts_with("http/1.1 200 "), "{head}");
    assert!(!head.contains("content-length") && !head.contains("transfer-encoding"), "{head}");
    client
}

#[tokio::test]
async fn a_tunnel_carries_http_and_grpc_with_mutual_tls() {
    let pair = pair().await;
    let mut http1 = tunnel(&pair, "catalog.shop:80").await;
    for _ in 0..3 {
        assert_eq!(http1.ask("GET /in HTTP/1.1\r\nHost: catalog\r\n\r\n").await.text(), "GET /in 0\n");
    }
    assert_eq!(pair.app.last().all("x-outrigger-identity"), [CART]);
    let stream = tunnel(&pair, "catalog:80").await.into_tcp();
    let http2 = Http2::over(stream).await;
    assert_eq!(http2.unary("Unary", b"hi").await.unwrap().messages(), ["hi"]);
    let labels =
        [("direction", "outbound"), ("protocol", "grpc"), ("destination_service", "catalog.shop"), ("mtls", "true")];
    eventually("counted as gRPC", async || {
        (pair.near.metrics().await.sum("outrigger_http_requests_total", &labels) == 1.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_nobody_registered_passes_in_plaintext_unless_the_mesh_says_otherwise() {
    let pair = pair().await;
    let outside = Application::start("outside").await;
    let address = outside.address();
    let request = format!("GET http://{address}/ HTTP/1.1\r\nHost: {address}\r\n\r\n");
    let mut client = Connection::open(pair.near.http_proxy()).await;
    assert_eq!(client.ask(&request).await.header("x-app"), Some("outside"));
    assert_eq!(outside.last().all("x-outrigger-identity"), Vec::<&str>::new());
    let local = format!("GET http://localhost:{}/ HTTP/1.1\r\nHost: x\r\n\r\n", outside.port());
    assert_eq!(client.ask(&local).await.header("x-app"), Some("outside"), "a name that only DNS knows");

    pair.mesh.write(
        "mesh-config.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: \
         outrigger-system}\nspec: {outbound: {mode: RegistryOnly}}\n",
    );
    eventually("RegistryOnly holds", async || {
        let answer = outrigger_tests::wire::ask(pair.near.http_proxy(), &request).await;
        (answer.status == 502 && answer.reason() == "not_registered").then_some(())
    })
    .await;
    assert_eq!(client.ask("GET http://catalog/ HTTP/1.1\r\nHost: x\r\n\r\n").await.status, 200);
}

#[tokio::test]
async fn nobody_reaches_the_sidecars_own_ports() {
    let pair = pair().await;
    for name in ["admin", "metrics", "health", "http-proxy"] {
        let address = pair.near.address(name);
        let request = format!("GET http://{address}/config HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let answer = outrigger_tests::wire::ask(pair.near.http_proxy(), request).await;
        assert_eq!((answer.status, answer.reason().as_str()), (502, "own_port"), "{name}");
    }
    let admin = pair.near.address("admin");
    let mut client = Connection::open(pair.near.http_proxy()).await;
    client.send(format!("CONNECT {admin} HTTP/1.1\r\nHost: {admin}\r\n\r\n")).await;
    client.take_until(b"\r\n\r\n").await;
    let answer = client.ask("GET /config HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!((answer.status, answer.reason().as_str()), (502, "own_port"));
}

#[tokio::test]
async fn wrong_requests_are_told_what_is_wrong() {
    let pair = pair().await;
    let cases = [
        ("GET / HTTP/1.1\r\nHost: catalog\r\n\r\n", 400, "bad_request"),
        ("GET https://catalog/ HTTP/1.1\r\nHost: catalog\r\n\r\n", 400, "bad_request"),
        ("CONNECT catalog HTTP/1.1\r\nHost: catalog\r\n\r\n", 400, "bad_request"),
        ("GET http://nosuch.invalid/ HTTP/1.1\r\nHost: x\r\n\r\n", 502, "unknown_destination"),
    ];
    for (request, status, reason) in cases {
        let answer = outrigger_tests::wire::ask(pair.near.http_proxy(), request).await;
        assert_eq!((answer.status, answer.reason().as_str()), (status, reason), "{request}");
        assert!(answer.header("proxy-status").unwrap().starts_with("cart-1; error="));
    }
    assert_eq!(pair.app.count(), 0);
    drop(pair.far);
}

#[tokio::test]
async fn a_tunnel_to_a_tcp_service_is_opaque() {
    let pair = pair().await;
    let backend = Backend::start().await;
    pair.mesh.service("queue.shop", 5672, backend.port(), Some("tcp"));
    let _queue = pair.mesh.sidecar("queue-1").label("app", "queue").inbound(backend.address()).start().await;
    let mut client = tunnel(&pair, "queue:5672").await;
    let mut app = backend.accept().await;
    app.send("server first").await;
    assert_eq!(client.take(12).await, b"server first");
    client.send("GET / HTTP/1.1\r\n\r\n").await;
    assert_eq!(app.take(18).await, b"GET / HTTP/1.1\r\n\r\n", "declared tcp is never parsed");
    client.finish().await;
    assert_eq!(app.expect_end().await, End::Closed);
    app.finish().await;
    assert_eq!(client.expect_end().await, End::Closed);
}
