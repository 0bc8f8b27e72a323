//! A collector of traces: takes OTLP over gRPC, as Jaeger does on 4317, and shows the spans in plain words.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::{Span as Wire, span::SpanKind};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status};

use crate::eventually::eventually;

/// A running collector. Ends when it is dropped.
pub struct Collector {
    endpoint: String,
    spans: Spans,
    _tasks: JoinSet<()>,
}

type Spans = Arc<Mutex<Vec<Span>>>;

/// One span as it was exported; ids in hexadecimal, numbers as text.
#[derive(Clone, Debug)]
pub struct Span {
    pub name: String,
    /// `CLIENT`, `SERVER` ...
    pub kind: &'static str,
    pub trace: String,
    pub id: String,
    /// Empty without one.
    pub parent: String,
    pub resource: BTreeMap<String, String>,
    pub attributes: BTreeMap<String, String>,
    pub error: bool,
    /// Unix nanoseconds.
    pub start: u64,
    pub end: u64,
}

impl Span {
    /// `service.name`
    pub fn service(&self) -> &str {
        self.resource.get("service.name").map_or("", String::as_str)
    }

    /// The empty string when it is absent.
    pub fn attribute(&self, key: &str) -> &str {
        self.attributes.get(key).map_or("", String::as_str)
    }
}

impl Collector {
    pub async fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let spans = Spans::default();
        let service = TraceServiceServer::new(Service(spans.clone()));
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Collector { endpoint, spans, _tasks: tasks }
    }

    /// `http://host:port`
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// All that came so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap().clone()
    }

    /// Waits until a trace has so many spans, and gives them by their beginning.
    pub async fn trace(&self, id: &str, count: usize) -> Vec<Span> {
        eventually(&format!("{count} spans of trace {id}"), async || {
            let mut spans: Vec<Span> = self.spans().into_iter().filter(|span| span.trace == id).collect();
            spans.sort_by_key(|span| span.start);
            (spans.len() >= count).then_some(spans)
        })
        .await
    }
}

struct Service(Spans);

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().unwrap();
        for resource_spans in request.into_inner().resource_spans {
            let resource = words(resource_spans.resource.map(|resource| resource.attributes).unwrap_or_default());
            for scope in resource_spans.scope_spans {
                spans.extend(scope.spans.into_iter().map(|span| plain(span, resource.clone())));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn plain(span: Wire, resource: BTreeMap<String, String>) -> Span {
    Span {
        kind: match span.kind() {
            SpanKind::Client => "CLIENT",
            SpanKind::Server => "SERVER",
            SpanKind::Unspecified | SpanKind::Internal | SpanKind::Producer | SpanKind::Consumer => "OTHER",
        },
        name: span.name,
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        resource,
        attributes: words(span.attributes),
        error: span.status.is_some_and(|status| status.code == 2),
        start: span.start_time_unix_nano,
        end: span.end_time_unix_nano,
    }
}

fn words(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let word = |attribute: KeyValue| {
        let value = match attribute.value.and_then(|value| value.value) {
            Some(any_value::Value::StringValue(text)) => text,
            Some(any_value::Value::IntValue(number)) => number.to_string(),
            Some(any_value::Value::BoolValue(yes)) => yes.to_string(),
            other => panic!("{} is {other:?}", attribute.key),
        };
        (attribute.key, value)
    };
    attributes.into_iter().map(word).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
