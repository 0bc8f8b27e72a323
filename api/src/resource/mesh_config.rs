//! `MeshConfig`: settings for the whole mesh, one object named `default` in `outrigger-system`.

use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Metadata;
use super::duration::WrittenDuration;
use super::findings::Findings;
use super::path::{Path, Shortened};
use super::syntax::Port;
use crate::identity::{ROOT_NAMESPACE, TrustDomain};

#[derive(Clone, PartialEq, Debug, Default)]
pub struct MeshConfig {
    /// Must agree with `--trust-domain` when both are given.
    pub trust_domain: Option<TrustDomain>,
    /// `leafLifetime`, whole seconds, at least 10 s; None: 24 h.
    pub leaf_lifetime_seconds: Option<u64>,
    /// `renewGrace`, whole seconds; None: 7 days.
    pub renew_grace_seconds: Option<u64>,
    pub key_algorithm: KeyAlgorithm,
    pub outbound: OutboundTraffic,
    /// `defaultAction: Deny`: what no ALLOW policy allows is refused, also where none applies.
    pub deny_by_default: bool,
    pub tracing: Tracing,
    pub access_log: AccessLogMode,
    /// `metrics.maxSeries`
    pub max_series: Option<u32>,
    /// Ports whose protocol is tcp unless a Service or a sidecar declares another; None: the defaults.
    pub opaque_ports: Option<Vec<u16>>,
    pub defaults: Defaults,
}

impl MeshConfig {
    /// The opaque ports in force: a list that is written replaces the defaults.
    pub fn opaque_ports(&self) -> &[u16] {
        self.opaque_ports.as_deref().unwrap_or(&crate::snapshot::DEFAULT_OPAQUE_PORTS)
    }
}

pub use crate::snapshot::KeyAlgorithm;

/// `outbound.mode`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
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

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
pub enum LoadBalancerType {
    #[default]
    LeastRequest,
    RoundRobin,
    Random,
}

