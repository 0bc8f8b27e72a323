//! Promise: the metrics contract. Both sides of a call count it once, under the labels of the contract and with the same
//! values, whatever is spoken and however it ends; the text and the rules that read it are what Prometheus expects.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use outrigger_api::name::Protocol;
use outrigger_tests::application::{Backend, nobody};
use outrigger_tests::grpc::{Http2, frame};
use outrigger_tests::metrics::Samples;
use outrigger_tests::peer;
use outrigger_tests::wire::{self, Connection, End};
use outrigger_tests::{Application, Mesh, MeshOptions, Peer, Sidecar, eventually};

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";

const HTTP: &str = "direction source_workload source_namespace source_principal destination_service \
                    destination_workload destination_namespace protocol method code grpc_status mtls reason";
const HTTP_HISTOGRAM: &str = "direction source_workload source_namespace destination_service destination_workload \
                              destination_namespace protocol code grpc_status mtls le";
const TCP: &str = "direction source_workload source_namespace source_principal destination_service \
                   destination_workload destination_namespace protocol mtls reason";

/// A caller and a service whose names in metrics are those of `--workload`, not of instances or accounts.
struct Pair {
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair(app: SocketAddr, protocol: Option<Protocol>) -> Pair {
    pair_in(Mesh::start(MeshOptions::default()).await, app, protocol).await
}

async fn pair_in(mesh: Mesh, app: SocketAddr, protocol: Option<Protocol>) -> Pair {
    mesh.service("catalog.shop", 80, app.port(), None);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").workload("catalog-api").inbound(app);
    let far = far.port(app.port(), protocol).start().await;
    let near = mesh.sidecar("cart-1").workload("cart-web").outbound("catalog:80").start().await;
    Pair { near, far, mesh }
}

/// What both sides say of a call through the pair, but for direction and outcome.
fn labels<'a>(direction: &'a str, protocol: &'a str, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut labels = vec![
        ("direction", direction),
        ("source_workload", "cart-web"),
        ("source_namespace", "shop"),
        ("destination_service", "catalog.shop"),
        ("destination_workload", "catalog-api"),
        ("destination_namespace", "shop"),
        ("protocol", protocol),
        ("mtls", "true"),
    ];
    labels.extend_from_slice(more);
    labels
}

