//! One edge of the service graph and everything that is counted on it. The data path finds its [`Edge`] once per
//! connection, route or endpoint and then only increments: a request costs a scan of a few keys and some atomic adds.
//! Nothing here formats, hashes a label or takes a lock in the common case.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::outcome::Reason;

use super::labels::{EdgeLabels, MethodLabel, is_failure};

/// Upper bounds of the histograms' buckets in seconds; the last bucket, +Inf, has none.
pub const BUCKETS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// The same in nanoseconds, so that observing needs no float.
const BUCKET_NANOS: [u64; 14] = [
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
];

/// Counts of one label set, shared by all workers.
#[derive(Debug)]
pub struct Edge {
    labels: EdgeLabels,
    overflow: bool,
    in_flight: AtomicI64,
    http: HttpTable,
    pub(super) tcp: TcpCounters,
    /// What the last report to the control plane had counted; touched by the reporting task alone.
    pub(super) reported: Mutex<super::report::Totals>,
}

impl Edge {
    pub(super) fn new(labels: EdgeLabels) -> Edge {
        Edge {
            labels,
            overflow: false,
            in_flight: AtomicI64::new(0),
            http: HttpTable::default(),
            tcp: TcpCounters::default(),
            reported: Mutex::default(),
        }
    }

    /// The edge that takes what exceeds the cap; its label values are all `overflow`.
    pub(super) fn overflow(labels: EdgeLabels) -> Edge {
        Edge { overflow: true, ..Edge::new(labels) }
    }

    pub fn labels(&self) -> &EdgeLabels {
        &self.labels
    }

    pub(super) fn is_overflow(&self) -> bool {
        self.overflow
    }

    pub(super) fn enter(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn in_flight(&self) -> i64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts one ended request. False when it needs a new series and `room` refuses one.
    pub(super) fn count(&self, outcome: Outcome, request: &Ended, room: &SeriesRoom) -> bool {
        let outcome = if self.overflow { Outcome::OVERFLOW } else { outcome };
        self.http.with(outcome, room, |series| series.add(request))
    }

    pub(super) fn for_each_series(&self, visit: impl FnMut(&HttpSeries)) {
        self.http.for_each(visit);
    }
}

/// What of a request is not known before its end; with the edge's labels it names one series.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Outcome {
    pub method: MethodLabel,
    /// None: no answer.
    pub code: Option<u16>,
    pub grpc_status: Option<u8>,
    pub reason: Option<Reason>,
}

impl Outcome {
    const OVERFLOW: Outcome = Outcome { method: MethodLabel::Other, code: Some(0), grpc_status: None, reason: None };

    /// What a connection has of an outcome.
    pub(super) const fn of_connection(reason: Option<Reason>) -> Outcome {
        Outcome { method: MethodLabel::Other, code: None, grpc_status: None, reason }
    }

    pub(super) fn failed(&self) -> bool {
        is_failure(self.code, self.grpc_status)
    }
}

/// The measures of a request that has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub duration: Duration,
    pub request_bytes: u64,
    pub response_bytes: u64,
    pub grpc_messages: u64,
}

/// One series of each HTTP metric. The number of requests is the number of observations.
#[derive(Debug)]
pub(super) struct HttpSeries {
    pub outcome: Outcome,
    pub duration: Histogram,
    pub request_bytes: AtomicU64,
    pub response_bytes: AtomicU64,
    pub grpc_messages: AtomicU64,
}

impl HttpSeries {
    fn new(outcome: Outcome) -> HttpSeries {
        HttpSeries {
            outcome,
            duration: Histogram::default(),
            request_bytes: AtomicU64::new(0),
            response_bytes: AtomicU64::new(0),
            grpc_messages: AtomicU64::new(0),
        }
    }

    fn add(&self, request: &Ended) {
        self.duration.observe(request.duration);
        add_some(&self.request_bytes, request.request_bytes);
        add_some(&self.response_bytes, request.response_bytes);
        add_some(&self.grpc_messages, request.grpc_messages);
    }
}

