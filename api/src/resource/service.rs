//! `Service` (v1), as in Kubernetes: a name for the workloads that its selector matches.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::findings::Findings;
use super::mesh_config::LoadBalancerType;
use super::metadata::{not_a_label, not_a_subdomain};
use super::path::{Path, Shortened};
use super::syntax::{Port, check_labels};
use super::{Labels, Metadata, Resource};
use crate::identity::is_account;
use crate::name::{Protocol, is_label};

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Service {
    /// Empty selects nothing.
    pub selector: Labels,
    pub ports: Vec<ServicePort>,
    /// From clusterIP and clusterIPs.
    pub cluster_ips: Vec<IpAddr>,
    /// `clusterIP: None`: its name stands for its endpoints.
    pub headless: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    pub name: Option<String>,
    pub port: u16,
    /// `port` itself when the document does not say.
    pub target_port: TargetPort,
    pub app_protocol: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetPort {
    Number(u16),
    /// The name of a port of the workload.
    Name(String),
}

/// How the service is balanced: `LeastRequest`, `RoundRobin` or `Random`; else MeshConfig's default holds.
pub const LOAD_BALANCER: &str = "outrigger.dev/load-balancer";
/// Which service accounts of the service's namespace may be its endpoints: `a,b`; else every one may.
pub const SERVICE_ACCOUNTS: &str = "outrigger.dev/service-accounts";
pub(super) const ANNOTATIONS: &[&str] = &[LOAD_BALANCER, SERVICE_ACCOUNTS];

impl Resource<Service> {
    /// What the annotation [`LOAD_BALANCER`] says.
    pub fn load_balancer(&self) -> Option<LoadBalancerType> {
        let text = self.metadata.annotations.get(LOAD_BALANCER)?;
        LoadBalancerType::NAMES.into_iter().find(|(name, _)| name == text).map(|(_, kind)| kind)
    }

    /// What the annotation [`SERVICE_ACCOUNTS`] says; None: every account may serve.
    pub fn service_accounts(&self) -> Option<BTreeSet<&str>> {
        self.metadata.annotations.get(SERVICE_ACCOUNTS).map(|text| text.split(',').map(str::trim).collect())
    }
}

/// Fields that are passed over in silence: they change nothing here.
pub(super) const SILENT_FIELDS: &[&str] = &["spec.ipFamilies", "spec.ipFamilyPolicy"];
/// Fields that are passed over in silence with this value, which is what happens anyway.
pub(super) const SILENT_VALUES: &[(&str, &str)] =
    &[("spec.type", "ClusterIP"), ("spec.sessionAffinity", "None"), ("spec.internalTrafficPolicy", "Cluster")];

/// `spec` as written, as far as it is acted on.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawService {
    selector: BTreeMap<String, String>,
    ports: Vec<RawPort>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    protocol: Transport,
    port: Option<Port>,
    target_port: Option<RawTargetPort>,
    app_protocol: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, Default)]
enum Transport {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "UDP")]
    Udp,
    #[serde(rename = "SCTP")]
    Sctp,
}

impl RawService {
    /// `path` is that of `spec`.
    pub(super) fn check(self, path: &Path, findings: &mut Findings) -> Service {
        check_labels(&self.selector, &path.key("selector"), findings);
        let mut cluster_ips = Vec::new();
        let mut headless = false;
        let single = self.cluster_ip.iter().map(|text| (path.key("clusterIP"), text));
        let several = self.cluster_ips.iter().enumerate();
        for (path, text) in single.chain(several.map(|(nth, text)| (path.key("clusterIPs").index(nth), text))) {
            match text.parse::<IpAddr>() {
                Ok(address) if !cluster_ips.contains(&address) => cluster_ips.push(address),
                Ok(_) => {}
                Err(_) if text == "None" => headless = true,
                Err(_) if text.is_empty() => {}
                Err(_) => {
                    let shown = Shortened(text);
                    findings.error(&path, format!("{shown:?} is not an IP address: expected one, or None"));
                }
            }
        }
        let ports = check_ports(self.ports, &path.key("ports"), findings);
        Service { selector: self.selector, ports, cluster_ips, headless }
    }
}

