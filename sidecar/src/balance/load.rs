//! What the process knows of the load and health of one endpoint: one block of atomics, shared by all workers, and the
//! registry that hands the same block to each of them. Written by the guards in `endpoints` and by `outlier`; read at
//! every pick. All accesses are relaxed: each number stands for itself, and a pick on a value that is a moment old is
//! as good as any.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use outrigger_api::identity::SpiffeId;
use outrigger_api::snapshot::{Endpoint, EndpointTls};

/// Nanoseconds since an instant that the process chose when it started, the same for all workers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Nanos(pub u64);

impl Nanos {
    /// Zero for an instant before the epoch.
    pub fn since(epoch: Instant, now: Instant) -> Nanos {
        Nanos::default() + now.saturating_duration_since(epoch)
    }
}

impl std::ops::Add<Duration> for Nanos {
    type Output = Nanos;

    fn add(self, duration: Duration) -> Nanos {
        Nanos(self.0.saturating_add(nanoseconds(duration)))
    }
}

/// How a request, or the attempt to connect, ended for the endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// An answer below 500, or a connection.
    Success,
    Failure5xx,
    /// No connection, a failed handshake or a wrong identity, no answer.
    ConnectError,
    /// The caller left first. Says nothing about the endpoint's health.
    Cancelled,
}

/// A measured latency loses its weight by this time: after it 37 % are left, after 23 s a tenth.
const DECAY: Duration = Duration::from_secs(10);

/// One endpoint's numbers. 128 bytes apart, because neighbouring cache lines are fetched in pairs.
#[derive(Default, Debug)]
#[repr(align(128))]
pub struct Load {
    /// Peak EWMA in nanoseconds, as of `measured_at`; 0 until the first answer. Two workers may write the pair at the
    /// same time: one sample is lost then, which a mean can bear.
    latency: AtomicU64,
    measured_at: AtomicU64,
    ejected_until: AtomicU64,
    in_flight: AtomicU32,
    connections: AtomicU32,
    consecutive_failures: AtomicU32,
    /// In a row, see [`Load::eject`].
    ejections: AtomicU32,
}

impl Load {
    /// Requests that wait for the end of their answer.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Connections being opened or open.
    pub fn connections(&self) -> u32 {
        self.connections.load(Relaxed)
    }

    pub fn consecutive_failures(&self) -> u32 {
        self.consecutive_failures.load(Relaxed)
    }

    /// Ejections in a row, the present one included.
    pub fn ejections(&self) -> u32 {
        self.ejections.load(Relaxed)
    }

    pub fn is_ejected(&self, now: Nanos) -> bool {
        self.ejected_until() > now
    }

    /// The end of the present or last ejection.
    pub fn ejected_until(&self) -> Nanos {
        Nanos(self.ejected_until.load(Relaxed))
    }

    /// Peak EWMA of the latency in nanoseconds, `None` when nothing has been measured since the endpoint appeared or
    /// came back. It falls while nothing is measured, so that an endpoint that was slow once is tried again.
    pub fn latency(&self, now: Nanos) -> Option<f64> {
        match self.latency.load(Relaxed) {
            0 => None,
            latency => Some(latency as f64 * self.remaining_weight(now)),
        }
    }

