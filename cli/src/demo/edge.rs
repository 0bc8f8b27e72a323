//! The edges of the demo and what is known of them: counts that both sidecars of an edge keep, differences between two
//! moments, quantiles. Pure; `scrape` fills it, `screen` and `verdict` read it.

use std::collections::{BTreeMap, BTreeSet};

/// Where the demo's workloads live.
pub(super) const NAMESPACE: &str = "demo";

/// Who calls whom, and how.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub from: &'static str,
    pub to: &'static str,
    /// As the `protocol` label of the metrics says it.
    pub protocol: &'static str,
    /// As people say it.
    pub spoken: &'static str,
    /// How often one request of the load makes this call.
    pub per_request: u64,
}

pub(super) const CALLS: [Call; 3] = [
    Call { from: "load", to: "web", protocol: "http1", spoken: "HTTP/1.1", per_request: 1 },
    Call { from: "web", to: "catalog", protocol: "grpc", spoken: "gRPC", per_request: 2 },
    Call { from: "web", to: "ledger", protocol: "tcp", spoken: "TCP", per_request: 1 },
];

impl Call {
    pub(super) fn service(&self) -> String {
        format!("{}.{NAMESPACE}", self.to)
    }

    pub(super) fn caller_identity(&self) -> String {
        identity(self.from)
    }

    pub(super) fn service_identity(&self) -> String {
        identity(self.to)
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} -> {}", self.from, self.to)
    }
}

/// The SPIFFE id of a workload of the demo, whose service account has its name.
fn identity(workload: &str) -> String {
    format!("spiffe://{}/ns/{NAMESPACE}/sa/{workload}", outrigger_api::identity::DEFAULT_TRUST_DOMAIN)
}

/// What one side of an edge has counted since it started: HTTP requests, or TCP connections, that have ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Side {
    pub ended: u64,
    /// As the documentation of availability defines it.
    pub failed: u64,
    /// Of those that ended, how many without mutual TLS.
    pub plaintext: u64,
    /// Why the mesh ended some of them itself.
    pub reasons: BTreeMap<String, u64>,
    /// Who called, as proved to this side.
    pub principals: BTreeSet<String>,
    pub protocols: BTreeSet<String>,
    pub latency: Latency,
}

/// One edge at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Edge {
    /// The caller's sidecar.
    pub outbound: Side,
    /// The service's sidecar.
    pub inbound: Side,
    /// The identities that the caller's sidecar demands of the service's endpoints before it sends a byte.
    pub demanded: BTreeSet<String>,
}

impl Edge {
    /// Every request so far was authenticated on both sides; false when there was none.
    pub(super) fn mutual(&self) -> bool {
        let mutual = |side: &Side| side.ended > 0 && side.plaintext == 0;
        mutual(&self.outbound) && mutual(&self.inbound)
    }

    /// As the caller's side saw it: it knows also what never arrived.
    pub(super) fn since(&self, earlier: &Edge) -> Window {
        let (now, before) = (&self.outbound, &earlier.outbound);
        Window {
            ended: now.ended.saturating_sub(before.ended),
            failed: now.failed.saturating_sub(before.failed),
            latency: now.latency.since(&before.latency),
        }
    }
}

/// What happened on an edge between two moments.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Window {
    pub ended: u64,
    pub failed: u64,
    pub latency: Latency,
}

impl Window {
    pub(super) fn success_percent(&self) -> Option<f64> {
        (self.ended > 0).then(|| 100.0 * self.ended.saturating_sub(self.failed) as f64 / self.ended as f64)
    }
}

/// A histogram: how many took at most so many seconds, by rising bounds; the last bound is infinite.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Latency {
    cumulative: Vec<(f64, u64)>,
}

impl Latency {
    /// Adds what one series counted up to `bound`.
    pub(super) fn add(&mut self, bound: f64, count: u64) {
        match self.cumulative.binary_search_by(|(known, _)| known.total_cmp(&bound)) {
            Ok(at) => self.cumulative[at].1 += count,
            Err(at) => self.cumulative.insert(at, (bound, count)),
        }
    }

    fn since(&self, earlier: &Latency) -> Latency {
        let before = |bound: f64| earlier.cumulative.iter().find(|(known, _)| *known == bound).map_or(0, |(_, n)| *n);
        let cumulative =
            self.cumulative.iter().map(|(bound, count)| (*bound, count.saturating_sub(before(*bound)))).collect();
        Latency { cumulative }
    }

    /// Seconds, by linear interpolation inside the bucket; None when nothing was counted.
    pub(super) fn quantile(&self, share: f64) -> Option<f64> {
        let all = self.cumulative.last()?.1;
        if all == 0 {
            return None;
        }
        let wanted = share * all as f64;
        let (mut below, mut counted) = (0.0, 0);
        for (bound, count) in &self.cumulative {
            if *count as f64 >= wanted && *count > counted {
                // Beyond the last finite bound nothing more is known than that bound.
                let above = if bound.is_finite() { *bound } else { below };
                return Some(below + (above - below) * (wanted - counted as f64) / (count - counted) as f64);
            }
            (below, counted) = (*bound, *count);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latency(counts: &[(f64, u64)]) -> Latency {
        let mut latency = Latency::default();
        counts.iter().for_each(|(bound, count)| latency.add(*bound, *count));
        latency
    }

    #[test]
    fn quantiles_are_interpolated() {
        let some = latency(&[(f64::INFINITY, 100), (0.001, 50), (0.005, 99)]);
        assert_eq!(some.quantile(0.25), Some(0.0005));
        assert_eq!(some.quantile(0.5), Some(0.001));
        assert_eq!(some.quantile(0.99), Some(0.005));
        assert_eq!(some.quantile(1.0), Some(0.005));
        assert_eq!(Latency::default().quantile(0.5), None);
        let later = latency(&[(0.001, 50), (0.005, 109), (f64::INFINITY, 110)]);
        assert_eq!(later.since(&some).quantile(0.5), Some(0.003));
    }

    #[test]
    fn an_edge_is_mutual_when_both_sides_are() {
        let side = |ended, plaintext| Side { ended, plaintext, ..Side::default() };
        for (outbound, inbound, mutual) in [
            (side(5, 0), side(5, 0), true),
            (side(5, 0), side(5, 1), false),
            (side(5, 5), side(5, 0), false),
            (side(5, 0), side(0, 0), false),
        ] {
            assert_eq!(Edge { outbound, inbound, ..Edge::default() }.mutual(), mutual);
        }
    }
}
