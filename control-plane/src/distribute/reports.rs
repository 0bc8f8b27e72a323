//! What sidecars reported lately, summed per edge for `outrigger stat`, and totals for as long as somebody may ask for
//! them. A sidecar speaks for itself: its own side of an edge comes from its certificate. What one service account can make
//! this keep is bounded in instances, in edges and in bytes, whatever it sends; strings are cut, numbers are made sane.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outrigger_api::peer_text::{LONGEST, PeerText};
use outrigger_api::wire::{Edge, ReportRequest};

use crate::registry::InstanceId;

/// What `stat` looks at, and how long a report is kept.
const WINDOW: Duration = Duration::from_secs(10);
/// An instance that reports nothing for this long is forgotten.
const INSTANCE_KEPT: Duration = Duration::from_secs(60);
/// Edges on which nothing happens keep their totals for this long.
const TOTALS_KEPT: Duration = Duration::from_secs(60 * 60);
/// Sidecars report every three seconds.
const LEAST_INTERVAL: Duration = Duration::from_secs(1);
/// Seconds that one report may cover.
const WINDOWS: std::ops::RangeInclusive<f64> = 1.0..=60.0;
/// Of one report.
const MAX_EDGES: usize = 1_000;
/// Of one service account: different edges, and instances.
const MAX_ACCOUNT_EDGES: usize = 2_000;
const MAX_INSTANCES: usize = 1_000;
/// Of one service account, and of all.
const MAX_ACCOUNT_BYTES: usize = 16 << 20;
const MAX_BYTES: usize = 128 << 20;
/// Of one instance.
const MAX_TROUBLES: usize = 4;
/// Names are DNS names.
const MAX_NAME: usize = 253;
const MAX_PRINCIPAL: usize = 1_024;
/// Beyond any sidecar's rate, and far from where sums lose their sense.
const MAX_PER_SECOND: f64 = 1e9;
const MAX_BYTES_PER_SECOND: f64 = 1e13;
/// The sidecar's own sum of edges beyond its limit of series has this in each label.
const OVERFLOW: &str = "overflow";
/// Upper bounds in seconds of the buckets of a report (DESIGN section 10); a last one is +Inf.
pub const BOUNDS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// How often what is old is looked for.
const SWEEP: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Reports {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// By namespace and service account.
    accounts: HashMap<(String, String), Account>,
    swept: Option<Instant>,
}

/// Why a report is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    #[error("window_seconds must be from 1 to 60")]
    Window,
    #[error("at most one report per second and instance")]
    TooOften,
    #[error("too many instances of this service account report")]
    Instances,
    #[error("the reports of this service account take too much memory")]
    Full,
}

/// Who reports, as its certificate says.
#[derive(Clone, Copy, Debug)]
pub struct Reporter<'c> {
    pub principal: &'c str,
    pub workload: &'c str,
}

/// What the instances of one service account reported.
#[derive(Default)]
struct Account {
    instances: HashMap<String, Instance>,
    /// Every edge that is kept has its entry here.
    totals: HashMap<Arc<EdgeKey>, Totals>,
    bytes: usize,
}

struct Instance {
    last: Instant,
    connections: u64,
    troubles: Vec<String>,
    reports: VecDeque<Received>,
}

struct Received {
    at: Instant,
    seconds: f64,
    edges: Vec<(Arc<EdgeKey>, Counts)>,
}

/// What was counted on an edge in one window.
#[derive(Clone, Copy, Default)]
struct Counts {
    requests: u64,
    failures: u64,
    sent: u64,
    received: u64,
    latency: [u64; BOUNDS.len() + 1],
}

/// What an edge's key, an edge of a report and an instance take, in bytes and about.
const KEY: usize = size_of::<(Arc<EdgeKey>, Totals)>();
const EDGE: usize = size_of::<(Arc<EdgeKey>, Counts)>();
const INSTANCE: usize = MAX_NAME + size_of::<Instance>() + 4 * size_of::<Received>() + MAX_TROUBLES * 4 * LONGEST;

/// Since the control plane started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    pub requests: u64,
    pub failures: u64,
    pub last: Instant,
}

