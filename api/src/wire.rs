//! The gRPC messages and services, and the one place where they become values of [`crate::snapshot`] and back.
//! Decoding refuses what it does not know: an unknown mode or protocol from a newer control plane refuses the whole
//! resource, never half of it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::identity::SpiffeId;
use crate::name;
use crate::peer_text::cut;
use crate::policy::authorization::Authorization;
use crate::policy::jwt::Authentication;
use crate::policy::rate_limit::RateLimits;
use crate::route::Routes;
use crate::snapshot;

mod generated {
    #![allow(clippy::all, clippy::unwrap_used, clippy::wildcard_imports, missing_docs)]
    tonic::include_proto!("outrigger.v1");
}
pub use generated::*;

/// What a [`Workload`] needs of its reader when policies are in it.
const AUTHORIZATION: &str = "authorization";
/// What a [`Destination`] needs of its reader when routes are in it.
const ROUTES: &str = "routes";
/// The same of RequestAuthentications.
const AUTHENTICATION: &str = "authentication";
/// The same of RateLimitPolicies.
const RATE_LIMITS: &str = "rate-limits";

/// The ALPN id of the control plane's port.
pub const CONTROL_PLANE_ALPN: &[u8] = b"h2";

/// With which both ends of a connection to the control plane export what a late renewal signs (identity.proto).
pub const LATE_RENEWAL_LABEL: &[u8] = b"EXPORTER-outrigger-late-renewal";

/// What the key of a certificate that ended signs to renew it.
pub fn late_renewal_message(exported: &[u8; 32], csr_der: &[u8]) -> Vec<u8> {
    [b"outrigger late renewal\0".as_slice(), exported, csr_der].concat()
}

