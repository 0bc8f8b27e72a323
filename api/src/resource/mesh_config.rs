//! `MeshConfig`: settings for the whole mesh, one object named `default` in `outrigger-system`.

use crate::identity::TrustDomain;

#[derive(Clone, PartialEq, Debug, Default)]
pub struct MeshConfig {
    /// Must agree with `--trust-domain` when both are given.
    pub trust_domain: Option<TrustDomain>,
    /// `leafLifetime`, whole seconds, at least 10 s; None: 24 h.
    pub leaf_lifetime_seconds: Option<u64>,
    pub key_algorithm: KeyAlgorithm,
    pub outbound: OutboundTraffic,
    pub tracing: Tracing,
    pub access_log: AccessLogMode,
    /// `metrics.maxSeries`
    pub max_series: Option<u32>,
    /// Ports whose protocol is tcp unless a Service or a sidecar declares another.
    pub opaque_ports: Vec<u16>,
    pub defaults: Defaults,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KeyAlgorithm {
    #[default]
    EcdsaP256,
    Ed25519,
}

/// `outbound.mode`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OutboundTraffic {
    #[default]
    AllowAny,
    RegistryOnly,
}

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Tracing {
    /// `http://host:port`
    pub otlp_endpoint: Option<String>,
    /// 0 to 100; None: 1.
    pub random_sampling_percentage: Option<f64>,
}

/// `accessLog`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AccessLogMode {
    Off,
    #[default]
    Failures,
    All,
}

/// `defaults`
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Defaults {
    /// `defaults.loadBalancer.type`
    pub load_balancer: LoadBalancerType,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LoadBalancerType {
    #[default]
    LeastRequest,
    RoundRobin,
    Random,
}
