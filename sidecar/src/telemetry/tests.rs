//! The contract of metrics, access log and report, asked through the public face as the data path does it. What goes
//! to a collector is in `trace_tests.rs`.

use std::net::SocketAddr;
use std::rc::Rc;

use http::{HeaderMap, Method, Uri};
use serde_json::Value;

use super::*;
use crate::outcome::Reason;

/// A writer whose bytes the test reads.
#[derive(Clone, Default)]
pub(super) struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn lines(&self) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

pub(super) fn own() -> Own {
    Own {
        instance: "catalog-0".into(),
        workload: "catalog".into(),
        namespace: "shop".into(),
        principal: "spiffe://outrigger.local/ns/shop/sa/catalog".into(),
        mark: None,
    }
}

pub(super) fn labels(direction: Direction, protocol: WireProtocol) -> EdgeLabels {
    EdgeLabels {
        direction,
        source_workload: "web".into(),
        source_namespace: "shop".into(),
        source_principal: "spiffe://outrigger.local/ns/shop/sa/web".into(),
        destination_service: "catalog.shop".into(),
        destination_workload: "catalog".into(),
        destination_namespace: "shop".into(),
        protocol,
        mtls: true,
        destination_principal: "spiffe://outrigger.local/ns/shop/sa/catalog".into(),
    }
}

fn telemetry() -> (Arc<Telemetry>, Sink) {
    let sink = Sink::default();
    (Telemetry::with_log_sink(own(), sink.clone()), sink)
}

fn inbound(telemetry: &Arc<Telemetry>) -> Arc<Edge> {
    telemetry.edge(&labels(Direction::Inbound, WireProtocol::Http1))
}

fn after(start: Instant, millis: u64) -> Instant {
    start + Duration::from_millis(millis)
}

/// The samples of one metric, without comments.
fn samples(telemetry: &Telemetry, name: &str) -> Vec<String> {
    let is_of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
    telemetry.encode().lines().filter(is_of).map(str::to_owned).collect()
}

const EDGE: &str = "direction=\"inbound\",source_workload=\"web\",source_namespace=\"shop\",\
    source_principal=\"spiffe://outrigger.local/ns/shop/sa/web\",destination_service=\"catalog.shop\",\
    destination_workload=\"catalog\",destination_namespace=\"shop\"";

#[test]
fn a_request_is_told_as_the_contract_says() {
    let (telemetry, _) = telemetry();
    let edge = inbound(&telemetry);
    let start = Instant::now();
    let record = HttpRecord::begin(&telemetry, Some(&edge), &Method::POST, start);
    let flying = samples(&telemetry, "outrigger_http_requests_in_flight");
    assert!(flying[0].ends_with("mtls=\"true\"} 1"), "{flying:?}");
    record.add_request_bytes(10);
    record.add_response_bytes(100);
    record.add_response_bytes(200);
    record.answered(200);
    record.response_ended();
    record.finish(after(start, 3));
    drop(record);
    let expected = include_str!("golden.prom");
    assert_eq!(telemetry.encode(), expected);
}

#[test]
fn a_record_is_counted_once_and_in_flight_returns_to_zero() {
    let (telemetry, _) = telemetry();
    let service = telemetry.edge(&labels(Direction::Outbound, WireProtocol::Http1));
    let endpoint = telemetry.edge(&EdgeLabels {
        destination_workload: "catalog-v2".into(),
        ..labels(Direction::Outbound, WireProtocol::Http1)
    });
    let record = Rc::new(HttpRecord::begin(&telemetry, Some(&service), &Method::GET, Instant::now()));
    record.set_edge(&endpoint);
    record.set_edge(&endpoint);
    let flying = samples(&telemetry, "outrigger_http_requests_in_flight");
    assert_eq!(flying.len(), 1);
    assert!(flying[0].contains("destination_workload=\"catalog-v2\"") && flying[0].ends_with(" 1"), "{flying:?}");
    record.answered(204);
    record.response_ended();
    record.finish(Instant::now());
    record.finish(Instant::now());
    drop(record);
    let counted = samples(&telemetry, "outrigger_http_requests_total");
    assert_eq!(counted.len(), 1);
    assert!(counted[0].contains("code=\"204\"") && counted[0].ends_with(" 1"), "{counted:?}");
    assert!(samples(&telemetry, "outrigger_http_requests_in_flight").iter().all(|line| line.ends_with(" 0")));
}

