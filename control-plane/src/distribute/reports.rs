//! The last minute of what sidecars reported, summed per edge for `outrigger stat`. Bounded whatever a sidecar sends.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use outrigger_api::wire::{Edge, ReportRequest};

use crate::registry::InstanceId;

/// How long a report is kept.
const KEPT: Duration = Duration::from_secs(60);
/// What `stat` looks at.
const WINDOW: Duration = Duration::from_secs(10);
/// Per report; a sidecar with more sends them truncated.
const MAX_EDGES: usize = 1_000;
/// Of one service account.
const MAX_INSTANCES: usize = 1_000;
const MAX_REPORTS: usize = 120;
/// Upper bounds in seconds of the buckets of a report (DESIGN section 10); a last one is +Inf.
pub const BOUNDS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

#[derive(Default)]
pub struct Reports {
    by_instance: Mutex<HashMap<InstanceId, VecDeque<Received>>>,
}

struct Received {
    at: Instant,
    report: ReportRequest,
}

/// Which edge, seen from which side.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct EdgeKey {
    pub source_namespace: String,
    pub source_workload: String,
    pub destination_namespace: String,
    pub destination_service: String,
    pub destination_workload: String,
    pub protocol: String,
    pub inbound: bool,
    pub mtls: bool,
    pub source_principal: String,
    pub destination_principal: String,
}

/// Rates over the window.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct EdgeStats {
    pub requests_per_second: f64,
    pub failures_per_second: f64,
    pub sent_bytes_per_second: f64,
    pub received_bytes_per_second: f64,
    /// Requests per second and bucket.
    pub latency: [f64; BOUNDS.len() + 1],
}

impl EdgeStats {
    /// 0 to 100; None when nothing was asked.
    pub fn success_percent(&self) -> Option<f64> {
        let requests = self.requests_per_second;
        // In this order no failure is exactly 100, whatever the rounding.
        (requests > 0.0).then(|| (100.0 - 100.0 * self.failures_per_second / requests).clamp(0.0, 100.0))
    }

    /// Seconds below which a share (0 to 1) of the requests ended, by linear interpolation within a bucket as
    /// Prometheus does it; the last finite bound for what is beyond it. None when there are none.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let total: f64 = self.latency.iter().sum();
        if total <= 0.0 {
            return None;
        }
        let wanted = total * share;
        let mut below = 0.0;
        let mut lower = 0.0;
        for (count, upper) in self.latency.iter().zip(BOUNDS) {
            if below + count >= wanted && *count > 0.0 {
                return Some(lower + (upper - lower) * ((wanted - below) / count).clamp(0.0, 1.0));
            }
            below += count;
            lower = upper;
        }
        Some(lower)
    }
}

impl Reports {
    pub fn take(&self, id: InstanceId, mut report: ReportRequest, now: Instant) {
        report.edges.truncate(MAX_EDGES);
        let mut by_instance = self.by_instance.lock().unwrap_or_else(PoisonError::into_inner);
        // Instances name themselves: nobody fills the memory with names.
        let kin = |other: &&InstanceId| other.namespace == id.namespace && other.service_account == id.service_account;
        if !by_instance.contains_key(&id) && by_instance.keys().filter(kin).count() >= MAX_INSTANCES {
            return;
        }
        let reports = by_instance.entry(id).or_default();
        reports.push_back(Received { at: now, report });
        while reports.len() > MAX_REPORTS {
            reports.pop_front();
        }
        by_instance.retain(|_, reports| {
            while reports.front().is_some_and(|first| now.duration_since(first.at) > KEPT) {
                reports.pop_front();
            }
            !reports.is_empty()
        });
    }