fn add_some(counter: &AtomicU64, n: u64) {
    if n > 0 {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// A histogram over [`BUCKETS`]; counts are per bucket, not cumulative.
#[derive(Default, Debug)]
pub(super) struct Histogram {
    buckets: [AtomicU64; BUCKETS.len() + 1],
    sum_nanos: AtomicU64,
}

impl Histogram {
    pub(super) fn observe(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let index = BUCKET_NANOS.iter().position(|bound| nanos <= *bound).unwrap_or(BUCKETS.len());
        self.buckets[index].fetch_add(1, Ordering::Relaxed);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Observations {
        let mut buckets = [0; BUCKETS.len() + 1];
        for (count, bucket) in buckets.iter_mut().zip(&self.buckets) {
            *count = bucket.load(Ordering::Relaxed);
        }
        Observations { buckets, sum_nanos: self.sum_nanos.load(Ordering::Relaxed) }
    }
}

/// A histogram as it was read; they can be added up.
#[derive(Clone, Default, Debug)]
pub(super) struct Observations {
    pub buckets: [u64; BUCKETS.len() + 1],
    pub sum_nanos: u64,
}

impl Observations {
    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    pub(super) fn add(&mut self, other: &Observations) {
        for (sum, n) in self.buckets.iter_mut().zip(other.buckets) {
            *sum += n;
        }
        self.sum_nanos = self.sum_nanos.wrapping_add(other.sum_nanos);
    }
}

/// The cap on series of one metric: who makes a new series reserves it here first.
#[derive(Debug)]
pub(super) struct SeriesRoom {
    used: AtomicU64,
    max: AtomicU64,
}

impl SeriesRoom {
    pub(super) fn new(max: u32) -> SeriesRoom {
        SeriesRoom { used: AtomicU64::new(0), max: AtomicU64::new(u64::from(max)) }
    }

    pub(super) fn resize(&self, max: u32) {
        self.max.store(u64::from(max), Ordering::Relaxed);
    }

    pub(super) fn reserve(&self) -> bool {
        let max = self.max.load(Ordering::Relaxed);
        let next = |used| (used < max).then_some(used + 1);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }

    fn give_back(&self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many outcomes of one edge are found by a scan; the rare others are in a map behind a lock.
const SCANNED: usize = 16;

#[derive(Default, Debug)]
struct HttpTable {
    /// Filled from the front, never emptied.
    scanned: [OnceLock<Box<HttpSeries>>; SCANNED],
    others: Mutex<HashMap<Outcome, HttpSeries>>,
}

impl HttpTable {
    fn with(&self, outcome: Outcome, room: &SeriesRoom, act: impl FnOnce(&HttpSeries)) -> bool {
        for slot in &self.scanned {
            let series = match slot.get() {
                Some(series) => series,
                None if outcome != Outcome::OVERFLOW && !room.reserve() => return false,
                None => {
                    let mut made = false;
                    let series = slot.get_or_init(|| {
                        made = true;
                        Box::new(HttpSeries::new(outcome))
                    });
                    if !made {
                        room.give_back(); // Another worker was first at this slot.
                    }
                    series
                }
            };
            if series.outcome == outcome {
                act(series);
                return true;
            }
        }
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        if !others.contains_key(&outcome) && !room.reserve() {
            return false;
        }
        act(others.entry(outcome).or_insert_with(|| HttpSeries::new(outcome)));
        true
    }

    fn for_each(&self, mut visit: impl FnMut(&HttpSeries)) {
        self.scanned.iter().map_while(OnceLock::get).for_each(|series| visit(series));
        self.others.lock().unwrap_or_else(PoisonError::into_inner).values().for_each(visit);
    }
}

/// What is counted of connections. Bytes move while the connection is open, when no reason is known yet.
#[derive(Debug)]
pub(super) struct TcpCounters {
    pub opened: AtomicU64,
    pub sent_bytes: AtomicU64,
    pub received_bytes: AtomicU64,
    pub duration: Histogram,
    /// By reason, in the order of [`Reason::ALL`]; the first is without one.
    pub closed: [AtomicU64; Reason::ALL.len() + 1],
}

impl Default for TcpCounters {
    fn default() -> TcpCounters {
        TcpCounters {
            opened: AtomicU64::default(),
            sent_bytes: AtomicU64::default(),
            received_bytes: AtomicU64::default(),
            duration: Histogram::default(),
            closed: std::array::from_fn(|_| AtomicU64::default()),
        }
    }
}

impl TcpCounters {
    /// The place of a reason in `closed`.
    pub(super) fn place(reason: Option<Reason>) -> usize {
        reason.and_then(|reason| Reason::ALL.iter().position(|other| *other == reason)).map_or(0, |at| at + 1)
    }

    /// The reason of a place in `closed`.
    pub(super) fn reason(place: usize) -> Option<Reason> {
        place.checked_sub(1).and_then(|at| Reason::ALL.get(at)).copied()
    }

    pub(super) fn failures(&self) -> u64 {
        let failed = |(place, _): &(usize, &AtomicU64)| TcpCounters::reason(*place).is_some_and(is_tcp_failure);
        self.closed.iter().enumerate().filter(failed).map(|(_, count)| count.load(Ordering::Relaxed)).sum()
    }
}

/// A connection that the client left or that fell idle has ended, not failed.
fn is_tcp_failure(reason: Reason) -> bool {
    !matches!(reason, Reason::ClientClosed | Reason::IdleTimeout)
}

/// Gives one edge to all who ask for the same labels.
#[derive(Debug)]
pub(super) struct Edges {
    by_labels: Mutex<HashMap<EdgeLabels, Arc<Edge>>>,
    pub overflow: Arc<Edge>,
    http_edges: SeriesRoom,
    tcp_edges: SeriesRoom,
    pub http_series: SeriesRoom,
    pub tcp_series: SeriesRoom,
}

impl Edges {
    pub(super) fn new(max_series: u32, overflow: EdgeLabels) -> Edges {
        Edges {
            by_labels: Mutex::default(),
            overflow: Arc::new(Edge::overflow(overflow)),
            http_edges: SeriesRoom::new(max_series),
            tcp_edges: SeriesRoom::new(max_series),
            http_series: SeriesRoom::new(max_series),
            tcp_series: SeriesRoom::new(max_series),
        }
    }

    pub(super) fn resize(&self, max_series: u32) {
        for room in [&self.http_edges, &self.tcp_edges, &self.http_series, &self.tcp_series] {
            room.resize(max_series);
        }
    }

    pub(super) fn find_or_create(&self, labels: &EdgeLabels) -> Arc<Edge> {
        let mut by_labels = self.by_labels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(edge) = by_labels.get(labels) {
            return edge.clone();
        }
        let room = if labels.protocol.is_http() { &self.http_edges } else { &self.tcp_edges };
        if !room.reserve() {
            return self.overflow.clone();
        }
        let edge = Arc::new(Edge::new(labels.clone()));
        by_labels.insert(labels.clone(), edge.clone());
        edge
    }

    /// All edges, the overflow's last.
    pub(super) fn all(&self) -> Vec<Arc<Edge>> {
        let by_labels = self.by_labels.lock().unwrap_or_else(PoisonError::into_inner);
        by_labels.values().chain([&self.overflow]).cloned().collect()
    }

    /// Counts one ended request where it belongs, or in the overflow's series.
    pub(super) fn count(&self, edge: &Edge, outcome: Outcome, request: &Ended) {
        if !edge.count(outcome, request, &self.http_series) {
            self.overflow.count(outcome, request, &self.http_series);
        }
    }

    /// Counts one closed connection where it belongs, or in the overflow's series.
    pub(super) fn count_closed(&self, edge: &Edge, reason: Option<Reason>) {
        let place = if edge.is_overflow() { 0 } else { TcpCounters::place(reason) };
        let counter = &edge.tcp.closed[place];
        // Two workers that make the same series at once reserve twice: a cap may be off by one, a count never.
        let fits = place == 0 || counter.load(Ordering::Relaxed) > 0 || self.tcp_series.reserve();
        let counter = if fits { counter } else { &self.overflow.tcp.closed[0] };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::labels::{Direction, WireProtocol};

    fn outcome(code: u16) -> Outcome {
        Outcome { method: MethodLabel::Get, code: Some(code), grpc_status: None, reason: None }
    }

    fn labels(workload: &str) -> EdgeLabels {
        EdgeLabels {
            direction: Direction::Inbound,
            source_workload: workload.into(),
            source_namespace: String::new(),
            source_principal: String::new(),
            destination_service: String::new(),
            destination_workload: String::new(),
            destination_namespace: String::new(),
            protocol: WireProtocol::Http1,
            mtls: false,
            destination_principal: String::new(),
        }
    }

    const ONE: Ended =
        Ended { duration: Duration::from_millis(1), request_bytes: 2, response_bytes: 3, grpc_messages: 0 };

    fn requests(edge: &Edge) -> Vec<(Option<u16>, u64)> {
        let mut found = Vec::new();
        edge.for_each_series(|series| found.push((series.outcome.code, series.duration.read().count())));
        found.sort();
        found
    }

    #[test]
    fn bounds_in_seconds_and_nanoseconds_agree() {
        for (seconds, nanos) in BUCKETS.iter().zip(BUCKET_NANOS) {
            assert_eq!(Duration::from_secs_f64(*seconds).as_nanos() as u64, nanos);
        }
    }

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let histogram = Histogram::default();
        for nanos in [0, 500_000, 500_001, 10_000_000_000, 10_000_000_001] {
            histogram.observe(Duration::from_nanos(nanos));
        }
        let read = histogram.read();
        assert_eq!((read.buckets[0], read.buckets[1], read.buckets[13], read.buckets[14]), (2, 1, 1, 1));
        assert_eq!(read.sum_nanos, 20_001_000_002);
    }

    #[test]
    fn more_outcomes_than_are_scanned_are_all_counted() {
        let edges = Edges::new(100, labels("overflow"));
        let edge = edges.find_or_create(&labels("a"));
        for _ in 0..2 {
            (200..240).for_each(|code| edges.count(&edge, outcome(code), &ONE));
        }
        let expected: Vec<_> = (200..240).map(|code| (Some(code), 2)).collect();
        assert_eq!(requests(&edge), expected);
        assert!(requests(&edges.overflow).is_empty());
    }

    #[test]
    fn what_exceeds_the_cap_is_counted_as_overflow() {
        let edges = Edges::new(2, labels("overflow"));
        let edge = edges.find_or_create(&labels("a"));
        for code in [200, 404, 500, 503, 200] {
            edges.count(&edge, outcome(code), &ONE);
        }
        assert_eq!(requests(&edge), [(Some(200), 2), (Some(404), 1)]);
        assert_eq!(requests(&edges.overflow), [(Some(0), 2)]);

        assert!(!edges.find_or_create(&labels("b")).is_overflow());
        assert!(edges.find_or_create(&labels("c")).is_overflow());
        assert!(!edges.find_or_create(&labels("a")).is_overflow());
        edges.resize(3);
        assert!(!edges.find_or_create(&labels("c")).is_overflow());
    }

    #[test]
    fn workers_race_for_a_series_and_lose_no_count() {
        let edges = Edges::new(100, labels("overflow"));
        let edge = edges.find_or_create(&labels("a"));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|i| edges.count(&edge, outcome(200 + i % 20), &ONE)));
            }
        });
        let expected: Vec<_> = (200..220).map(|code| (Some(code), 200)).collect();
        assert_eq!(requests(&edge), expected);
        assert_eq!(edges.http_series.used.load(Ordering::Relaxed), 20);
    }

    #[test]
    fn every_reason_has_its_place() {
        assert_eq!(TcpCounters::place(None), 0);
        for reason in Reason::ALL {
            assert_eq!(TcpCounters::reason(TcpCounters::place(Some(reason))), Some(reason));
        }
    }
}