/// What the steps of one request become in the labels.
#[test]
fn endings_become_code_grpc_status_and_reason() {
    type Steps = fn(&HttpRecord);
    let cases: [(&str, WireProtocol, Steps, &str); 11] = [
        ("dropped at once", WireProtocol::Http1, |_| {}, ",,client_closed"),
        ("dropped in the body", WireProtocol::Http1, |r| r.answered(200), "200,,client_closed"),
        (
            "made by the mesh",
            WireProtocol::Http1,
            |r| {
                r.failed(Reason::DestinationUnavailable, String::new);
                r.answered(503);
                r.response_ended();
            },
            "503,,destination_unavailable",
        ),
        (
            "the first failure stays",
            WireProtocol::Http1,
            |r| {
                r.failed(Reason::UpstreamReset, String::new);
                r.failed(Reason::Internal, || panic!("not made for the second"));
            },
            ",,upstream_reset",
        ),
        (
            "cut behind the head",
            WireProtocol::Http1,
            |r| {
                r.answered(200);
                r.failed(Reason::UpstreamTruncated, String::new);
            },
            "200,,upstream_truncated",
        ),
        (
            "grpc ok",
            WireProtocol::Grpc,
            |r| {
                r.answered(200);
                r.grpc_status(0);
                r.response_ended();
            },
            "200,0,",
        ),
        (
            "grpc with a number that gRPC does not know",
            WireProtocol::Grpc,
            |r| {
                r.answered(200);
                r.grpc_status(99);
                r.response_ended();
            },
            "200,2,",
        ),
        (
            "grpc trailers-only by the mesh",
            WireProtocol::Grpc,
            |r| {
                r.failed(Reason::ConnectTimeout, String::new);
                r.answered(200);
                r.grpc_status(14);
                r.response_ended();
            },
            "200,14,connect_timeout",
        ),
        (
            "grpc cut without trailers",
            WireProtocol::Grpc,
            |r| {
                r.answered(200);
                r.failed(Reason::UpstreamReset, String::new);
            },
            "200,14,upstream_reset",
        ),
        ("grpc cancelled behind the head", WireProtocol::Grpc, |r| r.answered(200), "200,1,client_closed"),
        ("grpc cancelled before", WireProtocol::Grpc, |_| {}, ",,client_closed"),
    ];
    for (case, protocol, steps, expected) in cases {
        let (telemetry, _) = telemetry();
        let edge = telemetry.edge(&labels(Direction::Inbound, protocol));
        steps(&HttpRecord::begin(&telemetry, Some(&edge), &Method::GET, Instant::now()));
        let counted = samples(&telemetry, "outrigger_http_requests_total");
        let label = |name: &str| {
            let rest = counted[0].split_once(&format!("{name}=\"")).unwrap().1;
            rest.split_once('"').unwrap().0.to_owned()
        };
        assert_eq!([label("code"), label("grpc_status"), label("reason")].join(","), expected, "{case}");
        assert!(counted.len() == 1 && counted[0].ends_with(" 1"), "{case}");
    }
}

#[test]
fn grpc_messages_of_both_directions_are_one_count() {
    let (telemetry, _) = telemetry();
    let edge = telemetry.edge(&labels(Direction::Inbound, WireProtocol::Grpc));
    let record = HttpRecord::begin(&telemetry, Some(&edge), &Method::POST, Instant::now());
    let mut frames = GrpcFrames::new();
    record.add_grpc_messages(frames.feed(&[0, 0, 0, 0, 0]));
    record.add_grpc_messages(frames.feed(&[0, 0, 0, 0, 1, 9, 0]));
    record.answered(200);
    record.grpc_status(0);
    record.response_ended();
    drop(record);
    assert!(samples(&telemetry, "outrigger_grpc_messages_total")[0].ends_with(" 2"));
}

#[test]
fn a_request_that_found_no_edge_is_counted_as_unknown() {
    let (telemetry, _) = telemetry();
    let record = HttpRecord::begin(&telemetry, None, &Method::GET, Instant::now());
    record.failed(Reason::UnknownDestination, String::new);
    record.answered(502);
    record.response_ended();
    drop(record);
    let counted = samples(&telemetry, "outrigger_http_requests_total");
    assert!(counted[0].contains("direction=\"outbound\",source_workload=\"catalog\""), "{counted:?}");
    assert!(counted[0].contains("destination_service=\"unknown\""), "{counted:?}");
    assert!(counted[0].contains("reason=\"unknown_destination\"") && counted[0].ends_with(" 1"), "{counted:?}");
}

