//! What a scrape sees: every metric of the mesh with its help and labels, read from the edges and a few gauges. Called
//! by the registry on the control thread; it never touches a counter.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{self, MetricFamily, MetricType};

use super::about::{
    ACCEPT_FAILURES, ACCESS_LOG_DROPPED, ALL, About, CERTIFICATE_EXPIRY, CONNECTIONS_REFUSED, CONTROL_PLANE_CONNECTED,
    DETECT, DNS, GRPC_MESSAGES, HTTP_DURATION, HTTP_REQUEST_BYTES, HTTP_REQUESTS, HTTP_RESPONSE_BYTES, IN_FLIGHT,
    MEMORY_PRESSURE, POLICY_AUDIT, POLICY_SHADOW, SNAPSHOT_AGE, SPANS_DROPPED, SPANS_EXPORTED, TCP_CLOSED,
    TCP_DURATION, TCP_OPENED, TCP_RECEIVED, TCP_SENT,
};
use super::edge::{BUCKETS, Edge, Edges, Observations, Outcome, TcpCounters};
use super::labels::{Detected, OVERFLOW, Resolved, WireProtocol};
use super::verdicts::{NoteKind, Verdicts};

/// Everything that is measured in this process.
#[derive(Debug)]
pub(super) struct Metrics {
    pub edges: Edges,
    /// Unix seconds; 0: no certificate yet.
    pub certificate_not_after: AtomicI64,
    pub connected: AtomicBool,
    /// Unix milliseconds at which the snapshot was last known to be current; 0: there is none.
    pub snapshot_confirmed: AtomicI64,
    /// In the order of [`Detected::ALL`].
    pub detected: [AtomicU64; Detected::ALL.len()],
    /// In the order of [`Resolved::ALL`].
    pub resolved: [AtomicU64; Resolved::ALL.len()],
    pub verdicts: Verdicts,
    pub spans_exported: AtomicU64,
    pub spans_dropped: AtomicU64,
    pub access_log_dropped: AtomicU64,
    pub accept_failures: AtomicU64,
    pub connections_refused: AtomicU64,
    pub memory_pressure: AtomicBool,
}

impl Metrics {
    pub(super) fn new(edges: Edges) -> Metrics {
        Metrics {
            edges,
            certificate_not_after: AtomicI64::new(0),
            connected: AtomicBool::new(false),
            snapshot_confirmed: AtomicI64::new(0),
            detected: Default::default(),
            resolved: Default::default(),
            verdicts: Verdicts::default(),
            spans_exported: AtomicU64::new(0),
            spans_dropped: AtomicU64::new(0),
            access_log_dropped: AtomicU64::new(0),
            accept_failures: AtomicU64::new(0),
            connections_refused: AtomicU64::new(0),
            memory_pressure: AtomicBool::new(false),
        }
    }

    /// Seconds of certificate left at `now`, negative behind its end; None without one.
    fn certificate_expiry(&self, now: SystemTime) -> Option<f64> {
        let not_after = self.certificate_not_after.load(Ordering::Relaxed);
        (not_after != 0).then(|| not_after as f64 - unix_millis(now) as f64 / 1e3)
    }

    /// Seconds since the snapshot was last known to be current; None without one.
    fn snapshot_age(&self, now: SystemTime) -> Option<f64> {
        let confirmed = self.snapshot_confirmed.load(Ordering::Relaxed);
        let age = if self.connected.load(Ordering::Relaxed) { 0 } else { unix_millis(now) - confirmed };
        (confirmed != 0).then_some(age.max(0) as f64 / 1e3)
    }

    pub(super) fn families(&self, now: SystemTime) -> Vec<MetricFamily> {
        let edges = self.edges.all();
        let mut families = HttpRows::read(&edges).families();
        families.extend(TcpRows::read(&edges).families());
        families.extend(self.process_families(now));
        families
    }