fn check_ports(raw: Vec<RawPort>, path: &Path, findings: &mut Findings) -> Vec<ServicePort> {
    let several = raw.len() > 1;
    let mut numbers = BTreeSet::new();
    let mut names = BTreeSet::new();
    let mut ports = Vec::new();
    for (nth, raw) in raw.into_iter().enumerate() {
        let path = path.index(nth);
        match &raw.name {
            Some(name) if !is_label(name) => findings.error(&path.key("name"), not_a_label(name)),
            Some(name) if !names.insert(name.clone()) => {
                findings.error(&path.key("name"), format!("{name} is the name of another port of this service"));
            }
            None if several => {
                let message = "has no name: Kubernetes demands one when there are several ports".to_owned();
                findings.warning(&path, message);
            }
            Some(_) | None => {}
        }
        let Some(Port(port)) = raw.port else {
            findings.error(&path, "`port` is missing".to_owned());
            continue;
        };
        match raw.protocol {
            Transport::Tcp => {}
            Transport::Udp | Transport::Sctp => {
                findings.warning(&path.key("protocol"), "only TCP is carried: the port is ignored".to_owned());
                continue;
            }
        }
        if !numbers.insert(port) {
            findings.error(&path.key("port"), format!("{port} is the number of another port of this service"));
        }
        if let Some(text) = raw.app_protocol.as_deref().filter(|text| Protocol::from_app_protocol(text).is_none()) {
            let shown = Shortened(text);
            findings.warning(&path.key("appProtocol"), format!("{shown:?} is not known: the protocol is detected"));
        }
        ports.push(ServicePort {
            name: raw.name,
            port,
            target_port: raw.target_port.map_or(TargetPort::Number(port), |RawTargetPort(target)| target),
            app_protocol: raw.app_protocol,
        });
    }
    ports
}

/// Checks the values of our annotations; `path` is that of `metadata`.
pub(super) fn check_annotations(metadata: &Metadata, path: &Path, findings: &mut Findings) {
    let path = path.key("annotations");
    if let Some(text) = metadata.annotations.get(LOAD_BALANCER)
        && !LoadBalancerType::NAMES.iter().any(|(name, _)| name == text)
    {
        let choice = LoadBalancerType::NAMES.map(|(name, _)| name);
        let message = format!("{:?} is none of {}", Shortened(text), choice.join(", "));
        findings.error(&path.key(LOAD_BALANCER), message);
    }
    if let Some(text) = metadata.annotations.get(SERVICE_ACCOUNTS) {
        for account in text.split(',').map(str::trim).filter(|account| !is_account(account)) {
            findings.error(&path.key(SERVICE_ACCOUNTS), not_a_subdomain(account));
        }
    }
}

struct RawTargetPort(TargetPort);

impl<'de> Deserialize<'de> for RawTargetPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawTargetPort, D::Error> {
        deserializer.deserialize_any(TargetPortVisitor)
    }
}

struct TargetPortVisitor;

impl Visitor<'_> for TargetPortVisitor {
    type Value = RawTargetPort;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number or the name of a port")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<RawTargetPort, E> {
        let port = u16::try_from(number).ok().filter(|port| *port != 0);
        port.map(|port| RawTargetPort(TargetPort::Number(port)))
            .ok_or_else(|| E::custom(format_args!("{number} is not a port: expected 1 to 65535, or a port's name")))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<RawTargetPort, E> {
        // Kubernetes refuses names without a letter too: `"8080"` is a number in the wrong clothes.
        if is_label(text) && text.bytes().any(|b| b.is_ascii_lowercase()) {
            return Ok(RawTargetPort(TargetPort::Name(text.to_owned())));
        }
        let hint = if text.parse::<u16>().is_ok() { ": write the number without quotes" } else { "" };
        Err(E::custom(format_args!("{:?} is not the name of a port{hint}", Shortened(text))))
    }
}