#[test]
fn tcp_connections_are_told_while_open_and_when_closed() {
    let (telemetry, _) = telemetry();
    let edge = telemetry.edge(&labels(Direction::Inbound, WireProtocol::Tcp));
    let start = Instant::now();
    let record = TcpRecord::begin(&telemetry, &edge, start);
    record.add_received(7);
    record.add_sent(1000);
    let tail = "protocol=\"tcp\",mtls=\"true\",reason=\"\"}";
    let sample = |name: &str, value: &str| format!("{name}{{{EDGE},{tail} {value}");
    for (name, value) in
        [("connections_opened_total", "1"), ("sent_bytes_total", "1000"), ("received_bytes_total", "7")]
    {
        let name = format!("outrigger_tcp_{name}");
        assert_eq!(samples(&telemetry, &name), [sample(&name, value)]);
    }
    assert!(samples(&telemetry, "outrigger_tcp_connections_closed_total").is_empty());
    record.failed(Reason::UpstreamReset, String::new);
    record.finish(after(start, 20_000));
    drop(record);
    drop(TcpRecord::begin(&telemetry, &edge, Instant::now()));
    let closed = samples(&telemetry, "outrigger_tcp_connections_closed_total");
    assert_eq!(closed.len(), 2);
    assert!(closed[0].ends_with("reason=\"\"} 1") && closed[1].ends_with("reason=\"upstream_reset\"} 1"), "{closed:?}");
    let sum = samples(&telemetry, "outrigger_tcp_connection_duration_seconds_count");
    assert!(sum[0].ends_with(" 2") && !sum[0].contains("reason") && !sum[0].contains("principal"), "{sum:?}");
}

#[test]
fn beyond_the_cap_all_labels_say_overflow() {
    let (telemetry, _) = telemetry();
    telemetry.configure(&MeshSettings { max_series: 1, ..MeshSettings::default() }, "");
    let edge = inbound(&telemetry);
    for status in [200, 201, 202] {
        let record = HttpRecord::begin(&telemetry, Some(&edge), &Method::GET, Instant::now());
        record.answered(status);
        record.response_ended();
    }
    let other = telemetry.edge(&labels(Direction::Outbound, WireProtocol::Http1));
    let record = HttpRecord::begin(&telemetry, Some(&other), &Method::GET, Instant::now());
    record.answered(200);
    record.response_ended();
    drop(record);
    let counted = samples(&telemetry, "outrigger_http_requests_total");
    assert_eq!(counted.len(), 2, "{counted:?}");
    assert!(counted[0].contains("code=\"200\"") && counted[0].ends_with(" 1"));
    let overflow = counted[1].matches("=\"overflow\"").count();
    assert!(overflow == 13 && counted[1].ends_with(" 3"), "{counted:?}");
    assert_eq!(samples(&telemetry, "outrigger_http_request_duration_seconds_count").len(), 2);
}

#[test]
fn edges_that_differ_in_no_label_share_their_series() {
    let (telemetry, _) = telemetry();
    for principal in ["a", "b"] {
        let edge = telemetry.edge(&EdgeLabels {
            destination_principal: principal.into(),
            ..labels(Direction::Outbound, WireProtocol::Http1)
        });
        let record = HttpRecord::begin(&telemetry, Some(&edge), &Method::GET, Instant::now());
        record.answered(200);
        record.response_ended();
    }
    let counted = samples(&telemetry, "outrigger_http_requests_total");
    assert!(counted.len() == 1 && counted[0].ends_with(" 2"), "{counted:?}");
}