impl LoadBalancerType {
    pub(super) const NAMES: [(&'static str, LoadBalancerType); 3] = [
        ("LeastRequest", LoadBalancerType::LeastRequest),
        ("RoundRobin", LoadBalancerType::RoundRobin),
        ("Random", LoadBalancerType::Random),
    ];
}

/// The name that the one MeshConfig has, in [`ROOT_NAMESPACE`].
const NAME: &str = "default";
/// Below this a renewal at half-life leaves no time for a retry.
const SHORTEST_LEAF_SECONDS: u64 = 10;
/// The intermediate that signs leaves lives no longer.
const LONGEST_LEAF_SECONDS: u64 = 90 * 24 * 60 * 60;

/// How long after its end a certificate may still renew itself, unless `renewGrace` says otherwise.
pub const DEFAULT_RENEW_GRACE_SECONDS: u64 = 7 * 24 * 60 * 60;
/// So long a control plane keeps what it knows of a certificate after its end.
pub const LONGEST_RENEW_GRACE_SECONDS: u64 = 90 * 24 * 60 * 60;

/// `spec` as written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawMeshConfig {
    trust_domain: Option<String>,
    trust_bundles: Option<IgnoredAny>,
    leaf_lifetime: Option<WrittenDuration>,
    renew_grace: Option<WrittenDuration>,
    key_algorithm: Option<KeyAlgorithm>,
    outbound: RawOutbound,
    default_action: Option<DefaultAction>,
    tracing: RawTracing,
    access_log: Option<AccessLogMode>,
    metrics: RawMetrics,
    opaque_ports: Option<Vec<Port>>,
    defaults: RawDefaults,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawOutbound {
    mode: Option<OutboundTraffic>,
}

#[derive(Deserialize, PartialEq)]
enum DefaultAction {
    Allow,
    Deny,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawTracing {
    otlp_endpoint: Option<String>,
    otlp_protocol: Option<OtlpProtocol>,
    random_sampling_percentage: Option<f64>,
}

#[derive(Deserialize, PartialEq)]
enum OtlpProtocol {
    #[serde(rename = "grpc")]
    Grpc,
    #[serde(rename = "http/protobuf")]
    HttpProtobuf,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawMetrics {
    max_series: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawDefaults {
    load_balancer: RawLoadBalancer,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawLoadBalancer {
    #[serde(rename = "type")]
    kind: Option<LoadBalancerType>,
}

impl RawMeshConfig {
    /// `path` is that of `spec`.
    pub(super) fn check(self, path: &Path, findings: &mut Findings) -> MeshConfig {
        if self.trust_bundles.is_some() {
            let path = path.key("trustBundles");
            findings.error_at_key(&path, "not in this version: a mesh trusts its own trust domain only".to_owned());
        }
        let trust_domain = self.trust_domain.and_then(|text| {
            let checked = TrustDomain::new(&text);
            checked.map_err(|error| findings.error(&path.key("trustDomain"), error.to_string())).ok()
        });
        let leaf_lifetime_seconds = self.leaf_lifetime.and_then(|WrittenDuration(lifetime)| {
            let checked = leaf_lifetime(lifetime);
            checked.map_err(|message| findings.error(&path.key("leafLifetime"), message)).ok()
        });
        let renew_grace_seconds = self.renew_grace.and_then(|WrittenDuration(grace)| {
            let checked = renew_grace(grace);
            checked.map_err(|message| findings.error(&path.key("renewGrace"), message)).ok()
        });
        if self.metrics.max_series == Some(0) {
            let path = path.key("metrics").key("maxSeries");
            findings.error(&path, "0 would leave no metric at all: expected at least 1".to_owned());
        }
        let opaque_ports = self.opaque_ports.map(|ports| {
            let ports: std::collections::BTreeSet<u16> = ports.into_iter().map(|Port(port)| port).collect();
            ports.into_iter().collect()
        });
        MeshConfig {
            trust_domain,
            leaf_lifetime_seconds,
            renew_grace_seconds,
            key_algorithm: self.key_algorithm.unwrap_or_default(),
            outbound: self.outbound.mode.unwrap_or_default(),
            deny_by_default: self.default_action == Some(DefaultAction::Deny),
            tracing: self.tracing.check(&path.key("tracing"), findings),
            access_log: self.access_log.unwrap_or_default(),
            max_series: self.metrics.max_series,
            opaque_ports,
            defaults: Defaults { load_balancer: self.defaults.load_balancer.kind.unwrap_or_default() },
        }
    }
}

/// There is one, under one name. `path` is that of `metadata`.
pub(super) fn check_name(metadata: &Metadata, path: &Path, findings: &mut Findings) {
    let rule = format!("the one MeshConfig is named {NAME} in {ROOT_NAMESPACE}");
    if metadata.name.is_empty() {
        // Already told that it has none.
    } else if metadata.name != NAME {
        findings.error(&path.key("name"), format!("{rule}, not {}", Shortened(&metadata.name)));
    } else if metadata.namespace != ROOT_NAMESPACE {
        findings.error(&path.key("namespace"), format!("{rule}, not in {}", Shortened(&metadata.namespace)));
    }
}

impl RawTracing {
    fn check(self, path: &Path, findings: &mut Findings) -> Tracing {
        if self.otlp_protocol == Some(OtlpProtocol::HttpProtobuf) {
            let path = path.key("otlpProtocol");
            findings.error(&path, "http/protobuf is not in this version: use grpc (port 4317)".to_owned());
        }
        if let Some(percentage) = self.random_sampling_percentage
            && !(0.0..=100.0).contains(&percentage)
        {
            let path = path.key("randomSamplingPercentage");
            findings.error(&path, format!("{percentage} is not a percentage: expected 0 to 100"));
        }
        let otlp_endpoint = self.otlp_endpoint.filter(|text| !text.is_empty());
        if let Some(text) = otlp_endpoint.as_deref()
            && !is_otlp_endpoint(text)
        {
            let path = path.key("otlpEndpoint");
            let shown = Shortened(text);
            findings.error(&path, format!("{shown:?} is not an OTLP endpoint: expected http://HOST:PORT"));
        }
        Tracing { otlp_endpoint, random_sampling_percentage: self.random_sampling_percentage }
    }
}

fn leaf_lifetime(lifetime: Duration) -> Result<u64, String> {
    let seconds = lifetime.as_secs();
    if lifetime.subsec_nanos() != 0 {
        return Err("expected whole seconds".to_owned());
    }
    if seconds < SHORTEST_LEAF_SECONDS {
        return Err(format!("{seconds}s is too short: expected at least {SHORTEST_LEAF_SECONDS}s"));
    }
    if seconds > LONGEST_LEAF_SECONDS {
        return Err(format!("{seconds}s is too long: expected at most {}h", LONGEST_LEAF_SECONDS / 3600));
    }
    Ok(seconds)
}

fn renew_grace(grace: Duration) -> Result<u64, String> {
    let seconds = grace.as_secs();
    if grace.subsec_nanos() != 0 {
        return Err("expected whole seconds".to_owned());
    }
    if seconds > LONGEST_RENEW_GRACE_SECONDS {
        return Err(format!("{seconds}s is too long: expected at most {}h", LONGEST_RENEW_GRACE_SECONDS / 3600));
    }
    Ok(seconds)
}

/// `http://HOST:PORT`, with nothing behind it but a slash. HOST is a name, an IPv4 or a bracketed IPv6 address.
fn is_otlp_endpoint(text: &str) -> bool {
    let Some(authority) = text.strip_prefix("http://").map(|rest| rest.strip_suffix('/').unwrap_or(rest)) else {
        return false;
    };
    let Some((host, port)) = authority.rsplit_once(':') else { return false };
    let port_fits = port.parse::<u16>().is_ok_and(|number| number != 0 && number.to_string() == port);
    let host_fits = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            (1..=253).contains(&host.len())
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        }
    };
    port_fits && host_fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for text in ["http://jaeger:4317", "http://127.0.0.1:4317/", "http://[::1]:4317", "http://a.b_c:1"] {
            assert!(is_otlp_endpoint(text), "{text}");
        }
        for text in [
            "jaeger:4317",
            "https://jaeger:4317",
            "http://jaeger",
            "http://jaeger:0",
            "http://jaeger:99999",
            "http://jaeger:+1",
            "http://:4317",
            "http://a/b:4317",
            "http://jaeger:4317/v1/traces",
            "http://u@h:1",
            "http://[::1:4317",
            "http://a b:1",
        ] {
            assert!(!is_otlp_endpoint(text), "{text}");
        }
    }

    #[test]
    fn leaf_lifetimes() {
        for seconds in [10, 80, 5400, 86_400, 7_776_000] {
            assert_eq!(leaf_lifetime(Duration::from_secs(seconds)), Ok(seconds));
        }
        for milliseconds in [0, 9_000, 10_500, 7_776_001_000] {
            assert!(leaf_lifetime(Duration::from_millis(milliseconds)).is_err(), "{milliseconds}");
        }
    }

    #[test]
    fn graces() {
        for seconds in [0, 1, 604_800, 7_776_000] {
            assert_eq!(renew_grace(Duration::from_secs(seconds)), Ok(seconds));
        }
        for milliseconds in [500, 10_500, 7_776_001_000] {
            assert!(renew_grace(Duration::from_millis(milliseconds)).is_err(), "{milliseconds}");
        }
    }
}
