//! `Service` (v1), as in Kubernetes: a name for the workloads that its selector matches.

use std::net::IpAddr;

use super::Labels;

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Service {
    /// Empty selects nothing.
    pub selector: Labels,
    pub ports: Vec<ServicePort>,
    /// From clusterIP and clusterIPs; empty for headless services.
    pub cluster_ips: Vec<IpAddr>,
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
