//! Promise: HTTP/1 passes through a pair of sidecars as it is: versions, framing, case, interim answers, trailers,
//! upgrades, pipelining; bodies are never held whole.

use std::time::Duration;

use outrigger_tests::wire::{End, Response};
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Sidecar, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// More than all buffers on the way hold.
const MUCH: usize = 32 << 20;

struct Pair {
    app: Application,
    near: Sidecar,
    _far: Sidecar,
    _mesh: Mesh,
}

async fn pair() -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    Pair { app, near, _far: far, _mesh: mesh }
}

impl Pair {
    async fn client(&self) -> Connection {
        Connection::open(self.near.outbound()).await
    }
}

fn request(method: &str, path: &str, fields: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: catalog\r\n{fields}\r\n")
}

#[tokio::test]
async fn http_1_0_is_answered_and_closed() {
    let pair = pair().await;
    let mut client = pair.client().await;
    let answer = client.ask("GET /chunked/5000 HTTP/1.0\r\n\r\n").await;
    assert_eq!((answer.status, answer.body.len()), (200, 5000), "no chunks to a client that knows none");
    assert_eq!(answer.header("transfer-encoding"), None);
    assert_eq!(client.expect_end().await, End::Closed);
    assert_eq!(pair.app.last().header("host"), Some("catalog.shop:80"), "a Host stands in");
    let mut kept = pair.client().await;
    for _ in 0..2 {
        let answer = kept.ask("GET /bytes/3 HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n").await;
        assert_eq!((answer.status, answer.body.len()), (200, 3));
    }
}

#[tokio::test]
async fn an_upload_goes_on_while_nobody_reads_the_answer() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = listener.local_addr().unwrap();
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let mut client = Connection::open(near.outbound()).await;
    client.send(request("POST", "/", &format!("Content-Length: {MUCH}\r\n"))).await;
    let (mut reading, mut writing) = listener.accept().await.unwrap().0.into_split();
    let answering = tokio::spawn(async move {
        writing.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {MUCH}\r\n\r\n").as_bytes()).await.unwrap();
        writing.write_all(&vec![b'd'; MUCH]).await.unwrap();
        writing
    });
    let taking = tokio::spawn(async move {
        let mut bytes = vec![0; 64 * 1024];
        let mut count = 0;
        while count < MUCH {
            count += reading.read(&mut bytes).await.unwrap();
        }
        reading
    });
    // All of it, before a byte of the answer is asked for.
    client.send(vec![b'u'; MUCH]).await;
    let answer = client.response(false).await;
    assert_eq!((answer.status, answer.body.len()), (200, MUCH));
    let (_reading, _writing) = (taking.await.unwrap(), answering.await.unwrap());
}

#[tokio::test]
async fn one_connection_carries_many_requests() {
    let pair = pair().await;
    let mut client = pair.client().await;
    for number in 0..50 {
        let answer = client.ask(request("GET", &format!("/{number}"), "")).await;
        assert_eq!(answer.text(), format!("GET /{number} 0\n"));
        assert_eq!(answer.header("connection"), None);
    }
    assert_eq!(pair.app.connections(), 1, "the pool keeps one connection to the application");
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let pair = pair().await;
    let mut client = pair.client().await;
    let all: String = (0..10).map(|number| request("GET", &format!("/{number}"), "")).collect();
    client.send(all + &request("POST", "/last", "Content-Length: 2\r\n") + "ok").await;
    for number in 0..10 {
        assert_eq!(client.response(false).await.text(), format!("GET /{number} 0\n"));
    }
    assert_eq!(client.response(false).await.text(), "POST /last 2\n");
}

#[tokio::test]
async fn a_request_may_come_byte_by_byte() {
    let pair = pair().await;
    let mut client = pair.client().await;
    for byte in request("POST", "/slow", "Content-Length: 3\r\n").into_bytes().into_iter().chain(*b"abc") {
        client.send([byte]).await;
    }
    assert_eq!(client.response(false).await.text(), "POST /slow 3\n");
}

