//! What the sidecar tells about traffic: metrics, traces, the access log, and the report to the control plane (DESIGN
//! section 10, printed for users in docs/metrics.md). The data path resolves an [`Edge`] once and fills one
//! [`HttpRecord`] or [`TcpRecord`] per request or connection; the control thread scrapes and configures. Telemetry
//! never holds up a request: what a queue cannot take is dropped and counted.

mod about;
mod access_log;
mod callers;
mod collect;
pub mod context;
mod edge;
mod export;
mod grpc;
mod labels;
mod lately;
mod record;
mod report;
mod span;
mod tcp;
#[cfg(test)]
mod tests;
mod text;
mod verdicts;

use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry_sdk::trace::SpanData;
use outrigger_api::snapshot::{AccessLog, DEFAULT_MAX_SERIES, MeshSettings};
use outrigger_api::wire;
use outrigger_runtime::logging::{Admitted, Throttle};
use prometheus::{Registry, TextEncoder};

use access_log::{AccessLogQueue, Entry};
pub use callers::{CallersView, PlaintextCallers, Unproved};
use collect::{Collected, Metrics, unix_millis};
use edge::Edges;
pub use edge::{BUCKETS, Edge};
pub use export::ExportError;
use export::{SpanQueue, Target, check_endpoint};
pub use grpc::GrpcFrames;
pub use labels::{
    Detected, Direction, EdgeLabels, OVERFLOW, Resolved, UNKNOWN, WireProtocol, grpc_status_name,
    is_failing_grpc_status, is_failure,
};
pub use lately::{Answered as AnsweredWith, Ended, Found, Inbound, Lately};
pub use record::HttpRecord;
pub use tcp::TcpRecord;
pub use verdicts::{Note, NoteKey, NoteKind, Verdicts, shape};

/// The longest that [`Telemetry::flush`] takes.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Whom this sidecar speaks for.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// Name of the instance: reports and traces, never metrics.
    pub instance: String,
    /// The name that metrics use.
    pub workload: String,
    pub namespace: String,
    /// SPIFFE id, empty before it is known.
    pub principal: String,
    /// SO_MARK of the connection to the collector.
    pub mark: Option<u32>,
}

/// One per process, shared by workers and the control thread.
pub struct Telemetry {
    own: Own,
    metrics: Arc<Metrics>,
    registry: Registry,
    /// An [`AccessLog`] by [`log_mode`].
    log_mode: AtomicU8,
    access_log: Option<AccessLogQueue>,
    /// Lines that strangers can cause as often as they like, by reason.
    strangers: Throttle<&'static str>,
    traces: AtomicBool,
    /// Of 2^32 traces that begin here, so many are sampled.
    sampled: AtomicU64,
    /// From the operating system's randomness: two sidecars that started at the same moment draw other ids.
    id_key: u128,
    /// Made when an endpoint is first configured.
    spans: OnceLock<SpanQueue>,
    reported: Mutex<Instant>,
    callers: PlaintextCallers,
    lately: Lately,
}

impl Telemetry {
    /// Access log on stderr, failures only, no traces, until [`configure`](Telemetry::configure) says otherwise.
    pub fn new(own: Own) -> Arc<Telemetry> {
        Telemetry::with_log_sink(own, std::io::stderr())
    }

    fn with_log_sink(own: Own, sink: impl Write + Send + 'static) -> Arc<Telemetry> {
        let metrics = Arc::new(Metrics::new(Edges::new(DEFAULT_MAX_SERIES, overflow_labels())));
        let registry = Registry::new();
        let registered = Collected::new(metrics.clone()).and_then(|all| registry.register(Box::new(all)));
        if let Err(error) = registered {
            tracing::error!("metrics of the mesh are missing from /metrics: {error}");
        }
        let access_log = AccessLogQueue::start(sink)
            .inspect_err(|error| tracing::error!("no access log, its thread could not be started: {error}"))
            .ok();
        let random = RandomState::new();
        let id_key = (u128::from(random.hash_one(1u8)) << 64) | u128::from(random.hash_one(2u8));
        let telemetry = Telemetry {
            own,
            metrics,
            registry,
            log_mode: AtomicU8::new(log_mode(AccessLog::Failures)),
            access_log,
            strangers: Throttle::default(),
            traces: AtomicBool::new(false),
            sampled: AtomicU64::new(0),
            id_key,
            spans: OnceLock::new(),
            reported: Mutex::new(Instant::now()),
            callers: PlaintextCallers::default(),
            lately: Lately::default(),
        };
        Arc::new(telemetry)
    }

