//! `Workload`: a static instance, for what registers itself with no sidecar or lives outside.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::findings::Findings;
use super::metadata::{not_a_label, not_a_subdomain};
use super::path::{Path, Shortened};
use super::syntax::{Port, check_labels};
use super::{Labels, Metadata};
use crate::identity::is_account;
use crate::name::is_label;

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

/// `spec` as written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawWorkload {
    address: Option<String>,
    ports: BTreeMap<String, Port>,
    labels: BTreeMap<String, String>,
    service_account: Option<String>,
    weight: Option<u32>,
    locality: Option<String>,
    mesh: bool,
    health_check: Option<IgnoredAny>,
}

impl RawWorkload {
    /// `path` is that of `spec`.
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> Option<Workload> {
        check_labels(&self.labels, &path.key("labels"), findings);
        for name in self.ports.keys().filter(|name| !is_label(name)) {
            findings.error_at_key(&path.key("ports").key(name), not_a_label(name));
        }
        if self.health_check.is_some() {
            let message = "is not acted on by this version: the address is served whatever its health".to_owned();
            findings.warning(&path.key("healthCheck"), message);
        }
        let service_account = self.service_account.unwrap_or_else(|| "default".to_owned());
        if !is_account(&service_account) {
            findings.error(&path.key("serviceAccount"), not_a_subdomain(&service_account));
        }
        if self.weight == Some(0) {
            let message = "0 is not a weight: expected at least 1; to take an instance out, remove it".to_owned();
            findings.error(&path.key("weight"), message);
        }
        let mut labels = metadata.labels.clone();
        labels.extend(self.labels);
        Some(Workload {
            address: address(self.address.as_deref(), path, findings)?,
            ports: self.ports.into_iter().map(|(name, Port(port))| (name, port)).collect(),
            labels,
            service_account,
            weight: self.weight.unwrap_or(1),
            locality: self.locality,
            mesh: self.mesh,
        })
    }
}

fn address(text: Option<&str>, path: &Path, findings: &mut Findings) -> Option<IpAddr> {
    let Some(text) = text else {
        findings.error(path, "`address` is missing: the IP address of the instance".to_owned());
        return None;
    };
    let wrong = match text.parse::<IpAddr>() {
        Ok(address) if address.is_unspecified() || address.is_multicast() => "is the address of no one instance",
        Ok(address) => return Some(address),
        Err(_) => "is not an IP address: expected IPv4 or IPv6, without a port",
    };
    findings.error(&path.key("address"), format!("{:?} {wrong}", Shortened(text)));
    None
}
