//! Promise: HTTP and gRPC programs need to know nothing of the mesh: through two transparent sidecars under STRICT, on ports
//! whose protocol nobody declared, requests works with Flask, aiohttp with itself, grpcio with itself, websockets with
//! itself, and h2load has thousands of streams answered, none of them lost.

use std::time::Duration;

use outrigger_tests::namespace::Families;
use outrigger_tests::pods::{Pods, Port, run};
use outrigger_tests::under_test;

const PORT: Port = Port { service: 80, app: 8080 };

#[tokio::test]
async fn requests_and_flask() {
    let Some(pods) = Pods::start(under_test!(), Families::V4, &[PORT], &["python"]).await else { return };
    let server = pods.python("catalog", "flask_server.py", &[pods.everywhere(), "8080"]);
    let _server = pods.serve(server).await;
    assert_eq!(run(pods.python("cart", "requests_client.py", &["http://catalog.shop"])).await, "ok");
    let both = pods.http("http1", 54, &[]).await;
    assert_eq!(both.sums("outrigger_http_requests_total", &[("code", "404")]), [1.0; 2]);
}

#[tokio::test]
async fn aiohttp_client_and_server() {
    let Some(pods) = Pods::start(under_test!(), Families::V6, &[PORT], &["python"]).await else { return };
    let server = pods.python("catalog", "aiohttp_server.py", &[pods.everywhere(), "8080"]);
    let _server = pods.serve(server).await;
    assert_eq!(run(pods.python("cart", "aiohttp_client.py", &["http://catalog.shop"])).await, "ok");
    let both = pods.http("http1", 105, &[]).await;
    assert_eq!(both.sums("outrigger_http_requests_total", &[("code", "101")]), [1.0; 2]);
}

#[tokio::test]
async fn grpcio_by_ipv4() {
    grpcio(Families::V4).await;
}

#[tokio::test]
async fn grpcio_by_ipv6() {
    grpcio(Families::V6).await;
}

async fn grpcio(family: Families) {
    let Some(pods) = Pods::start(under_test!(), family, &[PORT], &["python"]).await else { return };
    let listen = if family == Families::V6 { "[::]:8080" } else { "0.0.0.0:8080" };
    let _server = pods.serve(pods.python("catalog", "grpc_server.py", &[listen])).await;
    assert_eq!(run(pods.python("cart", "grpc_client.py", &["catalog.shop:80"])).await, "ok");
    // Two that the client gave up, one of them by its deadline, which the server knows as well.
    let both = pods.http("grpc", 113, &["client_closed", "upstream_reset"]).await;
    assert_eq!(both.sums("outrigger_http_requests_total", &[("grpc_status", "5")]), [1.0; 2]);
    // A request and an answer each, 100 more in pairs both ways, 300 up, 100 down, and three calls without an answer.
    assert_eq!(both.sums("outrigger_grpc_messages_total", &[]), [819.0; 2]);
    assert_eq!(both.sums("outrigger_http_requests_in_flight", &[]), [0.0; 2]);
}

#[tokio::test]
async fn websockets() {
    let Some(pods) = Pods::start(under_test!(), Families::V4, &[PORT], &["python"]).await else { return };
    let server = pods.python("catalog", "websocket_server.py", &[pods.everywhere(), "8080"]);
    let _server = pods.serve(server).await;
    assert_eq!(run(pods.python("cart", "websocket_client.py", &["ws://catalog.shop/"])).await, "ok");
    let both = pods.http("http1", 1, &[]).await;
    assert_eq!(both.sums("outrigger_http_requests_total", &[("code", "101")]), [1.0; 2]);
}

#[tokio::test]
async fn h2load_with_thousands_of_streams() {
    let Some(pods) = Pods::start(under_test!(), Families::V4, &[PORT], &["h2load", "nghttpd"]).await else { return };
    let documents = pods.path("documents");
    std::fs::create_dir(&documents).unwrap();
    std::fs::write(documents.join("small"), [b'x'; 300]).unwrap();
    let mut server = pods.program("catalog", "nghttpd");
    server.args(["--no-tls", "--address", pods.everywhere(), "--htdocs"]).arg(documents).arg("8080");
    let _server = pods.serve_on(server, 8080).await;
    let mut load = pods.program("cart", "h2load");
    load.args(["--requests=20000", "--clients=10", "--max-concurrent-streams=100", "http://catalog.shop/small"]);
    let shown = run(load).await;
    for line in [
        "requests: 20000 total, 20000 started, 20000 done, 20000 succeeded, 0 failed, 0 errored, 0 timeout",
        "status codes: 20000 2xx, 0 3xx, 0 4xx, 0 5xx",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    let both = pods.http("http2", 20_000, &[]).await;
    assert_eq!(both.sums("outrigger_http_response_bytes_total", &[]), [6_000_000.0; 2]);
}

/// The server says its settings at once: a client that takes its time must not be taken for one that waits for them.
#[tokio::test]
async fn a_slow_client_of_an_http2_server() {
    let Some(pods) = Pods::start(under_test!(), Families::V4, &[PORT], &["nghttpd"]).await else { return };
    let mut server = pods.program("catalog", "nghttpd");
    server.args(["--no-tls", "--address", pods.everywhere(), "--htdocs"]).arg(pods.path("")).arg("8080");
    let _server = pods.serve_on(server, 8080).await;
    for _ in 0..2 {
        let mut connection = pods.at("cart").connect((pods.service(), 80).into()).await;
        assert!(connection.stays_silent(Duration::from_millis(500)).await, "the server's settings are not the answer");
        let (mut requests, connection) = h2::client::handshake(connection.into_tcp()).await.unwrap();
        let driven = tokio::spawn(connection);
        let request = http::Request::get("http://catalog.shop/missing").body(()).unwrap();
        let answer = requests.send_request(request, true).unwrap().0.await.unwrap();
        assert_eq!(answer.status(), 404);
        driven.abort();
    }
    pods.http("http2", 2, &["client_closed"]).await;
}
