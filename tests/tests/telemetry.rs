//! Promise: the metrics contract. Both sides of a call count it once, under the labels of the contract and with the same
//! values, whatever is spoken. Calls that fail are in `telemetry_failures.rs`.

use outrigger_api::name::Protocol;
use outrigger_tests::application::Backend;
use outrigger_tests::counted::{
    CLOSED, IN_FLIGHT, MESSAGES, OPENED, RECEIVED, REQUEST_BYTES, REQUESTS, RESPONSE_BYTES, SENT, counts, label_sets,
    pair, pair_in,
};
use outrigger_tests::grpc::{Http2, frame};
use outrigger_tests::peer;
use outrigger_tests::wire::{self, Connection};
use outrigger_tests::{Application, Mesh, MeshOptions, Peer, eventually};

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";

const HTTP: &str = "direction source_workload source_namespace source_principal destination_service \
                    destination_workload destination_namespace protocol method code grpc_status mtls reason";
const HTTP_HISTOGRAM: &str = "direction source_workload source_namespace destination_service destination_workload \
                              destination_namespace protocol code grpc_status mtls le";
const TCP: &str = "direction source_workload source_namespace source_principal destination_service \
                   destination_workload destination_namespace protocol mtls reason";

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
