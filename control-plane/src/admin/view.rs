//! What `/status`, `/stats` and `/policy-report` say, as types that the commands of these names read. Times are Unix seconds.

use outrigger_api::policy::authorization::Action;
use serde::{Deserialize, Deserializer, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub trust_domain: String,
    pub authority: Authority,
    /// Whoever has a Watch stream open.
    pub sidecars: Vec<Sidecar>,
    /// Instances that hold a lease, or are kept after losing it.
    pub leases: usize,
    pub config: Config,
    /// Services that list endpoints which were lost, as `name.namespace`.
    pub stale_services: Vec<String>,
    /// What is probably not as it was meant.
    pub warnings: Vec<String>,
    /// Who was refused a certificate within the last hour, and why.
    #[serde(default)]
    pub refused_joins: Vec<Event>,
    /// Who was not registered within the last hour, and why.
    #[serde(default)]
    pub refused_registrations: Vec<Event>,
    /// Sidecars that went within the last hour and did not come back.
    #[serde(default)]
    pub gone: Vec<Event>,
}

/// Something that happened, perhaps several times.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub what: String,
    pub count: u64,
    /// When for the last time.
    pub last: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Authority {
    /// End of the issuing chain.
    pub not_after: u64,
    /// Half of its life is over, and the root's key is not here to renew it.
    pub overdue: bool,
    /// Roots in the trust bundle.
    pub roots: usize,
    pub generation: u64,
    /// End of the control plane's own certificate.
    pub serving_not_after: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sidecar {
    pub instance: String,
    pub namespace: String,
    pub identity: String,
    /// The sidecar's build.
    pub version: String,
    pub connected_since: u64,
    /// End of the certificate with which it connected.
    pub certificate_not_after: u64,
    pub subscriptions: usize,
    /// Subscriptions of which it has acknowledged nothing yet.
    pub unacknowledged: usize,
    /// Its open connections; None: it has not reported yet.
    pub connections: Option<u64>,
    pub refusals: Vec<Refusal>,
    /// What it says is wrong with itself, such as a collector that does not answer.
    #[serde(default)]
    pub troubles: Vec<String>,
}

/// An update that a sidecar refused; it goes on with what it had.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// `self`, `name.namespace:port` or an address.
    pub key: String,
    pub version: u64,
    pub reason: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// A file with errors is not in force; its last good text is, if there is one.
    pub errors: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    pub file: String,
    pub line: usize,
    pub column: usize,
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.message)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub edges: Vec<Edge>,
    /// What each edge has counted, also those on which nothing happens now.
    #[serde(default)]
    pub totals: Vec<Total>,
    /// Sidecars that are connected, and instances that have reported within a minute.
    #[serde(default)]
    pub sidecars: usize,
    #[serde(default)]
    pub reporting: usize,
    /// Seconds for which this control plane has been counting.
    #[serde(default)]
    pub uptime: u64,
}

/// An edge since the control plane started, or since an hour without traffic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Total {
    pub source_workload: String,
    pub source_namespace: String,
    pub destination_service: String,
    pub direction: Direction,
    pub protocol: String,
    pub mtls: bool,
    pub requests: u64,
    pub failures: u64,
    /// Seconds since its last report.
    pub quiet: u64,
}

/// The golden signals of one edge over the last ten seconds, as one side saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Edge {
    pub source_workload: String,
    pub source_namespace: String,
    /// SPIFFE id; empty when it was not proved.
    pub source_identity: String,
    /// `name.namespace`
    pub destination_service: String,
    pub destination_workload: String,
    pub destination_namespace: String,
    pub destination_identity: String,
    pub direction: Direction,
    /// http1, http2, grpc, tcp or tls
    pub protocol: String,
    pub mtls: bool,
    /// HTTP and gRPC: requests; TCP: connections that were opened.
    #[serde(deserialize_with = "number")]
    pub requests_per_second: f64,
    /// 0 to 100; None when there were no requests.
    pub success_percent: Option<f64>,
    /// Seconds.
    pub p50: Option<f64>,
    pub p99: Option<f64>,
    #[serde(deserialize_with = "number")]
    pub sent_bytes_per_second: f64,
    #[serde(deserialize_with = "number")]
    pub received_bytes_per_second: f64,
}

/// What policies in Shadow mode would have done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyReport {
    /// When this was said.
    pub now: u64,
    /// Every policy in Shadow mode.
    pub policies: Vec<ShadowPolicy>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShadowPolicy {
    /// `KIND/NAMESPACE/NAME`
    pub policy: String,
    pub action: Action,
    /// Since when it has been in Shadow mode as it is now, or since the control plane started.
    pub since: u64,
    /// Registered workloads that it selects.
    pub selects: usize,
    pub callers: Vec<ShadowCaller>,
}

/// Requests of one caller that a policy would have refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShadowCaller {
    /// SPIFFE id of the called workload.
    pub called: String,
    /// SPIFFE id; empty: it proved none; `other`: beyond what is told apart.
    pub caller: String,
    /// `GET /users/{*}`; empty for bytes that are not parsed.
    pub request: String,
    /// denied, limited
    pub would: String,
    pub count: u64,
    pub first: u64,
    pub last: u64,
}

/// Whose sidecar reported the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The server's.
    Inbound,
    /// The client's.
    Outbound,
}

/// JSON has no number for what is not finite: `null` stands there, and one such edge must not hide all others.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(0.0))
}