    /// Who calls without mutual TLS.
    pub fn plaintext_callers(&self) -> &PlaintextCallers {
        &self.callers
    }

    /// What was refused or failed lately.
    pub fn lately(&self) -> &Lately {
        &self.lately
    }

    /// Where others register what they measure (`outrigger_build_info`, `process_*`).
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The body of `/metrics`, text format 0.0.4.
    pub fn encode(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_else(|error| {
            tracing::error!("metrics cannot be encoded: {error}");
            String::new()
        })
    }

    /// Takes over what the mesh says. Called for each new snapshot; changes hold from the next request on. `service_name`
    /// is the name of the Service that selects this workload, empty without one.
    pub fn configure(&self, mesh: &MeshSettings, service_name: &str) {
        self.log_mode.store(log_mode(mesh.access_log), Ordering::Relaxed);
        self.metrics.edges.resize(mesh.max_series);
        let share = (mesh.random_sampling_percentage / 100.0).clamp(0.0, 1.0);
        self.sampled.store((share * 2f64.powi(32)) as u64, Ordering::Relaxed);
        let target = mesh.otlp_endpoint.as_ref().map(|endpoint| Target {
            endpoint: endpoint.clone(),
            service_name: if service_name.is_empty() { self.own.workload.clone() } else { service_name.to_owned() },
            service_namespace: self.own.namespace.clone(),
            service_instance_id: self.own.instance.clone(),
        });
        let traces = match self.retarget(target) {
            Ok(traces) => traces,
            Err(error) => {
                tracing::warn!("no traces: {error}");
                false
            }
        };
        self.traces.store(traces, Ordering::Relaxed);
    }

    /// True when spans have somewhere to go.
    fn retarget(&self, target: Option<Target>) -> Result<bool, ExportError> {
        if let Some(target) = &target {
            check_endpoint(&target.endpoint)?;
            if self.spans.get().is_none() {
                // Configured by one task; were there two, the second queue would end unused.
                let _ = self.spans.set(SpanQueue::start(self.metrics.clone(), self.own.mark)?);
            }
        }
        let traces = target.is_some();
        if let Some(spans) = self.spans.get() {
            spans.retarget(target);
        }
        Ok(traces)
    }

    /// Finds or makes the edge of these labels. It takes a lock: call it once per connection, route or endpoint and keep
    /// the answer. Beyond `metrics.maxSeries` it is the overflow's edge.
    pub fn edge(&self, labels: &EdgeLabels) -> Arc<Edge> {
        self.metrics.edges.find_or_create(labels)
    }

    /// True when spans are made, so that a caller can spare what only they need.
    pub fn traces(&self) -> bool {
        self.traces.load(Ordering::Relaxed)
    }

    /// The end of the workload's certificate.
    pub fn set_certificate_not_after(&self, unix_seconds: i64) {
        self.metrics.certificate_not_after.store(unix_seconds, Ordering::Relaxed);
    }

    /// Whether the stream from the control plane is up. While it is, the snapshot counts as current.
    pub fn set_control_plane_connected(&self, connected: bool) {
        let was = self.metrics.connected.swap(connected, Ordering::Relaxed);
        if was && !connected && self.metrics.snapshot_confirmed.load(Ordering::Relaxed) != 0 {
            self.confirm_snapshot(SystemTime::now());
        }
    }

    /// When the snapshot in use was last known to be current: now, when it came from the control plane; the time at
    /// which it was stored, when it was read from `--state`.
    pub fn confirm_snapshot(&self, at: SystemTime) {
        self.metrics.snapshot_confirmed.store(unix_millis(at), Ordering::Relaxed);
    }

