//! Promise: bytes that are not HTTP pass as they are, inside mutual TLS of their own connection: half-close both ways,
//! resets, a server that speaks first, and counted bytes on both sides.

use std::time::{Duration, Instant};

use outrigger_tests::application::Backend;
use outrigger_tests::wire::{Connection, End};
use outrigger_tests::{Mesh, MeshOptions, Sidecar, eventually};

struct Pair {
    app: Backend,
    near: Sidecar,
    far: Sidecar,
    _mesh: Mesh,
}

async fn pair(protocol: Option<&str>) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Backend::start().await;
    mesh.service("queue.shop", 5672, app.port(), protocol);
    let far = mesh.sidecar("queue-1").label("app", "queue").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("queue:5672").start().await;
    Pair { app, near, far, _mesh: mesh }
}

#[tokio::test]
async fn half_close_passes_both_ways() {
    for protocol in [Some("tcp"), None] {
        let pair = pair(protocol).await;
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send(b"\x00\x01question").await;
        let mut app = pair.app.accept().await;
        assert_eq!(app.take(10).await, b"\x00\x01question");
        client.finish().await;
        assert_eq!(app.expect_end().await, End::Closed, "the client's end arrives");
        app.send(vec![7; 300_000]).await;
        app.finish().await;
        let (bytes, end) = client.take_to_end().await;
        assert_eq!((bytes.len(), end), (300_000, End::Closed), "and the answer after it");

        let mut client = Connection::open(pair.near.outbound()).await;
        client.send(b"\xff").await;
        let mut app = pair.app.accept().await;
        app.take(1).await;
        app.finish().await;
        assert_eq!(client.expect_end().await, End::Closed);
        client.send(b"still talking").await;
        client.finish().await;
        assert_eq!(app.take_to_end().await, (b"still talking".to_vec(), End::Closed));
    }
}

#[tokio::test]
async fn a_reset_is_not_an_end() {
    let pair = pair(Some("tcp")).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send(b"hello").await;
    let mut app = pair.app.accept().await;
    app.take(5).await;
    app.send(b"half an ans").await;
    assert_eq!(client.take(11).await, b"half an ans");
    app.reset();
    assert_eq!(client.expect_end().await, End::Reset, "a truncation cannot be taken for an end");

    let mut client = Connection::open(pair.near.outbound()).await;
    client.send(b"hello").await;
    let mut app = pair.app.accept().await;
    app.take(5).await;
    client.reset();
    assert_eq!(app.expect_end().await, End::Reset);
}

#[tokio::test]
async fn a_server_may_speak_first_on_an_undeclared_port() {
    let pair = pair(None).await;
    for round in 0..3 {
        let begun = Instant::now();
        let mut client = Connection::open(pair.near.outbound()).await;
        let mut app = pair.app.accept().await;
        app.send(b"220 mail.test ESMTP\r\n").await;
        assert_eq!(client.take_until(b"\r\n").await, b"220 mail.test ESMTP\r\n");
        client.send(b"HELO client\r\n").await;
        assert_eq!(app.take_until(b"\r\n").await, b"HELO client\r\n");
        assert!(begun.elapsed() < Duration::from_secs(1), "round {round} took {:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_declared_tcp_port_never_waits_for_the_client() {
    let pair = pair(Some("tcp")).await;
    let _client = Connection::open(pair.near.outbound()).await;
    let mut app = pair.app.accept().await;
    app.send(b"first").await;
    let labels = [("direction", "outbound"), ("protocol", "tcp")];
    eventually("opened", async || {
        (pair.near.metrics().await.sum("outrigger_tcp_connections_opened_total", &labels) == 1.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_silent_client_that_then_speaks_http_is_parsed_all_the_same() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = outrigger_tests::Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let mut client = Connection::open(near.outbound()).await;
    eventually("the application was opened on suspicion", async || (app.connections() == 1).then_some(())).await;
    let answer = client.ask("GET /late HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "GET /late 0\n"));
    assert_eq!(app.last().all("x-outrigger-identity"), ["spiffe://outrigger.local/ns/shop/sa/cart"]);
}

#[tokio::test]
async fn both_sides_count_bytes_as_caller_to_service_and_back() {
    let pair = pair(Some("tcp")).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send(vec![1; 1000]).await;
    let mut app = pair.app.accept().await;
    app.take(1000).await;
    app.send(vec![2; 250_000]).await;
    client.take(250_000).await;
    client.finish().await;
    app.expect_end().await;
    app.finish().await;
    client.expect_end().await;
    for (sidecar, direction) in [(&pair.near, "outbound"), (&pair.far, "inbound")] {
        let labels = [
            ("direction", direction),
            ("source_workload", "cart"),
            ("source_principal", "spiffe://outrigger.local/ns/shop/sa/cart"),
            ("destination_service", "queue.shop"),
            ("destination_workload", "queue"),
            ("protocol", "tcp"),
            ("mtls", "true"),
            ("reason", ""),
        ];
        let samples = eventually("closed", async || {
            let samples = sidecar.metrics().await;
            (samples.sum("outrigger_tcp_connections_closed_total", &labels) == 1.0).then_some(samples)
        })
        .await;
        assert_eq!(samples.sum("outrigger_tcp_connections_opened_total", &[("direction", direction)]), 1.0);
        assert_eq!(
            samples.sum("outrigger_tcp_received_bytes_total", &[("direction", direction)]),
            1000.0,
            "{direction}"
        );
        assert_eq!(
            samples.sum("outrigger_tcp_sent_bytes_total", &[("direction", direction)]),
            250_000.0,
            "{direction}"
        );
        assert_eq!(samples.sum("outrigger_tcp_connection_duration_seconds_count", &[]), 1.0);
    }
}

#[tokio::test]
async fn a_reader_that_takes_nothing_stops_the_writer() {
    let pair = pair(Some("tcp")).await;
    let client = Connection::open(pair.near.outbound()).await;
    let mut app = pair.app.accept().await;
    let block = vec![0; 64 * 1024];
    let mut sent = 0_usize;
    while tokio::time::timeout(Duration::from_millis(500), app.send(&block)).await.is_ok() {
        sent += block.len();
        assert!(sent < 64 << 20, "{sent} bytes were taken and none was read");
    }
    drop(client);
}

#[tokio::test]
async fn nobody_to_connect_to_is_a_reset_with_a_reason() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let gone = Backend::start().await.stop();
    mesh.service("queue.shop", 5672, gone.port(), Some("tcp"));
    let near = mesh.sidecar("cart-1").outbound("queue:5672").start().await;
    assert_eq!(Connection::ended_by(near.outbound()).await, End::Reset);
    let labels = [("direction", "outbound"), ("reason", "destination_unavailable")];
    eventually("counted", async || {
        (near.metrics().await.sum("outrigger_tcp_connections_closed_total", &labels) == 1.0).then_some(())
    })
    .await;
    let _far = mesh.sidecar("queue-1").label("app", "queue").inbound(gone).start().await;
    eventually("the endpoint is known", async || {
        Connection::ended_by(near.outbound()).await;
        let labels = [("direction", "outbound"), ("mtls", "true")];
        (near.metrics().await.sum("outrigger_tcp_connections_closed_total", &labels) >= 1.0).then_some(())
    })
    .await;
}
