//! Promise: nothing waits for ever. Idle and stalled connections and streams end after their limit, with an answer where
//! one can still be given, and what is alive is left alone.

use std::time::Duration;

use outrigger_sidecar::config::Limits;
use outrigger_tests::application::Backend;
use outrigger_tests::grpc::Http2;
use outrigger_tests::wire::{self, Connection, End};
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually};

/// Long enough for a busy machine to do something in it, short enough to wait for.
const LIMIT: Duration = Duration::from_millis(600);

struct Pair {
    near: Sidecar,
    far: Sidecar,
    _mesh: Mesh,
}

async fn pair(app: std::net::SocketAddr, protocol: Option<&str>, limits: fn(&mut Limits)) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, app.port(), protocol);
    // The watchdog looks as often as the shortest head asks for.
    let quick = move |all: &mut Limits| {
        all.head_timeout = Duration::from_millis(400);
        limits(all);
    };
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(quick).start().await;
    Pair { near, far, _mesh: mesh }
}

const GET: &str = "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n";

#[tokio::test]
async fn an_answer_that_does_not_come_is_504() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), Some("http"), |limits| limits.stream_idle = LIMIT).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    let answer = client.ask("GET /hold HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    assert_eq!((answer.status, answer.reason().as_str()), (504, "stream_idle_timeout"));
    eventually("the application's side is given up, too", async || app.last().cancelled.then_some(())).await;
    let http2 = Http2::open(pair.near.outbound()).await;
    let answer = http2.get("/hold").await.unwrap();
    assert_eq!(answer.status.as_u16(), 504);
    let call = http2.call("Wait", &[]).await.unwrap();
    assert_eq!(call.answer().await.unwrap().headers["grpc-status"], "4");
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
}

#[tokio::test]
async fn a_body_that_stands_still_is_cut_and_one_that_moves_is_not() {
    let backend = Backend::start().await;
    let pair = pair(backend.address(), Some("http"), |limits| limits.stream_idle = LIMIT).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send(GET).await;
    let mut app = backend.accept().await;
    app.take_until(b"\r\n\r\n").await;
    app.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n").await;
    // Twice the limit in all, and never as long as the limit without a byte.
    for _ in 0..8 {
        tokio::time::sleep(LIMIT / 4).await;
        app.send("x").await;
    }
    let answer = client.response(false).await;
    assert_eq!((answer.status, answer.body.len(), answer.is_whole()), (200, 8, false));
    let labels = [("reason", "stream_idle_timeout"), ("code", "200")];
    eventually("counted", async || {
        (pair.near.metrics().await.sum("outrigger_http_requests_total", &labels) == 1.0).then_some(())
    })
    .await;
}

/// The mesh connection between the two carries both clients' streams: one that is not read is not its end.
#[tokio::test]
async fn a_stalled_stream_does_not_close_what_others_share() {
    const LIMIT: Duration = Duration::from_secs(1);
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let builder = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address());
    let short = |limits: &mut Limits| {
        limits.head_timeout = Duration::from_millis(200);
        limits.stream_idle = LIMIT;
    };
    let _far = builder.limits(short).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let (stalled, other) = (Http2::open(near.outbound()).await, Http2::open(near.outbound()).await);
    let unread = stalled.begin(http::Request::get("http://test/bytes/9000000").body(()).unwrap(), true).await.unwrap();
    let _unread = unread.answer().await.unwrap();
    let begun = std::time::Instant::now();
    let (mut answer, mut send) = other.call("Bidi", &[]).await.unwrap().answer_keeping().await.unwrap();
    while begun.elapsed() < LIMIT * 7 / 4 {
        send.send_data(outrigger_tests::grpc::frame(b"x"), false).unwrap();
        assert!(answer.data().await.unwrap().is_some(), "cut after {:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// An upload may take as long as it likes as long as it moves, though no answer has begun.
#[tokio::test]
async fn an_upload_that_moves_is_waited_for() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None, |limits| limits.stream_idle = LIMIT).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("POST / HTTP/1.1\r\nHost: catalog\r\nContent-Length: 10\r\n\r\n").await;
    let http2 = Http2::open(pair.near.outbound()).await;
    let request = http::Request::post("http://test/").body(()).unwrap();
    let mut stream = http2.begin(request, false).await.unwrap();
    for left in (0..10).rev() {
        tokio::time::sleep(LIMIT / 4).await;
        client.send("x").await;
        stream.write("x".into(), left == 0).await.unwrap();
    }
    assert_eq!(client.response(false).await.text(), "POST / 10\n");
    assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"POST / 10\n");
}

#[tokio::test]
async fn a_tunnel_on_which_nobody_speaks_is_closed() {
    let backend = Backend::start().await;
    let pair = pair(backend.address(), Some("tcp"), |limits| limits.tunnel_idle = LIMIT).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    let mut app = backend.accept().await;
    for _ in 0..6 {
        tokio::time::sleep(LIMIT / 3).await;
        app.send("x").await;
        assert_eq!(client.take(1).await, b"x", "alive as long as either side speaks");
    }
    client.expect_end().await;
    app.expect_end().await;
    drop(pair.far);
}

#[tokio::test]
async fn a_keep_alive_connection_without_requests_is_closed_in_order() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), Some("http"), |limits| limits.client_idle = LIMIT).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    for _ in 0..4 {
        tokio::time::sleep(LIMIT / 3).await;
        assert_eq!(client.ask(GET).await.status, 200);
    }
    assert_eq!(client.expect_end().await, End::Closed);
}