/// Which edge, seen from which side.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
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
    /// Takes a report of the instance `id`, which `reporter` connected for.
    pub fn take(
        &self,
        id: InstanceId,
        reporter: Reporter<'_>,
        report: ReportRequest,
        now: Instant,
    ) -> Result<(), ReportError> {
        if !WINDOWS.contains(&report.window_seconds) {
            return Err(ReportError::Window);
        }
        let mut inner = self.inner();
        inner.sweep(now);
        let accounts = &mut inner.accounts;
        let all: usize = accounts.values().map(|account| account.bytes).sum();
        // When memory is short, an account may still have its even share.
        let others = accounts.len().max(1);
        let account = accounts.entry((id.namespace.clone(), id.service_account)).or_default();
        if account.bytes >= MAX_ACCOUNT_BYTES || (all >= MAX_BYTES && account.bytes >= MAX_BYTES / others) {
            return Err(ReportError::Full);
        }
        match account.instances.get(&id.name) {
            Some(instance) if now.duration_since(instance.last) < LEAST_INTERVAL => return Err(ReportError::TooOften),
            None if account.instances.len() >= MAX_INSTANCES => return Err(ReportError::Instances),
            Some(_) | None => {}
        }
        account.take(&id.namespace, id.name, reporter, report, now);
        Ok(())
    }

    /// The rates of each edge over the last ten seconds or so. An instance counts with the reports of that time; what
    /// it said before is history.
    pub fn edges(&self, now: Instant) -> BTreeMap<EdgeKey, EdgeStats> {
        let accounts = &self.inner().accounts;
        let mut edges: BTreeMap<EdgeKey, EdgeStats> = BTreeMap::new();
        for instance in accounts.values().flat_map(|account| account.instances.values()) {
            let recent = || instance.reports.iter().filter(|received| now.duration_since(received.at) <= WINDOW);
            let seconds: f64 = recent().map(|received| received.seconds).sum();
            for (key, counts) in recent().flat_map(|received| &received.edges) {
                edges.entry(EdgeKey::clone(key)).or_default().add(counts, seconds);
            }
        }
        edges
    }

    /// What each edge has counted since the control plane started, where it is not older than an hour.
    pub fn totals(&self, now: Instant) -> BTreeMap<EdgeKey, Totals> {
        let accounts = &self.inner().accounts;
        let all = accounts.values().flat_map(|account| &account.totals);
        all.filter(|(_, totals)| now.duration_since(totals.last) <= TOTALS_KEPT)
            .map(|(key, totals)| (EdgeKey::clone(key), *totals))
            .collect()
    }

    /// The open connections that an instance last reported, and what is wrong with it.
    pub fn last(&self, id: &InstanceId) -> Option<(u64, Vec<String>)> {
        let inner = self.inner();
        let account = inner.accounts.get(&(id.namespace.clone(), id.service_account.clone()))?;
        account.instances.get(&id.name).map(|instance| (instance.connections, instance.troubles.clone()))
    }

    /// How many instances have reported within a minute.
    pub fn reporting(&self) -> usize {
        self.inner().accounts.values().map(|account| account.instances.len()).sum()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_none_or(|swept| now.duration_since(swept) >= SWEEP) {
            self.swept = Some(now);
            self.accounts.retain(|_, account| account.forget(now));
        }
    }
}

impl Account {
    fn take(&mut self, namespace: &str, name: String, reporter: Reporter<'_>, report: ReportRequest, now: Instant) {
        let seconds = report.window_seconds;
        let mut edges = Vec::new();
        for edge in report.edges.into_iter().take(MAX_EDGES) {
            let Some(key) = EdgeKey::of(&edge, namespace, reporter) else { continue };
            let counts = Counts::of(&edge, seconds);
            let key = match self.totals.get_key_value(&key) {
                Some((known, _)) => known.clone(),
                None if self.totals.len() < MAX_ACCOUNT_EDGES => {
                    self.bytes += key.bytes() + KEY;
                    Arc::new(key)
                }
                None => continue,
            };
            let totals = self.totals.entry(key.clone()).or_insert(Totals { requests: 0, failures: 0, last: now });
            totals.requests = totals.requests.saturating_add(counts.requests);
            totals.failures = totals.failures.saturating_add(counts.failures);
            totals.last = now;
            edges.push((key, counts));
        }
        edges.shrink_to_fit();
        self.bytes += edges.len() * EDGE + INSTANCE;
        let instance = self.instances.entry(name).or_insert(Instance {
            last: now,
            connections: 0,
            troubles: Vec::new(),
            reports: VecDeque::new(),
        });
        instance.last = now;
        instance.connections = report.connections;
        instance.troubles =
            report.troubles.iter().take(MAX_TROUBLES).map(|trouble| PeerText(trouble).to_string()).collect();
        instance.reports.push_back(Received { at: now, seconds, edges });
    }

