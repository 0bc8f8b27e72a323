//! Which requests and connections become a line of the access log, what is in the line, and what hostile bytes, strangers
//! in a crowd and a log that is not read cost.

use std::net::SocketAddr;

use http::{HeaderMap, Method, Uri};

use super::*;
use crate::outcome::Reason;

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

fn describe(record: &HttpRecord, uri: &str, host: &str) {
    let mut headers = HeaderMap::new();
    headers.insert("host", http::HeaderValue::from_bytes(host.as_bytes()).unwrap());
    let value = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
    headers.insert("traceparent", value.parse().unwrap());
    let uri: Uri = uri.parse().unwrap();
    record.describe(&Method::GET, &uri, &headers, Some(SocketAddr::from(([10, 0, 0, 1], 4000))));
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
