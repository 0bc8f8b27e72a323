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
    for first in OTHER_PROTOCOLS {
        let mut client = Connection::open(pair.near.outbound()).await;
        trickle(&mut client, first).await;
        let mut app = backend.accept().await;
        // One that was opened on suspicion may have been meant for somebody else: never here, there is one client.
        assert_eq!(app.take(first.len()).await, *first);
        app.send(b"+PONG\r\n").await;
        assert_eq!(client.take(7).await, b"+PONG\r\n");
        count += 1.0;
        eventually("counted", async || (detected(&pair.far, "tcp").await == count).then_some(())).await;
        assert_eq!(detected(&pair.near, "tcp").await, count);
    }
}

/// What clients of other protocols say first.
const OTHER_PROTOCOLS: &[&[u8]] = &[
    b"*1\r\n$4\r\nPING\r\n",
    b"\0\0\0\x08\x04\xd2\x16\x2f",
    b"AMQP\0\0\x09\x01",
    b"HELLO client\r\n",
    b"STATS\r\n",
    b"set /user/1 0 0 5\r\nhello\r\n",
    b"READ 1\n",
    b"0033git-upload-pack /p\0host=git.test\0",
    b"83 <34>1 2026-11-28T14:00:00Z web app - - - \"GET / HTTP/1.1\" 200 and so on, to the end\n",
    b"<34>Nov 28 14:00:00 web app: a line\n",
    b"OPTIONS rtsp://cam.test/1 RTSP/1.0\r\nCSeq: 1\r\n\r\n",
    b"REGISTER sip:test SIP/2.0\r\nVia: SIP/2.0/TCP a\r\n\r\n",
    b"CONNECT\naccept-version:1.2\nhost:a\n\n\0",
    b"@RSYNCD: 31.0\n",
    b"{\"jsonrpc\":\"2.0\"}\n",
];

/// A client that says a word and waits for the answer: no byte rules HTTP out, and nothing more comes.
#[tokio::test]
async fn what_stops_short_is_let_go_and_what_has_begun_like_http_is_not() {
    let backend = Backend::start().await;
    // What is answered is not answered because a head took too long.
    let never = |limits: &mut Limits| limits.head_timeout = Duration::from_secs(3600);
    let pair = pair(backend.port(), MeshOptions::permissive(), never).await;
    let words: &[&[u8]] = &[
        b"ruok",
        b"JDWP-Handshake",
        b"0033git-upload-pack",
        b"83 <34>1 2026",
        b"deadbeef",
        b"0123456789ABCDEF",
        b"q",
        b"R",
        b"7",
        b"HELLO",
        b"READ 1",
        b"PING",
        b"ON-AND-ON-WITHOUT-AN-END-AND-WITHOUT-A-BLANK",
        b"\r\n",
        b" ",
    ];
    for door in [pair.near.outbound(), pair.far.inbound()] {
        for word in words {
            let mut client = Connection::open(door).await;
            client.send(word).await;
            let mut app = backend.accept().await;
            assert_eq!(app.take(word.len()).await, *word);
            app.send(b"imok").await;
            assert_eq!(client.take(4).await, b"imok", "{}", word.escape_ascii());
        }
    }
    for begun in
        [&b"G"[..], b"PO", b"GET", b"GET ", b"GET /x HT", b"\r\nGET /", b"PURGE /x", b"foo http://a", b"a b HTTP/1"]
    {
        for door in [pair.near.outbound(), pair.far.inbound()] {
            let mut client = Connection::open(door).await;
            client.send(begun).await;
            assert!(client.stays_silent(Duration::from_millis(500)).await);
            while let Some(mut connection) = backend.accepted().await {
                assert_eq!(connection.take_to_end().await.0, b"", "{}", begun.escape_ascii());
            }
            client.reset();
        }
    }
}

/// On a port that is declared HTTP nothing is let go: what is wrong with it, the parser says.
#[tokio::test]
async fn on_a_port_declared_http_a_word_is_an_unfinished_head() {
    let backend = Backend::start().await;
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, backend.port(), Some("http"));
    let quick = |limits: &mut Limits| limits.head_timeout = Duration::from_millis(700);
    let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(quick).start().await;
    for word in [&b"ruok"[..], b"q", b"JDWP-Handshake"] {
        let mut client = Connection::open(near.outbound()).await;
        client.send(word).await;
        assert_eq!(client.response(false).await.status, 408);
    }
}