impl Pair {
    fn sides(&self) -> [(&'static str, &Sidecar); 2] {
        [("outbound", &self.near), ("inbound", &self.far)]
    }

    /// Both sides come to these values for these labels.
    async fn both(&self, protocol: &str, outcome: &[(&str, &str)], values: &[(&str, f64)]) {
        for (direction, sidecar) in self.sides() {
            counts(sidecar, &labels(direction, protocol, outcome), values).await;
        }
    }
}

async fn counts(sidecar: &Sidecar, labels: &[(&str, &str)], values: &[(&str, f64)]) {
    for (name, value) in values {
        let begun = Instant::now();
        let what = format!("{name} is {value}");
        eventually(&what, async || {
            let samples = sidecar.metrics().await;
            let there = samples.select(name, labels).next().is_some();
            if there && samples.sum(name, labels) == *value {
                return Some(());
            }
            if begun.elapsed() > Duration::from_secs(5) {
                let others: Vec<_> = samples.select(name, &[]).collect();
                panic!("{}: no {name} with {labels:?} is {value} among {others:#?}", sidecar.name);
            }
            None
        })
        .await;
    }
}

const REQUESTS: &str = "outrigger_http_requests_total";
const REQUEST_BYTES: &str = "outrigger_http_request_bytes_total";
const RESPONSE_BYTES: &str = "outrigger_http_response_bytes_total";
const IN_FLIGHT: &str = "outrigger_http_requests_in_flight";
const MESSAGES: &str = "outrigger_grpc_messages_total";
const OPENED: &str = "outrigger_tcp_connections_opened_total";
const CLOSED: &str = "outrigger_tcp_connections_closed_total";
const SENT: &str = "outrigger_tcp_sent_bytes_total";
const RECEIVED: &str = "outrigger_tcp_received_bytes_total";

/// The labels of each metric, exactly.
fn label_sets(samples: &Samples, names: &[&str], expected: &str) {
    let expected: BTreeSet<&str> = expected.split_whitespace().collect();
    for name in names {
        let mut any = false;
        for sample in samples.select(name, &[]) {
            any = true;
            let found: BTreeSet<&str> = sample.labels.keys().map(String::as_str).collect();
            assert_eq!(found, expected, "{name}");
        }
        assert!(any, "no sample of {name}");
    }
}

#[tokio::test]
async fn http1_is_counted_by_body_bytes_method_and_code() {
    let app = Application::start("catalog").await;
    app.release();
    let pair = pair(app.address(), None).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    let mut asked = async |text: &str| {
        let answer = client.ask(text).await;
        (answer.status, answer.body.len())
    };
    let chunked = "POST /chunked/2500 HTTP/1.1\r\nHost: c\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\nX-End: 1\r\n\r\n";
    // A connection of its own: one that carried request trailers is closed after its answer.
    let answer = Connection::open(pair.near.outbound()).await.ask(chunked).await;
    assert_eq!((answer.status, answer.body.len()), (200, 2500));
    assert_eq!(asked("HEAD /bytes/300 HTTP/1.1\r\nHost: c\r\n\r\n").await, (200, 0));
    assert_eq!(asked("PROPFIND /x HTTP/1.1\r\nHost: c\r\n\r\n").await, (200, 14));
    assert_eq!(asked("GET /status/404 HTTP/1.1\r\nHost: c\r\n\r\n").await, (404, 0));
    assert_eq!(asked("GET /status/500 HTTP/1.1\r\nHost: c\r\n\r\n").await, (500, 0));
    assert_eq!(asked("GET /status/204 HTTP/1.1\r\nHost: c\r\n\r\n").await, (204, 0));
    assert_eq!(asked("OPTIONS /trailers HTTP/1.1\r\nHost: c\r\nTE: trailers\r\n\r\n").await, (200, 5));
    assert_eq!(asked("PATCH /trailers HTTP/1.1\r\nHost: c\r\n\r\n").await, (200, 5));
    assert_eq!(asked("TRACE /hints HTTP/1.1\r\nHost: c\r\n\r\n").await, (200, 4));
    // Closed afterwards, because its body has no other end.
    assert_eq!(asked("PUT /chunked/500 HTTP/1.0\r\nHost: c\r\nContent-Length: 0\r\n\r\n").await, (200, 500));
    for (method, code, request_bytes, response_bytes) in [
        ("POST", "200", 7.0, 2500.0),
        ("HEAD", "200", 0.0, 0.0),
        ("other", "200", 0.0, 14.0),
        ("GET", "404", 0.0, 0.0),
        ("GET", "500", 0.0, 0.0),
        ("GET", "204", 0.0, 0.0),
        ("OPTIONS", "200", 0.0, 5.0),
        ("PATCH", "200", 0.0, 5.0),
        ("TRACE", "200", 0.0, 4.0),
        ("PUT", "200", 0.0, 500.0),
    ] {
        let outcome =
            [("source_principal", CART), ("method", method), ("code", code), ("grpc_status", ""), ("reason", "")];
        let values = [(REQUESTS, 1.0), (REQUEST_BYTES, request_bytes), (RESPONSE_BYTES, response_bytes)];
        pair.both("http1", &outcome, &values).await;
    }
    pair.both("http1", &[], &[(IN_FLIGHT, 0.0), ("outrigger_http_request_duration_seconds_count", 10.0)]).await;
    // Two of the client's, as the one with the trailers is closed. The sidecars agreed on the protocol of theirs before the
    // first byte: that counts as found, too.
    for ((_, sidecar), connections) in pair.sides().into_iter().zip([2.0, 1.0]) {
        let samples = sidecar.metrics().await;
        assert_eq!(samples.sum(REQUESTS, &[]), 10.0, "{}: each counted once", sidecar.name);
        label_sets(&samples, &[REQUESTS, REQUEST_BYTES, RESPONSE_BYTES], HTTP);
        label_sets(&samples, &["outrigger_http_request_duration_seconds_bucket"], HTTP_HISTOGRAM);
        let buckets = samples.values("outrigger_http_request_duration_seconds_bucket", "le");
        let expected = "0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 +Inf";
        assert_eq!(buckets, expected.split(' ').map(str::to_owned).collect());
        let detected = samples.sum("outrigger_detect_total", &[("outcome", "http1")]);
        assert_eq!(detected, connections, "{}", sidecar.name);
    }
}

#[tokio::test]
async fn a_request_is_in_flight_until_its_answer_has_ended() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), Some(Protocol::Http)).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    client.send("GET /hold HTTP/1.1\r\nHost: c\r\n\r\n").await;
    let http2 = Http2::open(pair.near.outbound()).await;
    let stream = http2.begin(http::Request::get("http://c/hold").body(()).unwrap(), true).await.unwrap();
    for protocol in ["http1", "http2"] {
        pair.both(protocol, &[], &[(IN_FLIGHT, 1.0)]).await;
    }
    for (_, sidecar) in pair.sides() {
        assert_eq!(sidecar.metrics().await.sum(REQUESTS, &[]), 0.0, "counted when it has ended");
    }
    app.release();
    assert_eq!(client.response(false).await.status, 200);
    assert_eq!(stream.answer().await.unwrap().whole().await.unwrap().status, 200);
    for protocol in ["http1", "http2"] {
        pair.both(protocol, &[], &[(IN_FLIGHT, 0.0), (REQUESTS, 1.0)]).await;
    }
}

