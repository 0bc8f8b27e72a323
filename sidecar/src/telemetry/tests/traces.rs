//! Traces end to end: records on one side, a collector that speaks OTLP over gRPC on the other.

use std::net::SocketAddr;

use http::{HeaderMap, Method, Uri};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use super::*;
use crate::outcome::Reason;

struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.send(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// A collector on a free port, and what it was sent.
async fn collector() -> (String, mpsc::UnboundedReceiver<ExportTraceServiceRequest>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::unbounded_channel();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let service = TraceServiceServer::new(Collector(sender));
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    (endpoint, receiver)
}

fn mesh(endpoint: &str, percentage: f64) -> MeshSettings {
    MeshSettings {
        otlp_endpoint: Some(endpoint.to_owned()),
        random_sampling_percentage: percentage,
        ..MeshSettings::default()
    }
}

fn telemetry(endpoint: &str, percentage: f64) -> Arc<Telemetry> {
    let telemetry = Telemetry::with_log_sink(own(), Sink::default());
    telemetry.configure(&mesh(endpoint, percentage), "catalog");
    telemetry
}

const APPLICATION: &str = "10.0.0.2:8080";
const OTHER: &str = "10.0.0.3:8080";
const CALLER: &str = "10.0.0.1:4000";

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn begin(
    telemetry: &Arc<Telemetry>,
    labels: &EdgeLabels,
    method: &Method,
    uri: &str,
    headers: &HeaderMap,
) -> HttpRecord {
    let record = HttpRecord::begin(telemetry, Some(&telemetry.edge(labels)), method, Instant::now());
    record.describe(method, &uri.parse::<Uri>().unwrap(), headers, Some(address(CALLER)));
    record
}

fn end(record: HttpRecord, status: u16) {
    record.answered(status);
    record.response_ended();
    drop(record);
}

fn spans(request: &ExportTraceServiceRequest) -> Vec<Span> {
    let scopes = request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
    scopes.flat_map(|scope| scope.spans.clone()).collect()
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|attribute| attribute.key == key)?.value.clone()?.value?;
    Some(match value {
        any_value::Value::StringValue(text) => text,
        any_value::Value::IntValue(number) => number.to_string(),
        any_value::Value::BoolValue(yes) => yes.to_string(),
        other => panic!("{key} is {other:?}"),
    })
}

