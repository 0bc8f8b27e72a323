//! What a sidecar knows, as plain immutable values. The control plane makes them from its index, the sidecar from the
//! wire (see [`crate::wire`]); whoever holds one may rely on it being whole and valid.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::identity::SpiffeId;
use crate::name::{Protocol, ServiceName};
use crate::policy::authorization::Authorization;
use crate::policy::jwt::Authentication;
pub use crate::policy::mtls::MtlsMode;
use crate::policy::rate_limit::RateLimits;
use crate::route::Routes;

/// The workload itself: what its inbound side needs.
#[derive(Clone, PartialEq, Debug)]
pub struct Workload {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// By the application's port.
    pub ports: BTreeMap<u16, InboundPort>,
    /// For ports that nobody declared.
    pub default_mtls_mode: MtlsMode,
    pub mesh: MeshSettings,
    /// It is known as an instance; before, `ports` come from policies alone.
    pub registered: bool,
    /// What rules about the destination look at.
    pub labels: BTreeMap<String, String>,
    /// Who may call. It stands here and has no key of its own, so that a port and what decides about it arrive together.
    pub authorization: Arc<Authorization>,
    /// Which tokens count.
    pub authentication: Arc<Authentication>,
    /// How many requests it takes.
    pub rate_limits: Arc<RateLimits>,
}

impl Workload {
    /// The mode in force for an application port.
    pub fn mtls_mode(&self, port: u16) -> MtlsMode {
        self.ports.get(&port).map_or(self.default_mtls_mode, |port| port.mtls_mode)
    }

    /// What is declared about an application port; of one that nobody registered only the opaque ports say anything.
    pub fn protocol(&self, port: u16) -> Option<Protocol> {
        self.ports.get(&port).map_or_else(|| self.mesh.protocol(port), |port| port.protocol)
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct InboundPort {
    pub protocol: Option<Protocol>,
    pub mtls_mode: MtlsMode,
    /// The Service that selects this port, if any.
    pub service: Option<ServiceName>,
}

/// Mesh-wide settings that concern a sidecar.
#[derive(Clone, PartialEq, Debug)]
pub struct MeshSettings {
    pub outbound_mode: OutboundMode,
    /// Where traces go; none are made when absent.
    pub otlp_endpoint: Option<String>,
    /// 0 to 100.
    pub random_sampling_percentage: f64,
    pub access_log: AccessLog,
    /// Cap on label sets per metric.
    pub max_series: u32,
    pub leaf_lifetime_seconds: u64,
    pub key_algorithm: KeyAlgorithm,
    /// Ports that are tcp where nothing else declares a protocol.
    pub opaque_ports: Vec<u16>,
}

impl MeshSettings {
    /// What is declared about a port that nobody registered.
    pub fn protocol(&self, port: u16) -> Option<Protocol> {
        self.opaque_ports.contains(&port).then_some(Protocol::Tcp)
    }
}

/// What kind of key a leaf has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Deserialize)]
pub enum KeyAlgorithm {
    #[default]
    #[serde(rename = "ECDSA-P256")]
    EcdsaP256,
    Ed25519,
}

/// Cap on label sets per metric when MeshConfig does not say.
pub const DEFAULT_MAX_SERIES: u32 = 2_000;
/// Lifetime of a leaf when MeshConfig does not say: 24 h.
pub const DEFAULT_LEAF_LIFETIME_SECONDS: u64 = 24 * 60 * 60;
/// Opaque ports when MeshConfig does not say: those of protocols in which the server speaks first, or that nothing but
/// their own client understands. SMTP, MySQL and its group replication, PostgreSQL, Redis, Elasticsearch's transport,
/// memcached.
pub const DEFAULT_OPAQUE_PORTS: [u16; 8] = [25, 587, 3306, 4444, 5432, 6379, 9300, 11211];

impl Default for MeshSettings {
    fn default() -> MeshSettings {
        MeshSettings {
            outbound_mode: OutboundMode::AllowAny,
            otlp_endpoint: None,
            random_sampling_percentage: 1.0,
            access_log: AccessLog::Failures,
            max_series: DEFAULT_MAX_SERIES,
            leaf_lifetime_seconds: DEFAULT_LEAF_LIFETIME_SECONDS,
            key_algorithm: KeyAlgorithm::default(),
            opaque_ports: DEFAULT_OPAQUE_PORTS.to_vec(),
        }
    }
}

/// What happens to a destination that nobody registered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OutboundMode {
    AllowAny,
    RegistryOnly,
}

/// Which requests are written to the access log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessLog {
    Off,
    Failures,
    All,
}

/// One port of one service and who may serve it.
#[derive(Clone, PartialEq, Debug)]
pub struct Destination {
    pub service: ServiceName,
    pub port: u16,
    pub protocol: Option<Protocol>,
    pub load_balancer: LoadBalancer,
    pub endpoints: Vec<Endpoint>,
    /// The control plane lost more than half of the endpoints at once and lists them all the same.
    pub stale: bool,
    /// Why there are no endpoints, for people; empty where there are some.
    pub why_empty: String,
    /// The Service exists and has no such port.
    pub no_such_port: bool,
    /// What binds the port, for the callers of the asking workload's namespace.
    pub routes: Option<Arc<Routes>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LoadBalancer {
    /// Of two random endpoints the less loaded: peak EWMA for HTTP, open connections for TCP.
    #[default]
    LeastRequest,
    RoundRobin,
    Random,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// Where to dial: the mesh port when `tls` is mutual, else the application's own.
    pub address: SocketAddr,
    pub tls: EndpointTls,
    /// The name that metrics use.
    pub workload: String,
    pub namespace: String,
    /// Name of the instance.
    pub instance: String,
    /// At least 1.
    pub weight: u32,
    /// The application's port behind the mesh port.
    pub application_port: u16,
}

/// How to dial an endpoint. There is no third way: an unknown one is refused when it is decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EndpointTls {
    /// Mutual TLS, and the peer must prove this identity.
    Mutual(SpiffeId),
    Plaintext,
}

/// What a sidecar subscribes to.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Key {
    /// Its own workload.
    Own,
    Service(crate::name::ServicePort),
    Address(SocketAddr),
    /// The addresses that a service's name stands for.
    Name(ServiceName),
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Key::Own => f.write_str("self"),
            Key::Service(service) => write!(f, "{service}"),
            Key::Address(address) => write!(f, "{address}"),
            Key::Name(service) => write!(f, "{service}"),
        }
    }
}
