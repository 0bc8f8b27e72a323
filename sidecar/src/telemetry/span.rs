//! Makes the span of a sampled request or attempt at its end, with the names and attributes of the OpenTelemetry
//! conventions 1.44 for HTTP and RPC. Called by the HTTP record only when the trace is sampled; a URL path never
//! becomes part of a span's name.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use outrigger_api::name::ServicePort;

use crate::outcome::Reason;

use super::context::Ids;
use super::edge::Edge;
use super::labels::{MethodLabel, WireProtocol, grpc_status_name, is_failing_grpc_status};

/// Of the conventions that names and attributes follow.
pub(super) const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.44.0";

/// SERVER inbound, CLIENT outbound.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Server,
    Client,
}

/// What a span tells, borrowed from the record that ends.
pub(super) struct Facts<'r> {
    pub kind: Kind,
    pub ids: Ids,
    /// The span that this one is part of; 0 without one.
    pub parent: u64,
    pub edge: &'r Edge,
    pub method: &'r http::Method,
    pub route: Option<&'r str>,
    pub path: &'r str,
    pub authority: &'r str,
    pub user_agent: Option<&'r str>,
    /// Sent again so many times before.
    pub resend: u32,
    pub downstream: Option<SocketAddr>,
    pub upstream: Option<SocketAddr>,
    /// The Service that is called.
    pub called: Option<&'r ServicePort>,
    /// The workload calls itself.
    pub in_process: bool,
    pub status: Option<u16>,
    pub grpc_status: Option<u8>,
    pub reason: Option<Reason>,
    pub duration: Duration,
    pub ended: SystemTime,
}

impl Facts<'_> {
    pub(super) fn span(&self) -> SpanData {
        let error = self.error_type();
        SpanData {
            span_context: SpanContext::new(
                TraceId::from(self.ids.trace),
                SpanId::from(self.ids.span),
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id: SpanId::from(self.parent),
            parent_span_is_remote: self.parent != 0,
            span_kind: match self.kind {
                Kind::Server => SpanKind::Server,
                Kind::Client => SpanKind::Client,
            },
            name: self.name(),
            start_time: self.ended.checked_sub(self.duration).unwrap_or(self.ended),
            end_time: self.ended,
            attributes: self.attributes(error.as_deref()),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: if error.is_some() { Status::error("") } else { Status::Unset },
            instrumentation_scope: InstrumentationScope::builder("outrigger")
                .with_version(env!("CARGO_PKG_VERSION"))
                .with_schema_url(SCHEMA_URL)
                .build(),
        }
    }

    /// `package.Service/Method`, else `{method} {route}`, else `{method}`.
    fn name(&self) -> Cow<'static, str> {
        if self.is_grpc()
            && let Some(method) = rpc_method(self.path)
        {
            return method.to_owned().into();
        }
        let method = match MethodLabel::from(self.method) {
            MethodLabel::Other => "HTTP",
            known => known.as_str(),
        };
        match self.route {
            Some(route) => format!("{method} {route}").into(),
            None => method.into(),
        }
    }

    fn is_grpc(&self) -> bool {
        self.edge.labels().protocol == WireProtocol::Grpc
    }

    /// What failed, in one word of low cardinality. A server is not at fault for a 4xx, a client got an error.
    fn error_type(&self) -> Option<Cow<'static, str>> {
        let client = self.kind == Kind::Client;
        let failed = match (self.status, self.grpc_status) {
            (None, _) => true,
            (Some(status), _) if status >= 500 || (client && status >= 400) => true,
            (_, Some(grpc)) => is_failing_grpc_status(grpc) || (client && grpc != 0),
            (Some(_), None) => self.reason.is_some() && client,
        };
        if !failed {
            return None;
        }
        Some(match (self.reason, self.grpc_status, self.status) {
            (Some(reason), _, _) => reason.word().into(),
            (None, Some(grpc), _) if grpc != 0 => grpc_status_name(grpc).into(),
            (None, _, Some(status)) => status.to_string().into(),
            (None, _, None) => "_OTHER".into(),
        })
    }

    fn attributes(&self, error: Option<&str>) -> Vec<KeyValue> {
        let mut attributes = Vec::with_capacity(16);
        if self.is_grpc() {
            attributes.push(KeyValue::new("rpc.system.name", "grpc"));
            attributes.push(KeyValue::new("rpc.method", rpc_method(self.path).unwrap_or("_OTHER").to_owned()));
            let status =
                self.grpc_status.map(|status| KeyValue::new("rpc.response.status_code", grpc_status_name(status)));
            attributes.extend(status);
        } else {
            self.http_attributes(&mut attributes);
        }
        self.network_attributes(&mut attributes);
        attributes.extend(error.map(|error| KeyValue::new("error.type", error.to_owned())));
        attributes.extend(self.reason.map(|reason| KeyValue::new("outrigger.reason", reason.word())));
        let labels = self.edge.labels();
        // No TLS is spoken within a process, and nothing of it is plaintext either.
        if !self.in_process {
            attributes.push(KeyValue::new("outrigger.mtls", labels.mtls));
        }
        let peer = match self.kind {
            Kind::Server => &labels.source_principal,
            Kind::Client => &labels.destination_principal,
        };
        if !peer.is_empty() {
            attributes.push(KeyValue::new("outrigger.peer.identity", peer.clone()));
        }
        attributes
    }

    fn http_attributes(&self, attributes: &mut Vec<KeyValue>) {
        match MethodLabel::from(self.method) {
            MethodLabel::Other => {
                attributes.push(KeyValue::new("http.request.method", "_OTHER"));
                attributes.push(KeyValue::new("http.request.method_original", self.method.as_str().to_owned()));
            }
            known => attributes.push(KeyValue::new("http.request.method", known.as_str())),
        }
        attributes.push(KeyValue::new("url.scheme", "http"));
        attributes.push(KeyValue::new("url.path", self.path.to_owned()));
        if self.kind == Kind::Client {
            let url = match self.called {
                Some(called) => format!("http://{called}{}", self.path),
                None => format!("http://{}{}", self.authority, self.path),
            };
            attributes.push(KeyValue::new("url.full", url));
        }
        let status = self.status.map(|status| KeyValue::new("http.response.status_code", i64::from(status)));
        attributes.extend(status);
        attributes.extend(self.route.map(|route| KeyValue::new("http.route", route.to_owned())));
        attributes.extend(self.user_agent.map(|agent| KeyValue::new("user_agent.original", agent.to_owned())));
        let version = match self.edge.labels().protocol {
            WireProtocol::Http1 => "1.1",
            WireProtocol::Http2 | WireProtocol::Grpc | WireProtocol::Tcp | WireProtocol::Tls => "2",
        };
        attributes.push(KeyValue::new("network.protocol.name", "http"));
        attributes.push(KeyValue::new("network.protocol.version", version));
        if self.resend > 0 {
            attributes.push(KeyValue::new("http.request.resend_count", i64::from(self.resend)));
        }
    }

    fn network_attributes(&self, attributes: &mut Vec<KeyValue>) {
        let (host, mut port) = host_and_port(self.authority);
        let mut host = Cow::Borrowed(host);
        // Whatever the client says in Host: it may be the address of a listener.
        if let Some(ServicePort { service, port: called }) = self.called {
            (host, port) = (service.to_string().into(), Some(*called));
            attributes.push(KeyValue::new("service.peer.name", service.name.to_string()));
            attributes.push(KeyValue::new("service.peer.namespace", service.namespace.to_string()));
        }
        if !host.is_empty() {
            attributes.push(KeyValue::new("server.address", host.into_owned()));
        }
        attributes.extend(port.map(|port| KeyValue::new("server.port", i64::from(port))));
        let peer = match self.kind {
            Kind::Server => self.downstream,
            Kind::Client => self.upstream,
        };
        if let Some(peer) = peer {
            attributes.push(KeyValue::new("network.peer.address", peer.ip().to_string()));
            if peer.port() != 0 {
                attributes.push(KeyValue::new("network.peer.port", i64::from(peer.port())));
            }
            if self.kind == Kind::Server {
                attributes.push(KeyValue::new("client.address", peer.ip().to_string()));
            }
        }
    }
}