#[test]
fn gauges_are_absent_until_something_is_known() {
    let (telemetry, _) = telemetry();
    let value = |name: &str| -> Option<f64> {
        samples(&telemetry, name).first().map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
    };
    assert_eq!(value("outrigger_certificate_expiry_seconds"), None);
    assert_eq!(value("outrigger_snapshot_age_seconds"), None);
    assert_eq!(value("outrigger_control_plane_connected"), Some(0.0));

    let now = SystemTime::now();
    telemetry.set_certificate_not_after(unix_millis(now) / 1000 + 3600);
    telemetry.confirm_snapshot(now - Duration::from_secs(100));
    let left = value("outrigger_certificate_expiry_seconds").unwrap();
    assert!((3500.0..=3600.0).contains(&left), "{left}");
    assert!(value("outrigger_snapshot_age_seconds").unwrap() >= 100.0);

    telemetry.set_control_plane_connected(true);
    assert_eq!(value("outrigger_control_plane_connected"), Some(1.0));
    assert_eq!(value("outrigger_snapshot_age_seconds"), Some(0.0));
    telemetry.set_control_plane_connected(false);
    assert!(value("outrigger_snapshot_age_seconds").unwrap() < 50.0);
    telemetry.set_certificate_not_after(unix_millis(now) / 1000 - 10);
    assert!(value("outrigger_certificate_expiry_seconds").unwrap() <= -10.0);

    for outcome in Detected::ALL {
        telemetry.detected(outcome);
    }
    telemetry.detected(Detected::ServerFirst);
    let detected = samples(&telemetry, "outrigger_detect_total");
    assert_eq!(detected.len(), 5);
    assert!(detected.contains(&"outrigger_detect_total{outcome=\"server_first\"} 2".to_owned()), "{detected:?}");
}

fn describe(record: &HttpRecord, uri: &str, host: &str) {
    let mut headers = HeaderMap::new();
    headers.insert("host", http::HeaderValue::from_bytes(host.as_bytes()).unwrap());
    let value = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
    headers.insert("traceparent", value.parse().unwrap());
    let uri: Uri = uri.parse().unwrap();
    record.describe(&Method::GET, &uri, &headers, Some(SocketAddr::from(([10, 0, 0, 1], 4000))));
}

#[tokio::test]
async fn a_failure_is_one_line_and_a_success_none() {
    let (telemetry, sink) = telemetry();
    let edge = inbound(&telemetry);
    let start = Instant::now();
    let good = HttpRecord::begin(&telemetry, Some(&edge), &Method::GET, start);
    good.answered(404);
    good.response_ended();
    drop(good);
    let bad = HttpRecord::begin(&telemetry, Some(&edge), &Method::GET, start);
    describe(&bad, "/books/1?token=secret", "catalog.shop");
    bad.set_upstream(SocketAddr::from(([10, 0, 0, 2], 8080)));
    bad.set_policy("AuthorizationPolicy/shop/readers", Some(1));
    bad.failed(Reason::ConnectionRefused, || "10.0.0.2:8080 refused".to_owned());
    bad.answered(503);
    bad.add_response_bytes(42);
    bad.response_ended();
    bad.finish(after(start, 1500));
    telemetry.flush().await;
    let lines = sink.lines();
    assert_eq!(lines.len(), 1);
    let expected = serde_json::json!({
        "timestamp": lines[0]["timestamp"], "log": "access", "direction": "inbound", "protocol": "http1",
        "method": "GET", "path": "/books/1", "authority": "catalog.shop", "status": 503, "grpc_status": null,
        "sni": "", "reason": "connection_refused", "policy": "AuthorizationPolicy/shop/readers", "rule": "1", "route": "", "duration": 1.5,
        "request_bytes": 0, "response_bytes": 42, "source_workload": "web", "source_namespace": "shop",
        "source_principal": "spiffe://outrigger.local/ns/shop/sa/web", "destination_service": "catalog.shop",
        "destination_workload": "catalog", "destination_namespace": "shop",
        "destination_principal": "spiffe://outrigger.local/ns/shop/sa/catalog", "mtls": true,
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "downstream": "10.0.0.1:4000",
        "upstream": "10.0.0.2:8080", "detail": "10.0.0.2:8080 refused",
    });
    assert_eq!(lines[0], expected);
}