/// The span id that a traceparent names.
fn named(headers: &HeaderMap) -> (String, String, String) {
    let parts: Vec<_> = headers["traceparent"].to_str().unwrap().split('-').map(str::to_owned).collect();
    (parts[1].clone(), parts[2].clone(), parts[3].clone())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn the_client_span_is_the_parent_of_the_server_span() {
    let (endpoint, mut received) = collector().await;
    let (web, catalog) = (telemetry(&endpoint, 100.0), telemetry(&endpoint, 0.0));
    let mut headers = HeaderMap::new();
    headers.insert("host", "catalog.shop:80".parse().unwrap());
    headers.insert("user-agent", "curl/8".parse().unwrap());

    let out = begin(&web, &labels(Direction::Outbound, WireProtocol::Http1), &Method::GET, "/books/7?x=1", &headers);
    out.attempt(&mut headers, address(APPLICATION), Instant::now());
    let (trace, client, flags) = named(&headers);
    assert_eq!(flags, "01");

    let served =
        begin(&catalog, &labels(Direction::Inbound, WireProtocol::Http1), &Method::GET, "/books/7?x=1", &headers);
    served.trace_server(&mut headers);
    let (same, server, _) = named(&headers);
    assert_eq!(same, trace);
    end(served, 404);
    end(out, 404);
    tokio::join!(web.flush(), catalog.flush());

    let (first, second) = (received.recv().await.unwrap(), received.recv().await.unwrap());
    let (of_resource, of_scope) =
        (&first.resource_spans[0].schema_url, &first.resource_spans[0].scope_spans[0].schema_url);
    assert_eq!((of_resource, of_scope), (of_scope, &"https://opentelemetry.io/schemas/1.44.0".to_owned()));
    let resource = &first.resource_spans[0].resource.as_ref().unwrap().attributes;
    for (key, value) in
        [("service.name", "catalog"), ("service.namespace", "shop"), ("service.instance.id", "catalog-0")]
    {
        assert_eq!(text(resource, key).as_deref(), Some(value));
    }
    let all = [spans(&first), spans(&second)].concat();
    assert_eq!(all.len(), 2);
    let of = |id: &str| all.iter().find(|span| hex(&span.span_id) == id).unwrap();
    let (client, server) = (of(&client), of(&server));
    assert_eq!((client.kind, server.kind), (3, 2));
    assert_eq!((hex(&client.trace_id), hex(&server.trace_id)), (trace.clone(), trace));
    assert_eq!(server.parent_span_id, client.span_id);
    assert!(client.parent_span_id.iter().all(|byte| *byte == 0));
    assert_eq!((client.name.as_str(), server.name.as_str()), ("GET", "GET"));
    assert!(client.start_time_unix_nano <= client.end_time_unix_nano);
    // A 404 is the client's error and not the server's.
    assert_eq!(client.status.as_ref().map(|status| status.code), Some(2));
    assert_ne!(server.status.as_ref().map(|status| status.code), Some(2));

    type Attributes<'a> = &'a [(&'a str, Option<&'a str>)];
    let expected: [(&Span, Attributes); 2] = [
        (
            server,
            &[
                ("http.request.method", Some("GET")),
                ("http.response.status_code", Some("404")),
                ("url.scheme", Some("http")),
                ("url.path", Some("/books/7")),
                ("url.full", None),
                ("server.address", Some("catalog.shop")),
                ("server.port", Some("80")),
                ("client.address", Some("10.0.0.1")),
                ("network.peer.address", Some("10.0.0.1")),
                ("network.protocol.version", Some("1.1")),
                ("user_agent.original", Some("curl/8")),
                ("error.type", None),
            ],
        ),
        (
            client,
            &[
                ("url.full", Some("http://catalog.shop:80/books/7")),
                ("network.peer.address", Some("10.0.0.2")),
                ("network.peer.port", Some("8080")),
                ("error.type", Some("404")),
                ("http.request.resend_count", None),
                ("outrigger.mtls", Some("true")),
            ],
        ),
    ];
    for (span, attributes) in expected {
        for (key, value) in attributes {
            assert_eq!(text(&span.attributes, key).as_deref(), *value, "{key}");
        }
    }
}

#[tokio::test]
async fn each_attempt_is_a_span_of_its_own() {
    let (endpoint, mut received) = collector().await;
    let telemetry = telemetry(&endpoint, 100.0);
    let original = HeaderMap::new();
    let record = begin(&telemetry, &labels(Direction::Outbound, WireProtocol::Http1), &Method::GET, "/", &original);
    let mut names = Vec::new();
    let mut headers = original.clone();
    for (upstream, fails) in [(OTHER, true), (APPLICATION, false)] {
        headers = if fails { headers } else { original.clone() };
        record.attempt(&mut headers, address(upstream), Instant::now());
        names.push(named(&headers));
        if fails {
            record.attempt_failed(Reason::ConnectionRefused, Instant::now());
        }
    }
    end(record, 200);
    telemetry.flush().await;
    assert_eq!(names[0].0, names[1].0);
    let all = spans(&received.recv().await.unwrap());
    assert_eq!(all.iter().map(|span| hex(&span.span_id)).collect::<Vec<_>>(), [names[0].1.clone(), names[1].1.clone()]);
    let told = |key: &str| all.iter().map(|span| text(&span.attributes, key)).collect::<Vec<_>>();
    assert_eq!(told("http.request.resend_count"), [None, Some("1".into())]);
    assert_eq!(told("error.type"), [Some("connection_refused".into()), None]);
    assert_eq!(told("network.peer.address"), [Some("10.0.0.3".into()), Some("10.0.0.2".into())]);
    assert_eq!(told("http.response.status_code"), [None, Some("200".into())]);
}

#[tokio::test]
async fn grpc_spans_carry_the_method_and_the_status() {
    let (endpoint, mut received) = collector().await;
    let telemetry = telemetry(&endpoint, 100.0);
    for (path, status) in [("/shop.v1.Catalog/List", 14), ("/shop.v1.Catalog/List", 5), ("/any/thing/else", 0)] {
        let mut headers = HeaderMap::new();
        let labels = labels(Direction::Inbound, WireProtocol::Grpc);
        let record = begin(&telemetry, &labels, &Method::POST, path, &headers);
        record.trace_server(&mut headers);
        record.grpc_status(status);
        end(record, 200);
    }
    telemetry.flush().await;
    let all = spans(&received.recv().await.unwrap());
    let names: Vec<_> = all.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["shop.v1.Catalog/List", "shop.v1.Catalog/List", "POST"]);
    let told = |key: &str| all.iter().map(|span| text(&span.attributes, key).unwrap_or_default()).collect::<Vec<_>>();
    assert_eq!(told("rpc.system.name"), ["grpc"; 3]);
    assert_eq!(told("rpc.method"), ["shop.v1.Catalog/List", "shop.v1.Catalog/List", "_OTHER"]);
    assert_eq!(told("rpc.response.status_code"), ["UNAVAILABLE", "NOT_FOUND", "OK"]);
    assert_eq!(told("error.type"), ["UNAVAILABLE", "", ""]);
}