    pub(super) fn started(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// Ends what [`Load::started`] began. Whether the endpoint is to be ejected is decided by `outlier`, which knows
    /// the others.
    pub(super) fn finished(&self, now: Nanos, latency: Duration, outcome: Outcome) {
        self.in_flight.fetch_sub(1, Relaxed);
        match outcome {
            Outcome::Success => self.measured(now, latency),
            // A fast refusal must not make an endpoint look fast, but a slow one is slow.
            Outcome::Failure5xx | Outcome::ConnectError | Outcome::Cancelled => {
                if self.latency(now).is_some_and(|known| nanoseconds(latency) as f64 > known) {
                    self.measured(now, latency);
                }
            }
        }
    }

    /// Ends what [`Load::started`] began, when nothing can be said about it.
    pub(super) fn abandoned(&self) {
        self.in_flight.fetch_sub(1, Relaxed);
    }

    pub(super) fn opened(&self) {
        self.connections.fetch_add(1, Relaxed);
    }

    pub(super) fn closed(&self) {
        self.connections.fetch_sub(1, Relaxed);
    }

    /// How many there are in a row now.
    pub(super) fn failed(&self) -> u32 {
        self.consecutive_failures.fetch_add(1, Relaxed).saturating_add(1)
    }

    pub(super) fn forgive(&self) {
        if self.consecutive_failures.load(Relaxed) != 0 {
            self.consecutive_failures.store(0, Relaxed);
        }
    }

    /// The caller holds [`Loads::ejecting`]. What was measured is forgotten: it would have decayed to almost nothing
    /// when the endpoint returns, and that would draw everybody to it.
    pub(super) fn eject(&self, until: Nanos, in_a_row: u32) {
        self.ejected_until.store(until.0, Relaxed);
        self.ejections.store(in_a_row, Relaxed);
        self.latency.store(0, Relaxed);
    }

    /// Up at once, down slowly: what a caller fears is the peak.
    fn measured(&self, now: Nanos, latency: Duration) {
        let sample = nanoseconds(latency).max(1);
        let average = match self.latency.load(Relaxed) {
            known if sample >= known => sample,
            known => {
                let weight = self.remaining_weight(now);
                (known as f64 * weight + sample as f64 * (1.0 - weight)) as u64
            }
        };
        self.latency.store(average.max(1), Relaxed);
        self.measured_at.store(now.0, Relaxed);
    }

    fn remaining_weight(&self, now: Nanos) -> f64 {
        let age = now.0.saturating_sub(self.measured_at.load(Relaxed));
        (-(age as f64) / DECAY.as_nanos() as f64).exp()
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The loads of all endpoints of the process. Cheap to clone; all workers hold the same. It keeps no load alive: one
/// lives as long as some worker's [`Endpoints`](super::Endpoints) name the endpoint.
#[derive(Clone, Default, Debug)]
pub struct Loads(Arc<Registry>);

#[derive(Default, Debug)]
struct Registry {
    known: Mutex<Known>,
    /// Held while an ejection is decided, so that two workers cannot both take the last one allowed.
    ejecting: Mutex<()>,
    /// When the last of all ejections ends; nothing is ejected anywhere after it.
    last_ejection_ends: AtomicU64,
    sets: AtomicU64,
}

#[derive(Default, Debug)]
struct Known {
    loads: HashMap<Key, Weak<Load>>,
    /// The size at which dead entries are swept out.
    sweep_at: usize,
}

const FIRST_SWEEP: usize = 64;

/// An address that another identity takes over is another endpoint: it inherits neither latency nor ejection.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Key {
    address: SocketAddr,
    identity: Option<SpiffeId>,
}

impl Key {
    fn of(endpoint: &Endpoint) -> Key {
        let identity = match &endpoint.tls {
            EndpointTls::Mutual(identity) => Some(identity.clone()),
            EndpointTls::Plaintext => None,
        };
        Key { address: endpoint.address, identity }
    }
}

impl Loads {
    pub fn of(&self, endpoint: &Endpoint) -> Arc<Load> {
        let mut known = lock(&self.0.known);
        let key = Key::of(endpoint);
        if let Some(load) = known.loads.get(&key).and_then(Weak::upgrade) {
            return load;
        }
        if known.loads.len() >= known.sweep_at.max(FIRST_SWEEP) {
            known.loads.retain(|_, load| load.strong_count() > 0);
            known.sweep_at = known.loads.len() * 2;
        }
        let load = Arc::new(Load::default());
        known.loads.insert(key, Arc::downgrade(&load));
        load
    }

    pub(super) fn ejecting(&self) -> MutexGuard<'_, ()> {
        lock(&self.0.ejecting)
    }

    pub(super) fn ejected_until(&self, until: Nanos) {
        self.0.last_ejection_ends.fetch_max(until.0, Relaxed);
    }

    pub(super) fn any_ejected(&self, now: Nanos) -> bool {
        self.0.last_ejection_ends.load(Relaxed) > now.0
    }

    /// Tells sets apart, from 1 on.
    pub(super) fn next_set(&self) -> u64 {
        self.0.sets.fetch_add(1, Relaxed) + 1
    }
}

/// What these locks guard is consistent between any two statements, so a panic of another holder does no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{endpoint, seconds};
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_peak_counts_at_once_and_fades() {
        let load = Load::default();
        assert_eq!(load.latency(seconds(0)), None);
        load.measured(seconds(0), MS);
        load.measured(seconds(0), MS * 100);
        assert_eq!(load.latency(seconds(0)), Some(1e8));
        let faded = load.latency(seconds(10)).unwrap();
        assert!((3.6e7..3.7e7).contains(&faded), "{faded}");
        for second in 1..=60 {
            load.measured(seconds(second), MS);
        }
        let settled = load.latency(seconds(60)).unwrap();
        assert!((1e6..2e6).contains(&settled), "{settled}");
    }

    #[test]
    fn only_answers_make_an_endpoint_look_fast() {
        for outcome in [Outcome::Failure5xx, Outcome::ConnectError, Outcome::Cancelled] {
            let load = Load::default();
            let end = |latency, outcome| {
                load.started();
                load.finished(seconds(1), latency, outcome);
            };
            end(MS, outcome);
            assert_eq!(load.latency(seconds(1)), None, "{outcome:?}");
            end(MS * 10, Outcome::Success);
            end(MS, outcome);
            assert_eq!(load.latency(seconds(1)), Some(1e7), "{outcome:?}");
            end(MS * 20, outcome);
            assert_eq!(load.latency(seconds(1)), Some(2e7), "{outcome:?}");
            assert_eq!(load.in_flight(), 0);
        }
    }

    #[test]
    fn one_load_per_address_and_identity_as_long_as_somebody_holds_it() {
        let loads = Loads::default();
        let mut endpoint = endpoint(1, 1);
        let first = loads.of(&endpoint);
        assert!(Arc::ptr_eq(&first, &loads.clone().of(&endpoint)));
        endpoint.tls = EndpointTls::Mutual(SpiffeId::parse("spiffe://td/ns/a/sa/b").unwrap());
        assert!(!Arc::ptr_eq(&first, &loads.of(&endpoint)));
        endpoint.tls = EndpointTls::Plaintext;
        first.started();
        drop(first);
        assert_eq!(loads.of(&endpoint).in_flight(), 0);
    }

    #[test]
    fn the_registry_forgets_endpoints_that_are_gone() {
        let loads = Loads::default();
        let kept: Vec<_> = (0..100).map(|n| loads.of(&endpoint(n, 1))).collect();
        for n in 0..10_000 {
            loads.of(&endpoint(1000 + n, 1));
        }
        let known = lock(&loads.0.known).loads.len();
        assert!(known <= 2 * kept.len() + FIRST_SWEEP, "{known}");
    }
}
