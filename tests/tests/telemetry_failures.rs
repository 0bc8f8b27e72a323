//! Promise: the metrics contract where a call fails, or where a side of it is not known. It is counted once, with a reason
//! on the side that has one, and never as a success.

use outrigger_api::name::Protocol;
use outrigger_tests::application::{Backend, nobody};
use outrigger_tests::counted::{CLOSED, IN_FLIGHT, OPENED, REQUESTS, RESPONSE_BYTES, counts, labels, pair, pair_in};
use outrigger_tests::grpc::Http2;
use outrigger_tests::wire::{self, Connection, End};
use outrigger_tests::{Application, Mesh, MeshOptions};

#[tokio::test]
async fn a_grpc_call_that_the_mesh_fails_has_a_failing_status() {
    let pair = pair(nobody().await, Some(Protocol::Grpc)).await;
    let client = Http2::open(pair.near.outbound()).await;
    let failed = client.unary("Unary", b"hello").await.unwrap();
    assert_eq!((failed.status.as_u16(), failed.grpc_status()), (200, Some("14")));
    let inbound = [("code", "200"), ("grpc_status", "14"), ("reason", "connection_refused")];
    counts(&pair.far, &labels("inbound", "grpc", &inbound), &[(REQUESTS, 1.0)]).await;
    // It passed this answer on unchanged.
    let outbound = [("code", "200"), ("grpc_status", "14")];
    counts(&pair.near, &labels("outbound", "grpc", &outbound), &[(REQUESTS, 1.0)]).await;

    let app = Application::start("catalog").await;
    let pair = self::pair(app.address(), Some(Protocol::Grpc)).await;
    let client = Http2::open(pair.near.outbound()).await;
    let call = client.call("Wait", &[]).await.unwrap();
    pair.both("grpc", &[], &[(IN_FLIGHT, 1.0)]).await;
    call.cancel();
    let cancelled = [("code", ""), ("grpc_status", ""), ("reason", "client_closed")];
    pair.both("grpc", &cancelled, &[(REQUESTS, 1.0)]).await;
    pair.both("grpc", &[], &[(IN_FLIGHT, 0.0)]).await;
}

#[tokio::test]
async fn a_head_that_is_refused_counts_for_the_service_it_was_sent_to() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    assert_eq!(client.ask("GET / HTTP/1.1\r\nHost : c\r\n\r\n").await.status, 400);
    let labels = [
        ("direction", "outbound"),
        ("source_workload", "cart-web"),
        ("destination_service", "catalog.shop"),
        ("code", "400"),
        ("reason", "bad_request"),
    ];
    counts(&pair.near, &labels, &[(REQUESTS, 1.0)]).await;
    assert_eq!(app.count(), 0);
}

#[tokio::test]
async fn an_application_that_refuses_is_the_inbound_sides_reason() {
    let pair = pair(nobody().await, None).await;
    let answer = wire::get(pair.near.outbound(), "/").await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "connection_refused"));
    let inbound = [("code", "503"), ("method", "GET"), ("reason", "connection_refused")];
    counts(&pair.far, &labels("inbound", "http1", &inbound), &[(REQUESTS, 1.0)]).await;
    counts(&pair.near, &labels("outbound", "http1", &[("code", "503")]), &[(REQUESTS, 1.0)]).await;
    pair.both("http1", &[], &[(IN_FLIGHT, 0.0), (REQUESTS, 1.0)]).await;
}

#[tokio::test]
async fn a_service_without_endpoints_is_unavailable() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, 8080, None);
    let near = mesh.sidecar("cart-1").workload("cart-web").outbound("catalog:80").start().await;
    let answer = wire::get(near.outbound(), "/").await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "destination_unavailable"));
    let labels = [
        ("direction", "outbound"),
        ("source_workload", "cart-web"),
        ("destination_service", "catalog.shop"),
        ("code", "503"),
        ("reason", "destination_unavailable"),
    ];
    counts(&near, &labels, &[(REQUESTS, 1.0)]).await;
    let mut client = Connection::open(near.outbound()).await;
    client.send(b"\xff\xff\xff\xff").await;
    client.take_to_end().await;
    let labels = [("destination_service", "catalog.shop"), ("reason", "destination_unavailable")];
    counts(&near, &labels, &[(CLOSED, 1.0)]).await;
}

