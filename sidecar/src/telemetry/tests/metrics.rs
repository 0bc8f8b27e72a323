//! What requests, connections and gauges become in `/metrics`: names, labels, and each thing counted once.

use std::rc::Rc;

use http::Method;

use super::*;
use crate::outcome::Reason;

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
    let expected = include_str!("../golden.prom");
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

const EDGE: &str = "direction=\"inbound\",source_workload=\"web\",source_namespace=\"shop\",\
    source_principal=\"spiffe://outrigger.local/ns/shop/sa/web\",destination_service=\"catalog.shop\",\
    destination_workload=\"catalog\",destination_namespace=\"shop\"";

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
