//! The report to the control plane: what happened since the last one, per edge.

use http::Method;

use super::*;
use crate::outcome::Reason;

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