    fn process_families(&self, now: SystemTime) -> Vec<MetricFamily> {
        let connected = f64::from(u8::from(self.connected.load(Ordering::Relaxed)));
        let count = |counter: &AtomicU64| Rows::one(counter.load(Ordering::Relaxed));
        let detected = Detected::ALL
            .iter()
            .zip(&self.detected)
            .map(|(outcome, count)| (vec![outcome.as_str().to_owned()], count.load(Ordering::Relaxed)));
        let resolved = Resolved::ALL
            .iter()
            .zip(&self.resolved)
            .map(|(outcome, count)| (vec![outcome.as_str().to_owned()], count.load(Ordering::Relaxed)));
        let mut families = vec![
            gauge(&CONTROL_PLANE_CONNECTED, Rows::one(connected)),
            counter(&DETECT, Rows(detected.collect())),
            counter(&DNS, Rows(resolved.collect())),
            counter(&SPANS_EXPORTED, count(&self.spans_exported)),
            counter(&SPANS_DROPPED, count(&self.spans_dropped)),
            counter(&ACCESS_LOG_DROPPED, count(&self.access_log_dropped)),
            counter(&ACCEPT_FAILURES, count(&self.accept_failures)),
            counter(&CONNECTIONS_REFUSED, count(&self.connections_refused)),
            gauge(&MEMORY_PRESSURE, Rows::one(f64::from(u8::from(self.memory_pressure.load(Ordering::Relaxed))))),
        ];
        let would = |kind, word: &'static str| {
            let counts = self.verdicts.counts(kind).into_iter();
            counts.map(move |((policy, principal), count)| (vec![policy, principal, word.to_owned()], count))
        };
        let shadow: BTreeMap<_, _> =
            would(NoteKind::WouldDeny, "denied").chain(would(NoteKind::WouldLimit, "limited")).collect();
        let audit = self.verdicts.counts(NoteKind::Audit).into_iter();
        let audit: BTreeMap<_, _> =
            audit.map(|((policy, principal), count)| (vec![policy, principal], count)).collect();
        if !shadow.is_empty() {
            families.push(counter(&POLICY_SHADOW, Rows(shadow)));
        }
        if !audit.is_empty() {
            families.push(counter(&POLICY_AUDIT, Rows(audit)));
        }
        families.extend(self.certificate_expiry(now).map(|left| gauge(&CERTIFICATE_EXPIRY, Rows::one(left))));
        families.extend(self.snapshot_age(now).map(|age| gauge(&SNAPSHOT_AGE, Rows::one(age))));
        families
    }
}

pub(super) fn unix_millis(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as i64
}

/// The registry's handle.
pub(super) struct Collected {
    metrics: Arc<Metrics>,
    described: Vec<Desc>,
}

impl Collected {
    pub(super) fn new(metrics: Arc<Metrics>) -> prometheus::Result<Collected> {
        let describe = |about: &&About| {
            let labels = about.labels.iter().map(|label| (*label).to_owned()).collect();
            Desc::new(about.name.to_owned(), about.help.to_owned(), labels, HashMap::new())
        };
        Ok(Collected { metrics, described: ALL.iter().map(describe).collect::<Result<_, _>>()? })
    }
}

impl Collector for Collected {
    fn desc(&self) -> Vec<&Desc> {
        self.described.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.metrics.families(SystemTime::now())
    }
}

/// Label values in the metric's order, and the sum of what is counted under them: edges that differ only in what the
/// metric has no label for share a row.
struct Rows<V>(BTreeMap<Vec<String>, V>);

impl<V: Default> Rows<V> {
    fn new() -> Rows<V> {
        Rows(BTreeMap::new())
    }

    fn one(value: V) -> Rows<V> {
        Rows(BTreeMap::from([(Vec::new(), value)]))
    }

    fn at(&mut self, about: &About, edge: &Edge, outcome: Option<&Outcome>) -> &mut V {
        let values = about.labels.iter().map(|name| label_value(name, edge, outcome)).collect();
        self.0.entry(values).or_default()
    }
}

fn label_value(name: &str, edge: &Edge, outcome: Option<&Outcome>) -> String {
    if edge.is_overflow() {
        return OVERFLOW.to_owned();
    }
    let labels = edge.labels();
    match name {
        "direction" => labels.direction.as_str().to_owned(),
        "source_workload" => labels.source_workload.clone(),
        "source_namespace" => labels.source_namespace.clone(),
        "source_principal" => labels.source_principal.clone(),
        "destination_service" => labels.destination_service.clone(),
        "destination_workload" => labels.destination_workload.clone(),
        "destination_namespace" => labels.destination_namespace.clone(),
        "protocol" => labels.protocol.as_str().to_owned(),
        "mtls" => labels.mtls.to_string(),
        "method" => outcome.map(|outcome| outcome.method.as_str().to_owned()).unwrap_or_default(),
        "code" => outcome.and_then(|outcome| outcome.code).map(|code| code.to_string()).unwrap_or_default(),
        "grpc_status" => {
            outcome.and_then(|outcome| outcome.grpc_status).map(|status| status.to_string()).unwrap_or_default()
        }
        "reason" => {
            outcome.and_then(|outcome| outcome.reason).map(|reason| reason.word().to_owned()).unwrap_or_default()
        }
        _ => String::new(),
    }
}

struct HttpRows {
    requests: Rows<u64>,
    duration: Rows<Observations>,
    request_bytes: Rows<u64>,
    response_bytes: Rows<u64>,
    grpc_messages: Rows<u64>,
    in_flight: Rows<i64>,
}