/// The full method of a gRPC path. A path that is none, whatever its content type says, names nothing: it could be
/// any text of a caller.
fn rpc_method(path: &str) -> Option<&str> {
    let full = path.strip_prefix('/')?;
    let (service, method) = full.split_once('/')?;
    let word = |text: &str, dots: bool| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || (dots && byte == b'.');
        !text.is_empty() && text.len() <= 255 && text.bytes().all(allowed)
    };
    (word(service, true) && word(method, false)).then_some(full)
}

fn host_and_port(authority: &str) -> (&str, Option<u16>) {
    let bracketed = authority.starts_with('[');
    match authority.rsplit_once(':') {
        Some((host, port)) if !bracketed || host.ends_with(']') => {
            (host.trim_start_matches('[').trim_end_matches(']'), port.parse().ok())
        }
        _ => (authority.trim_start_matches('[').trim_end_matches(']'), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_grpc_method_becomes_a_name() {
        for (path, method) in [
            ("/shop.v1.Catalog/List", Some("shop.v1.Catalog/List")),
            ("/Catalog/List", Some("Catalog/List")),
            ("/Catalog", None),
            ("/users/a-b", None),
            ("/a/b/c", None),
            ("//List", None),
            ("/Catalog/", None),
            ("/Catalog/Li%20st", None),
            ("", None),
        ] {
            assert_eq!(rpc_method(path), method, "{path}");
        }
    }

    #[test]
    fn authorities_split_into_host_and_port() {
        for (authority, expected) in [
            ("catalog", ("catalog", None)),
            ("catalog.shop:80", ("catalog.shop", Some(80))),
            ("127.0.0.1:8080", ("127.0.0.1", Some(8080))),
            ("[::1]:8080", ("::1", Some(8080))),
            ("[::1]", ("::1", None)),
            ("catalog:x", ("catalog", None)),
            ("", ("", None)),
        ] {
            assert_eq!(host_and_port(authority), expected, "{authority}");
        }
    }
}