#[tokio::test]
async fn names_keep_their_case_and_their_order() {
    let pair = pair().await;
    let mut client = pair.client().await;
    let fields = "X-UPPER: 1\r\nx-lower: 2\r\nX-MiXeD: 3\r\nX-Twice: a\r\nX-Between: -\r\nX-Twice: b\r\n";
    client.ask(request("GET", "/", fields)).await;
    let seen = pair.app.last();
    let ours =
        |(name, _): &&(String, String)| name.to_ascii_lowercase().starts_with("x-") && !name.contains("utrigger");
    let names: Vec<&str> = seen.headers.iter().filter(ours).map(|(name, _)| name.as_str()).collect();
    for name in ["X-UPPER", "x-lower", "X-MiXeD", "X-Twice", "X-Between"] {
        assert!(names.contains(&name), "{name} among {names:?}");
    }
    assert_eq!(seen.all("x-twice"), ["a", "b"]);
}

#[tokio::test]
async fn head_204_and_304_have_no_body() {
    let pair = pair().await;
    let mut client = pair.client().await;
    let head = client.ask(request("HEAD", "/bytes/1234", "")).await;
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, Some("1234"), 0));
    for status in [204, 304] {
        let answer = client.ask(request("GET", &format!("/status/{status}"), "")).await;
        assert_eq!((answer.status, answer.header("transfer-encoding"), answer.body.len()), (status, None, 0));
    }
    for status in [200, 404, 418, 500, 503] {
        let answer = client.ask(request("GET", &format!("/status/{status}"), "")).await;
        assert_eq!((answer.status, answer.header("x-app")), (status, Some("catalog")), "the application's own");
        assert_eq!(answer.header("proxy-status"), None, "not the mesh's");
    }
    assert_eq!(client.ask(request("GET", "/after", "")).await.text(), "GET /after 0\n", "still in step");
}

#[tokio::test]
async fn every_method_passes() {
    let pair = pair().await;
    let mut client = pair.client().await;
    for method in ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "M-SEARCH"] {
        let answer = client.ask(request(method, "/x", "Content-Length: 4\r\n") + "body").await;
        assert_eq!(answer.text(), format!("{method} /x 4\n"));
    }
    assert_eq!(client.ask(request("OPTIONS", "*", "")).await.text(), "OPTIONS * 0\n");
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let pair = pair().await;
    let mut client = pair.client().await;
    let answer = client.ask(request("GET", "/trailers", "TE: trailers\r\nConnection: TE\r\n")).await;
    assert_eq!(answer.body, b"hello");
    assert!(answer.trailers.iter().any(|(name, value)| name.eq_ignore_ascii_case("x-sum") && value == "5d41402a"));
    assert_eq!(pair.app.last().header("te"), Some("trailers"));
    let upload = request("POST", "/", "Transfer-Encoding: chunked\r\nTrailer: X-Check\r\n")
        + "3\r\nabc\r\n0\r\nX-Check: 1\r\nX-Outrigger-Identity: admin\r\n\r\n";
    assert_eq!(client.ask(upload).await.text(), "POST / 3\n");
    let trailers = pair.app.last().trailers;
    assert_eq!(trailers.len(), 1, "{trailers:?}");
    assert!(trailers[0].0.eq_ignore_ascii_case("x-check"), "{trailers:?}");
}

#[tokio::test]
async fn interim_answers_pass_before_the_final_one() {
    let pair = pair().await;
    let mut client = pair.client().await;
    client.send(request("GET", "/hints", "")).await;
    let interim = client.take_until(b"\r\n\r\n").await;
    let text = String::from_utf8_lossy(&interim).to_lowercase();
    assert!(text.starts_with("http/1.1 103 ") && text.contains("link: </a.css>"), "{text}");
    pair.app.release();
    let answer = client.response(false).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "done"));
}

#[tokio::test]
async fn expect_100_continue_is_answered_before_the_body() {
    let pair = pair().await;
    let mut client = pair.client().await;
    client.send(request("POST", "/", "Content-Length: 4\r\nExpect: 100-continue\r\n")).await;
    assert!(client.take_until(b"\r\n\r\n").await.starts_with(b"HTTP/1.1 100 "));
    let answer = client.ask("body").await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "POST / 4\n"));
}