/// On a port declared HTTP, and at the forward proxy, at the sidecar's door as well; who asked once may take long.
#[tokio::test]
async fn who_never_asks_anything_is_closed_without_a_word() {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let short = |limits: &mut Limits| limits.first_byte_timeout = LIMIT;
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).limits(short).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").http_proxy().limits(short).start().await;
    let mut asked = Connection::open(near.outbound()).await;
    assert_eq!(asked.ask(GET).await.status, 200);
    for address in [near.outbound(), near.http_proxy(), far.inbound()] {
        let begun = std::time::Instant::now();
        let mut silent = Connection::open(address).await;
        assert_eq!(silent.expect_end().await, End::Closed);
        assert!(begun.elapsed() >= LIMIT, "{:?}", begun.elapsed());
        assert!(silent.ahead().is_empty());
    }
    assert_eq!(asked.ask(GET).await.status, 200, "longer than that between requests");
}

#[tokio::test]
async fn stalled_requests_do_not_delay_others() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None, |_| {}).await;
    let mut stalled = Vec::new();
    for _ in 0..100 {
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send("GET /hold HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
        stalled.push(client);
    }
    eventually("all wait", async || (app.count() == 100).then_some(())).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        let begun = std::time::Instant::now();
        assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
        slowest = slowest.max(begun.elapsed());
    }
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    app.release();
    for client in &mut stalled {
        assert_eq!(client.response(false).await.status, 200);
    }
}

#[tokio::test]
async fn a_hundred_idle_connections_stay_usable() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None, |_| {}).await;
    let mut idle = Vec::new();
    for _ in 0..100 {
        let mut client = Connection::open(pair.near.outbound()).await;
        assert_eq!(client.ask(GET).await.status, 200);
        idle.push(client);
    }
    for client in &mut idle {
        assert_eq!(client.ask(GET).await.status, 200);
    }
    assert!(app.connections() < 10, "requests share connections: {}", app.connections());
    drop(idle);
    eventually("the table is empty again", async || {
        let views = pair.near.admin_get("/connections").await;
        let open: usize =
            views.as_array().unwrap().iter().map(|view| view["connections"].as_array().unwrap().len()).sum();
        (open == 0).then_some(())
    })
    .await;
}

/// A watch, a long poll or a bidirectional stream may be silent for long. Bytes that nobody takes may not wait for as long.
#[tokio::test]
async fn silence_is_not_a_stall() {
    const STALLED: Duration = Duration::from_secs(1);
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), Some("http"), |limits| limits.stream_stalled = STALLED).await;
    // Silent: an answer that does not come, on both framings, and a call that has begun to be answered.
    let mut polling = Connection::open(pair.near.outbound()).await;
    polling.send("GET /hold HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    let http2 = Http2::open(pair.near.outbound()).await;
    let watching = http2.begin(http::Request::get("http://test/hold").body(()).unwrap(), true).await.unwrap();
    let (mut answer, mut send) = http2.call("Bidi", &[]).await.unwrap().answer_keeping().await.unwrap();
    // Stalled: a client that does not read, on both framings.
    let mut lazy = Connection::open(pair.near.outbound()).await;
    lazy.send("GET /bytes/50000000 HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    lazy.take_until(b"\r\n\r\n").await;
    let lazy_http2 = Http2::open(pair.near.outbound()).await;
    let request = http::Request::get("http://test/bytes/50000000").body(()).unwrap();
    let unread = lazy_http2.begin(request, true).await.unwrap();
    let _unread = unread.answer().await.unwrap();
    eventually("what nobody reads is ended", async || {
        let cancelled = app.requests().iter().filter(|seen| seen.target.contains("bytes") && seen.cancelled).count();
        (cancelled == 2).then_some(())
    })
    .await;
    tokio::time::sleep(2 * STALLED).await;
    send.send_data(outrigger_tests::grpc::frame(b"x"), false).unwrap();
    assert!(answer.data().await.unwrap().is_some(), "the bidirectional stream lives");
    app.release();
    assert_eq!(polling.response(false).await.status, 200);
    assert_eq!(watching.answer().await.unwrap().status.as_u16(), 200);
}

/// Bytes of a client that the application does not take.
#[tokio::test]
async fn an_upload_that_nobody_reads_is_ended() {
    let backend = Backend::start().await;
    let pair = pair(backend.address(), Some("http"), |limits| limits.stream_stalled = LIMIT).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("POST / HTTP/1.1\r\nHost: catalog\r\nContent-Length: 100000000\r\n\r\n").await;
    let _unread = backend.accept().await;
    let block = vec![b'x'; 256 * 1024];
    let ended = eventually("the client is told", async || {
        match tokio::time::timeout(Duration::from_millis(100), client.try_send(&block)).await {
            Ok(Ok(())) => None,
            Ok(Err(_)) => Some(()),
            Err(_) => client.try_response(false).await.ok().map(|answer| assert_eq!(answer.status, 504)),
        }
    });
    ended.await;
}

/// The kernels of both sides acknowledge keep-alive probes, so both live.
#[tokio::test]
async fn a_tunnel_whose_peers_acknowledge_is_not_closed() {
    let backend = Backend::start().await;
    let alive = |limits: &mut Limits| {
        limits.keepalive = Duration::from_secs(1);
        // Behind the first probe this is the pause between two, also when the peer answers each.
        limits.keepalive_interval = Duration::from_secs(1);
        limits.tunnel_idle = Duration::from_secs(3);
    };
    let pair = pair(backend.address(), Some("tcp"), alive).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    let mut app = backend.accept().await;
    assert!(client.stays_silent(Duration::from_secs(7)).await, "more than twice the limit");
    client.send(b"question").await;
    assert_eq!(app.take(8).await, b"question");
    app.send(b"answer").await;
    assert_eq!(client.take(6).await, b"answer");
}
