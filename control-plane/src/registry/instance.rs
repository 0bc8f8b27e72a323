//! One instance, whoever told of it: a sidecar by its lease, or an operator by a Workload document.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use outrigger_api::name::Protocol;
use outrigger_api::resource::{Labels, Metadata, Workload};
use serde::{Deserialize, Serialize};

/// Which instance: its identity's namespace and service account, and its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InstanceId {
    pub namespace: String,
    pub service_account: String,
    pub name: String,
}

impl InstanceId {
    /// Sorts before every instance of the namespace.
    pub(super) fn first_of(namespace: &str) -> InstanceId {
        InstanceId { namespace: namespace.to_owned(), service_account: String::new(), name: String::new() }
    }
}

impl std::fmt::Display for InstanceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{} (service account {})", self.name, self.namespace, self.service_account)
    }
}

/// Which sidecar it is that stands for an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// The redemption from which its certificate comes.
    pub lineage: String,
    /// What its process calls itself; empty: it does not say.
    pub process: String,
}

impl Holder {
    /// A renewed certificate and a broken connection make another stream of the same sidecar.
    pub fn is_same(&self, other: &Holder) -> bool {
        match self.process.is_empty() || other.process.is_empty() {
            true => self.lineage == other.lineage,
            false => self.process == other.process,
        }
    }
}

/// What a sidecar registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    pub holder: Holder,
    /// The name that metrics use.
    pub workload: String,
    pub labels: Labels,
    pub ip: IpAddr,
    pub other_ips: Vec<IpAddr>,
    pub ports: Vec<LeasedPort>,
    /// Every port of its addresses is the sidecar's: those that are not in `ports` are served at their own number.
    pub transparent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeasedPort {
    /// What a Service's targetPort names.
    pub application: u16,
    /// Where peers dial.
    pub mesh: u16,
    pub protocol: Option<Protocol>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    pub id: InstanceId,
    /// The name that metrics use.
    pub workload: String,
    pub labels: Labels,
    /// Where those who ask for a Service reach it.
    pub ip: IpAddr,
    /// Further addresses, for those who dial them.
    pub other_ips: Vec<IpAddr>,
    pub ports: Ports,
    /// At least 1.
    pub weight: u32,
    /// It has a sidecar.
    pub mesh: bool,
    /// Lost, and listed all the same.
    pub stale: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Exactly these; they have no names.
    Leased(Vec<LeasedPort>),
    /// Every port, at its own number but for those that are listed; they have no names.
    Intercepted(Vec<LeasedPort>),
    /// By name. A number that is not among them may exist as well.
    Named(BTreeMap<String, u16>),
}

impl Instance {
    pub(super) fn leased(id: &InstanceId, registration: &Registration, stale: bool) -> Instance {
        Instance {
            id: id.clone(),
            workload: registration.workload.clone(),
            labels: registration.labels.clone(),
            ip: registration.ip,
            other_ips: registration.other_ips.clone(),
            ports: match registration.transparent {
                true => Ports::Intercepted(registration.ports.clone()),
                false => Ports::Leased(registration.ports.clone()),
            },
            weight: 1,
            mesh: true,
            stale,
        }
    }

    pub(super) fn fixed(metadata: &Metadata, workload: &Workload) -> Instance {
        Instance {
            id: InstanceId {
                namespace: metadata.namespace.clone(),
                service_account: workload.service_account.clone(),
                name: metadata.name.clone(),
            },
            workload: metadata.name.clone(),
            labels: workload.labels.clone(),
            ip: workload.address,
            other_ips: Vec::new(),
            ports: Ports::Named(workload.ports.clone()),
            weight: workload.weight.max(1),
            mesh: workload.mesh,
            stale: false,
        }
    }

    /// The ports that a sidecar named, when it told of this instance.
    pub fn leased_ports(&self) -> Option<&[LeasedPort]> {
        match &self.ports {
            Ports::Leased(ports) | Ports::Intercepted(ports) => Some(ports),
            Ports::Named(_) => None,
        }
    }

    /// Every address, the preferred one first.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        std::iter::once(self.ip).chain(self.other_ips.iter().copied())
    }

    /// Which ports of its addresses are its own: those at which peers dial it and those that its application calls so.
    pub(super) fn claim(&self) -> Claim {
        match &self.ports {
            Ports::Intercepted(_) => Claim::All,
            Ports::Leased(ports) => Claim::Ports(ports.iter().flat_map(|port| [port.mesh, port.application]).collect()),
            Ports::Named(ports) => Claim::Ports(ports.values().copied().collect()),
        }
    }

    /// Peers dial this instance at that port, as it said.
    pub fn listens_on(&self, port: u16) -> bool {
        match &self.ports {
            Ports::Leased(ports) | Ports::Intercepted(ports) => ports.iter().any(|leased| leased.mesh == port),
            Ports::Named(ports) => ports.values().any(|named| *named == port),
        }
    }
}

/// Ports of an address that belong to one identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    All,
    Ports(BTreeSet<u16>),
}

impl Claim {
    /// What both claim.
    pub(super) fn overlap(&self, other: &Claim) -> Option<Overlap> {
        match (self, other) {
            (Claim::All, Claim::All) => Some(Overlap::Everything),
            (Claim::All, Claim::Ports(ports)) | (Claim::Ports(ports), Claim::All) => {
                ports.first().copied().map(Overlap::Port)
            }
            (Claim::Ports(ports), Claim::Ports(others)) => {
                ports.intersection(others).next().copied().map(Overlap::Port)
            }
        }
    }
}

/// What two claims have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlap {
    Everything,
    /// The first of the ports.
    Port(u16),
}

impl std::fmt::Display for Overlap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Overlap::Everything => f.write_str("every port"),
            Overlap::Port(port) => write!(f, "port {port}"),
        }
    }
}

/// A lease on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedLease {
    #[serde(flatten)]
    id: InstanceId,
    workload: String,
    labels: Labels,
    ip: IpAddr,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    other_ips: Vec<IpAddr>,
    ports: Vec<SavedPort>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    transparent: bool,
    #[serde(default)]
    lineage: String,
    /// It is over, and its addresses are still kept for its identity.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) over: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct SavedPort {
    application: u16,
    mesh: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    protocol: Option<String>,
}

impl SavedLease {
    /// None for a static instance.
    pub(super) fn of(instance: &Instance, holder: &Holder, over: bool) -> Option<SavedLease> {
        let ports = instance
            .leased_ports()?
            .iter()
            .map(|port| SavedPort {
                application: port.application,
                mesh: port.mesh,
                protocol: port.protocol.map(|protocol| protocol.to_string()),
            })
            .collect();
        Some(SavedLease {
            id: instance.id.clone(),
            workload: instance.workload.clone(),
            labels: instance.labels.clone(),
            ip: instance.ip,
            other_ips: instance.other_ips.clone(),
            ports,
            transparent: matches!(instance.ports, Ports::Intercepted(_)),
            lineage: holder.lineage.clone(),
            over,
        })
    }

    pub(super) fn into_parts(self) -> (InstanceId, Registration) {
        let ports = self
            .ports
            .into_iter()
            .map(|port| LeasedPort {
                application: port.application,
                mesh: port.mesh,
                protocol: port.protocol.and_then(|protocol| protocol.parse().ok()),
            })
            .collect();
        let registration = Registration {
            holder: Holder { lineage: self.lineage, process: String::new() },
            workload: self.workload,
            labels: self.labels,
            ip: self.ip,
            other_ips: self.other_ips,
            ports,
            transparent: self.transparent,
        };
        (self.id, registration)
    }
}
