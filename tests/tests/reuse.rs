//! Promise: connections are reused, and reuse never loses or repeats a request. What the upstream does wrong becomes
//! one clear answer: nothing is replayed that it may have processed, and a truncation never looks whole.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use outrigger_tests::application::Backend;
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, Mesh, MeshOptions, PATIENCE, Sidecar, eventually, under_test};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

struct Pair {
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair(app: SocketAddr) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    Pair { near, far, mesh }
}

/// Writes the head and the body of each answer apart and leaves it to its kernel when they go (Nagle), as Python's
/// http.server does: on a connection that is used again the body waits for the ACK of the head.
async fn writing_apart(head: &'static [&'static str]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.set_nodelay(false).unwrap();
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while matches!(stream.read_buf(&mut buffer).await, Ok(count) if count > 0) {
                    if buffer.ends_with(b"\r\n\r\n") {
                        buffer.clear();
                        for part in head.iter().chain(&["ok"]) {
                            if stream.write_all(part.as_bytes()).await.is_err() {
                                return;
                            }
                        }
                    }
                }
            });
        }
    });
    address
}

/// The fastest of many, so that a slow machine alone cannot fail it: with a delayed ACK each one takes 40 ms and more.
#[tokio::test]
async fn nobody_waits_for_a_delayed_ack_of_a_connection_that_is_used_again() {
    for head in [
        &["HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"][..],
        &["HTTP/1.1 200 OK\r\n", "Server: in pieces\r\n", "Content-Length: 2\r\n", "\r\n"],
    ] {
        let app = writing_apart(head).await;
        let mesh = Mesh::start(MeshOptions::default()).await;
        mesh.service("catalog.shop", 80, app.port(), Some("http"));
        let mut far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).spawn(under_test!()).await;
        far.ready().await;
        let mut near = mesh.sidecar("cart-1").outbound("catalog:80").spawn(under_test!()).await;
        near.ready().await;
        let mut client = Connection::open(near.address("outbound:catalog.shop:80").await).await;
        let mut fastest = PATIENCE;
        for round in 0..60 {
            let begun = Instant::now();
            assert_eq!(client.ask(GET).await.text(), "ok");
            // A fresh connection is acknowledged at once by itself.
            if round >= 20 {
                fastest = fastest.min(begun.elapsed());
            }
        }
        assert!(fastest < Duration::from_millis(30), "{fastest:?}, {head:?}");
    }
}