    /// Lets go of what is old. False when nothing is left.
    fn forget(&mut self, now: Instant) -> bool {
        for instance in self.instances.values_mut() {
            while instance.reports.front().is_some_and(|first| now.duration_since(first.at) > WINDOW) {
                instance.reports.pop_front();
            }
        }
        self.instances.retain(|_, instance| now.duration_since(instance.last) <= INSTANCE_KEPT);
        self.totals.retain(|_, totals| now.duration_since(totals.last) <= TOTALS_KEPT);
        // Measured anew: between two sweeps it only grows.
        let keys: usize = self.totals.keys().map(|key| key.bytes() + KEY).sum();
        let edges: usize = self.instances.values().flat_map(|instance| &instance.reports).map(|r| r.edges.len()).sum();
        self.bytes = keys + edges * EDGE + self.instances.len() * INSTANCE;
        !self.instances.is_empty() || !self.totals.is_empty()
    }
}

impl EdgeKey {
    /// None when the reporter's own side of the edge is not its own.
    fn of(edge: &Edge, namespace: &str, reporter: Reporter<'_>) -> Option<EdgeKey> {
        let own = if edge.inbound { &edge.destination_principal } else { &edge.source_principal };
        if own != reporter.principal && own != OVERFLOW {
            return None;
        }
        let name = |text: &str| cut(text, MAX_NAME);
        let mut key = EdgeKey {
            source_namespace: name(&edge.source_namespace),
            source_workload: name(&edge.source_workload),
            destination_namespace: name(&edge.destination_namespace),
            destination_service: name(&edge.destination_service),
            destination_workload: name(&edge.destination_workload),
            protocol: cut(&edge.protocol, 16),
            inbound: edge.inbound,
            mtls: edge.mtls,
            source_principal: cut(&edge.source_principal, MAX_PRINCIPAL),
            destination_principal: cut(&edge.destination_principal, MAX_PRINCIPAL),
        };
        let (own_namespace, own_workload, own_principal) = if edge.inbound {
            // A Service selects workloads of its own namespace only.
            let served = key.destination_service.rsplit_once('.').is_some_and(|(_, service)| service == namespace);
            if !served {
                key.destination_service.clear();
            }
            (&mut key.destination_namespace, &mut key.destination_workload, &mut key.destination_principal)
        } else {
            (&mut key.source_namespace, &mut key.source_workload, &mut key.source_principal)
        };
        namespace.clone_into(own_namespace);
        *own_workload = name(reporter.workload);
        *own_principal = cut(reporter.principal, MAX_PRINCIPAL);
        Some(key)
    }

    fn bytes(&self) -> usize {
        let texts = [
            &self.source_namespace,
            &self.source_workload,
            &self.destination_namespace,
            &self.destination_service,
            &self.destination_workload,
            &self.protocol,
            &self.source_principal,
            &self.destination_principal,
        ];
        size_of::<EdgeKey>() + texts.iter().map(|text| text.capacity()).sum::<usize>()
    }
}

/// At most so many bytes, and no more memory than that.
fn cut(text: &str, longest: usize) -> String {
    text[..text.floor_char_boundary(longest)].to_owned()
}

