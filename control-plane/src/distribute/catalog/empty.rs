//! Why nobody serves a port of a Service, in the words that callers get as `detail` and operators in `outrigger status`. Pure.

use outrigger_api::resource::{Resource, Service, ServicePort, TargetPort};
use outrigger_api::snapshot::{Destination, LoadBalancer};
use outrigger_api::{compile, name};

use super::{SERVICE_ACCOUNTS, selects};
use crate::policy;
use crate::registry::Registry;

/// A known Service, asked for at a port that it does not have.
pub(super) fn without_port(service: &Resource<Service>, key: &name::ServicePort) -> Destination {
    let ports = service.spec.ports.iter().map(|port| {
        let protocol = compile::service_protocol(port).map(|protocol| protocol.to_string());
        match protocol.or_else(|| port.name.clone()) {
            Some(word) => format!("{} ({word})", port.port),
            None => port.port.to_string(),
        }
    });
    let ports = ports.collect::<Vec<_>>().join(", ");
    let has = if ports.is_empty() { "no port at all".to_owned() } else { ports };
    Destination {
        service: key.service.clone(),
        port: key.port,
        protocol: None,
        load_balancer: LoadBalancer::default(),
        endpoints: Vec::new(),
        stale: false,
        why_empty: format!("{} has no port {}; it has {has}", key.service, key.port),
        no_such_port: true,
        routes: None,
    }
}

/// Why nobody serves a port of a Service.
pub(super) fn why(registry: &Registry, service: &Resource<Service>, port: &ServicePort) -> String {
    let selector = &service.spec.selector;
    if selector.is_empty() {
        return "the Service has no selector".to_owned();
    }
    let labels = selector.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",");
    let namespace = &service.metadata.namespace;
    let labelled =
        registry.of_namespace(namespace).filter(|instance| policy::contains(&instance.labels, selector)).count();
    if labelled == 0 {
        let draining =
            registry.draining(namespace).filter(|instance| policy::contains(&instance.labels, selector)).count();
        if draining > 0 {
            return format!("all workloads with the labels {labels} of its selector ({draining}) are draining");
        }
        return format!("no workload of namespace {namespace} has the labels {labels} of its selector");
    }
    let selected = registry.of_namespace(namespace).filter(|instance| selects(service, instance)).count();
    if selected == 0 {
        return format!(
            "of the workloads with the labels {labels} ({labelled}) none has a service account of {SERVICE_ACCOUNTS}"
        );
    }
    let target = match &port.target_port {
        TargetPort::Number(number) => number.to_string(),
        TargetPort::Name(name) => name.clone(),
    };
    format!("of the workloads with the labels {labels} ({selected}) none serves the targetPort {target}")
}