const GET: &str = "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nHost: catalog\r\nContent-Length: 4\r\n\r\nbody";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A server that closes each connection at the moment when its idle time is over; counts what it answered.
async fn closing_after(idle: Duration, answered: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answered = answered.clone();
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                // As servers do: the keep-alive time begins with the first answer.
                let mut patience = PATIENCE;
                loop {
                    let read = tokio::time::timeout(patience, stream.read_buf(&mut buffer)).await;
                    patience = idle;
                    if !matches!(read, Ok(Ok(count)) if count > 0) {
                        return;
                    }
                    if buffer.ends_with(b"\r\n\r\n") {
                        buffer.clear();
                        answered.fetch_add(1, Ordering::Relaxed);
                        if stream.write_all(OK.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn six_hundred_gets_at_the_closing_instant_and_none_fails() {
    let idle = Duration::from_millis(20);
    let answered = Arc::new(AtomicUsize::new(0));
    let pair = pair(closing_after(idle, answered.clone()).await).await;
    let clients = (0..30).map(|_| {
        let address = pair.near.outbound();
        tokio::spawn(async move {
            let mut client = Connection::open(address).await;
            let mut failed = Vec::new();
            for _ in 0..20 {
                let answer = client.ask(GET).await;
                if answer.status != 200 || answer.body != b"ok" {
                    failed.push((answer.status, answer.text(), answer.headers));
                }
                // The race itself: the next request leaves when the server's idle time ends.
                tokio::time::sleep(idle - Duration::from_micros(300)).await;
            }
            failed
        })
    });
    for client in clients.collect::<Vec<_>>() {
        assert_eq!(client.await.unwrap(), Vec::new());
    }
    assert!(answered.load(Ordering::Relaxed) >= 600);
}

#[tokio::test]
async fn a_get_that_died_on_a_reused_connection_is_asked_once_more() {
    let backend = Backend::start().await;
    let pair = pair(backend.address()).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send(GET).await;
    let mut app = backend.accept().await;
    app.take_until(b"\r\n\r\n").await;
    app.send(OK).await;
    client.response(false).await;
    client.send(GET).await;
    app.take_until(b"\r\n\r\n").await;
    drop(app);
    let mut fresh = backend.accept().await;
    fresh.take_until(b"\r\n\r\n").await;
    fresh.send(OK).await;
    assert_eq!(client.response(false).await.status, 200);
    // A fresh connection that dies is an answer: nobody asks for ever.
    client.send(GET).await;
    fresh.take_until(b"\r\n\r\n").await;
    drop(fresh);
    let mut last = backend.accept().await;
    last.take_until(b"\r\n\r\n").await;
    drop(last);
    let answer = client.response(false).await;
    assert_eq!((answer.status, answer.reason().as_str()), (502, "upstream_closed"));
    assert!(backend.accepted().await.is_none());
}

#[tokio::test]
async fn a_post_is_never_sent_twice() {
    let backend = Backend::start().await;
    let pair = pair(backend.address()).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send(POST).await;
    let mut app = backend.accept().await;
    app.take_until(b"body").await;
    app.send(OK).await;
    client.response(false).await;
    client.send(POST).await;
    app.take_until(b"body").await;
    let begun = Instant::now();
    drop(app);
    let answer = client.response(false).await;
    assert_eq!((answer.status, answer.reason().as_str()), (502, "upstream_closed"));
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    // The next request of the same client is served by a connection of its own.
    client.send(POST).await;
    let mut fresh = backend.accept().await;
    fresh.take_until(b"body").await;
    assert!(fresh.ahead().is_empty(), "one POST");
    fresh.send(OK).await;
    assert_eq!(client.response(false).await.status, 200);
    assert!(backend.accepted().await.is_none());
}

#[tokio::test]
async fn an_upstream_that_closes_before_answering_is_502_at_once() {
    let backend = Backend::start().await;
    let pair = pair(backend.address()).await;
    for (request, end) in [(GET, "close"), (POST, "close"), (GET, "reset"), (POST, "reset")] {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send(request).await;
        let mut app = backend.accept().await;
        app.take_until(b"\r\n\r\n").await;
        let begun = Instant::now();
        if end == "reset" {
            app.reset()
        } else {
            drop(app)
        }
        let answer = client.response(false).await;
        let reason = answer.reason();
        assert_eq!(answer.status, 502, "{request} {end}");
        assert!(["upstream_closed", "upstream_reset"].contains(&reason.as_str()), "{reason}");
        assert!(answer.header("proxy-status").unwrap().starts_with("catalog-1; error=connection_terminated"));
        assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn nonsense_from_the_upstream_is_502() {
    let backend = Backend::start().await;
    let pair = pair(backend.address()).await;
    for nonsense in [
        "SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "HTTP/1.1 abc\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ] {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send(GET).await;
        let mut app = backend.accept().await;
        app.take_until(b"\r\n\r\n").await;
        app.send(nonsense).await;
        let answer = client.response(false).await;
        assert_eq!((answer.status, answer.reason().as_str()), (502, "upstream_protocol"), "{nonsense}");
    }
}

#[tokio::test]
async fn a_truncated_body_is_seen_as_truncated() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address()).await;
    for path in ["/truncate", "/chunked-truncate"] {
        let mut client = Connection::open(pair.near.outbound()).await;
        let answer = client.ask(format!("GET {path} HTTP/1.1\r\nHost: catalog\r\n\r\n")).await;
        assert!(!answer.is_whole(), "{path}: {answer:?}");
    }
    let labels = [("reason", "upstream_truncated"), ("code", "200")];
    for sidecar in [&pair.near, &pair.far] {
        eventually("counted on both sides", async || {
            let samples = sidecar.metrics().await;
            let all = samples.values("outrigger_http_requests_total", "reason");
            let found = samples.sum("outrigger_http_requests_total", &labels);
            assert!(!all.contains(""), "a truncated answer is not a success: {all:?}");
            (found >= 1.0).then_some(())
        })
        .await;
    }
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200, "the next request is served");
}

#[tokio::test]
async fn a_body_without_length_ends_with_its_connection() {
    let backend = Backend::start().await;
    let pair = pair(backend.address()).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send(GET).await;
    let mut app = backend.accept().await;
    app.take_until(b"\r\n\r\n").await;
    app.send("HTTP/1.0 200 OK\r\n\r\nuntil the end").await;
    drop(app);
    let answer = client.response(false).await;
    assert_eq!((answer.is_whole(), answer.text().as_str()), (true, "until the end"));
}

#[tokio::test]
async fn a_refused_connection_is_503_from_the_inbound_side() {
    let gone = Backend::start().await.stop();
    let pair = pair(gone).await;
    let answer = wire::get(pair.near.outbound(), "/").await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "connection_refused"));
    assert_eq!(answer.header("proxy-status"), Some("catalog-1; error=connection_refused"));
    for (sidecar, direction) in [(&pair.near, "outbound"), (&pair.far, "inbound")] {
        let labels = [("direction", direction), ("code", "503")];
        eventually(direction, async || {
            (sidecar.metrics().await.sum("outrigger_http_requests_total", &labels) == 1.0).then_some(())
        })
        .await;
    }
    let own = [("direction", "inbound"), ("reason", "connection_refused")];
    assert_eq!(pair.far.metrics().await.sum("outrigger_http_requests_total", &own), 1.0);
}

#[tokio::test]
async fn no_endpoint_is_503_and_nobody_of_that_name_502() {
    let pair = pair(Backend::start().await.address()).await;
    pair.mesh.service("empty.shop", 80, 8080, Some("http"));
    let client = pair.mesh.sidecar("web-1").outbound("empty:80").http_proxy().start().await;
    let answer = wire::get(client.outbound(), "/").await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "destination_unavailable"));
    assert_eq!(answer.header("proxy-status"), Some("web-1; error=destination_unavailable"));
    let nobody = pair.mesh.sidecar("nil-1").outbound("nobody:80").start().await;
    let answer = wire::get(nobody.outbound(), "/").await;
    assert_eq!((answer.status, answer.reason().as_str()), (502, "not_registered"));
}