#[tokio::test]
async fn http2_is_counted_per_stream() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let client = Http2::open(pair.near.outbound()).await;
    let post = http::Request::post("http://catalog/echo").body(()).unwrap();
    assert_eq!(client.ask(post, &[b'x'; 70_000]).await.unwrap().body.len(), 70_000);
    assert_eq!(client.get("/bytes/300").await.unwrap().body.len(), 300);
    assert_eq!(client.get("/trailers").await.unwrap().body, b"hello");
    let outcome = |method| [("method", method), ("code", "200"), ("grpc_status", ""), ("reason", "")];
    let echo = [(REQUESTS, 1.0), (REQUEST_BYTES, 70_000.0), (RESPONSE_BYTES, 70_000.0)];
    pair.both("http2", &outcome("POST"), &echo).await;
    pair.both("http2", &outcome("GET"), &[(REQUESTS, 2.0), (REQUEST_BYTES, 0.0), (RESPONSE_BYTES, 305.0)]).await;
    pair.both("http2", &[], &[(IN_FLIGHT, 0.0)]).await;
    for (_, sidecar) in pair.sides() {
        let samples = sidecar.metrics().await;
        assert_eq!(samples.sum(MESSAGES, &[]), 0.0);
        assert_eq!(samples.sum("outrigger_detect_total", &[("outcome", "http2")]), 1.0, "{}", sidecar.name);
    }
}