#[tokio::test]
async fn a_client_that_leaves_is_said_to_have_left_on_both_sides() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("GET /hold HTTP/1.1\r\nHost: c\r\n\r\n").await;
    pair.both("http1", &[], &[(IN_FLIGHT, 1.0)]).await;
    drop(client);
    let left = [("code", ""), ("reason", "client_closed")];
    pair.both("http1", &left, &[(REQUESTS, 1.0)]).await;
    pair.both("http1", &[], &[(IN_FLIGHT, 0.0)]).await;

    // In the middle of an answer: its head was there.
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("GET /bytes/100000000 HTTP/1.1\r\nHost: c\r\n\r\n").await;
    client.take_until(b"\r\n\r\n").await;
    client.reset();
    let left = [("code", "200"), ("reason", "client_closed")];
    pair.both("http1", &left, &[(REQUESTS, 1.0)]).await;
    pair.both("http1", &[], &[(IN_FLIGHT, 0.0)]).await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_not_a_success() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    let answer = client.ask("GET /truncate HTTP/1.1\r\nHost: c\r\n\r\n").await;
    assert!(!answer.is_whole());
    let cut = [("code", "200"), ("reason", "upstream_truncated")];
    pair.both("http1", &cut, &[(REQUESTS, 1.0), (RESPONSE_BYTES, 9.0)]).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.ask("GET /reset HTTP/1.1\r\nHost: c\r\n\r\n").await;
    pair.both("http1", &[("code", "502")], &[(REQUESTS, 1.0)]).await;
}

#[tokio::test]
async fn a_connection_that_a_side_closes_has_no_reason_and_one_that_fails_has() {
    let app = Backend::start().await;
    let pair = pair(app.address(), Some(Protocol::Tcp)).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send(b"hello").await;
    let mut served = app.accept().await;
    served.take(5).await;
    client.reset();
    assert_eq!(served.take_to_end().await.1, End::Reset);
    pair.both("tcp", &[("reason", "")], &[(CLOSED, 1.0)]).await;

    let refused = self::pair(nobody().await, Some(Protocol::Tcp)).await;
    let mut client = Connection::open(refused.near.outbound()).await;
    client.try_send(b"hello").await.ok();
    client.take_to_end().await;
    let labels = labels("inbound", "tcp", &[("reason", "connection_refused")]);
    counts(&refused.far, &labels, &[(CLOSED, 1.0)]).await;
    counts(&refused.near, &self::labels("outbound", "tcp", &[]), &[(CLOSED, 1.0), (OPENED, 1.0)]).await;
}

#[tokio::test]
async fn a_destination_that_nobody_registered_is_unknown() {
    let app = Application::start("outside").await;
    let mesh = Mesh::start(MeshOptions::default()).await;
    let near = mesh.sidecar("cart-1").workload("cart-web").http_proxy().start().await;
    let target = app.address();
    let request = format!("GET http://{target}/ HTTP/1.1\r\nHost: {target}\r\n\r\n");
    assert_eq!(Connection::open(near.http_proxy()).await.ask(request).await.status, 200);
    let labels = [
        ("source_workload", "cart-web"),
        ("destination_service", ""),
        ("destination_workload", "unknown"),
        ("destination_namespace", "unknown"),
        ("mtls", "false"),
        ("code", "200"),
    ];
    counts(&near, &labels, &[(REQUESTS, 1.0)]).await;
}

#[tokio::test]
async fn plaintext_under_strict_is_a_connection_of_nobody_known() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let mut client = Connection::open(pair.far.inbound()).await;
    client.send("GET / HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    assert!(client.take_to_end().await.0.is_empty());
    let labels = [
        ("direction", "inbound"),
        ("source_workload", "unknown"),
        ("source_namespace", "unknown"),
        ("source_principal", ""),
        ("destination_service", "catalog.shop"),
        ("destination_workload", "catalog-api"),
        ("mtls", "false"),
        ("reason", "mtls_required"),
    ];
    counts(&pair.far, &labels, &[(CLOSED, 1.0)]).await;
}

#[tokio::test]
async fn plaintext_under_permissive_is_served_for_nobody_known() {
    let app = Application::start("catalog").await;
    let pair = pair_in(Mesh::start(MeshOptions::permissive()).await, app.address(), None).await;
    assert_eq!(wire::get(pair.far.inbound(), "/").await.status, 200);
    let labels = [
        ("source_workload", "unknown"),
        ("source_namespace", "unknown"),
        ("source_principal", ""),
        ("destination_workload", "catalog-api"),
        ("mtls", "false"),
        ("code", "200"),
        ("reason", ""),
    ];
    counts(&pair.far, &labels, &[(REQUESTS, 1.0)]).await;
}
