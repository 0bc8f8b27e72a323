//! What is probably not as it was meant, for `outrigger status`.

use outrigger_api::compile;
use outrigger_api::name::{self, Protocol, ServiceName};
use outrigger_api::resource::{Attached, Resource, Service, ServicePort, TargetPort};

use super::destination::{LOAD_BALANCER, load_balancer};
use super::target::{Target, target};
use super::{Catalog, selects, service_name};
use crate::policy;
use crate::registry::{Instance, Registry};

impl Catalog {
    /// All of it, sorted, but for ports without endpoints.
    pub fn warnings(&self, registry: &Registry) -> Vec<String> {
        let mut warnings = Vec::new();
        for service in self.resources.services.values() {
            let full_name = format!("Service {}/{}", service.metadata.namespace, service.metadata.name);
            if let Some(value) = service.metadata.annotations.get(LOAD_BALANCER)
                && load_balancer(value).is_none()
            {
                warnings.push(format!(
                    "{full_name}: annotation {LOAD_BALANCER} is {value:?}; expected RoundRobin, Random or LeastRequest"
                ));
            }
            for port in &service.spec.ports {
                let TargetPort::Name(name) = &port.target_port else { continue };
                let mut leased = registry
                    .of_namespace(&service.metadata.namespace)
                    .filter(|instance| instance.leased_ports().is_some() && selects(service, instance));
                if let Some(instance) = leased.next() {
                    warnings.push(format!(
                        "{full_name}: targetPort {name:?} is a name, and the ports of {} have none; give its number",
                        instance.id
                    ));
                }
            }
        }
        for (name, service) in
            self.resources.services.values().filter_map(|service| Some((service_name(&service.metadata)?, service)))
        {
            warnings
                .extend(service.spec.ports.iter().filter_map(|port| self.disagreement(registry, &name, service, port)));
        }
        for id in registry.hidden() {
            warnings.push(format!(
                "Workload {}/{}: a sidecar with its name and service account is connected; the document is in force",
                id.namespace, id.name
            ));
        }
        for instance in registry.all().filter(|instance| instance.leased_ports().is_some()) {
            for ip in instance.ips().filter(|ip| self.is_of_service(*ip)) {
                warnings
                    .push(format!("{}: its address {ip} is a Service's by now, which gets the traffic", instance.id));
            }
        }
        for (address, holder, other) in &self.contested {
            warnings.push(format!(
                "Service {other}: {address} is the clusterIP of {holder} already, which gets its traffic"
            ));
        }
        for service in self.virtual_addresses.without() {
            warnings.push(format!(
                "Service {service}: no virtual address is free, so a sidecar's resolver has no answer for it; give it a \
                 clusterIP"
            ));
        }
        for instance in registry.all() {
            let modes = policy::mtls_modes(&self.resources, &instance.id.namespace, &instance.labels);
            // What stands in for a broken document (its name begins with `~`) is an error of its own.
            let told = |(one, other): &(String, String)| !one.contains("/~") && !other.contains("/~");
            for (one, other) in modes.contradictions.into_iter().filter(told) {
                warnings.push(format!("PeerAuthentication {one} contradicts {other}; the stricter is in force"));
            }
        }
        warnings.extend(self.selecting_nothing(registry));
        warnings.sort();
        warnings.dedup();
        warnings
    }

    /// Policies with a selector that selects no registered workload, where any is registered.
    fn selecting_nothing(&self, registry: &Registry) -> Vec<String> {
        let written = self.resources.attached().filter(Attached::is_written);
        let selecting = written.filter(|policy| policy.attachment.selector.is_some());
        let nothing = selecting.filter(|policy| {
            let mut all = registry.all();
            !all.any(|instance| policy.selects(&instance.id.namespace, &instance.labels))
        });
        let warning = |policy: Attached<'_>| {
            let (kind, namespace, name) = (policy.kind, &policy.metadata.namespace, &policy.metadata.name);
            format!("{kind} {namespace}/{name}: no registered workload has the labels of its selector")
        };
        if registry.all().next().is_none() { Vec::new() } else { nothing.map(warning).collect() }
    }

    /// How many workloads a policy, `KIND/NAMESPACE/NAME`, selects.
    pub fn selected_by(&self, registry: &Registry, policy: &str) -> usize {
        let named = |attached: &Attached<'_>| attached.object().to_string() == policy;
        let Some(policy) = self.resources.attached().find(named) else { return 0 };
        registry.all().filter(|instance| policy.selects(&instance.id.namespace, &instance.labels)).count()
    }

    /// What the sidecars of a port say of its protocol, when it is not what its callers go by.
    fn disagreement(
        &self,
        registry: &Registry,
        name: &ServiceName,
        service: &Resource<Service>,
        port: &ServicePort,
    ) -> Option<String> {
        let selected = registry.of_namespace(&service.metadata.namespace).filter(|instance| selects(service, instance));
        let chosen: Vec<(&Instance, Target)> =
            selected.filter_map(|instance| Some((&**instance, target(instance, &port.target_port)?))).collect();
        let of_service = compile::service_protocol(port);
        let said = |protocol: Option<Protocol>| protocol.map_or("nothing".to_owned(), |protocol| protocol.to_string());
        let (instance, word, expected) = match of_service {
            Some(declared) => {
                let other = |(_, target): &&(&Instance, Target)| target.protocol.is_some_and(|word| word != declared);
                let (instance, target) = chosen.iter().find(other)?;
                (instance, target.protocol, format!("the Service says {declared}, by which callers go"))
            }
            None => {
                let first = chosen.iter().find(|(_, target)| target.protocol.is_some())?.1.protocol;
                let (other, target) = chosen.iter().find(|(_, target)| target.protocol != first)?;
                let word = said(first);
                (other, target.protocol, format!("another sidecar says {word}; callers go by no declared protocol"))
            }
        };
        Some(format!(
            "Service {name}, port {}: the sidecar of {} says {} and {expected}; set the port's appProtocol, or mend --port",
            port.port,
            instance.id,
            said(word)
        ))
    }

    /// The ports of Services that nobody serves, with the reason, for `outrigger status`.
    pub fn empty_ports(&self, registry: &Registry) -> Vec<String> {
        let mut all = Vec::new();
        for service in self.resources.services.values() {
            let Some(name) = service_name(&service.metadata) else { continue };
            for port in &service.spec.ports {
                let key = name::ServicePort { service: name.clone(), port: port.port };
                let destination = self.service(registry, &key);
                if let Some(destination) = destination.filter(|destination| destination.endpoints.is_empty()) {
                    all.push(format!("{name}, port {}: no endpoints: {}", port.port, destination.why_empty));
                }
            }
        }
        all
    }
}
