//! From resources and registry to what a sidecar is told: pure functions over one moment. Called by the publisher for
//! each key that somebody subscribed to.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use outrigger_api::compile::{self, RouteTable};
use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_api::name::{self, Protocol, ServiceName};
use outrigger_api::policy::authorization::Authorization;
use outrigger_api::resource::{
    AccessLogMode, AuthorizationPolicy, DEFAULT_RENEW_GRACE_SECONDS, Labels, LoadBalancerType, Metadata,
    OutboundTraffic, Resource, Resources, Service, ServicePort, TargetPort,
};
use outrigger_api::snapshot::{
    AccessLog, DEFAULT_LEAF_LIFETIME_SECONDS, DEFAULT_MAX_SERIES, Destination, Endpoint, EndpointTls, InboundPort, Key,
    LoadBalancer, MeshSettings, MtlsMode, OutboundMode, Workload,
};
use outrigger_api::virtual_address::is_virtual;

use super::empty;
use crate::policy;
use crate::registry::{Instance, InstanceId, LeasedPort, Ports, Registry, VirtualAddresses};

/// `RoundRobin`, `Random` or `LeastRequest`, on a Service.
pub const LOAD_BALANCER: &str = "outrigger.dev/load-balancer";
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

    /// What is probably not as it was meant, for `outrigger status`.
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

    /// Who may call a workload with these labels.
    fn authorization(&self, registry: &Registry, namespace: &str, labels: &Labels) -> Authorization {
        let callers = || {
            let all = registry.all().map(|instance| (&instance.id, &instance.labels));
            compile::callers(all.map(|(id, labels)| (id.namespace.as_str(), id.service_account.as_str(), labels)))
        };
        compile::authorization_among(&self.resources, &self.trust_domain, namespace, labels, &callers)
    }

    /// AuthorizationPolicies with a selector that selects no registered workload, where any is registered.
    fn selecting_nothing(&self, registry: &Registry) -> Vec<String> {
        let policies = self.resources.authorization_policies.values();
        let selecting =
            policies.filter(|policy| policy.spec.selector.is_some() && !policy.metadata.name.starts_with('~'));
        let nothing = selecting.filter(|policy| {
            let (metadata, spec) = (&policy.metadata, &policy.spec);
            let mut all = registry.all();
            !all.any(|instance| compile::selects(metadata, spec, &instance.id.namespace, &instance.labels))
        });
        let warning = |policy: &Resource<AuthorizationPolicy>| {
            let (namespace, name) = (&policy.metadata.namespace, &policy.metadata.name);
            format!("AuthorizationPolicy {namespace}/{name}: no registered workload has the labels of its selector")
        };
        if registry.all().next().is_none() { Vec::new() } else { nothing.map(warning).collect() }
    }

    /// How many workloads an AuthorizationPolicy, `KIND/NAMESPACE/NAME`, selects.
    pub fn selected_by(&self, registry: &Registry, policy: &str) -> usize {
        let mut parts = policy.splitn(3, '/').skip(1).map(str::to_owned);
        let (Some(namespace), Some(name)) = (parts.next(), parts.next()) else { return 0 };
        let Some(policy) = self.resources.authorization_policies.get(&(namespace, name)) else { return 0 };
        let selected = |instance: &&Arc<Instance>| {
            compile::selects(&policy.metadata, &policy.spec, &instance.id.namespace, &instance.labels)
        };
        registry.all().filter(selected).count()
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

    fn services_in<'a, 'n>(&'a self, namespace: &'n str) -> impl Iterator<Item = &'a Resource<Service>> + use<'a, 'n> {
        self.resources
            .services
            .range((namespace.to_owned(), String::new())..)
            .take_while(move |((of, _), _)| of == namespace)
            .map(|(_, service)| service)
    }

    fn service(&self, registry: &Registry, key: &name::ServicePort) -> Option<Destination> {
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

/// What is known of a port of the workload itself.
#[derive(Default)]
struct OwnPort<'a> {
    declared: Option<Protocol>,
    /// The first Service, by name, that selects it.
    service: Option<(ServiceName, &'a ServicePort)>,
}

/// Where an instance serves a port.
#[derive(Clone, Copy)]
struct Target {
    application: u16,
    dial: u16,
    protocol: Option<Protocol>,
}

impl Target {
    fn of(port: &LeasedPort) -> Target {
        Target { application: port.application, dial: port.mesh, protocol: port.protocol }
    }

    fn plain(port: u16) -> Target {
        Target { application: port, dial: port, protocol: None }
    }
}

/// By the port at which peers dial, or else by the application's.
fn leased_at(ports: &[LeasedPort], port: u16) -> Option<Target> {
    let by_mesh = ports.iter().find(|leased| leased.mesh == port);
    by_mesh.or_else(|| ports.iter().find(|leased| leased.application == port)).map(Target::of)
}

fn target(instance: &Instance, wanted: &TargetPort) -> Option<Target> {
    let (application, leased) = application_port(instance, wanted)?;
    Some(leased.map_or(Target::plain(application), Target::of))
}

/// The instance's port that a targetPort means: a sidecar serves the ports that it registered, which have no names, and
/// every other only when it is transparent; a Workload document serves any number and the names that it lists.
fn application_port<'a>(instance: &'a Instance, wanted: &TargetPort) -> Option<(u16, Option<&'a LeasedPort>)> {
    match (&instance.ports, wanted) {
        (Ports::Leased(ports), TargetPort::Number(number)) => {
            ports.iter().find(|port| port.application == *number).map(|port| (*number, Some(port)))
        }
        (Ports::Intercepted(ports), TargetPort::Number(number)) => {
            Some((*number, ports.iter().find(|port| port.application == *number)))
        }
        (Ports::Leased(_) | Ports::Intercepted(_), TargetPort::Name(_)) => None,
        (Ports::Named(_), TargetPort::Number(number)) => Some((*number, None)),
        (Ports::Named(ports), TargetPort::Name(name)) => ports.get(name).map(|number| (*number, None)),
    }
}