impl Counts {
    fn of(edge: &Edge, seconds: f64) -> Counts {
        let count = |value: u64| value.min((MAX_PER_SECOND * seconds) as u64);
        let bytes = |value: u64| value.min((MAX_BYTES_PER_SECOND * seconds) as u64);
        let requests = count(edge.requests);
        let mut counts = Counts {
            requests,
            failures: edge.failures.min(requests),
            sent: bytes(edge.sent_bytes),
            received: bytes(edge.received_bytes),
            latency: Default::default(),
        };
        for (kept, said) in counts.latency.iter_mut().zip(&edge.latency_buckets) {
            *kept = count(*said);
        }
        counts
    }
}

impl EdgeStats {
    fn add(&mut self, counts: &Counts, seconds: f64) {
        self.requests_per_second += counts.requests as f64 / seconds;
        self.failures_per_second += counts.failures as f64 / seconds;
        self.sent_bytes_per_second += counts.sent as f64 / seconds;
        self.received_bytes_per_second += counts.received as f64 / seconds;
        for (sum, count) in self.latency.iter_mut().zip(counts.latency) {
            *sum += count as f64 / seconds;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";
    const REPORTER: Reporter<'static> = Reporter { principal: CART, workload: "cart" };

    fn id(name: &str) -> InstanceId {
        InstanceId { namespace: "shop".into(), service_account: "cart".into(), name: name.into() }
    }

    fn own_edge() -> Edge {
        Edge { source_principal: CART.to_owned(), ..Edge::default() }
    }

    fn report(requests: u64, failures: u64, buckets: &[u64]) -> ReportRequest {
        report_of(vec![Edge { requests, failures, latency_buckets: buckets.to_vec(), ..own_edge() }])
    }

    fn report_of(edges: Vec<Edge>) -> ReportRequest {
        ReportRequest { window_seconds: 5.0, edges, ..ReportRequest::default() }
    }

    #[test]
    fn replicas_add_up_and_old_reports_do_not() {
        let reports = Reports::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let take = |name, report, seconds| reports.take(id(name), REPORTER, report, at(seconds)).unwrap();
        take("a", report(1_000, 1_000, &[]), 0);
        take("a", report(50, 0, &[0, 50]), 20);
        take("a", report(100, 10, &[0, 100]), 25);
        take("b", report(25, 0, &[0, 0, 25]), 25);
        let edges = reports.edges(at(26));
        let stats = edges.values().next().unwrap();
        assert_eq!(stats.requests_per_second, 20.0);
        assert_eq!(stats.success_percent(), Some(95.0));
        assert!(reports.edges(at(100)).is_empty());
        let totals = reports.totals(at(100));
        assert_eq!(totals.values().map(|totals| (totals.requests, totals.failures)).next(), Some((1_175, 1_010)));
        assert!(reports.totals(at(25 + 60 * 60 + 1)).is_empty());
    }

    #[test]
    fn a_sidecar_speaks_for_its_own_side_only() {
        let reports = Reports::default();
        let now = Instant::now();
        let edge = |inbound, source: &str, destination: &str, service: &str| Edge {
            inbound,
            source_principal: source.into(),
            destination_principal: destination.into(),
            destination_service: service.into(),
            // None of this is the reporter's.
            source_workload: "pay".into(),
            source_namespace: "bank".into(),
            destination_workload: "ledger".into(),
            destination_namespace: "bank".into(),
            requests: 1,
            ..Edge::default()
        };
        let pay = "spiffe://outrigger.local/ns/bank/sa/pay";
        let told = [
            edge(false, "", "", "ledger.bank"),
            edge(false, pay, CART, "ledger.bank"),
            edge(true, CART, pay, "ledger.bank"),
            edge(true, CART, "", "ledger.bank"),
            edge(false, CART, pay, "ledger.bank"),
            edge(true, pay, CART, "cart.shop"),
            edge(true, pay, CART, "ledger.bank"),
            edge(false, OVERFLOW, OVERFLOW, OVERFLOW),
        ];
        reports.take(id("a"), REPORTER, report_of(told.to_vec()), now).unwrap();
        let edges = reports.edges(now);
        let shown: Vec<String> = edges
            .keys()
            .map(|key| {
                let (from, to) =
                    (format!("{}.{}", key.source_workload, key.source_namespace), &key.destination_service);
                format!("{from} > {to} = {}.{}", key.destination_workload, key.destination_namespace)
            })
            .collect();
        let mut expected = [
            "pay.bank >  = cart.shop",
            "pay.bank > cart.shop = cart.shop",
            "cart.shop > ledger.bank = ledger.bank",
            "cart.shop > overflow = ledger.bank",
        ];
        expected.sort_unstable();
        let mut shown: Vec<&str> = shown.iter().map(String::as_str).collect();
        shown.sort_unstable();
        assert_eq!(shown, expected);
        assert!(
            edges
                .keys()
                .all(|key| if key.inbound { &key.destination_principal } else { &key.source_principal } == CART)
        );
    }

    #[test]
    fn windows_and_numbers_are_sane() {
        let reports = Reports::default();
        let start = Instant::now();
        for window in [0.0, -1.0, 5e-324, 0.999, 60.1, 1e300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let report = ReportRequest { window_seconds: window, ..report(1, 0, &[]) };
            assert_eq!(reports.take(id("a"), REPORTER, report, start), Err(ReportError::Window), "{window}");
        }
        let huge = Edge {
            requests: u64::MAX,
            failures: u64::MAX,
            sent_bytes: u64::MAX,
            received_bytes: u64::MAX,
            latency_buckets: vec![u64::MAX; 100],
            ..own_edge()
        };
        let lying = Edge { requests: 10, failures: 20, mtls: true, ..own_edge() };
        reports.take(id("a"), REPORTER, report_of(vec![huge, lying]), start).unwrap();
        for stats in reports.edges(start).values() {
            let EdgeStats { requests_per_second, failures_per_second, sent_bytes_per_second, .. } = *stats;
            assert!(requests_per_second <= MAX_PER_SECOND && sent_bytes_per_second <= MAX_BYTES_PER_SECOND);
            assert!(failures_per_second <= requests_per_second);
            assert_eq!(stats.success_percent(), Some(0.0));
            assert!(stats.quantile(0.99).is_none_or(f64::is_finite));
        }
    }

    #[test]
    fn what_an_account_can_make_it_keep_is_bounded() {
        let reports = Reports::default();
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(reports.take(id("a"), REPORTER, report(1, 0, &[]), at(0)), Ok(()));
        assert_eq!(reports.take(id("a"), REPORTER, report(1, 0, &[]), at(999)), Err(ReportError::TooOften));
        assert_eq!(reports.take(id("a"), REPORTER, report(1, 0, &[]), at(1_000)), Ok(()));

        // Many edges with long names, from many instances.
        let long = "x".repeat(4_000);
        let mut refused = 0;
        for instance in 0..100 {
            let edges = (0..MAX_EDGES).map(|number| Edge {
                destination_service: format!("{number}-{long}"),
                destination_workload: long.clone(),
                destination_principal: long.clone(),
                requests: 1,
                ..own_edge()
            });
            let taken = reports.take(id(&format!("i{instance}")), REPORTER, report_of(edges.collect()), at(2_000));
            refused += usize::from(taken.is_err());
        }
        assert!(refused > 0);
        let bytes = || reports.inner().accounts.values().map(|account| account.bytes).sum::<usize>();
        let one_report = MAX_EDGES * 2_500;
        assert!(bytes() <= MAX_ACCOUNT_BYTES + one_report, "{}", bytes());
        for key in reports.totals(at(2_000)).keys() {
            assert!(key.bytes() < 4 * 1_024, "{}", key.bytes());
        }
        // Another account is not refused for it, and what is old goes.
        let other = InstanceId { service_account: "web".into(), ..id("web-1") };
        let own = Reporter { principal: "spiffe://outrigger.local/ns/shop/sa/web", workload: "web" };
        let web = || report_of(vec![Edge { source_principal: own.principal.into(), requests: 1, ..Edge::default() }]);
        assert_eq!(reports.take(other.clone(), own, web(), at(2_000)), Ok(()));
        let later = 2_000 + 61 * 60 * 1_000;
        assert_eq!(reports.take(other, own, web(), at(later)), Ok(()));
        assert!(bytes() < 10_000, "{}", bytes());
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