impl HttpRows {
    fn read(edges: &[Arc<Edge>]) -> HttpRows {
        let mut rows = HttpRows {
            requests: Rows::new(),
            duration: Rows::new(),
            request_bytes: Rows::new(),
            response_bytes: Rows::new(),
            grpc_messages: Rows::new(),
            in_flight: Rows::new(),
        };
        for edge in edges {
            let mut any = false;
            edge.for_each_series(|series| {
                any = true;
                let outcome = Some(&series.outcome);
                let durations = series.duration.read();
                let bytes =
                    (series.request_bytes.load(Ordering::Relaxed), series.response_bytes.load(Ordering::Relaxed));
                *rows.requests.at(&HTTP_REQUESTS, edge, outcome) += durations.count();
                rows.duration.at(&HTTP_DURATION, edge, outcome).add(&durations);
                *rows.request_bytes.at(&HTTP_REQUEST_BYTES, edge, outcome) += bytes.0;
                *rows.response_bytes.at(&HTTP_RESPONSE_BYTES, edge, outcome) += bytes.1;
                let messages = series.grpc_messages.load(Ordering::Relaxed);
                if messages > 0 || (edge.labels().protocol == WireProtocol::Grpc && !edge.is_overflow()) {
                    *rows.grpc_messages.at(&GRPC_MESSAGES, edge, outcome) += messages;
                }
            });
            let in_flight = edge.in_flight();
            if any || in_flight != 0 {
                *rows.in_flight.at(&IN_FLIGHT, edge, None) += in_flight;
            }
        }
        rows
    }

    fn families(self) -> Vec<MetricFamily> {
        vec![
            counter(&HTTP_REQUESTS, self.requests),
            histogram(&HTTP_DURATION, self.duration),
            counter(&HTTP_REQUEST_BYTES, self.request_bytes),
            counter(&HTTP_RESPONSE_BYTES, self.response_bytes),
            counter(&GRPC_MESSAGES, self.grpc_messages),
            gauge(&IN_FLIGHT, Rows(self.in_flight.0.into_iter().map(|(labels, n)| (labels, n as f64)).collect())),
        ]
    }
}

struct TcpRows {
    opened: Rows<u64>,
    closed: Rows<u64>,
    sent: Rows<u64>,
    received: Rows<u64>,
    duration: Rows<Observations>,
}

impl TcpRows {
    fn read(edges: &[Arc<Edge>]) -> TcpRows {
        let mut rows = TcpRows {
            opened: Rows::new(),
            closed: Rows::new(),
            sent: Rows::new(),
            received: Rows::new(),
            duration: Rows::new(),
        };
        for edge in edges {
            let tcp = &edge.tcp;
            for (place, count) in tcp.closed.iter().enumerate() {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    let outcome = Outcome::of_connection(TcpCounters::reason(place));
                    *rows.closed.at(&TCP_CLOSED, edge, Some(&outcome)) += count;
                }
            }
            let opened = tcp.opened.load(Ordering::Relaxed);
            if opened == 0 {
                continue;
            }
            *rows.opened.at(&TCP_OPENED, edge, None) += opened;
            *rows.sent.at(&TCP_SENT, edge, None) += tcp.sent_bytes.load(Ordering::Relaxed);
            *rows.received.at(&TCP_RECEIVED, edge, None) += tcp.received_bytes.load(Ordering::Relaxed);
            rows.duration.at(&TCP_DURATION, edge, None).add(&tcp.duration.read());
        }
        rows
    }

    fn families(self) -> Vec<MetricFamily> {
        vec![
            counter(&TCP_OPENED, self.opened),
            counter(&TCP_CLOSED, self.closed),
            counter(&TCP_SENT, self.sent),
            counter(&TCP_RECEIVED, self.received),
            histogram(&TCP_DURATION, self.duration),
        ]
    }
}

fn counter(about: &About, rows: Rows<u64>) -> MetricFamily {
    family(about, MetricType::COUNTER, rows, |metric, value| {
        let mut counter = proto::Counter::default();
        counter.set_value(value as f64);
        metric.set_counter(counter);
    })
}

fn gauge(about: &About, rows: Rows<f64>) -> MetricFamily {
    family(about, MetricType::GAUGE, rows, |metric, value| {
        let mut gauge = proto::Gauge::default();
        gauge.set_value(value);
        metric.set_gauge(gauge);
    })
}

fn histogram(about: &About, rows: Rows<Observations>) -> MetricFamily {
    family(about, MetricType::HISTOGRAM, rows, |metric, value| {
        let mut histogram = proto::Histogram::default();
        histogram.set_sample_count(value.count());
        histogram.set_sample_sum(Duration::from_nanos(value.sum_nanos).as_secs_f64());
        let mut cumulative = 0;
        let bucket = |(bound, count): (&f64, &u64)| {
            cumulative += count;
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(cumulative);
            bucket
        };
        histogram.set_bucket(BUCKETS.iter().zip(&value.buckets).map(bucket).collect());
        metric.set_histogram(histogram);
    })
}

fn family<V>(about: &About, kind: MetricType, rows: Rows<V>, set: impl Fn(&mut proto::Metric, V)) -> MetricFamily {
    let metric = |(values, value): (Vec<String>, V)| {
        let pair = |(name, value): (&&str, String)| {
            let mut pair = proto::LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value(value);
            pair
        };
        let mut metric = proto::Metric::from_label(about.labels.iter().zip(values).map(pair).collect());
        set(&mut metric, value);
        metric
    };
    let mut family = MetricFamily::default();
    family.set_name(about.name.to_owned());
    family.set_help(about.help.to_owned());
    family.set_field_type(kind);
    family.set_metric(rows.0.into_iter().map(metric).collect());
    family
}