#[tokio::test]
async fn grpc_counts_messages_of_both_directions() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), Some(Protocol::Grpc)).await;
    let client = Http2::open(pair.near.outbound()).await;
    let outcome = |status| [("method", "POST"), ("code", "200"), ("grpc_status", status), ("reason", "")];
    let (mut messages, mut calls) = (0.0, 0.0);
    // Method, messages sent, messages that come back.
    for (method, sent, received) in [("Unary", 1, 1), ("Collect", 3, 1), ("Repeat", 1, 3), ("Bidi", 4, 4)] {
        let mut stream = client.call(method, &[]).await.unwrap();
        for number in 1..=sent {
            stream.write(frame(&[b'x'; 100]), number == sent).await.unwrap();
        }
        let whole = stream.answer().await.unwrap().whole().await.unwrap();
        assert_eq!((whole.grpc_status(), whole.messages().len()), (Some("0"), received));
        messages += f64::from(sent) + received as f64;
        calls += 1.0;
        pair.both("grpc", &outcome("0"), &[(REQUESTS, calls), (MESSAGES, messages)]).await;
    }
    let bytes = |messages: i32| f64::from(messages * 105);
    pair.both("grpc", &outcome("0"), &[(REQUEST_BYTES, bytes(9)), (RESPONSE_BYTES, bytes(9))]).await;

    let failed = client.unary("Fail", b"hello").await.unwrap();
    assert_eq!((failed.status.as_u16(), failed.grpc_status()), (200, Some("5")), "trailers-only");
    pair.both("grpc", &outcome("5"), &[(REQUESTS, 1.0), (RESPONSE_BYTES, 0.0)]).await;
    pair.both("grpc", &[], &[(IN_FLIGHT, 0.0)]).await;
    for (_, sidecar) in pair.sides() {
        label_sets(&sidecar.metrics().await, &[MESSAGES], HTTP);
    }
}

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
async fn opaque_bytes_are_counted_from_caller_to_service_on_both_sides() {
    for (declared, first) in [(Some(Protocol::Tcp), &b"\x00\x01question"[..]), (None, b"\x00\x01question")] {
        let app = Backend::start().await;
        let pair = pair(app.address(), declared).await;
        let mut client = Connection::open(pair.near.outbound()).await;
        client.send(first).await;
        let mut served = app.accept().await;
        assert_eq!(served.take(10).await, first);
        served.send(b"reply").await;
        client.take(5).await;
        // While it is open already.
        let open = [(OPENED, 1.0), (RECEIVED, 10.0), (SENT, 5.0)];
        pair.both("tcp", &[("source_principal", CART), ("reason", "")], &open).await;
        for (_, sidecar) in pair.sides() {
            assert_eq!(sidecar.metrics().await.sum(CLOSED, &[]), 0.0);
        }
        served.send(vec![7; 300_000]).await;
        served.finish().await;
        client.finish().await;
        assert_eq!(client.take_to_end().await.0.len(), 300_000);
        let ended = [(OPENED, 1.0), (CLOSED, 1.0), (RECEIVED, 10.0), (SENT, 300_005.0)];
        pair.both("tcp", &[("source_principal", CART), ("reason", "")], &ended).await;
        pair.both("tcp", &[], &[("outrigger_tcp_connection_duration_seconds_count", 1.0)]).await;
        for (_, sidecar) in pair.sides() {
            let samples = sidecar.metrics().await;
            label_sets(&samples, &[OPENED, CLOSED, SENT, RECEIVED], TCP);
            assert_eq!(samples.sum(OPENED, &[]), 1.0);
            let found = if declared.is_none() { 1.0 } else { 0.0 };
            if sidecar.name == "catalog-1" {
                assert_eq!(samples.sum("outrigger_detect_total", &[("outcome", "tcp")]), found);
            }
        }
    }
}

#[tokio::test]
async fn an_applications_own_tls_is_a_connection_of_protocol_tls() {
    for declared in [Some(Protocol::Tls), None] {
        let app = Backend::start().await;
        let pair = pair(app.address(), declared).await;
        let (caller, service) = (Peer::without_certificate(), peer::self_signed("spiffe://elsewhere/service"));
        let serve = async {
            let mut served = service.accept(app.accept().await, &["h2"]).await.unwrap();
            assert_eq!(served.take(5).await, b"hello");
        };
        let call = async {
            let mut client = caller.connect(pair.near.outbound(), &["h2"]).await.unwrap();
            client.send(b"hello").await;
            client.take_to_end().await;
        };
        tokio::join!(serve, call);
        pair.both("tls", &[("reason", "")], &[(OPENED, 1.0)]).await;
        for (_, sidecar) in pair.sides() {
            let samples = sidecar.metrics().await;
            assert_eq!(samples.sum(OPENED, &[]), 1.0, "{}", sidecar.name);
            let found = samples.sum("outrigger_detect_total", &[("outcome", "tls")]);
            assert!(found == 1.0 || declared.is_some(), "{}", sidecar.name);
        }
    }
}

