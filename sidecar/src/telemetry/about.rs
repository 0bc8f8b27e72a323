//! Name, help and labels of every metric that this module makes; docs/metrics.md prints the same. Read by the collector
//! at each scrape. A new metric is one constant here and its place in [`ALL`].

/// Name, help and labels of one metric.
pub(super) struct About {
    pub name: &'static str,
    pub help: &'static str,
    pub labels: &'static [&'static str],
}

pub(super) const HTTP_LABELS: &[&str] = &[
    "direction",
    "source_workload",
    "source_namespace",
    "source_principal",
    "destination_service",
    "destination_workload",
    "destination_namespace",
    "protocol",
    "method",
    "code",
    "grpc_status",
    "mtls",
    "reason",
];
pub(super) const HTTP_HISTOGRAM_LABELS: &[&str] = &[
    "direction",
    "source_workload",
    "source_namespace",
    "destination_service",
    "destination_workload",
    "destination_namespace",
    "protocol",
    "code",
    "grpc_status",
    "mtls",
];
pub(super) const IN_FLIGHT_LABELS: &[&str] = &[
    "direction",
    "source_workload",
    "source_namespace",
    "destination_service",
    "destination_workload",
    "destination_namespace",
    "protocol",
    "mtls",
];
pub(super) const TCP_LABELS: &[&str] = &[
    "direction",
    "source_workload",
    "source_namespace",
    "source_principal",
    "destination_service",
    "destination_workload",
    "destination_namespace",
    "protocol",
    "mtls",
    "reason",
];

pub(super) const HTTP_REQUESTS: About = About {
    name: "outrigger_http_requests_total",
    help: "Requests whose response has ended, or that ended without one.",
    labels: HTTP_LABELS,
};
pub(super) const HTTP_DURATION: About = About {
    name: "outrigger_http_request_duration_seconds",
    help: "Time from the request's head to the end of its response.",
    labels: HTTP_HISTOGRAM_LABELS,
};
pub(super) const HTTP_REQUEST_BYTES: About = About {
    name: "outrigger_http_request_bytes_total",
    help: "Bytes of request bodies, after framing, without heads and trailers.",
    labels: HTTP_LABELS,
};
pub(super) const HTTP_RESPONSE_BYTES: About = About {
    name: "outrigger_http_response_bytes_total",
    help: "Bytes of response bodies, after framing, without heads and trailers.",
    labels: HTTP_LABELS,
};
pub(super) const GRPC_MESSAGES: About =
    About { name: "outrigger_grpc_messages_total", help: "gRPC messages of both directions.", labels: HTTP_LABELS };
pub(super) const IN_FLIGHT: About = About {
    name: "outrigger_http_requests_in_flight",
    help: "Requests that have begun and not ended.",
    labels: IN_FLIGHT_LABELS,
};
pub(super) const TCP_OPENED: About =
    About { name: "outrigger_tcp_connections_opened_total", help: "Opaque connections opened.", labels: TCP_LABELS };
pub(super) const TCP_CLOSED: About = About {
    name: "outrigger_tcp_connections_closed_total",
    help: "Opaque connections closed, with the reason when the mesh or a peer ended them.",
    labels: TCP_LABELS,
};
pub(super) const TCP_SENT: About = About {
    name: "outrigger_tcp_sent_bytes_total",
    help: "Bytes from the service to the caller, on both sides.",
    labels: TCP_LABELS,
};
pub(super) const TCP_RECEIVED: About = About {
    name: "outrigger_tcp_received_bytes_total",
    help: "Bytes from the caller to the service, on both sides.",
    labels: TCP_LABELS,
};
pub(super) const TCP_DURATION: About = About {
    name: "outrigger_tcp_connection_duration_seconds",
    help: "Time from opening to closing of opaque connections.",
    labels: IN_FLIGHT_LABELS,
};
pub(super) const CERTIFICATE_EXPIRY: About = About {
    name: "outrigger_certificate_expiry_seconds",
    help: "Seconds until the workload's certificate ends; absent before the first one.",
    labels: &[],
};
pub(super) const CONTROL_PLANE_CONNECTED: About = About {
    name: "outrigger_control_plane_connected",
    help: "1 while the stream from the control plane is up.",
    labels: &[],
};
pub(super) const SNAPSHOT_AGE: About = About {
    name: "outrigger_snapshot_age_seconds",
    help: "Seconds since the snapshot was last known to be current: 0 while the control plane is connected.",
    labels: &[],
};
pub(super) const DETECT: About = About {
    name: "outrigger_detect_total",
    help: "Connections on undeclared ports whose protocol was decided.",
    labels: &["outcome"],
};
pub(super) const POLICY_SHADOW: About = About {
    name: "outrigger_policy_shadow_total",
    help: "Requests and opaque connections that a policy in Shadow mode would have refused.",
    labels: &["policy", "source_principal", "would"],
};
pub(super) const POLICY_AUDIT: About = About {
    name: "outrigger_policy_audit_total",
    help: "Requests and opaque connections that an AUDIT policy matched.",
    labels: &["policy", "source_principal"],
};
pub(super) const DNS: About = About {
    name: "outrigger_dns_queries_total",
    help: "Questions about names that the resolver was asked.",
    labels: &["outcome"],
};
pub(super) const SPANS_EXPORTED: About =
    About { name: "outrigger_spans_exported_total", help: "Spans that the collector took.", labels: &[] };
pub(super) const ACCEPT_FAILURES: About = About {
    name: "outrigger_accept_failures_total",
    help: "Times that a connection could not be accepted, for want of descriptors or memory.",
    labels: &[],
};
pub(super) const CONNECTIONS_REFUSED: About = About {
    name: "outrigger_connections_refused_total",
    help: "Connections closed at once because the sidecar was at its limit of connections or of memory.",
    labels: &[],
};
pub(super) const MEMORY_PRESSURE: About = About {
    name: "outrigger_memory_pressure",
    help: "1 while memory is short and new connections are refused.",
    labels: &[],
};
pub(super) const SPANS_DROPPED: About = About {
    name: "outrigger_spans_dropped_total",
    help: "Spans lost because the queue was full or the collector did not take them.",
    labels: &[],
};
pub(super) const ACCESS_LOG_DROPPED: About = About {
    name: "outrigger_access_log_dropped_total",
    help: "Access log lines lost because stderr was not read fast enough.",
    labels: &[],
};

/// All metrics of this module.
pub(super) const ALL: [&About; 24] = [
    &HTTP_REQUESTS,
    &HTTP_DURATION,
    &HTTP_REQUEST_BYTES,
    &HTTP_RESPONSE_BYTES,
    &GRPC_MESSAGES,
    &IN_FLIGHT,
    &TCP_OPENED,
    &TCP_CLOSED,
    &TCP_SENT,
    &TCP_RECEIVED,
    &TCP_DURATION,
    &CERTIFICATE_EXPIRY,
    &CONTROL_PLANE_CONNECTED,
    &SNAPSHOT_AGE,
    &DETECT,
    &DNS,
    &POLICY_SHADOW,
    &POLICY_AUDIT,
    &SPANS_EXPORTED,
    &SPANS_DROPPED,
    &ACCESS_LOG_DROPPED,
    &ACCEPT_FAILURES,
    &CONNECTIONS_REFUSED,
    &MEMORY_PRESSURE,
];