    /// The rates of each edge over the last ten seconds or so. An instance counts with the reports of that time; what
    /// it said before is history.
    pub fn edges(&self, now: Instant) -> BTreeMap<EdgeKey, EdgeStats> {
        let by_instance = self.by_instance.lock().unwrap_or_else(PoisonError::into_inner);
        let mut edges: BTreeMap<EdgeKey, EdgeStats> = BTreeMap::new();
        for reports in by_instance.values() {
            let recent: Vec<&ReportRequest> = reports
                .iter()
                .filter(|received| now.duration_since(received.at) <= WINDOW)
                .map(|received| &received.report)
                .collect();
            let seconds: f64 = recent.iter().map(|report| report.window_seconds).sum();
            if seconds <= 0.0 {
                continue;
            }
            for edge in recent.iter().flat_map(|report| &report.edges) {
                edges.entry(EdgeKey::of(edge)).or_default().add(edge, seconds);
            }
        }
        edges
    }

    /// The end of the certificate and the open connections that an instance last reported.
    pub fn last(&self, id: &InstanceId) -> Option<(i64, u64)> {
        let by_instance = self.by_instance.lock().unwrap_or_else(PoisonError::into_inner);
        let last = &by_instance.get(id)?.back()?.report;
        Some((last.certificate_not_after, last.connections))
    }
}

impl EdgeKey {
    fn of(edge: &Edge) -> EdgeKey {
        EdgeKey {
            source_namespace: edge.source_namespace.clone(),
            source_workload: edge.source_workload.clone(),
            destination_namespace: edge.destination_namespace.clone(),
            destination_service: edge.destination_service.clone(),
            destination_workload: edge.destination_workload.clone(),
            protocol: edge.protocol.clone(),
            inbound: edge.inbound,
            mtls: edge.mtls,
            source_principal: edge.source_principal.clone(),
            destination_principal: edge.destination_principal.clone(),
        }
    }
}

impl EdgeStats {
    fn add(&mut self, edge: &Edge, seconds: f64) {
        self.requests_per_second += edge.requests as f64 / seconds;
        self.failures_per_second += edge.failures as f64 / seconds;
        self.sent_bytes_per_second += edge.sent_bytes as f64 / seconds;
        self.received_bytes_per_second += edge.received_bytes as f64 / seconds;
        for (sum, count) in self.latency.iter_mut().zip(&edge.latency_buckets) {
            *sum += *count as f64 / seconds;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> InstanceId {
        InstanceId { namespace: "shop".into(), service_account: "cart".into(), name: name.into() }
    }

    fn report(requests: u64, failures: u64, buckets: &[u64]) -> ReportRequest {
        let edge = Edge { requests, failures, latency_buckets: buckets.to_vec(), ..Edge::default() };
        ReportRequest { window_seconds: 5.0, edges: vec![edge], ..ReportRequest::default() }
    }

    #[test]
    fn replicas_add_up_and_old_reports_do_not() {
        let reports = Reports::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        reports.take(id("a"), report(1_000, 1_000, &[]), at(0));
        reports.take(id("a"), report(50, 0, &[0, 50]), at(20));
        reports.take(id("a"), report(100, 10, &[0, 100]), at(25));
        reports.take(id("b"), report(25, 0, &[0, 0, 25]), at(25));
        let edges = reports.edges(at(26));
        let stats = edges.values().next().unwrap();
        assert_eq!(stats.requests_per_second, 20.0);
        assert_eq!(stats.success_percent(), Some(95.0));
        assert!(reports.edges(at(100)).is_empty());
    }

    #[test]
    fn no_failure_is_exactly_all() {
        let stats = EdgeStats { requests_per_second: 99.068_832_496_155_05, ..EdgeStats::default() };
        assert_eq!(stats.success_percent(), Some(100.0));
    }

    #[test]
    fn quantiles_interpolate_within_buckets() {
        let mut stats = EdgeStats::default();
        assert_eq!(stats.quantile(0.5), None);
        stats.latency[4] = 100.0;
        assert_eq!(stats.quantile(0.5), Some(0.0075));
        assert_eq!(stats.quantile(1.0), Some(0.01));
        stats.latency = Default::default();
        stats.latency[BOUNDS.len()] = 1.0;
        assert_eq!(stats.quantile(0.5), Some(10.0));
    }
}
