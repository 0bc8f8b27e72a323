//! How a request or connection ends: the one table of reasons. Everything that goes wrong on the walk becomes an
//! [`Error`]; one total `match` turns its reason into status code, gRPC status, Proxy-Status error and retry decision.
//! Called by every stage; imports nothing of this crate.

use std::borrow::Cow;
use std::fmt;

/// Why the mesh ended a request or connection itself. Each is one word in `reason` labels, problem+json and logs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Reason {
    // What the downstream did.
    BadRequest,
    RequestHeadTimeout,
    RequestHeadTooLarge,
    RequestTargetTooLong,
    ClientClosed,
    MtlsRequired,
    PolicyDenied,
    PathAmbiguous,
    JwtMissing,
    JwtInvalid,
    JwksUnavailable,
    RateLimited,
    PeerCertificate,
    TlsHandshake,
    ProtocolMismatch,
    IdleTimeout,
    // What is known, or not.
    NotReady,
    NotRegistered,
    UnknownDestination,
    DestinationUnavailable,
    OwnPort,
    ForeignAddress,
    ForbiddenAddress,
    MethodNotAllowed,
    RouteNotFound,
    BackendInvalid,
    // What the upstream did.
    ConnectionRefused,
    ConnectTimeout,
    ConnectFailed,
    IdentityMismatch,
    UpstreamClosed,
    UpstreamReset,
    UpstreamProtocol,
    UpstreamHeadTooLarge,
    UpstreamTruncated,
    StreamIdleTimeout,
    RequestTimeout,
    AttemptTimeout,
    // What this sidecar could not do.
    Overloaded,
    Draining,
    Internal,
}

/// One row of the table that the documentation prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The word in metrics, logs and problem+json.
    pub word: &'static str,
    /// The status that an HTTP client sees when the head can still be answered.
    pub status: u16,
    /// The gRPC status of a trailers-only answer.
    pub grpc: u8,
    /// The error type of RFC 9209 for the Proxy-Status field.
    pub proxy_status: &'static str,
    /// What happened, for a person.
    pub title: &'static str,
}

const fn row(word: &'static str, status: u16, grpc: u8, proxy_status: &'static str, title: &'static str) -> Row {
    Row { word, status, grpc, proxy_status, title }
}

impl Reason {
    pub const ALL: [Reason; 41] = [
        Reason::BadRequest,
        Reason::RequestHeadTimeout,
        Reason::RequestHeadTooLarge,
        Reason::RequestTargetTooLong,
        Reason::ClientClosed,
        Reason::MtlsRequired,
        Reason::PolicyDenied,
        Reason::PathAmbiguous,
        Reason::JwtMissing,
        Reason::JwtInvalid,
        Reason::JwksUnavailable,
        Reason::RateLimited,
        Reason::PeerCertificate,
        Reason::TlsHandshake,
        Reason::ProtocolMismatch,
        Reason::IdleTimeout,
        Reason::NotReady,
        Reason::NotRegistered,
        Reason::UnknownDestination,
        Reason::DestinationUnavailable,
        Reason::OwnPort,
        Reason::ForeignAddress,
        Reason::ForbiddenAddress,
        Reason::MethodNotAllowed,
        Reason::RouteNotFound,
        Reason::BackendInvalid,
        Reason::ConnectionRefused,
        Reason::ConnectTimeout,
        Reason::ConnectFailed,
        Reason::IdentityMismatch,
        Reason::UpstreamClosed,
        Reason::UpstreamReset,
        Reason::UpstreamProtocol,
        Reason::UpstreamHeadTooLarge,
        Reason::UpstreamTruncated,
        Reason::StreamIdleTimeout,
        Reason::RequestTimeout,
        Reason::AttemptTimeout,
        Reason::Overloaded,
        Reason::Draining,
        Reason::Internal,
    ];

