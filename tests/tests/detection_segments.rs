//! Promise: how a client's first bytes are cut into segments, and how long they take, changes nothing of what they are
//! found to be. What has begun like HTTP and does not go on is told so, and never passed on unparsed.

use std::sync::Arc;
use std::time::Duration;

use outrigger_sidecar::config::Limits;
use outrigger_tests::application::Backend;
use outrigger_tests::peer::{Authority, Peer};
use outrigger_tests::wire::Connection;
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const GET: &[u8] = b"GET /cut HTTP/1.1\r\nHost: catalog\r\nX-Long: 0123456789\r\n\r\n";
/// Preface and an empty SETTINGS frame (RFC 9113 section 3.4).
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// Less than this between two bytes would let the kernel put them together.
const PAUSE: Duration = Duration::from_millis(2);

struct Pair {
    near: Sidecar,
    far: Sidecar,
    _mesh: Mesh,
}

async fn pair(port: u16, options: MeshOptions, limits: impl Fn(&mut Limits)) -> Pair {
    let mesh = Mesh::start(options).await;
    mesh.service("catalog.shop", 80, port, None);
    let address = ([127, 0, 0, 1], port).into();
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(address).limits(&limits).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(&limits).start().await;
    Pair { near, far, _mesh: mesh }
}

async fn trickle(connection: &mut Connection, bytes: &[u8]) {
    for byte in bytes {
        connection.send([*byte]).await;
        tokio::time::sleep(PAUSE).await;
    }
}

async fn detected(sidecar: &Sidecar, outcome: &str) -> f64 {
    sidecar.metrics().await.sum("outrigger_detect_total", &[("outcome", outcome)])
}

#[tokio::test]
async fn http_byte_by_byte_is_http_in_both_directions() {
    let app = Application::start("catalog").await;
    let pair = pair(app.port(), MeshOptions::permissive(), |_| {}).await;
    for door in [pair.near.outbound(), pair.far.inbound()] {
        let mut client = Connection::open(door).await;
        trickle(&mut client, GET).await;
        let answer = client.response(false).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "GET /cut 0\n"));

        let mut client = Connection::open(door).await;
        trickle(&mut client, HTTP2).await;
        // The server's own preface is a SETTINGS frame; an application behind an opaque tunnel would say the same, hence
        // the count below.
        assert_eq!(client.take(9).await[3], 4);
    }
    assert_eq!((detected(&pair.near, "http1").await, detected(&pair.near, "http2").await), (1.0, 1.0));
    // From the near sidecar, which said so in its ALPN id, and by what it found itself.
    assert_eq!((detected(&pair.far, "http1").await, detected(&pair.far, "http2").await), (2.0, 1.0));
}

#[tokio::test]
async fn a_sidecars_hello_in_pieces_is_a_hello() {
    let app = Application::start("catalog").await;
    let pair = pair(app.port(), MeshOptions::permissive(), |_| {}).await;
    let peer = Peer::issue(&pair._mesh, "shop", "web", "web-1").await;
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (mut reader, mut writer) = tokio::net::TcpStream::connect(pair.far.inbound()).await.unwrap().into_split();
    let (mut hello, mut answer) = tokio::io::split(theirs);
    tokio::spawn(async move {
        let mut chunk = [0; 4096];
        while let Ok(count) = hello.read(&mut chunk).await {
            if count == 0 {
                return;
            }
            for piece in chunk[..count].chunks(97) {
                writer.write_all(piece).await.unwrap();
                tokio::time::sleep(PAUSE).await;
            }
        }
    });
    tokio::spawn(async move { tokio::io::copy(&mut reader, &mut answer).await });
    let connector = tokio_rustls::TlsConnector::from(Arc::new(peer.client_config(&["outrigger/h1"])));
    let name = rustls::pki_types::ServerName::try_from("80.catalog.shop.outrigger").unwrap();
    let mut tls = connector.connect(name, ours).await.unwrap();
    tls.write_all(GET).await.unwrap();
    let mut status = [0; 12];
    tls.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");
    assert_eq!(app.last().all("x-outrigger-identity"), ["spiffe://outrigger.local/ns/shop/sa/web"]);
}

