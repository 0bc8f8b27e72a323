//! Who serves a destination: the endpoints of a Service's port, or the one endpoint that has an address, and how each is dialled.

use std::net::SocketAddr;

use outrigger_api::compile;
use outrigger_api::identity::SpiffeId;
use outrigger_api::name::{self, ServiceName};
use outrigger_api::resource::{LoadBalancerType, Resource, Service, ServicePort};
use outrigger_api::snapshot::{Destination, Endpoint, EndpointTls, Key, LoadBalancer, MtlsMode};

use super::target::{Target, application_port, leased_at, target};
use super::{Catalog, empty, selects};
use crate::policy;
use crate::registry::{Instance, Ports, Registry};

/// `RoundRobin`, `Random` or `LeastRequest`, on a Service.
pub const LOAD_BALANCER: &str = "outrigger.dev/load-balancer";

impl Catalog {
    /// Who serves a destination, and what binds it for callers of the namespace `caller`; None when nobody registered it.
    pub fn destination(&self, registry: &Registry, key: &Key, caller: &str) -> Option<Destination> {
        // Routes bind the Service's own addresses: who dials one endpoint gets that endpoint.
        let bound = |key: &name::ServicePort| {
            let destination = self.service(registry, key)?;
            Some(Destination { routes: self.routes.of(key, caller).cloned(), ..destination })
        };
        match key {
            Key::Own | Key::Name(_) => None,
            Key::Service(key) => bound(key),
            Key::Address(address) => match self.by_service_ip.get(address) {
                Some(key) => bound(key),
                None => self.endpoint_itself(registry, *address).or_else(|| {
                    // The address of a Service, at a port that it does not have.
                    let service = self.service_by_ip.get(&address.ip())?;
                    let key = name::ServicePort { service: service.clone(), port: address.port() };
                    self.service(registry, &key)
                }),
            },
        }
    }

    pub(super) fn service(&self, registry: &Registry, key: &name::ServicePort) -> Option<Destination> {
        let name = (key.service.namespace.to_string(), key.service.name.to_string());
        let service = self.resources.services.get(&name)?;
        let Some(port) = service.spec.ports.iter().find(|port| port.port == key.port) else {
            return Some(empty::without_port(service, key));
        };
        let chosen: Vec<(&Instance, Target)> = registry
            .of_namespace(&name.0)
            .filter(|instance| selects(service, instance))
            .filter_map(|instance| Some((&**instance, target(instance, &port.target_port)?)))
            .collect();
        let mut destination = self.assemble(key.service.clone(), key.port, Some((service, port)), &chosen);
        if destination.endpoints.is_empty() {
            destination.why_empty = empty::why(registry, service, port);
        }
        Some(destination)
    }

    /// A destination by the address of an endpoint: exactly that endpoint, under the name of a Service that it
    /// serves there, or under its own name when there is none.
    fn endpoint_itself(&self, registry: &Registry, address: SocketAddr) -> Option<Destination> {
        let port = address.port();
        let dialled = |instance: &Instance| match &instance.ports {
            Ports::Leased(ports) => leased_at(ports, port),
            Ports::Intercepted(ports) => leased_at(ports, port).or(Some(Target::plain(port))),
            // A workload with a sidecar has it at every port; of one without, an unlisted port is nothing that is known.
            Ports::Named(ports) => {
                (instance.mesh || ports.values().any(|named| *named == port)).then(|| Target::plain(port))
            }
        };
        // Where peers dial comes before what an application calls its port: an address may be shared, as on loopback.
        let here = || registry.at(address.ip());
        let instance = here()
            .find(|instance| instance.listens_on(port))
            .or_else(|| here().find(|instance| dialled(instance).is_some()))?;
        let target = dialled(instance)?;
        let found = self.services_of(instance).into_iter().find_map(|(name, service)| {
            let serves = |of: &&ServicePort| {
                application_port(instance, &of.target_port).is_some_and(|(port, _)| port == target.application)
            };
            Some((name, service, service.spec.ports.iter().find(serves)?))
        });
        let chosen = [(&**instance, target)];
        let mut destination = match found {
            Some((name, service, of)) => self.assemble(name, of.port, Some((service, of)), &chosen),
            None => {
                let namespace = &instance.id.namespace;
                let name = ServiceName::new(&instance.workload, namespace)
                    .or_else(|_| ServiceName::new(&instance.id.name, namespace));
                self.assemble(name.ok()?, port, None, &chosen)
            }
        };
        // The one of its addresses that was dialled, which may be of another family than the preferred one.
        for endpoint in &mut destination.endpoints {
            endpoint.address.set_ip(address.ip());
        }
        Some(destination)
    }

    fn assemble(
        &self,
        name: ServiceName,
        port: u16,
        service: Option<(&Resource<Service>, &ServicePort)>,
        chosen: &[(&Instance, Target)],
    ) -> Destination {
        let said = chosen.iter().map(|(_, target)| target.protocol);
        let application_port = chosen.first().map(|(_, target)| target.application);
        let annotated =
            service.and_then(|(service, _)| load_balancer(service.metadata.annotations.get(LOAD_BALANCER)?));
        Destination {
            service: name,
            port,
            protocol: compile::called_protocol(&self.resources, service.map(|(_, port)| port), said, application_port),
            load_balancer: annotated
                .unwrap_or_else(|| default_load_balancer(self.resources.mesh.defaults.load_balancer)),
            endpoints: chosen.iter().filter_map(|(instance, target)| self.endpoint(instance, *target)).collect(),
            stale: chosen.iter().any(|(instance, _)| instance.stale),
            why_empty: String::new(),
            no_such_port: false,
            routes: None,
        }
    }

    /// How to dial: mutual TLS with the identity that the endpoint is registered under, unless it has no sidecar or
    /// policy says that its sidecar takes plaintext only.
    fn endpoint(&self, instance: &Instance, target: Target) -> Option<Endpoint> {
        let id = &instance.id;
        let disabled = || {
            let modes = policy::mtls_modes(&self.resources, &id.namespace, &instance.labels);
            policy::mode_of(&modes, target.application) == MtlsMode::Disable
        };
        let tls = if !instance.mesh || disabled() {
            EndpointTls::Plaintext
        } else {
            EndpointTls::Mutual(SpiffeId::new(&self.trust_domain, &id.namespace, &id.service_account).ok()?)
        };
        Some(Endpoint {
            address: SocketAddr::new(instance.ip, target.dial),
            tls,
            workload: instance.workload.clone(),
            namespace: id.namespace.clone(),
            instance: id.name.clone(),
            weight: instance.weight,
            application_port: target.application,
        })
    }
}

pub(super) fn load_balancer(text: &str) -> Option<LoadBalancer> {
    match text.trim() {
        "LeastRequest" => Some(LoadBalancer::LeastRequest),
        "RoundRobin" => Some(LoadBalancer::RoundRobin),
        "Random" => Some(LoadBalancer::Random),
        _ => None,
    }
}

fn default_load_balancer(configured: LoadBalancerType) -> LoadBalancer {
    match configured {
        LoadBalancerType::LeastRequest => LoadBalancer::LeastRequest,
        LoadBalancerType::RoundRobin => LoadBalancer::RoundRobin,
        LoadBalancerType::Random => LoadBalancer::Random,
    }
}
