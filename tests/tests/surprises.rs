//! Promise: nothing of what follows surprises anybody. Streams that move are never taken for dead, one that stands
//! still harms itself alone, a hello that comes late is a hello all the same, and the words of a body are no answers.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use outrigger_tests::application::Backend;
use outrigger_tests::grpc::Http2;
use outrigger_tests::peer::Peer;
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually};

struct Pair {
    near: Sidecar,
    far: Sidecar,
    _mesh: Mesh,
}

const LONG: Duration = Duration::from_secs(300);

/// Streams may stand still for `near` and `far`; the watchdogs look every 50 ms.
async fn pair(app: SocketAddr, protocol: Option<&str>, near: Duration, far: Duration) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, app.port(), protocol);
    let limits = |idle: Duration| {
        move |limits: &mut outrigger_sidecar::config::Limits| {
            limits.stream_idle = idle;
            limits.head_timeout = Duration::from_millis(200);
        }
    };
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).limits(limits(far)).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").http_proxy().limits(limits(near)).start().await;
    Pair { near, far, _mesh: mesh }
}

const IDLE: Duration = Duration::from_millis(500);

#[tokio::test]
async fn an_upload_that_moves_may_take_longer_than_a_stream_may_stand_still() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), Some("http"), IDLE, IDLE).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("POST /x HTTP/1.1\r\nHost: catalog\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        client.try_send("1\r\na\r\n").await.expect("the connection stands");
    }
    let answer = client.ask("0\r\n\r\n").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(app.last().body.len(), 20);
}

#[tokio::test]
async fn a_client_that_waits_for_an_answer_is_told_that_none_comes() {
    let backend = Backend::start().await;
    let pair = pair(backend.address(), Some("http"), IDLE, LONG).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("GET / HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    let _app = backend.accept().await;
    let answer = client.response(false).await;
    assert_eq!((answer.status, answer.reason().as_str()), (504, "stream_idle_timeout"));
}

#[tokio::test]
async fn a_stream_that_nobody_reads_ends_alone() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), Some("http2"), LONG, IDLE).await;
    let lazy = Http2::open(pair.near.outbound()).await;
    let request = http::Request::get("http://catalog/bytes/10000000").body(()).unwrap();
    let _unread = lazy.begin(request, true).await.unwrap();
    let busy = Http2::open(pair.near.outbound()).await;
    let request = http::Request::post("http://catalog/echo").body(()).unwrap();
    let mut stream = busy.begin(request, false).await.unwrap();
    for _ in 0..30 {
        stream.write(Bytes::from_static(b"x"), false).await.expect("the other stream goes on");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stream.write(Bytes::new(), true).await.expect("the other stream goes on");
    let whole = stream.answer().await.unwrap().whole().await.expect("the other stream goes on");
    assert_eq!(whole.body.len(), 30);
    // The one that nobody read is gone.
    eventually("the application is told", async || app.requests().iter().any(|seen| seen.cancelled).then_some(()))
        .await;
}

#[tokio::test]
async fn a_hello_that_comes_late_on_a_permissive_port_is_a_hello() {
    for protocol in [Some("http"), None, Some("tcp")] {
        let app = Application::start("catalog").await;
        let mesh = Mesh::start(MeshOptions::permissive()).await;
        mesh.service("catalog.shop", 80, app.port(), protocol);
        let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
        let peer = Peer::issue(&mesh, "shop", "cart", "cart-1").await;
        let alpn = if protocol == Some("tcp") { "outrigger/tcp" } else { "outrigger/h1" };
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(peer.client_config(&[alpn])));
        let stream = tokio::net::TcpStream::connect(far.inbound()).await.unwrap();
        // What is tested is the waiting itself: longer than a silent client is waited for.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let name = rustls::pki_types::ServerName::try_from("80.catalog.shop.outrigger").unwrap();
        let tls = connector.connect(name, stream).await.unwrap_or_else(|error| panic!("{protocol:?}: {error}"));
        let mut client = Connection::from(tokio_rustls::TlsStream::from(tls));
        let answer = client.ask("GET /late HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
        assert_eq!(answer.status, 200, "{protocol:?}");
        let identity = app.last().header("x-outrigger-identity").map(str::to_owned);
        assert_eq!(identity.is_some(), protocol != Some("tcp"), "{protocol:?}");
    }
}

#[tokio::test]
async fn a_body_that_looks_like_a_refusal_is_a_body() {
    let backend = Backend::start().await;
    let pair = pair(backend.address(), Some("http"), LONG, LONG).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("GET / HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    let mut app = backend.accept().await;
    app.take_until(b"\r\n\r\n").await;
    app.send("HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n").await;
    client.take_until(b"\r\n\r\n").await;
    app.send("HTTP/1.1 404 Not Found\r\n").await;
    assert_eq!(wire::text(&client.take(24).await), "HTTP/1.1 404 Not Found\r\n");
    // The connection lives on, and a real refusal is still the sidecar's own.
    let answer = client.ask("G@T / HTTP/1.1\r\n\r\n").await;
    assert_eq!((answer.status, answer.reason().as_str()), (400, "bad_request"));
}

#[tokio::test]
async fn the_sidecar_itself_is_reached_by_no_spelling_of_its_address() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), Some("http"), LONG, LONG).await;
    let port = pair.near.address("admin").port();
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "[::ffff:0.0.0.0]"] {
        let mut client = Connection::open(pair.near.http_proxy()).await;
        let request = format!("GET http://{host}:{port}/config HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let answer = client.ask(request).await;
        assert_eq!((answer.status, answer.reason().as_str()), (502, "own_port"), "{host}: {}", answer.text());
    }
}

#[tokio::test]
async fn a_client_that_breaks_off_its_upload_is_not_held_against_the_endpoint() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), Some("http"), LONG, LONG).await;
    for _ in 0..6 {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send("POST /x HTTP/1.1\r\nHost: catalog\r\nContent-Length: 100\r\n\r\nabc").await;
        let count = app.count();
        eventually("it began", async || (app.count() > 0 || count > 0).then_some(())).await;
        client.reset();
    }
    eventually("all are counted", async || {
        let samples = pair.near.metrics().await;
        (samples.sum("outrigger_http_requests_total", &[]) == 6.0).then_some(())
    })
    .await;
    let reasons = pair.near.metrics().await.values("outrigger_http_requests_total", "reason");
    assert_eq!(reasons.into_iter().collect::<Vec<_>>(), ["client_closed"]);
    let reasons = pair.far.metrics().await.values("outrigger_http_requests_total", "reason");
    assert!(!reasons.contains("upstream_closed") && !reasons.contains("upstream_reset"), "{reasons:?}");
}

#[tokio::test]
async fn a_client_of_http_1_0_gets_no_interim_answer() {
    let backend = Backend::start().await;
    let pair = pair(backend.address(), Some("http"), LONG, LONG).await;
    for (version, expected) in [("1.1", "HTTP/1.1 103"), ("1.0", "HTTP/1.0 200")] {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send(format!("GET / HTTP/{version}\r\nHost: catalog\r\n\r\n")).await;
        let mut app = backend.accept().await;
        app.take_until(b"\r\n\r\n").await;
        app.send("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n").await;
        app.send("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").await;
        assert_eq!(wire::text(&client.take(12).await), expected);
    }
}

#[tokio::test]
async fn a_connection_that_was_opened_on_suspicion_is_no_connection_of_the_client() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None, LONG, LONG).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let answer = client.ask("GET /x HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    assert_eq!(answer.status, 200);
    assert_eq!(pair.near.metrics().await.sum("outrigger_tcp_connections_opened_total", &[]), 0.0);
}