    /// A connection could not be accepted.
    pub fn accept_failed(&self) {
        self.metrics.accept_failures.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection was closed at once: the sidecar is at its limit.
    pub fn connection_refused(&self) {
        self.metrics.connections_refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether connections are refused for want of memory.
    pub fn set_memory_pressure(&self, short: bool) {
        self.metrics.memory_pressure.store(short, Ordering::Relaxed);
    }

    /// What Shadow and AUDIT policies said.
    pub fn verdicts(&self) -> &Verdicts {
        &self.metrics.verdicts
    }

    /// Counts a connection on an undeclared port whose protocol was decided.
    pub fn detected(&self, outcome: Detected) {
        self.metrics.detected[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a question about a name.
    pub fn resolved(&self, outcome: Resolved) {
        self.metrics.resolved[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// What happened since the last call, for `Telemetry.Report`. The caller fills in `connections`; a window that
    /// could not be sent is not made up for.
    pub fn report_window(&self) -> wire::ReportRequest {
        let now = Instant::now();
        let last = std::mem::replace(&mut *self.reported.lock().unwrap_or_else(PoisonError::into_inner), now);
        wire::ReportRequest {
            instance: self.own.instance.clone(),
            window_seconds: now.saturating_duration_since(last).as_secs_f64(),
            edges: report::fitting(self.metrics.edges.all().iter().filter_map(|edge| report::window(edge)).collect()),
            certificate_not_after: self.metrics.certificate_not_after.load(Ordering::Relaxed),
            connections: 0,
            troubles: self.spans.get().and_then(SpanQueue::trouble).into_iter().collect(),
            shadow: self.metrics.verdicts.unreported(),
        }
    }

    /// The control plane has taken a report with these.
    pub fn report_taken(&self, shadow: &[wire::ShadowNote]) {
        self.metrics.verdicts.reported(shadow);
    }

    /// Waits until spans and log lines of what has ended are out, at most 5 s. For the end of the process.
    pub async fn flush(&self) {
        let spans = async {
            if let Some(spans) = self.spans.get() {
                spans.flush().await;
            }
        };
        let log = async {
            if let Some(log) = &self.access_log {
                log.flush().await;
            }
        };
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, async { tokio::join!(spans, log) }).await;
    }

    // --- for the records ------------------------------------------------------------------------------------

    fn edges(&self) -> &Edges {
        &self.metrics.edges
    }

    /// The edge of a request that ended before anything was known of its destination.
    fn unresolved_edge(&self) -> Arc<Edge> {
        self.edge(&EdgeLabels {
            direction: Direction::Outbound,
            source_workload: self.own.workload.clone(),
            source_namespace: self.own.namespace.clone(),
            source_principal: self.own.principal.clone(),
            destination_service: UNKNOWN.to_owned(),
            destination_workload: UNKNOWN.to_owned(),
            destination_namespace: UNKNOWN.to_owned(),
            protocol: WireProtocol::Http1,
            mtls: false,
            destination_principal: String::new(),
        })
    }

    /// Whether a request that failed, or one that did not, is logged.
    fn logs(&self, failed: bool) -> bool {
        let needed = if failed { AccessLog::Failures } else { AccessLog::All };
        self.log_mode.load(Ordering::Relaxed) >= log_mode(needed)
    }

    /// Whether a line about what a stranger did may be written now.
    pub fn line(&self, reason: &'static str) -> Option<Admitted> {
        self.strangers.admit(reason, Instant::now())
    }

    fn log(&self, mut entry: Entry) {
        if let Some(reason) = entry.refused_stranger() {
            match self.line(reason) {
                Some(line) => entry.suppressed = line.suppressed,
                None => return,
            }
        }
        if !self.access_log.as_ref().is_some_and(|log| log.send(entry)) {
            self.metrics.access_log_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The decision for a trace that begins here.
    fn samples(&self) -> bool {
        u64::from(fastrand::u32(..)) < self.sampled.load(Ordering::Relaxed)
    }

    fn new_trace_id(&self) -> u128 {
        (fastrand::u128(..) ^ self.id_key).max(1)
    }

    fn new_span_id(&self) -> u64 {
        (fastrand::u64(..) ^ self.id_key as u64).max(1)
    }

    fn export(&self, span: SpanData) {
        if !self.spans.get().is_some_and(|spans| spans.send(span)) {
            self.metrics.spans_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

const fn log_mode(mode: AccessLog) -> u8 {
    match mode {
        AccessLog::Off => 0,
        AccessLog::Failures => 1,
        AccessLog::All => 2,
    }
}

fn overflow_labels() -> EdgeLabels {
    EdgeLabels {
        direction: Direction::Outbound,
        source_workload: OVERFLOW.to_owned(),
        source_namespace: OVERFLOW.to_owned(),
        source_principal: OVERFLOW.to_owned(),
        destination_service: OVERFLOW.to_owned(),
        destination_workload: OVERFLOW.to_owned(),
        destination_namespace: OVERFLOW.to_owned(),
        protocol: WireProtocol::Http1,
        mtls: false,
        destination_principal: OVERFLOW.to_owned(),
    }
}
