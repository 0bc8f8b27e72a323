//! `Workload`: a static instance, for what registers itself with no sidecar or lives outside.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::Labels;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Workload {
    pub address: IpAddr,
    /// Port name to port number.
    pub ports: BTreeMap<String, u16>,
    /// `spec.labels` over `metadata.labels`: what selectors match.
    pub labels: Labels,
    /// `default` when the document does not say.
    pub service_account: String,
    /// At least 1.
    pub weight: u32,
    pub locality: Option<String>,
    /// It has a sidecar, which takes mTLS at these same ports.
    pub mesh: bool,
}
