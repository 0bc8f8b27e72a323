//! The words that metrics are labelled with: direction, protocol, method, and the facts of one edge (who calls whom).
//! Made by the data path when it learns them, once per connection, route or endpoint; never from a raw path or
//! authority. Nothing here counts.

pub use crate::connection::Direction;

/// What is spoken on the downstream side of the edge.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum WireProtocol {
    Http1,
    Http2,
    Grpc,
    Tcp,
    Tls,
}

impl WireProtocol {
    pub const fn as_str(self) -> &'static str {
        match self {
            WireProtocol::Http1 => "http1",
            WireProtocol::Http2 => "http2",
            WireProtocol::Grpc => "grpc",
            WireProtocol::Tcp => "tcp",
            WireProtocol::Tls => "tls",
        }
    }

    /// True where requests are counted, false where connections are.
    pub const fn is_http(self) -> bool {
        match self {
            WireProtocol::Http1 | WireProtocol::Http2 | WireProtocol::Grpc => true,
            WireProtocol::Tcp | WireProtocol::Tls => false,
        }
    }
}

/// How detection of an undeclared port ended, the label of `outrigger_detect_total`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detected {
    Http1,
    Http2,
    Tls,
    /// The client's first bytes are of no protocol that is parsed.
    Tcp,
    /// The server spoke first, so that the bytes are opaque.
    ServerFirst,
}

impl Detected {
    pub const ALL: [Detected; 5] =
        [Detected::Http1, Detected::Http2, Detected::Tls, Detected::Tcp, Detected::ServerFirst];

    pub const fn as_str(self) -> &'static str {
        match self {
            Detected::Http1 => "http1",
            Detected::Http2 => "http2",
            Detected::Tls => "tls",
            Detected::Tcp => "tcp",
            Detected::ServerFirst => "server_first",
        }
    }
}

/// What became of a question about a name, the label of `outrigger_dns_queries_total`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolved {
    /// Answered from what the mesh knows.
    Mesh,
    /// An upstream's answer was passed on.
    Forwarded,
    /// No upstream answered.
    Failed,
    /// It was no question that is answered or forwarded, or one too many.
    Refused,
}

impl Resolved {
    pub const ALL: [Resolved; 4] = [Resolved::Mesh, Resolved::Forwarded, Resolved::Failed, Resolved::Refused];

    pub const fn as_str(self) -> &'static str {
        match self {
            Resolved::Mesh => "mesh",
            Resolved::Forwarded => "forwarded",
            Resolved::Failed => "failed",
            Resolved::Refused => "refused",
        }
    }
}

/// The value of a label for a peer that proved nothing and is not registered.
pub const UNKNOWN: &str = "unknown";
/// The value of every label of the series that takes what exceeds the cap.
pub const OVERFLOW: &str = "overflow";

/// One edge: all labels that stay the same from request to request. Absent is the empty string, an unknown peer
/// [`UNKNOWN`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct EdgeLabels {
    pub direction: Direction,
    pub source_workload: String,
    pub source_namespace: String,
    /// SPIFFE id, empty without one.
    pub source_principal: String,
    /// `name.namespace`
    pub destination_service: String,
    pub destination_workload: String,
    pub destination_namespace: String,
    pub protocol: WireProtocol,
    pub mtls: bool,
    /// SPIFFE id of the endpoint. No label: it is for the report to the control plane, for logs and spans.
    pub destination_principal: String,
}

/// The label `method`: the methods of RFC 9110 and PATCH (RFC 5789), else `other`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum MethodLabel {
    Get,
    Head,
    Post,
    Put,
    Delete,
    Connect,
    Options,
    Trace,
    Patch,
    Other,
}

impl MethodLabel {
    pub const fn as_str(self) -> &'static str {
        match self {
            MethodLabel::Get => "GET",
            MethodLabel::Head => "HEAD",
            MethodLabel::Post => "POST",
            MethodLabel::Put => "PUT",
            MethodLabel::Delete => "DELETE",
            MethodLabel::Connect => "CONNECT",
            MethodLabel::Options => "OPTIONS",
            MethodLabel::Trace => "TRACE",
            MethodLabel::Patch => "PATCH",
            MethodLabel::Other => "other",
        }
    }
}

impl From<&http::Method> for MethodLabel {
    fn from(method: &http::Method) -> MethodLabel {
        match method.as_str() {
            "GET" => MethodLabel::Get,
            "HEAD" => MethodLabel::Head,
            "POST" => MethodLabel::Post,
            "PUT" => MethodLabel::Put,
            "DELETE" => MethodLabel::Delete,
            "CONNECT" => MethodLabel::Connect,
            "OPTIONS" => MethodLabel::Options,
            "TRACE" => MethodLabel::Trace,
            "PATCH" => MethodLabel::Patch,
            _ => MethodLabel::Other,
        }
    }
}

/// The gRPC statuses by which a call counts as failed: UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL,
/// UNAVAILABLE, DATA_LOSS. The others are answers of the application.
pub const fn is_failing_grpc_status(status: u8) -> bool {
    matches!(status, 2 | 4 | 12 | 13 | 14 | 15)
}

/// Availability's definition of failure: no answer, a 5xx, or a failing gRPC status.
pub const fn is_failure(code: Option<u16>, grpc_status: Option<u8>) -> bool {
    match (code, grpc_status) {
        (None, _) => true,
        (Some(code), _) if code >= 500 => true,
        (Some(_), Some(status)) => is_failing_grpc_status(status),
        (Some(_), None) => false,
    }
}

/// The name of a gRPC status, as the RPC conventions of OpenTelemetry want it.
pub const fn grpc_status_name(status: u8) -> &'static str {
    match status {
        0 => "OK",
        1 => "CANCELLED",
        3 => "INVALID_ARGUMENT",
        4 => "DEADLINE_EXCEEDED",
        5 => "NOT_FOUND",
        6 => "ALREADY_EXISTS",
        7 => "PERMISSION_DENIED",
        8 => "RESOURCE_EXHAUSTED",
        9 => "FAILED_PRECONDITION",
        10 => "ABORTED",
        11 => "OUT_OF_RANGE",
        12 => "UNIMPLEMENTED",
        13 => "INTERNAL",
        14 => "UNAVAILABLE",
        15 => "DATA_LOSS",
        16 => "UNAUTHENTICATED",
        _ => "UNKNOWN",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_methods_keep_their_name_and_others_share_one() {
        for name in ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"] {
            let method = http::Method::from_bytes(name.as_bytes()).unwrap();
            assert_eq!(MethodLabel::from(&method).as_str(), name);
        }
        for name in ["get", "PROPFIND", "X"] {
            let method = http::Method::from_bytes(name.as_bytes()).unwrap();
            assert_eq!(MethodLabel::from(&method).as_str(), "other");
        }
    }

    #[test]
    fn failure_is_no_answer_5xx_or_a_failing_grpc_status() {
        for (code, grpc, failed) in [
            (None, None, true),
            (Some(200), None, false),
            (Some(404), None, false),
            (Some(499), None, false),
            (Some(500), None, true),
            (Some(503), Some(0), true),
            (Some(200), Some(0), false),
            (Some(200), Some(1), false),
            (Some(200), Some(7), false),
            (Some(200), Some(14), true),
        ] {
            assert_eq!(is_failure(code, grpc), failed, "{code:?} {grpc:?}");
        }
        let failing: Vec<u8> = (0..=20).filter(|status| is_failing_grpc_status(*status)).collect();
        assert_eq!(failing, [2, 4, 12, 13, 14, 15]);
    }
}