    /// The table. gRPC: 4 DEADLINE_EXCEEDED, 7 PERMISSION_DENIED, 8 RESOURCE_EXHAUSTED, 13 INTERNAL, 14 UNAVAILABLE, 16 UNAUTHENTICATED.
    pub const fn row(self) -> Row {
        match self {
            Reason::BadRequest => {
                row("bad_request", 400, 13, "http_request_error", "The request breaks the protocol's rules.")
            }
            Reason::RequestHeadTimeout => {
                row("request_head_timeout", 408, 4, "http_request_error", "The request head did not end within 10 s.")
            }
            Reason::RequestHeadTooLarge => row(
                "request_head_too_large",
                431,
                8,
                "http_request_error",
                "The request head exceeds 64 KiB or 100 fields.",
            ),
            Reason::RequestTargetTooLong => {
                row("request_target_too_long", 414, 8, "http_request_error", "The request target exceeds 16 KiB.")
            }
            Reason::ClientClosed => {
                row("client_closed", 499, 1, "connection_terminated", "The client left before the answer ended.")
            }
            Reason::MtlsRequired => row(
                "mtls_required",
                403,
                7,
                "tls_certificate_error",
                "This port takes mutual TLS from mesh sidecars only.",
            ),
            Reason::PolicyDenied => {
                row("policy_denied", 403, 7, "http_request_denied", "A policy does not allow this request.")
            }
            Reason::PathAmbiguous => row(
                "path_ambiguous",
                400,
                3,
                "http_request_error",
                "A policy looks at paths, and this path can be read in two ways.",
            ),
            Reason::JwtMissing => {
                row("jwt_missing", 401, 16, "http_request_denied", "A token is required and the request has none.")
            }
            Reason::JwtInvalid => {
                row("jwt_invalid", 401, 16, "http_request_denied", "The request's token is not valid here.")
            }
            Reason::JwksUnavailable => row(
                "jwks_unavailable",
                503,
                14,
                "proxy_internal_response",
                "The keys that would verify the request's token are not known.",
            ),
            Reason::RateLimited => {
                row("rate_limited", 429, 8, "http_request_denied", "A rate limit of this service is used up.")
            }
            Reason::PeerCertificate => row(
                "peer_certificate",
                403,
                7,
                "tls_certificate_error",
                "The peer's certificate does not prove an identity of this mesh.",
            ),
            Reason::TlsHandshake => {
                row("tls_handshake", 503, 14, "tls_protocol_error", "The TLS handshake did not succeed.")
            }
            Reason::ProtocolMismatch => row(
                "protocol_mismatch",
                400,
                13,
                "http_protocol_error",
                "The bytes are not of the protocol that is declared for the port.",
            ),
            Reason::IdleTimeout => {
                row("idle_timeout", 408, 4, "connection_timeout", "Nothing moved on the connection for too long.")
            }
            Reason::NotReady => row(
                "not_ready",
                503,
                14,
                "proxy_internal_response",
                "This sidecar is not ready (/ready says why), or the control plane is away and this destination was never met.",
            ),
            Reason::NotRegistered => row(
                "not_registered",
                502,
                14,
                "destination_ip_prohibited",
                "Nobody registered this destination and the mesh allows registered ones only.",
            ),
            Reason::UnknownDestination => {
                row("unknown_destination", 502, 14, "dns_error", "The destination's name could not be resolved.")
            }
            Reason::DestinationUnavailable => row(
                "destination_unavailable",
                503,
                14,
                "destination_unavailable",
                "The service has no endpoint that can be used now.",
            ),
            Reason::OwnPort => row(
                "own_port",
                502,
                14,
                "proxy_loop_detected",
                "The destination is a port on which the sidecar itself listens.",
            ),
            Reason::ForeignAddress => row(
                "foreign_address",
                502,
                14,
                "destination_ip_prohibited",
                "The destination is no address of this workload.",
            ),
            Reason::ForbiddenAddress => row(
                "forbidden_address",
                403,
                7,
                "destination_ip_prohibited",
                "The client's address may not use this listener.",
            ),
            Reason::MethodNotAllowed => {
                row("method_not_allowed", 405, 12, "http_request_denied", "This listener does not take that method.")
            }
            Reason::RouteNotFound => row(
                "route_not_found",
                404,
                12,
                "destination_not_found",
                "Routes are attached to this destination, and none of them matches.",
            ),
            Reason::BackendInvalid => row(
                "backend_invalid",
                500,
                14,
                "destination_unavailable",
                "The route leads to a backend that does not exist or is not granted.",
            ),
            Reason::ConnectionRefused => {
                row("connection_refused", 503, 14, "connection_refused", "The upstream refused the connection.")
            }
            Reason::ConnectTimeout => row(
                "connect_timeout",
                503,
                14,
                "connection_timeout",
                "No endpoint took the connection within the connect budget.",
            ),
            Reason::ConnectFailed => row(
                "connect_failed",
                503,
                14,
                "destination_ip_unroutable",
                "The connection to the upstream could not be made.",
            ),
            Reason::IdentityMismatch => row(
                "identity_mismatch",
                503,
                14,
                "tls_certificate_error",
                "The endpoint proved another identity than the one it was registered with.",
            ),
            Reason::UpstreamClosed => row(
                "upstream_closed",
                502,
                14,
                "connection_terminated",
                "The upstream closed the connection before it answered.",
            ),
            Reason::UpstreamReset => {
                row("upstream_reset", 502, 14, "connection_terminated", "The upstream reset the stream.")
            }
            Reason::UpstreamProtocol => row(
                "upstream_protocol",
                502,
                14,
                "http_protocol_error",
                "The upstream's answer breaks the protocol's rules.",
            ),
            Reason::UpstreamHeadTooLarge => row(
                "upstream_head_too_large",
                502,
                8,
                "http_response_header_section_size",
                "The upstream's head or trailers exceed 64 KiB.",
            ),
            Reason::UpstreamTruncated => row(
                "upstream_truncated",
                502,
                14,
                "http_response_incomplete",
                "The upstream's answer ended before it was complete.",
            ),
            Reason::StreamIdleTimeout => {
                row("stream_idle_timeout", 504, 4, "http_response_timeout", "Nothing moved on the stream for too long.")
            }
            Reason::RequestTimeout => row(
                "request_timeout",
                504,
                4,
                "http_response_timeout",
                "The request took longer than its route allows.",
            ),
            Reason::AttemptTimeout => row(
                "attempt_timeout",
                504,
                4,
                "http_response_timeout",
                "The backend took longer than the route allows for one attempt.",
            ),
            Reason::Overloaded => {
                row("overloaded", 503, 8, "connection_limit_reached", "This sidecar is at a limit; try again later.")
            }
            Reason::Draining => row("draining", 503, 14, "proxy_internal_response", "This sidecar is shutting down."),
            Reason::Internal => {
                row("internal", 500, 13, "proxy_internal_error", "This sidecar failed; its log says why.")
            }
        }
    }