#[tokio::test]
async fn strangers_who_are_refused_are_one_line_per_reason_and_second() {
    let (telemetry, sink) = telemetry();
    let stranger =
        EdgeLabels { source_principal: String::new(), mtls: false, ..labels(Direction::Inbound, WireProtocol::Tcp) };
    let edge = telemetry.edge(&stranger);
    let known = telemetry.edge(&labels(Direction::Inbound, WireProtocol::Tcp));
    let refuse = |edge: &Arc<Edge>, reason| {
        let record = TcpRecord::begin(&telemetry, edge, Instant::now());
        record.failed(reason, || format!("\u{9b}2J\n{}", "x".repeat(100_000)));
    };
    for _ in 0..3 {
        refuse(&known, Reason::TlsHandshake);
    }
    let begun = Instant::now();
    for _ in 0..10_000 {
        refuse(&edge, Reason::MtlsRequired);
        refuse(&edge, Reason::TlsHandshake);
    }
    telemetry.flush().await;
    let lines = sink.lines();
    let of = |reason: &str| lines.iter().filter(|line| line["reason"] == reason).count();
    // On a slow machine more than a second may have gone by.
    let seconds = 1 + begun.elapsed().as_secs() as usize;
    assert_eq!(lines.iter().filter(|line| line["source_principal"] != "").count(), 3, "peers are not held back");
    assert!((1..=seconds).contains(&of("mtls_required")) && of("tls_handshake") <= 3 + seconds, "{}", lines.len());
    assert!(lines.iter().all(|line| line["detail"].as_str().unwrap().len() <= 2048));
    while begun.elapsed() < Duration::from_secs(1) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    refuse(&edge, Reason::MtlsRequired);
    telemetry.flush().await;
    let lines = sink.lines();
    let told: u64 = lines.iter().filter_map(|line| line["suppressed"].as_u64()).sum();
    let written = lines.iter().filter(|line| line["source_principal"] == "").count() as u64;
    assert!(told + written >= 10_001, "{told} + {written}");
}

#[tokio::test]
async fn a_refused_connection_names_its_caller() {
    let (telemetry, sink) = telemetry();
    let edge = telemetry.edge(&labels(Direction::Inbound, WireProtocol::Tcp));
    let record = TcpRecord::begin(&telemetry, &edge, Instant::now());
    record.downstream(SocketAddr::from(([10, 0, 0, 1], 4000)));
    record.failed(Reason::MtlsRequired, || "plaintext".to_owned());
    drop(record);
    telemetry.flush().await;
    let lines = sink.lines();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["downstream"], "10.0.0.1:4000");
    assert_eq!(lines[0]["upstream"], serde_json::Value::Null);
}

#[tokio::test]
async fn hostile_bytes_do_not_break_a_line() {
    let (telemetry, sink) = telemetry();
    let edge = inbound(&telemetry);
    let hosts = ["a\"},{\"reason\":\"x", "back\\slash", "tab\there", "ümlaut"];
    for host in hosts {
        let record = HttpRecord::begin(&telemetry, Some(&edge), &Method::GET, Instant::now());
        describe(&record, "/%0a%22\"}{\\'", host);
        record
            .failed(Reason::BadRequest, || "line\none \u{0} \u{2028} \u{1b}[2J\r\n{\"reason\":\"forged\"}".to_owned());
    }
    let tcp = telemetry.edge(&labels(Direction::Inbound, WireProtocol::Tcp));
    TcpRecord::begin(&telemetry, &tcp, Instant::now()).failed(Reason::TlsHandshake, || "a\nb".to_owned());
    telemetry.flush().await;
    let raw = sink.0.lock().unwrap().clone();
    assert!(raw.iter().all(|byte| *byte == b'\n' || (*byte >= 0x20 && *byte != 0x7f)));
    let lines = sink.lines();
    assert_eq!(lines.len(), hosts.len() + 1);
    for (line, host) in lines.iter().zip(hosts) {
        assert_eq!(line["reason"], "bad_request");
        assert_eq!(line["path"], "/%0a%22\"}{\\'");
        // A host that is not visible ASCII is none.
        assert_eq!(line["authority"], if host.is_ascii() { host } else { "" });
    }
    assert_eq!(lines[hosts.len()]["reason"], "tls_handshake");
}

#[tokio::test]
async fn the_mode_decides_what_is_logged() {
    for (mode, expected) in [(AccessLog::Off, 0), (AccessLog::Failures, 1), (AccessLog::All, 3)] {
        let (telemetry, sink) = telemetry();
        telemetry.configure(&MeshSettings { access_log: mode, ..MeshSettings::default() }, "");
        let edge = inbound(&telemetry);
        for status in [200, 403, 500] {
            let record = HttpRecord::begin(&telemetry, Some(&edge), &Method::GET, Instant::now());
            record.answered(status);
            record.response_ended();
        }
        telemetry.flush().await;
        assert_eq!(sink.lines().len(), expected, "{mode:?}");
    }
}

