//! From resources and registry to what a sidecar is told: pure functions over one moment. Called by the publisher for
//! each key that somebody subscribed to. Here is what is looked up; beside it what a workload is told of itself (`own.rs`) and
//! of a destination (`destination.rs`, `target.rs`, `empty.rs`), what of MeshConfig concerns it (`settings.rs`), and what
//! `outrigger status` warns of (`warnings.rs`).

mod destination;
mod empty;
mod own;
mod settings;
mod target;
mod warnings;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use outrigger_api::compile::{self, RouteTable};
use outrigger_api::identity::TrustDomain;
use outrigger_api::name::{self, ServiceName};
use outrigger_api::resource::{Metadata, Resource, Resources, Service};
use outrigger_api::snapshot::Key;
use outrigger_api::virtual_address::is_virtual;

use crate::policy;
use crate::registry::{Instance, Registry, VirtualAddresses};

pub use settings::{leaf_lifetime_seconds, renew_grace_seconds};

/// Which service accounts may be endpoints of a Service: `a,b`.
pub const SERVICE_ACCOUNTS: &str = "outrigger.dev/service-accounts";

/// A configuration with what is looked up in it by address.
#[derive(Debug)]
pub struct Catalog {
    pub resources: Arc<Resources>,
    pub trust_domain: TrustDomain,
    virtual_addresses: VirtualAddresses,
    /// Every clusterIP.
    cluster_ips: HashSet<IpAddr>,
    /// By clusterIP or virtual address.
    by_service_ip: HashMap<SocketAddr, name::ServicePort>,
    service_by_ip: HashMap<IpAddr, ServiceName>,
    routes: RouteTable,
    /// Who has a clusterIP, and who wants the same.
    contested: Vec<(SocketAddr, ServiceName, ServiceName)>,
    /// What workloads are told follows from the labels of others.
    pub looks_at_callers: bool,
}

impl Catalog {
    /// `virtual_addresses`: settled for these resources, and kept on disk.
    pub fn new(resources: Arc<Resources>, trust_domain: TrustDomain, virtual_addresses: VirtualAddresses) -> Catalog {
        let mut by_service_ip: HashMap<SocketAddr, name::ServicePort> = HashMap::new();
        let mut service_by_ip: HashMap<IpAddr, ServiceName> = HashMap::new();
        let mut contested = Vec::new();
        for service in resources.services.values() {
            let Ok(name) = ServiceName::new(&service.metadata.name, &service.metadata.namespace) else { continue };
            let given = virtual_addresses.of(&name);
            for ip in service.spec.cluster_ips.iter().chain(given.iter().flatten()) {
                service_by_ip.entry(*ip).or_insert_with(|| name.clone());
                for port in &service.spec.ports {
                    let key = name::ServicePort { service: name.clone(), port: port.port };
                    let address = SocketAddr::new(*ip, port.port);
                    let holder = by_service_ip.entry(address).or_insert(key);
                    if holder.service != name {
                        contested.push((address, holder.service.clone(), name.clone()));
                    }
                }
            }
        }
        let cluster_ips = resources.services.values().flat_map(|service| service.spec.cluster_ips.clone()).collect();
        let looks_at_callers = compile::looks_at_callers(&resources);
        let routes = RouteTable::new(&resources);
        Catalog {
            looks_at_callers,
            resources,
            trust_domain,
            virtual_addresses,
            cluster_ips,
            by_service_ip,
            service_by_ip,
            routes,
            contested,
        }
    }

    /// Whether an address is a clusterIP or a virtual address, which no workload can have.
    pub fn is_of_service(&self, ip: IpAddr) -> bool {
        is_virtual(ip) || self.cluster_ips.contains(&ip)
    }

    /// Whether callers of that namespace follow routes of their own to a destination.
    pub fn is_consumer(&self, key: &Key, caller: &str) -> bool {
        let port = match key {
            Key::Own | Key::Name(_) => None,
            Key::Service(port) => Some(port),
            Key::Address(address) => self.by_service_ip.get(address),
        };
        port.is_some_and(|port| self.routes.is_consumer(port, caller))
    }

    /// What the name of a service stands for; None when nobody registered it.
    pub fn addresses(&self, registry: &Registry, name: &ServiceName) -> Option<Vec<IpAddr>> {
        let key = (name.namespace.to_string(), name.name.to_string());
        let service = self.resources.services.get(&key)?;
        if !service.spec.cluster_ips.is_empty() {
            return Some(service.spec.cluster_ips.clone());
        }
        if !service.spec.headless {
            return Some(self.virtual_addresses.of(name).iter().flatten().copied().collect());
        }
        let selected = registry.of_namespace(&key.0).filter(|instance| selects(service, instance));
        let mut ips: Vec<IpAddr> = selected.flat_map(|instance| instance.ips()).collect();
        ips.sort();
        ips.dedup();
        Some(ips)
    }

    /// The Services that an instance is part of, by name.
    pub fn services_of(&self, instance: &Instance) -> Vec<(ServiceName, &Resource<Service>)> {
        self.services_in(&instance.id.namespace)
            .filter(|service| selects(service, instance))
            .filter_map(|service| Some((service_name(&service.metadata)?, service)))
            .collect()
    }

    fn services_in<'a, 'n>(&'a self, namespace: &'n str) -> impl Iterator<Item = &'a Resource<Service>> + use<'a, 'n> {
        self.resources
            .services
            .range((namespace.to_owned(), String::new())..)
            .take_while(move |((of, _), _)| of == namespace)
            .map(|(_, service)| service)
    }
}

fn selects(service: &Resource<Service>, instance: &Instance) -> bool {
    let selector = &service.spec.selector;
    !selector.is_empty()
        && service.metadata.namespace == instance.id.namespace
        && policy::contains(&instance.labels, selector)
        && service
            .metadata
            .annotations
            .get(SERVICE_ACCOUNTS)
            .is_none_or(|accounts| accounts.split(',').any(|account| account.trim() == instance.id.service_account))
}

fn service_name(metadata: &Metadata) -> Option<ServiceName> {
    ServiceName::new(&metadata.name, &metadata.namespace).ok()
}

#[cfg(test)]
mod tests;