/// The application's own TLS, its ClientHello cut in the middle of the record's header, passes through both sidecars.
#[tokio::test]
async fn the_applications_own_tls_in_pieces_is_tls() {
    let backend = Backend::start().await;
    let pair = pair(backend.port(), MeshOptions::default(), |_| {}).await;
    let authority = Authority::new();
    let server = authority.leaf(&["spiffe://else.where/x"], |_| {});
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (mut reader, mut writer) = tokio::net::TcpStream::connect(pair.near.outbound()).await.unwrap().into_split();
    let (mut hello, mut answer) = tokio::io::split(theirs);
    tokio::spawn(async move {
        let mut first = [0; 1];
        hello.read_exact(&mut first).await.unwrap();
        writer.write_all(&first).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        tokio::io::copy(&mut hello, &mut writer).await
    });
    tokio::spawn(async move { tokio::io::copy(&mut reader, &mut answer).await });
    let serving = tokio::spawn(async move {
        let mut connection = server.accept(backend.accept().await, &["http/1.1"]).await.unwrap();
        connection.send(b"inside").await;
        connection
    });
    let client = Peer::without_certificate();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client.client_config(&["http/1.1"])));
    let name = rustls::pki_types::ServerName::try_from("catalog.test").unwrap();
    let mut tls = connector.connect(name, ours).await.unwrap();
    let mut word = [0; 6];
    tls.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"inside");
    drop(serving.await.unwrap());
    assert_eq!((detected(&pair.near, "tls").await, detected(&pair.far, "tls").await), (1.0, 1.0));
}

#[tokio::test]
async fn an_unfinished_head_is_408_and_never_opaque() {
    let backend = Backend::start().await;
    let quick = |limits: &mut Limits| limits.head_timeout = Duration::from_millis(400);
    let pair = pair(backend.port(), MeshOptions::permissive(), quick).await;
    for door in [pair.near.outbound(), pair.far.inbound()] {
        for beginning in [&b"G"[..], b"GET / HT", b"PRI * HTTP/2.0\r\n\r\nS", b"GET / HTTP/1.1\r\nHost: x\r\n"] {
            let mut client = Connection::open(door).await;
            client.send(beginning).await;
            let answer = client.response(false).await;
            assert_eq!((answer.status, answer.reason().as_str()), (408, "request_head_timeout"), "{beginning:?}");
            client.expect_end().await;
        }
    }
    // Somebody may have been connected to on suspicion; nobody was told anything.
    while let Some(mut connection) = backend.accepted().await {
        assert_eq!(connection.take_to_end().await.0, b"");
    }
    let outcomes = ["http1", "http2", "tls", "tcp", "server_first"];
    for outcome in outcomes {
        // The fourth beginning has a whole first line.
        let expected = if outcome == "http1" { 1.0 } else { 0.0 };
        assert_eq!(detected(&pair.near, outcome).await, expected, "{outcome}");
    }
}

#[tokio::test]
async fn what_is_not_http_is_opaque_however_it_is_cut() {
    let backend = Backend::start().await;
    let pair = pair(backend.port(), MeshOptions::default(), |_| {}).await;
    let mut count = 0.0;
    for first in [&b"*1\r\n$4\r\nPING\r\n"[..], b"\0\0\0\x08\x04\xd2\x16\x2f", b"AMQP\0\0\x09\x01", b"HELO client\r\n"]
    {
        let mut client = Connection::open(pair.near.outbound()).await;
        trickle(&mut client, first).await;
        let mut app = backend.accept().await;
        // One that was opened on suspicion may have been meant for somebody else: never here, there is one client.
        assert_eq!(app.take(first.len()).await, first);
        app.send(b"+PONG\r\n").await;
        assert_eq!(client.take(7).await, b"+PONG\r\n");
        count += 1.0;
        eventually("counted", async || (detected(&pair.far, "tcp").await == count).then_some(())).await;
        assert_eq!(detected(&pair.near, "tcp").await, count);
    }
}
