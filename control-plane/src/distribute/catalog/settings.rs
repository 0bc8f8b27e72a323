//! What of MeshConfig concerns sidecars and certificates, with its defaults.

use outrigger_api::resource::{AccessLogMode, DEFAULT_RENEW_GRACE_SECONDS, OutboundTraffic, Resources};
use outrigger_api::snapshot::{
    AccessLog, DEFAULT_LEAF_LIFETIME_SECONDS, DEFAULT_MAX_SERIES, MeshSettings, OutboundMode,
};

/// Seconds after its end in which a certificate may still renew itself.
pub fn renew_grace_seconds(resources: &Resources) -> u64 {
    resources.mesh.renew_grace_seconds.unwrap_or(DEFAULT_RENEW_GRACE_SECONDS)
}

/// Seconds that a leaf lives.
pub fn leaf_lifetime_seconds(resources: &Resources) -> u64 {
    resources.mesh.leaf_lifetime_seconds.unwrap_or(DEFAULT_LEAF_LIFETIME_SECONDS)
}

pub(super) fn mesh_settings(resources: &Resources) -> MeshSettings {
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
