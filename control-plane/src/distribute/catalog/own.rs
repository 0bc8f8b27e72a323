//! What the sidecar of a workload is told of itself: its ports with their protocols and modes, and the policies that select it.

use std::collections::BTreeMap;
use std::sync::Arc;

use outrigger_api::compile;
use outrigger_api::name::{Protocol, ServiceName};
use outrigger_api::policy::authorization::Authorization;
use outrigger_api::resource::{Labels, ServicePort};
use outrigger_api::snapshot::{InboundPort, Workload};

use super::Catalog;
use super::settings::mesh_settings;
use super::target::application_port;
use crate::policy;
use crate::registry::{InstanceId, Ports, Registry};

/// What is known of a port of the workload itself.
#[derive(Default)]
struct OwnPort<'a> {
    declared: Option<Protocol>,
    /// The first Service, by name, that selects it.
    service: Option<(ServiceName, &'a ServicePort)>,
}

impl Catalog {
    /// What the sidecar of `id` is told of itself. Before it has a lease its labels are those that were granted.
    pub fn own_workload(&self, registry: &Registry, id: &InstanceId, granted: &Labels) -> Workload {
        let instance = registry.get(id);
        let labels = instance.map_or(granted, |instance| &instance.labels);
        let modes = policy::mtls_modes(&self.resources, &id.namespace, labels);
        let mut ports: BTreeMap<u16, OwnPort<'_>> = BTreeMap::new();
        if let Some(Ports::Named(named)) = instance.map(|instance| &instance.ports) {
            ports.extend(named.values().map(|port| (*port, OwnPort::default())));
        }
        // Beside a Workload document it is still the sidecar that knows where its application is.
        let leased = registry.leased(id).and_then(|leased| leased.leased_ports()).unwrap_or_default();
        ports.extend(leased.iter().map(|port| (port.application, OwnPort { declared: port.protocol, service: None })));
        for port in modes.ports.keys() {
            ports.entry(*port).or_default();
        }
        for (name, service) in instance.map(|instance| self.services_of(instance)).unwrap_or_default() {
            for port in &service.spec.ports {
                let target = instance.and_then(|instance| application_port(instance, &port.target_port));
                if let Some((target, _)) = target {
                    ports.entry(target).or_default().service.get_or_insert((name.clone(), port));
                }
            }
        }
        let inbound = |(port, OwnPort { declared, service }): (u16, OwnPort<'_>)| {
            let of_service = service.as_ref().map(|(_, port)| *port);
            let protocol = compile::protocol(&self.resources, declared, of_service, Some(port));
            let mtls_mode = policy::mode_of(&modes, port);
            (port, InboundPort { protocol, mtls_mode, service: service.map(|(name, _)| name) })
        };
        Workload {
            name: id.name.clone(),
            namespace: id.namespace.clone(),
            service_account: id.service_account.clone(),
            ports: ports.into_iter().map(inbound).collect(),
            default_mtls_mode: modes.default,
            mesh: mesh_settings(&self.resources),
            registered: instance.is_some(),
            labels: labels.clone(),
            authentication: Arc::new(compile::authentication(&self.resources, &id.namespace, labels)),
            rate_limits: Arc::new(compile::rate_limits(&self.resources, &id.namespace, labels)),
            authorization: Arc::new(self.authorization(registry, &id.namespace, labels)),
        }
    }

    /// Who may call a workload with these labels.
    fn authorization(&self, registry: &Registry, namespace: &str, labels: &Labels) -> Authorization {
        let callers = || {
            let all = registry.all().map(|instance| (&instance.id, &instance.labels));
            compile::callers(all.map(|(id, labels)| (id.namespace.as_str(), id.service_account.as_str(), labels)))
        };
        compile::authorization_among(&self.resources, &self.trust_domain, namespace, labels, &callers)
    }
}