#[tokio::test]
async fn an_upgrade_becomes_raw_bytes() {
    let pair = pair().await;
    let mut client = pair.client().await;
    let fields = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    client.send(request("GET", "/upgrade", fields) + "early").await;
    let answer: Response = client.response(false).await;
    assert_eq!((answer.status, answer.header("upgrade")), (101, Some("websocket")));
    assert_eq!(client.take(5).await, b"early", "what was sent with the request is not lost");
    client.send([0x81, 0x05, b'h', b'e', b'l', b'l', b'o', 0, 0xff]).await;
    assert_eq!(client.take(9).await, [0x81, 0x05, b'h', b'e', b'l', b'l', b'o', 0, 0xff]);
    client.finish().await;
    assert_eq!(client.expect_end().await, End::Closed);
    let labels = [("direction", "outbound"), ("code", "101"), ("reason", "")];
    eventually("the upgrade is counted at its end", async || {
        (pair.near.metrics().await.sum("outrigger_http_requests_total", &labels) == 1.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_upgrade_that_is_refused_stays_http() {
    let pair = pair().await;
    let mut client = pair.client().await;
    let fields = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n";
    let answer = client.ask(request("GET", "/upgrade", fields)).await;
    assert_eq!(answer.status, 200, "h2c never passes");
    let seen = pair.app.last();
    assert_eq!((seen.header("upgrade"), seen.header("http2-settings")), (None, None));
    let refused = client.ask(request("GET", "/status/426", "Connection: Upgrade\r\nUpgrade: websocket\r\n")).await;
    assert_eq!(refused.status, 426);
    assert_eq!(client.ask(request("GET", "/after", "")).await.text(), "GET /after 0\n");
}

#[tokio::test]
async fn hop_by_hop_fields_stay_on_their_hop() {
    let pair = pair().await;
    let mut client = pair.client().await;
    let fields = "Connection: X-Hop, Host, Content-Length, keep-alive\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n\
                  Proxy-Connection: keep-alive\r\nContent-Length: 2\r\n";
    assert_eq!(client.ask(request("POST", "/", fields) + "ok").await.text(), "POST / 2\n");
    let seen = pair.app.last();
    for name in ["x-hop", "keep-alive", "proxy-connection", "connection"] {
        assert_eq!(seen.header(name), None, "{name}");
    }
    assert_eq!((seen.header("host"), seen.header("content-length")), (Some("catalog"), Some("2")));
}

#[tokio::test]
async fn large_bodies_pass_whole_both_ways() {
    let pair = pair().await;
    let mut client = pair.client().await;
    let answer = client.ask(request("GET", "/bytes/20000000", "")).await;
    assert_eq!((answer.is_whole(), answer.body.len()), (true, 20_000_000));
    assert!(answer.body.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at % 65536 % 251));
    let body = vec![b'y'; 5_000_000];
    client.send(request("POST", "/", "Content-Length: 5000000\r\n")).await;
    client.send(&body).await;
    assert_eq!(client.response(false).await.text(), "POST / 5000000\n");
}

/// The application writes 200 MiB as fast as it is taken; a reader that takes nothing stops it after what sockets hold.
#[tokio::test]
async fn a_slow_reader_holds_the_application_back() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let backend = outrigger_tests::application::Backend::start().await;
    mesh.service("catalog.shop", 80, backend.port(), None);
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(backend.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let mut client = Connection::open(near.outbound()).await;
    client.send(request("GET", "/", "")).await;
    let mut app = backend.accept().await;
    app.take_until(b"\r\n\r\n").await;
    app.send("HTTP/1.1 200 OK\r\nContent-Length: 209715200\r\n\r\n").await;
    let block = vec![b'z'; 64 * 1024];
    let mut sent = 0_usize;
    while tokio::time::timeout(Duration::from_millis(500), app.send(&block)).await.is_ok() {
        sent += block.len();
        assert!(sent < 64 << 20, "{sent} bytes were taken from the application, none by the client");
    }
    drop(client);
    // The application's write fails as soon as the client is gone.
    eventually("the cancelled download reaches the application", async || app.try_send(b"z").await.err()).await;
}

#[tokio::test]
async fn a_client_that_leaves_is_noticed_by_the_application() {
    let pair = pair().await;
    let mut client = pair.client().await;
    client.send(request("GET", "/hold", "")).await;
    eventually("the request arrives", async || (pair.app.count() == 1).then_some(())).await;
    client.reset();
    eventually("the request is cancelled", async || pair.app.last().cancelled.then_some(())).await;
    let labels = [("direction", "outbound"), ("reason", "client_closed"), ("code", "")];
    eventually("counted as the client's doing", async || {
        (pair.near.metrics().await.sum("outrigger_http_requests_total", &labels) == 1.0).then_some(())
    })
    .await;
}