pub(super) fn selects(service: &Resource<Service>, instance: &Instance) -> bool {
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

pub(super) fn service_name(metadata: &Metadata) -> Option<ServiceName> {
    ServiceName::new(&metadata.name, &metadata.namespace).ok()
}

fn load_balancer(text: &str) -> Option<LoadBalancer> {
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

/// Seconds after its end in which a certificate may still renew itself.
pub fn renew_grace_seconds(resources: &Resources) -> u64 {
    resources.mesh.renew_grace_seconds.unwrap_or(DEFAULT_RENEW_GRACE_SECONDS)
}

/// Seconds that a leaf lives.
pub fn leaf_lifetime_seconds(resources: &Resources) -> u64 {
    resources.mesh.leaf_lifetime_seconds.unwrap_or(DEFAULT_LEAF_LIFETIME_SECONDS)
}

fn mesh_settings(resources: &Resources) -> MeshSettings {
    let mesh = &resources.mesh;
    MeshSettings {
        outbound_mode: match mesh.outbound {
            OutboundTraffic::AllowAny => OutboundMode::AllowAny,
            OutboundTraffic::RegistryOnly => OutboundMode::RegistryOnly,
        },
        otlp_endpoint: mesh.tracing.otlp_endpoint.clone(),
        random_sampling_percentage: mesh.tracing.random_sampling_percentage.unwrap_or(1.0),
        access_log: match mesh.access_log {
            AccessLogMode::Off => AccessLog::Off,
            AccessLogMode::Failures => AccessLog::Failures,
            AccessLogMode::All => AccessLog::All,
        },
        max_series: mesh.max_series.unwrap_or(DEFAULT_MAX_SERIES),
        leaf_lifetime_seconds: leaf_lifetime_seconds(resources),
        key_algorithm: mesh.key_algorithm,
        opaque_ports: mesh.opaque_ports().to_vec(),
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
