//! What a sidecar tells the control plane every few seconds, so that `outrigger stat` works without a Prometheus:
//! per edge the difference since the last report. Called by the reporting task; it sends nothing by itself.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use outrigger_api::wire;
use prost::Message as _;

use super::edge::{Edge, Observations};
use super::labels::{Direction, OVERFLOW};

/// The control plane takes 256 KiB; the rest of the message needs little.
const MAX_BYTES: usize = 200 * 1024;

/// The busiest edges, as many as the control plane takes.
pub(super) fn fitting(mut edges: Vec<wire::Edge>) -> Vec<wire::Edge> {
    edges.sort_by_key(|edge| std::cmp::Reverse(edge.requests));
    let mut bytes = 0;
    edges.retain(|edge| {
        bytes += edge.encoded_len() + 8;
        bytes <= MAX_BYTES
    });
    edges
}

/// What was counted on an edge since the sidecar started.
#[derive(Clone, Default, Debug)]
pub(super) struct Totals {
    requests: u64,
    failures: u64,
    latency: Observations,
    sent: u64,
    received: u64,
}

impl Totals {
    fn of(edge: &Edge) -> Totals {
        let mut totals = Totals::default();
        edge.for_each_series(|series| {
            let durations = series.duration.read();
            totals.requests += durations.count();
            if series.outcome.failed() {
                totals.failures += durations.count();
            }
            totals.latency.add(&durations);
            totals.sent += series.response_bytes.load(Ordering::Relaxed);
            totals.received += series.request_bytes.load(Ordering::Relaxed);
        });
        totals.requests += edge.tcp.opened.load(Ordering::Relaxed);
        totals.failures += edge.tcp.failures();
        totals.latency.add(&edge.tcp.duration.read());
        totals.sent += edge.tcp.sent_bytes.load(Ordering::Relaxed);
        totals.received += edge.tcp.received_bytes.load(Ordering::Relaxed);
        totals
    }

    fn since(&self, earlier: &Totals) -> Totals {
        let mut latency = self.latency.clone();
        for (count, before) in latency.buckets.iter_mut().zip(earlier.latency.buckets) {
            *count = count.saturating_sub(before);
        }
        Totals {
            requests: self.requests.saturating_sub(earlier.requests),
            failures: self.failures.saturating_sub(earlier.failures),
            latency,
            sent: self.sent.saturating_sub(earlier.sent),
            received: self.received.saturating_sub(earlier.received),
        }
    }

    fn is_empty(&self) -> bool {
        self.requests == 0 && self.failures == 0 && self.latency.count() == 0 && self.sent == 0 && self.received == 0
    }
}

/// What happened on the edge since the last call; None when nothing did.
pub(super) fn window(edge: &Edge) -> Option<wire::Edge> {
    let mut reported = edge.reported.lock().unwrap_or_else(PoisonError::into_inner);
    let totals = Totals::of(edge);
    let delta = totals.since(&reported);
    *reported = totals;
    drop(reported);
    if delta.is_empty() {
        return None;
    }
    let labels = edge.labels();
    let text = |value: &str| if edge.is_overflow() { OVERFLOW.to_owned() } else { value.to_owned() };
    Some(wire::Edge {
        inbound: !edge.is_overflow() && labels.direction == Direction::Inbound,
        source_workload: text(&labels.source_workload),
        source_namespace: text(&labels.source_namespace),
        source_principal: text(&labels.source_principal),
        destination_service: text(&labels.destination_service),
        destination_workload: text(&labels.destination_workload),
        destination_namespace: text(&labels.destination_namespace),
        destination_principal: text(&labels.destination_principal),
        protocol: text(labels.protocol.as_str()),
        mtls: !edge.is_overflow() && labels.mtls,
        requests: delta.requests,
        failures: delta.failures,
        latency_buckets: delta.latency.buckets.to_vec(),
        sent_bytes: delta.sent,
        received_bytes: delta.received,
    })
}