/// A reader of stderr that has stopped reading.
struct Stuck(std::sync::mpsc::Receiver<()>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stuck_reader_of_the_log_costs_lines_and_no_time() {
    let (release, stuck) = std::sync::mpsc::channel();
    let telemetry = Telemetry::with_log_sink(own(), Stuck(stuck));
    let edge = inbound(&telemetry);
    for _ in 0..6000 {
        drop(HttpRecord::begin(&telemetry, Some(&edge), &Method::GET, Instant::now()));
    }
    let dropped = samples(&telemetry, "outrigger_access_log_dropped_total");
    assert!(!dropped[0].ends_with(" 0"), "{dropped:?}");
    assert!(samples(&telemetry, "outrigger_http_requests_total")[0].ends_with(" 6000"));
    drop(release);
}

#[test]
fn a_report_has_what_happened_since_the_last_one() {
    let (telemetry, _) = telemetry();
    let (http, tcp) = (inbound(&telemetry), telemetry.edge(&labels(Direction::Outbound, WireProtocol::Tcp)));
    assert!(telemetry.report_window().edges.is_empty());
    telemetry.set_certificate_not_after(1_800_000_000);
    let start = Instant::now();
    for (status, millis) in [(200, 0), (200, 3), (404, 3), (503, 20_000)] {
        let record = HttpRecord::begin(&telemetry, Some(&http), &Method::GET, start);
        record.add_request_bytes(1);
        record.add_response_bytes(10);
        record.answered(status);
        record.response_ended();
        record.finish(after(start, millis));
    }
    for reason in [None, Some(Reason::ClientClosed), Some(Reason::UpstreamReset)] {
        let record = TcpRecord::begin(&telemetry, &tcp, start);
        record.add_sent(5);
        record.add_received(6);
        if let Some(reason) = reason {
            record.failed(reason, String::new);
        }
    }
    let report = telemetry.report_window();
    assert_eq!((report.instance.as_str(), report.certificate_not_after), ("catalog-0", 1_800_000_000));
    let told = |inbound: bool| report.edges.iter().find(|edge| edge.inbound == inbound).unwrap();
    let (http, tcp) = (told(true), told(false));
    assert_eq!((http.requests, http.failures, http.sent_bytes, http.received_bytes), (4, 1, 40, 4));
    assert_eq!(http.latency_buckets, [1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!((http.protocol.as_str(), http.mtls), ("http1", true));
    assert_eq!(http.source_principal, "spiffe://outrigger.local/ns/shop/sa/web");
    assert_eq!(http.destination_principal, "spiffe://outrigger.local/ns/shop/sa/catalog");
    assert_eq!((tcp.requests, tcp.failures, tcp.sent_bytes, tcp.received_bytes), (3, 1, 15, 18));
    assert!(telemetry.report_window().edges.is_empty());
}

#[test]
fn a_path_is_copied_only_for_those_who_want_it() {
    let (telemetry, _) = telemetry();
    telemetry.configure(&MeshSettings { access_log: AccessLog::Off, ..MeshSettings::default() }, "");
    let edge = inbound(&telemetry);
    let record = HttpRecord::begin(&telemetry, Some(&edge), &Method::GET, Instant::now());
    record.failed(Reason::Internal, || panic!("nobody reads it"));
    let mut headers = HeaderMap::new();
    record.trace_server(&mut headers);
    record.attempt(&mut headers, SocketAddr::from(([10, 0, 0, 2], 1)), Instant::now());
    assert!(headers.is_empty());
}

/// The documentation is the contract's printed form: nothing that can be seen is missing from it.
#[test]
fn the_documentation_names_every_metric_label_reason_and_outcome() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    let has = |word: &str| assert!(text.contains(&format!("`{word}`")), "docs/metrics.md lacks `{word}`");
    for about in about::ALL {
        has(about.name);
        about.labels.iter().for_each(|label| has(label));
    }
    for reason in Reason::ALL {
        let row = reason.row();
        let line =
            format!("| `{}` | {} | {} | `{}` | {} |", row.word, row.status, row.grpc, row.proxy_status, row.title);
        assert!(text.contains(&line), "docs/metrics.md lacks the row\n{line}");
    }
    Detected::ALL.iter().for_each(|outcome| has(outcome.as_str()));
}

/// The names that the shipped rules read are names that exist.
#[test]
fn the_shipped_rules_use_metrics_and_labels_that_exist() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../k8s/prometheus/outrigger-rules.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    for name in text.split(word).filter(|name| name.starts_with("outrigger_")) {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        let elsewhere = ["outrigger_build_info"];
        assert!(about::ALL.iter().any(|about| about.name == base) || elsewhere.contains(&base), "{name}");
    }
}
