//! What the control plane counts about itself. Handles are made once; `admin` prints them.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

pub struct Metrics {
    pub registry: Registry,
    pub issued: IntCounterVec,
    pub issue_refused: IntCounterVec,
    pub pushes: IntCounter,
    pub refusals: IntCounter,
    pub handshakes_failed: IntCounter,
    pub leases_refused: IntCounter,
    pub reports: IntCounter,
    pub leases: IntGauge,
    pub connected: IntGauge,
    pub subscriptions: IntGauge,
    pub config_errors: IntGauge,
    pub stale_services: IntGauge,
    pub issuer_expiry: IntGauge,
}

impl Metrics {
    pub fn new() -> Result<Metrics, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(format!("outrigger_control_plane_{name}"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let by = |name: &str, help: &str, label: &str| {
            let opts = Opts::new(format!("outrigger_control_plane_{name}"), help);
            let counters = IntCounterVec::new(opts, &[label])?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(format!("outrigger_control_plane_{name}"), help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        Ok(Metrics {
            issued: by("certificates_issued_total", "Workload certificates issued, by proof (token or mtls)", "proof")?,
            issue_refused: by("certificates_refused_total", "Requests for a certificate refused, by reason", "reason")?,
            pushes: counter("pushes_total", "Updates that were due to a subscriber because a resource changed")?,
            refusals: counter("refusals_total", "Updates that a sidecar refused")?,
            handshakes_failed: counter("handshakes_failed_total", "TLS handshakes that failed or timed out")?,
            leases_refused: counter("leases_refused_total", "Registrations refused")?,
            reports: counter("reports_total", "Reports of golden signals taken")?,
            leases: gauge("leases", "Instances that hold a lease or are kept after losing it")?,
            connected: gauge("connected_sidecars", "Open Watch streams")?,
            subscriptions: gauge("subscriptions", "Distinct resources that somebody subscribed to")?,
            config_errors: gauge("config_errors", "Errors in the configuration directory as it is now")?,
            stale_services: gauge("stale_services", "Services that list endpoints which were lost")?,
            issuer_expiry: gauge("issuer_expiry_seconds", "Seconds until the issuing chain ends")?,
            registry,
        })
    }
}
