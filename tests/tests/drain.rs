//! Promise: SIGTERM loses no request. The sidecar is unready and withdrawn at once, takes what still comes for the drain
//! delay, finishes what runs, and ends with exit code 0 within its budget.

use std::time::{Duration, Instant};

use outrigger_tests::grpc::Http2;
use outrigger_tests::wire::{Connection, End};
use outrigger_tests::{Application, Mesh, MeshOptions, Sidecar, eventually, under_test, wire};

#[tokio::test]
async fn twenty_two_requests_in_flight_survive_sigterm() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let builder = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address());
    let mut far = builder.drain_delay(Duration::from_millis(300)).spawn(under_test!()).await;
    far.ready().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let mut held = Vec::new();
    for _ in 0..20 {
        let mut client = Connection::open(near.outbound()).await;
        client.send("GET /hold HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
        held.push(client);
    }
    let http2 = Http2::open(near.outbound()).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let request = http::Request::get("http://test/hold").body(()).unwrap();
        streams.push(http2.begin(request, true).await.unwrap());
    }
    eventually("all are in flight", async || (app.count() == 22).then_some(())).await;
    let health = far.address("health").await;
    let begun = Instant::now();
    far.signal("TERM");
    let unready = eventually("/ready is 503", async || {
        let answer = wire::get(health, "/ready").await;
        (answer.status == 503).then_some(answer)
    })
    .await;
    assert!(unready.text().contains("draining"), "{}", unready.text());
    assert!(begun.elapsed() < Duration::from_secs(1), "at once: {:?}", begun.elapsed());
    eventually("the lease is withdrawn", async || {
        (mesh.control_plane_get("/status").await["leases"] == 0).then_some(())
    })
    .await;
    let inbound = far.address(&format!("inbound:{}", app.port())).await;
    eventually("the drain delay is over", async || tokio::net::TcpStream::connect(inbound).await.err()).await;
    app.release();
    for client in &mut held {
        let answer = client.response(false).await;
        assert_eq!((answer.status, answer.is_whole(), answer.text().as_str()), (200, true, "GET /hold 0\n"));
    }
    for stream in streams {
        assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().body, b"GET /hold 0\n");
    }
    let status = far.wait(Duration::from_secs(30)).await;
    assert_eq!(status.code(), Some(0), "{}", far.stderr());
    assert!(begun.elapsed() < Duration::from_secs(10), "idle connections do not hold it: {:?}", begun.elapsed());
}

#[tokio::test]
async fn a_second_sigterm_ends_it_at_once() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    let builder = mesh.sidecar("catalog-1").inbound(app.address()).outbound("catalog:80");
    let mut sidecar = builder.drain_delay(Duration::from_secs(25)).spawn(under_test!()).await;
    sidecar.ready().await;
    sidecar.signal("TERM");
    let health = sidecar.address("health").await;
    eventually("draining", async || (wire::get(health, "/ready").await.status == 503).then_some(())).await;
    let begun = Instant::now();
    sidecar.signal("TERM");
    assert_eq!(sidecar.wait(Duration::from_secs(5)).await.code(), Some(0), "{}", sidecar.stderr());
    assert!(begun.elapsed() < Duration::from_secs(4));
}

struct Pair {
    app: Application,
    near: Sidecar,
    far: Sidecar,
    _mesh: Mesh,
}

async fn pair(delay: Duration) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).drain_delay(delay).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").drain_delay(delay).start().await;
    Pair { app, near, far, _mesh: mesh }
}

#[tokio::test]
async fn a_draining_outbound_still_serves_its_application() {
    let pair = pair(Duration::from_millis(200)).await;
    let mut idle = Connection::open(pair.near.outbound()).await;
    assert_eq!(idle.ask("GET /a HTTP/1.1\r\nHost: a\r\n\r\n").await.status, 200);
    let mut held = Connection::open(pair.near.outbound()).await;
    held.send("GET /hold HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    eventually("in flight", async || (pair.app.count() == 2).then_some(())).await;
    let address = pair.near.outbound();
    let ready = pair.near.readiness().clone();
    let app = &pair.app;
    let (cut, ()) = tokio::join!(pair.near.drain(), async {
        eventually("draining", async || ready.check().is_err().then_some(())).await;
        let answer = wire::ask(address, "GET /late HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
        assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
        app.release();
        assert_eq!(held.response(false).await.status, 200);
    });
    assert_eq!(cut, 0);
    assert_eq!(idle.expect_end().await, End::Closed, "an idle connection is closed in order");
    assert_eq!(pair.app.count(), 3);
}

#[tokio::test]
async fn a_draining_inbound_says_goodbye_to_http2_and_finishes_its_streams() {
    let pair = pair(Duration::from_millis(200)).await;
    let client = Http2::open(pair.near.outbound()).await;
    let held = client.begin(http::Request::get("http://test/hold").body(()).unwrap(), true).await.unwrap();
    eventually("in flight", async || (pair.app.count() == 1).then_some(())).await;
    let app = &pair.app;
    let (ready, inbound) = (pair.far.readiness().clone(), pair.far.inbound());
    let (cut, ()) = tokio::join!(pair.far.drain(), async {
        eventually("draining", async || ready.check().is_err().then_some(())).await;
        eventually("the drain delay is over", async || tokio::net::TcpStream::connect(inbound).await.err()).await;
        app.release();
        assert_eq!(held.answer().await.unwrap().whole().await.unwrap().status.as_u16(), 200);
    });
    assert_eq!(cut, 0);
}