#[tokio::test]
async fn sampling_follows_the_caller_and_else_the_percentage() {
    let (endpoint, mut received) = collector().await;
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let with_flag = |flag: &str| Some(format!("00-{TRACE}-00f067aa0ba902b7-{flag}"));
    for (percentage, came, sampled) in [
        (0.0, None, false),
        (100.0, None, true),
        (0.0, with_flag("01"), true),
        (100.0, with_flag("00"), false),
        (0.0, Some("garbage".to_owned()), false),
        (100.0, Some("garbage".to_owned()), true),
    ] {
        for kind in [Direction::Inbound, Direction::Outbound] {
            let telemetry = telemetry(&endpoint, percentage);
            let mut headers = HeaderMap::new();
            if let Some(came) = &came {
                headers.insert("traceparent", came.parse().unwrap());
            }
            let record = begin(&telemetry, &labels(kind, WireProtocol::Http1), &Method::GET, "/", &headers);
            match kind {
                Direction::Inbound => record.trace_server(&mut headers),
                Direction::Outbound => {
                    record.attempt(&mut headers, address(OTHER), Instant::now());
                    record.attempt(&mut headers, address(APPLICATION), Instant::now());
                }
            }
            let (trace, span, flags) = named(&headers);
            assert_eq!(flags, if sampled { "01" } else { "00" }, "{percentage} {came:?}");
            assert_eq!(trace == TRACE, came.as_ref().is_some_and(|came| came.starts_with("00-")));
            if came == with_flag("00") {
                assert_eq!(headers["traceparent"].to_str().unwrap(), came.clone().unwrap());
            }
            end(record, 200);
            telemetry.flush().await;
            if sampled {
                let last = spans(&received.try_recv().unwrap()).pop().unwrap();
                assert_eq!(hex(&last.span_id), span);
            }
            assert!(received.try_recv().is_err());
        }
    }
}

#[tokio::test]
async fn a_new_endpoint_takes_over_and_none_ends_tracing() {
    let (first, mut at_first) = collector().await;
    let (second, mut at_second) = collector().await;
    let telemetry = telemetry(&first, 100.0);
    let request = || {
        let mut headers = HeaderMap::new();
        let labels = labels(Direction::Inbound, WireProtocol::Http1);
        let record = begin(&telemetry, &labels, &Method::GET, "/", &headers);
        record.trace_server(&mut headers);
        end(record, 200);
        headers
    };
    request();
    telemetry.flush().await;
    assert_eq!(spans(&at_first.try_recv().unwrap()).len(), 1);

    telemetry.configure(&mesh(&second, 100.0), "books");
    request();
    telemetry.flush().await;
    let moved = at_second.try_recv().unwrap();
    let resource = &moved.resource_spans[0].resource.as_ref().unwrap().attributes;
    assert_eq!(text(resource, "service.name").as_deref(), Some("books"));

    telemetry.configure(&MeshSettings::default(), "books");
    assert!(request().is_empty());
    telemetry.configure(&mesh("https://collector:4317", 100.0), "books");
    assert!(request().is_empty());
    telemetry.flush().await;
    assert!(at_first.try_recv().is_err() && at_second.try_recv().is_err());
}

#[tokio::test]
async fn an_absent_collector_costs_spans_and_nothing_else() {
    // A port that was free a moment ago and on which nobody listens.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let telemetry = telemetry(&endpoint, 100.0);
    for _ in 0..10 {
        let mut headers = HeaderMap::new();
        let labels = labels(Direction::Inbound, WireProtocol::Http1);
        let record = begin(&telemetry, &labels, &Method::GET, "/", &headers);
        record.trace_server(&mut headers);
        end(record, 200);
    }
    telemetry.flush().await;
    let encoded = telemetry.encode();
    assert!(encoded.contains("\noutrigger_spans_dropped_total 10\n"), "{encoded}");
    assert!(encoded.contains("\noutrigger_spans_exported_total 0\n"));
}

#[test]
fn ids_are_never_zero_and_differ() {
    let telemetry = Telemetry::with_log_sink(own(), Sink::default());
    let ids: std::collections::HashSet<u128> = (0..1000).map(|_| telemetry.new_trace_id()).collect();
    assert!(ids.len() == 1000 && !ids.contains(&0));
}