/// Why a message was refused. The text goes back in `Ack.refusal`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("{field} has a value that this build does not know ({value})")]
    Unknown { field: &'static str, value: i32 },
    #[error("the message needs {0:?}, which this build does not have: use a newer sidecar")]
    Needs(String),
    #[error("{field}: {message}")]
    Invalid { field: &'static str, message: String },
}

fn invalid(field: &'static str, error: impl std::fmt::Display) -> WireError {
    WireError::Invalid { field, message: error.to_string() }
}

fn port(field: &'static str, value: u32) -> Result<u16, WireError> {
    u16::try_from(value).ok().filter(|port| *port != 0).ok_or_else(|| invalid(field, format!("{value} is not a port")))
}

fn ip(field: &'static str, value: &str) -> Result<IpAddr, WireError> {
    value.parse().map_err(|_| invalid(field, format!("{:?} is not an IP address", cut(value))))
}

// --- keys ---------------------------------------------------------------------------------------------------

impl From<&snapshot::Key> for ResourceKey {
    fn from(key: &snapshot::Key) -> ResourceKey {
        use resource_key::Key;
        let key = match key {
            snapshot::Key::Own => Key::Self_(Self_ {}),
            snapshot::Key::Service(name::ServicePort { service, port }) => Key::Service(ServicePort {
                name: service.name.to_string(),
                namespace: service.namespace.to_string(),
                port: u32::from(*port),
            }),
            snapshot::Key::Address(address) => {
                Key::Address(Address { ip: address.ip().to_string(), port: u32::from(address.port()) })
            }
            snapshot::Key::Name(service) => {
                Key::Name(ServiceName { name: service.name.to_string(), namespace: service.namespace.to_string() })
            }
        };
        ResourceKey { key: Some(key) }
    }
}

impl TryFrom<&ResourceKey> for snapshot::Key {
    type Error = WireError;

    fn try_from(key: &ResourceKey) -> Result<snapshot::Key, WireError> {
        use resource_key::Key;
        match key.key.as_ref().ok_or(WireError::Missing { field: "key" })? {
            Key::Self_(_) => Ok(snapshot::Key::Own),
            Key::Service(service) => Ok(snapshot::Key::Service(name::ServicePort {
                service: name::ServiceName::new(&service.name, &service.namespace)
                    .map_err(|e| invalid("key.service", e))?,
                port: port("key.service.port", service.port)?,
            })),
            Key::Address(address) => Ok(snapshot::Key::Address(SocketAddr::new(
                ip("key.address.ip", &address.ip)?,
                port("key.address.port", address.port)?,
            ))),
            Key::Name(service) => Ok(snapshot::Key::Name(
                name::ServiceName::new(&service.name, &service.namespace).map_err(|e| invalid("key.name", e))?,
            )),
        }
    }
}

// --- closed sets ----------------------------------------------------------------------------------------------

/// `None` is "not declared".
pub fn protocol_to_wire(protocol: Option<name::Protocol>) -> Protocol {
    match protocol {
        None => Protocol::Unspecified,
        Some(name::Protocol::Http) => Protocol::Http,
        Some(name::Protocol::Http2) => Protocol::Http2,
        Some(name::Protocol::Grpc) => Protocol::Grpc,
        Some(name::Protocol::Tcp) => Protocol::Tcp,
        Some(name::Protocol::Tls) => Protocol::Tls,
    }
}

/// The reverse of [`protocol_to_wire`].
pub fn protocol_from_wire(value: i32) -> Result<Option<name::Protocol>, WireError> {
    match Protocol::try_from(value).map_err(|_| WireError::Unknown { field: "protocol", value })? {
        Protocol::Unspecified => Ok(None),
        Protocol::Http => Ok(Some(name::Protocol::Http)),
        Protocol::Http2 => Ok(Some(name::Protocol::Http2)),
        Protocol::Grpc => Ok(Some(name::Protocol::Grpc)),
        Protocol::Tcp => Ok(Some(name::Protocol::Tcp)),
        Protocol::Tls => Ok(Some(name::Protocol::Tls)),
    }
}

fn mtls_mode_to_wire(mode: snapshot::MtlsMode) -> MtlsMode {
    match mode {
        snapshot::MtlsMode::Strict => MtlsMode::Strict,
        snapshot::MtlsMode::Permissive => MtlsMode::Permissive,
        snapshot::MtlsMode::Disable => MtlsMode::Disable,
    }
}

fn mtls_mode_from_wire(value: i32) -> Result<snapshot::MtlsMode, WireError> {
    match MtlsMode::try_from(value) {
        Ok(MtlsMode::Strict) => Ok(snapshot::MtlsMode::Strict),
        Ok(MtlsMode::Permissive) => Ok(snapshot::MtlsMode::Permissive),
        Ok(MtlsMode::Disable) => Ok(snapshot::MtlsMode::Disable),
        Ok(MtlsMode::Unspecified) | Err(_) => Err(WireError::Unknown { field: "mtls_mode", value }),
    }
}

// --- the workload itself ----------------------------------------------------------------------------------------

impl Workload {
    /// The message for a workload; the trust bundle travels with it.
    pub fn encode(workload: &snapshot::Workload, trust_bundle: TrustBundle) -> Workload {
        let needs = [
            (AUTHORIZATION, !workload.authorization.is_empty()),
            (AUTHENTICATION, !workload.authentication.is_empty()),
            (RATE_LIMITS, !workload.rate_limits.is_empty()),
        ];
        Workload {
            name: workload.name.clone(),
            namespace: workload.namespace.clone(),
            service_account: workload.service_account.clone(),
            ports: workload
                .ports
                .iter()
                .map(|(port, inbound)| InboundPort {
                    port: u32::from(*port),
                    protocol: protocol_to_wire(inbound.protocol).into(),
                    mtls_mode: mtls_mode_to_wire(inbound.mtls_mode).into(),
                    service: inbound.service.as_ref().map(ToString::to_string).unwrap_or_default(),
                })
                .collect(),
            default_mtls_mode: mtls_mode_to_wire(workload.default_mtls_mode).into(),
            mesh: Some((&workload.mesh).into()),
            trust_bundle: Some(trust_bundle),
            registered: workload.registered,
            needs: needs.into_iter().filter(|(_, there)| *there).map(|(need, _)| need.to_owned()).collect(),
            labels: workload.labels.clone().into_iter().collect(),
            // Plain values with text as keys: there is nothing that JSON could refuse.
            authorization: match workload.authorization.is_empty() {
                true => Vec::new(),
                false => serde_json::to_vec(&*workload.authorization).unwrap_or_else(|_| b"!".to_vec()),
            },
            rate_limits: match workload.rate_limits.is_empty() {
                true => Vec::new(),
                false => serde_json::to_vec(&*workload.rate_limits).unwrap_or_else(|_| b"!".to_vec()),
            },
            authentication: match workload.authentication.is_empty() {
                true => Vec::new(),
                false => serde_json::to_vec(&*workload.authentication).unwrap_or_else(|_| b"!".to_vec()),
            },
        }
    }

    /// The workload without its trust bundle, which `identity` checks and keeps by itself.
    pub fn decode(&self) -> Result<snapshot::Workload, WireError> {
        if let Some(need) =
            self.needs.iter().find(|need| ![AUTHORIZATION, AUTHENTICATION, RATE_LIMITS].contains(&need.as_str()))
        {
            return Err(WireError::Needs(need.chars().take(60).collect()));
        }
        let authorization = match self.authorization.as_slice() {
            [] => Authorization::default(),
            json => serde_json::from_slice(json).map_err(|error| invalid("authorization", error))?,
        };
        let authorization: Authorization = authorization;
        authorization.prepare();
        let authentication = match self.authentication.as_slice() {
            [] => Authentication::default(),
            json => serde_json::from_slice(json).map_err(|error| invalid("authentication", error))?,
        };
        let rate_limits = match self.rate_limits.as_slice() {
            [] => RateLimits::default(),
            json => serde_json::from_slice(json).map_err(|error| invalid("rate_limits", error))?,
        };
        let mesh = self.mesh.as_ref().ok_or(WireError::Missing { field: "mesh" })?;
        let mut ports = std::collections::BTreeMap::new();
        for inbound in &self.ports {
            let service = match inbound.service.as_str() {
                "" => None,
                text => Some(name::ServiceName::parse(text, &self.namespace).map_err(|e| invalid("ports.service", e))?),
            };
            ports.insert(
                port("ports.port", inbound.port)?,
                snapshot::InboundPort {
                    protocol: protocol_from_wire(inbound.protocol)?,
                    mtls_mode: mtls_mode_from_wire(inbound.mtls_mode)?,
                    service,
                },
            );
        }
        Ok(snapshot::Workload {
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
            ports,
            default_mtls_mode: mtls_mode_from_wire(self.default_mtls_mode)?,
            mesh: mesh.try_into()?,
            registered: self.registered,
            labels: self.labels.clone().into_iter().collect(),
            authorization: Arc::new(authorization),
            authentication: Arc::new(authentication),
            rate_limits: Arc::new(rate_limits),
        })
    }
}

impl From<&snapshot::MeshSettings> for MeshSettings {
    fn from(mesh: &snapshot::MeshSettings) -> MeshSettings {
        MeshSettings {
            outbound_mode: match mesh.outbound_mode {
                snapshot::OutboundMode::AllowAny => OutboundMode::AllowAny,
                snapshot::OutboundMode::RegistryOnly => OutboundMode::RegistryOnly,
            }
            .into(),
            otlp_endpoint: mesh.otlp_endpoint.clone().unwrap_or_default(),
            random_sampling_percentage: mesh.random_sampling_percentage,
            access_log: match mesh.access_log {
                snapshot::AccessLog::Off => AccessLog::Off,
                snapshot::AccessLog::Failures => AccessLog::Failures,
                snapshot::AccessLog::All => AccessLog::All,
            }
            .into(),
            max_series: mesh.max_series,
            leaf_lifetime_seconds: mesh.leaf_lifetime_seconds,
            key_algorithm: match mesh.key_algorithm {
                snapshot::KeyAlgorithm::EcdsaP256 => KeyAlgorithm::EcdsaP256,
                snapshot::KeyAlgorithm::Ed25519 => KeyAlgorithm::Ed25519,
            }
            .into(),
            opaque_ports: mesh.opaque_ports.iter().copied().map(u32::from).collect(),
        }
    }
}

impl TryFrom<&MeshSettings> for snapshot::MeshSettings {
    type Error = WireError;

    fn try_from(mesh: &MeshSettings) -> Result<snapshot::MeshSettings, WireError> {
        let sampling = mesh.random_sampling_percentage;
        if !(0.0..=100.0).contains(&sampling) {
            return Err(invalid("random_sampling_percentage", format!("{sampling} is not between 0 and 100")));
        }
        Ok(snapshot::MeshSettings {
            outbound_mode: match OutboundMode::try_from(mesh.outbound_mode) {
                Ok(OutboundMode::AllowAny) => snapshot::OutboundMode::AllowAny,
                Ok(OutboundMode::RegistryOnly) => snapshot::OutboundMode::RegistryOnly,
                Ok(OutboundMode::Unspecified) | Err(_) => {
                    return Err(WireError::Unknown { field: "outbound_mode", value: mesh.outbound_mode });
                }
            },
            otlp_endpoint: Some(mesh.otlp_endpoint.clone()).filter(|endpoint| !endpoint.is_empty()),
            random_sampling_percentage: sampling,
            access_log: match AccessLog::try_from(mesh.access_log) {
                Ok(AccessLog::Off) => snapshot::AccessLog::Off,
                Ok(AccessLog::All) => snapshot::AccessLog::All,
                Ok(AccessLog::Failures) => snapshot::AccessLog::Failures,
                Ok(AccessLog::Unspecified) | Err(_) => {
                    return Err(WireError::Unknown { field: "access_log", value: mesh.access_log });
                }
            },
            max_series: if mesh.max_series == 0 { snapshot::DEFAULT_MAX_SERIES } else { mesh.max_series },
            leaf_lifetime_seconds: mesh.leaf_lifetime_seconds,
            key_algorithm: match KeyAlgorithm::try_from(mesh.key_algorithm) {
                Ok(KeyAlgorithm::Unspecified | KeyAlgorithm::EcdsaP256) => snapshot::KeyAlgorithm::EcdsaP256,
                Ok(KeyAlgorithm::Ed25519) => snapshot::KeyAlgorithm::Ed25519,
                Err(_) => return Err(WireError::Unknown { field: "key_algorithm", value: mesh.key_algorithm }),
            },
            opaque_ports: mesh
                .opaque_ports
                .iter()
                .map(|number| port("opaque_ports", *number))
                .collect::<Result<_, _>>()?,
        })
    }
}

// --- destinations -------------------------------------------------------------------------------------------------

impl From<&snapshot::Destination> for Destination {
    fn from(destination: &snapshot::Destination) -> Destination {
        Destination {
            name: destination.service.name.to_string(),
            namespace: destination.service.namespace.to_string(),
            port: u32::from(destination.port),
            protocol: protocol_to_wire(destination.protocol).into(),
            load_balancer: match destination.load_balancer {
                snapshot::LoadBalancer::LeastRequest => LoadBalancer::LeastRequest,
                snapshot::LoadBalancer::RoundRobin => LoadBalancer::RoundRobin,
                snapshot::LoadBalancer::Random => LoadBalancer::Random,
            }
            .into(),
            endpoints: destination.endpoints.iter().map(Endpoint::from).collect(),
            stale: destination.stale,
            why_empty: destination.why_empty.clone(),
            no_such_port: destination.no_such_port,
            needs: destination.routes.iter().map(|_| ROUTES.to_owned()).collect(),
            // Plain values with text as keys: there is nothing that JSON could refuse.
            routes: destination
                .routes
                .as_ref()
                .map_or_else(Vec::new, |routes| serde_json::to_vec(&**routes).unwrap_or_else(|_| b"!".to_vec())),
        }
    }
}

impl TryFrom<&Destination> for snapshot::Destination {
    type Error = WireError;

    fn try_from(destination: &Destination) -> Result<snapshot::Destination, WireError> {
        if let Some(need) = destination.needs.iter().find(|need| *need != ROUTES) {
            return Err(WireError::Needs(need.chars().take(60).collect()));
        }
        let routes: Option<Routes> = match destination.routes.as_slice() {
            [] => None,
            json => Some(serde_json::from_slice(json).map_err(|error| invalid("routes", error))?),
        };
        Ok(snapshot::Destination {
            service: name::ServiceName::new(&destination.name, &destination.namespace)
                .map_err(|e| invalid("name", e))?,
            port: port("port", destination.port)?,
            protocol: protocol_from_wire(destination.protocol)?,
            load_balancer: match LoadBalancer::try_from(destination.load_balancer) {
                Ok(LoadBalancer::Unspecified | LoadBalancer::LeastRequest) => snapshot::LoadBalancer::LeastRequest,
                Ok(LoadBalancer::RoundRobin) => snapshot::LoadBalancer::RoundRobin,
                Ok(LoadBalancer::Random) => snapshot::LoadBalancer::Random,
                Err(_) => {
                    return Err(WireError::Unknown { field: "load_balancer", value: destination.load_balancer });
                }
            },
            endpoints: destination.endpoints.iter().map(snapshot::Endpoint::try_from).collect::<Result<_, _>>()?,
            stale: destination.stale,
            why_empty: cut(&destination.why_empty),
            no_such_port: destination.no_such_port,
            routes: routes.map(Arc::new),
        })
    }
}

impl From<&[IpAddr]> for ServiceAddresses {
    fn from(ips: &[IpAddr]) -> ServiceAddresses {
        ServiceAddresses { ips: ips.iter().map(ToString::to_string).collect() }
    }
}

impl TryFrom<&ServiceAddresses> for Vec<IpAddr> {
    type Error = WireError;

    fn try_from(addresses: &ServiceAddresses) -> Result<Vec<IpAddr>, WireError> {
        addresses.ips.iter().map(|text| ip("ips", text)).collect()
    }
}

impl From<&snapshot::Endpoint> for Endpoint {
    fn from(endpoint: &snapshot::Endpoint) -> Endpoint {
        let (tls, identity) = match &endpoint.tls {
            snapshot::EndpointTls::Mutual(identity) => (EndpointTls::Mtls, identity.to_string()),
            snapshot::EndpointTls::Plaintext => (EndpointTls::Plaintext, String::new()),
        };
        Endpoint {
            ip: endpoint.address.ip().to_string(),
            port: u32::from(endpoint.address.port()),
            tls: tls.into(),
            identity,
            workload: endpoint.workload.clone(),
            namespace: endpoint.namespace.clone(),
            weight: endpoint.weight,
            application_port: u32::from(endpoint.application_port),
            instance: endpoint.instance.clone(),
        }
    }
}

impl TryFrom<&Endpoint> for snapshot::Endpoint {
    type Error = WireError;

    fn try_from(endpoint: &Endpoint) -> Result<snapshot::Endpoint, WireError> {
        let tls = match EndpointTls::try_from(endpoint.tls) {
            Ok(EndpointTls::Mtls) => snapshot::EndpointTls::Mutual(
                SpiffeId::parse(&endpoint.identity).map_err(|e| invalid("endpoints.identity", e))?,
            ),
            Ok(EndpointTls::Plaintext) => snapshot::EndpointTls::Plaintext,
            Ok(EndpointTls::Unspecified) | Err(_) => {
                return Err(WireError::Unknown { field: "endpoints.tls", value: endpoint.tls });
            }
        };
        Ok(snapshot::Endpoint {
            address: SocketAddr::new(ip("endpoints.ip", &endpoint.ip)?, port("endpoints.port", endpoint.port)?),
            tls,
            workload: endpoint.workload.clone(),
            namespace: endpoint.namespace.clone(),
            instance: endpoint.instance.clone(),
            weight: endpoint.weight.max(1),
            application_port: port("endpoints.application_port", endpoint.application_port)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::{RouteTable, load};
    use crate::resource::SourceFile;

    /// A route that an older sidecar understands half would send requests astray.
    #[test]
    fn a_destination_travels_with_its_routes_or_not_at_all() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: pay, namespace: shop}\nspec: {ports: [{port: 80}]}\n---\n\
                    apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: a, namespace: shop}\nspec: \
                    {parentRefs: [{group: '', kind: Service, name: pay}], rules: [{backendRefs: [{name: pay, port: 80}]}]}\n";
        let parsed = load(&[SourceFile { name: "a".into(), text: text.into() }]);
        let port = name::ServicePort::parse("pay.shop:80", "shop").unwrap();
        let destination = snapshot::Destination {
            service: port.service.clone(),
            port: 80,
            protocol: None,
            load_balancer: snapshot::LoadBalancer::default(),
            endpoints: Vec::new(),
            stale: false,
            why_empty: String::new(),
            no_such_port: false,
            routes: RouteTable::new(&parsed.resources).of(&port, "shop").cloned(),
        };
        let known = Destination::from(&destination);
        assert_eq!(known.needs, ["routes"]);
        assert_eq!(snapshot::Destination::try_from(&known), Ok(destination));
        let text = String::from_utf8(known.routes.clone()).unwrap();
        let with = |from: &str, to: &str| {
            let newer = text.replacen(from, to, 1);
            assert_ne!(newer, text, "{from}");
            Destination { routes: newer.into_bytes(), ..known.clone() }
        };
        for newer in [
            Destination { needs: vec!["routes".into(), "newer".into()], ..known.clone() },
            with("{", "{\"newer\":1,"),
            with("\"weight\"", "\"newer\":1,\"weight\""),
            with("\"HTTPRoute\"", "\"UDPRoute\""),
        ] {
            assert!(snapshot::Destination::try_from(&newer).is_err(), "{newer:?}");
        }
    }
}