    pub const fn word(self) -> &'static str {
        self.row().word
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Where on the walk it happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    Accept,
    Lookup,
    Detect,
    Policy,
    Route,
    Balance,
    Connect,
    Forward,
}

/// Whose fault it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Downstream,
    Upstream,
    Own,
}

/// Whether the request may be sent again, elsewhere or anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Retry {
    /// The peer provably did not process it.
    Safe,
    Never,
}

/// An error of the walk: where, whose, why, and whether to try again. `detail` is for logs and names the endpoint,
/// the address or the library's words; it never holds a secret and is not sent to peers.
#[derive(Clone, Debug)]
pub struct Error {
    pub stage: Stage,
    pub side: Side,
    pub reason: Reason,
    pub retry: Retry,
    pub detail: Cow<'static, str>,
    /// The code with which an HTTP/2 upstream reset the stream, for a client that speaks HTTP/2 as well.
    pub reset: Option<u32>,
    /// The object that refused, where one did.
    pub by: Option<Box<Refuser>>,
    /// The rate limit that is used up, where one is.
    pub quota: Option<Box<Quota>>,
}

/// A rate limit as the client is told of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quota {
    pub name: String,
    pub requests: u32,
    /// Seconds in which so many fit.
    pub window: u64,
    /// Seconds until one more fits, at least 1.
    pub wait: u64,
}

/// The object that refused a request or connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refuser {
    /// `KIND/NAMESPACE/NAME`
    pub object: String,
    /// From 0; None where no single rule did.
    pub rule: Option<usize>,
    /// The caller proved who it is, so it may be told.
    pub told: bool,
}

impl Error {
    /// Says which object refused.
    pub fn by(self, by: Option<Refuser>) -> Error {
        Error { by: by.map(Box::new), ..self }
    }

    pub fn downstream(stage: Stage, reason: Reason, detail: impl Into<Cow<'static, str>>) -> Error {
        let detail = detail.into();
        Error { stage, side: Side::Downstream, reason, retry: Retry::Never, detail, reset: None, by: None, quota: None }
    }

    pub fn own(stage: Stage, reason: Reason, detail: impl Into<Cow<'static, str>>) -> Error {
        let detail = detail.into();
        Error { stage, side: Side::Own, reason, retry: Retry::Never, detail, reset: None, by: None, quota: None }
    }

    pub fn upstream(stage: Stage, reason: Reason, retry: Retry, detail: impl Into<Cow<'static, str>>) -> Error {
        Error { stage, side: Side::Upstream, reason, retry, detail: detail.into(), reset: None, by: None, quota: None }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?}, {:?}): {}", self.reason, self.stage, self.side, self.detail)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_unique_and_snake_case() {
        let words: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.word()).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        for word in words {
            assert!(word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{word}");
        }
    }
}