/// A listener that never accepts and whose backlog is full: a connect to it gets no answer.
struct BlackHole {
    _listener: std::net::TcpListener,
    _waiting: Vec<std::net::TcpStream>,
    address: SocketAddr,
}

fn black_hole(ip: &str) -> BlackHole {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let any: SocketAddr = format!("{ip}:0").parse().unwrap();
    socket.bind(&any.into()).unwrap();
    socket.listen(0).unwrap();
    let listener: std::net::TcpListener = socket.into();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        waiting.push(stream);
        assert!(waiting.len() < 64, "the backlog does not fill");
    }
    BlackHole { _listener: listener, _waiting: waiting, address }
}

fn workload(name: &str, app: &str, address: SocketAddr) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
         {{address: {}, serviceAccount: {app}, labels: {{app: {app}}}, ports: {{main: {}}}}}\n",
        address.ip(),
        address.port()
    )
}

#[tokio::test]
async fn an_endpoint_that_swallows_connects_costs_at_most_five_seconds() {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let hole = tokio::task::spawn_blocking(|| black_hole("127.0.0.1")).await.unwrap();
    mesh.service("far.shop", 80, hole.address.port(), Some("http"));
    mesh.write("hole.yaml", &workload("hole", "far", hole.address));
    let near = mesh.sidecar("cart-1").outbound("far:80").start().await;
    let begun = Instant::now();
    let answer = wire::get(near.outbound(), "/").await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "connect_timeout"));
    // Long enough for a packet that was lost twice.
    assert!(begun.elapsed() > Duration::from_secs(4), "{:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());

    // With another endpoint beside it every request is answered, at the worst a connect timeout later.
    let alive = Application::start_at("alive", SocketAddr::new([127, 0, 0, 9].into(), hole.address.port())).await;
    mesh.write("alive.yaml", &workload("alive", "far", alive.address()));
    eventually("the other endpoint is known", async || {
        (wire::get(near.outbound(), "/").await.status == 200).then_some(())
    })
    .await;
    for _ in 0..10 {
        let begun = Instant::now();
        assert_eq!(wire::get(near.outbound(), "/").await.status, 200);
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    }
}