#[tokio::test]
async fn a_client_that_hesitates_before_its_request_is_no_opaque_connection() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    let mut client = Connection::open(pair.near.outbound()).await;
    // Longer than detection waits: the upstream is opened speculatively.
    eventually("the speculative upstream", async || (app.connections() > 0).then_some(())).await;
    assert_eq!(client.ask("GET / HTTP/1.1\r\nHost: c\r\n\r\n").await.status, 200);
    pair.both("http1", &[("code", "200"), ("reason", "")], &[(REQUESTS, 1.0)]).await;
    for (_, sidecar) in pair.sides() {
        assert_eq!(sidecar.metrics().await.sum(OPENED, &[]), 0.0, "{}", sidecar.name);
    }
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
async fn beyond_max_series_everything_is_counted_as_overflow() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let config = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: \
                  outrigger-system}\nspec: {metrics: {maxSeries: 3}}\n";
    mesh.write("mesh-config.yaml", config);
    let app = Application::start("catalog").await;
    let pair = pair_in(mesh, app.address(), None).await;
    for (index, code) in (201..=206).enumerate() {
        assert_eq!(wire::get(pair.near.outbound(), &format!("/status/{code}")).await.status, code, "{index}");
    }
    for (_, sidecar) in pair.sides() {
        let overflow = [
            ("direction", "overflow"),
            ("source_workload", "overflow"),
            ("destination_service", "overflow"),
            ("code", "overflow"),
            ("reason", "overflow"),
        ];
        counts(sidecar, &overflow, &[(REQUESTS, 3.0)]).await;
        let samples = sidecar.metrics().await;
        assert_eq!(samples.sum(REQUESTS, &[]), 6.0, "nothing is lost");
        assert_eq!(samples.select(REQUESTS, &[]).count(), 4);
    }
}

// --- what Prometheus says of it ---------------------------------------------------------------------------------

/// Runs promtool. None, and a line that says so, where it is not installed; CI has it.
fn promtool(arguments: &[&str], input: &str) -> Option<(bool, String)> {
    let mut command = Command::new("promtool");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "promtool: {error}; apt-get install prometheus");
            println!("not run: promtool {arguments:?}: {error}; it is in Debian's package prometheus");
            return None;
        }
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

#[tokio::test]
async fn promtool_finds_nothing_to_complain_of() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    // A sample of everything.
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
    Http2::open(pair.near.outbound()).await.unary("Unary", b"hello").await.unwrap();
    let mut opaque = Connection::open(pair.near.outbound()).await;
    opaque.send(b"\xff\xff\xff\xff\r\n\r\n").await;
    opaque.take_to_end().await;
    drop(opaque);
    for (_, sidecar) in pair.sides() {
        counts(sidecar, &[], &[(REQUESTS, 2.0), (CLOSED, 1.0), (MESSAGES, 2.0)]).await;
    }
    let addresses = [
        ("cart-1", pair.near.address("metrics")),
        ("catalog-1", pair.far.address("metrics")),
        ("control plane", pair.mesh.admin()),
    ];
    for (name, address) in addresses {
        let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        let answer = wire::ask(address, request).await;
        let kind = answer.header("content-type").unwrap_or_default();
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{name}: {kind}");
        let Some((clean, said)) = promtool(&["check", "metrics"], &answer.text()) else { return };
        assert!(clean && said.trim().is_empty(), "{name}: {said}");
    }
}

#[test]
fn promtool_takes_the_rules() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../k8s/prometheus");
    for entry in std::fs::read_dir(directory).unwrap() {
        let file = entry.unwrap().path();
        let Some((clean, said)) = promtool(&["check", "rules", file.to_str().unwrap()], "") else { return };
        assert!(clean && said.contains("SUCCESS"), "{file:?}: {said}");
    }
}

/// Each metric of the mesh that a rule reads exists, with the labels that the rule names.
#[tokio::test]
async fn the_rules_read_what_is_there() {
    let app = Application::start("catalog").await;
    let pair = pair(app.address(), None).await;
    assert_eq!(wire::get(pair.near.outbound(), "/").await.status, 200);
    counts(&pair.near, &[], &[(REQUESTS, 1.0)]).await;
    let text = wire::get(pair.near.address("metrics"), "/metrics").await.text();
    let known: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let rules = include_str!("../../k8s/prometheus/outrigger-rules.yaml");
    let rules: String = rules.lines().filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n");
    let words = rules.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    for word in words.filter(|word| word.starts_with("outrigger_")) {
        let name = word.strip_suffix("_bucket").unwrap_or(word);
        // Opaque connections have not been seen by this sidecar.
        assert!(known.contains(name) || name.starts_with("outrigger_tcp_"), "{word} is in no exposition: {known:?}");
    }
    eventually("the standard names of a process", async || {
        let samples = pair.near.metrics().await;
        let cpu = samples.select("process_cpu_seconds_total", &[]).count();
        let memory = samples.sum("process_resident_memory_bytes", &[]);
        (cpu == 1 && memory > 1e6).then_some(())
    })
    .await;
}
