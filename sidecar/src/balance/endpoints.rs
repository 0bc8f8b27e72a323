//! One version of a destination's endpoints as a worker sees it, with each endpoint's shared [`Load`]. Built when a
//! snapshot arrives, immutable afterwards; a request keeps the set that it began with, through the `Arc` in its guard.
//! Draws of random endpoints by weight take the same time for two endpoints and for ten thousand.

use std::sync::Arc;
use std::time::Duration;

use outrigger_api::snapshot::{Destination, Endpoint, LoadBalancer};

use super::load::{Load, Loads, Nanos, Outcome};
use super::outlier;

#[derive(Debug)]
pub struct Endpoints {
    load_balancer: LoadBalancer,
    endpoints: Box<[Endpoint]>,
    slots: Box<[Slot]>,
    /// False when all weights are the same, which spares the draw its table.
    weighted: bool,
    /// Unlike that of any other set of this process.
    id: u64,
    loads: Loads,
}

/// What a pick needs of an endpoint, close together.
#[derive(Debug)]
struct Slot {
    load: Arc<Load>,
    /// Mean weight divided by this one's: 1 for an average endpoint, less for a heavier one.
    lightness: f64,
    /// Vose's alias method: a draw that hits this slot keeps it below `keep` (of 2^32), else goes to `alias`.
    keep: u64,
    alias: usize,
}

impl Endpoints {
    /// `previous` is this worker's set that the new one replaces: being there, it keeps alive the loads of the endpoints
    /// that stay. Other workers' loads of the same endpoints are the same ones, through `loads`.
    pub fn new(destination: &Destination, previous: Option<&Endpoints>, loads: &Loads) -> Endpoints {
        let _alive = previous;
        let endpoints: Box<[Endpoint]> = destination.endpoints.clone().into();
        let weights: Vec<u64> = endpoints.iter().map(|endpoint| u64::from(endpoint.weight.max(1))).collect();
        let total: u64 = weights.iter().sum();
        let slots = endpoints
            .iter()
            .zip(&weights)
            .zip(alias_table(&weights, total))
            .map(|((endpoint, weight), (keep, alias))| Slot {
                load: loads.of(endpoint),
                lightness: total as f64 / (endpoints.len() as u64 * weight) as f64,
                keep,
                alias,
            })
            .collect();
        Endpoints {
            load_balancer: destination.load_balancer,
            slots,
            weighted: weights.windows(2).any(|pair| pair[0] != pair[1]),
            id: loads.next_set(),
            loads: loads.clone(),
            endpoints,
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// `None` for an index that no pick on this set returned.
    pub fn endpoint(&self, index: usize) -> Option<&Endpoint> {
        self.endpoints.get(index)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Endpoint, &Load)> {
        self.endpoints.iter().zip(self.loads())
    }

    pub fn load_balancer(&self) -> LoadBalancer {
        self.load_balancer
    }

    /// Counts a request as in flight until the guard ends. `None` for an index that no pick on this set returned.
    pub fn start(self: &Arc<Self>, index: usize) -> Option<InFlight> {
        self.slots.get(index)?.load.started();
        Some(InFlight { set: Some(self.clone()), index })
    }

    /// Counts a connection as open until the guard is dropped; to be called before connecting, so that other picks see
    /// it coming. `None` for an index that no pick on this set returned.
    pub fn open(self: &Arc<Self>, index: usize) -> Option<Open> {
        self.slots.get(index)?.load.opened();
        Some(Open { set: self.clone(), index })
    }

    pub(super) fn load(&self, index: usize) -> &Load {
        &self.slots[index].load
    }

    pub(super) fn loads(&self) -> impl Iterator<Item = &Load> {
        self.slots.iter().map(|slot| &*slot.load)
    }

    pub(super) fn lightness(&self, index: usize) -> f64 {
        self.slots[index].lightness
    }

    pub(super) fn weight(&self, index: usize) -> u32 {
        self.endpoints[index].weight.max(1)
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn registry(&self) -> &Loads {
        &self.loads
    }

    /// Any endpoint, by weight. The set is not empty.
    fn draw(&self, rng: &mut fastrand::Rng) -> usize {
        let slot = rng.usize(..self.slots.len());
        if self.weighted && u64::from(rng.u32(..)) >= self.slots[slot].keep {
            return self.slots[slot].alias;
        }
        slot
    }
}

/// A request in flight. Dropped without [`InFlight::finish`], it counts as cancelled.
#[derive(Debug)]
#[must_use = "the request counts as in flight only as long as this lives"]
pub struct InFlight {
    /// `None` when finished.
    set: Option<Arc<Endpoints>>,
    index: usize,
}

impl InFlight {
    /// `latency` runs from the request's head to the answer's, without the time to connect: a first request on a fresh
    /// connection would make its endpoint look slow.
    pub fn finish(mut self, now: Nanos, latency: Duration, outcome: Outcome) {
        if let Some(set) = self.set.take() {
            set.load(self.index).finished(now, latency, outcome);
            outlier::note(&set, self.index, now, outcome);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(set) = self.set.take() {
            set.load(self.index).abandoned();
        }
    }
}

/// A connection that is being opened or open; closed when dropped.
#[derive(Debug)]
#[must_use = "the connection counts as open only as long as this lives"]
pub struct Open {
    set: Arc<Endpoints>,
    index: usize,
}

impl Open {
    /// Tells how connecting went, TLS handshake included. [`Outcome::Success`] ends a row of failures, so an HTTP
    /// connection that only carries requests should tell failures alone: else a server that accepts and then answers
    /// with 503 is never ejected.
    pub fn connected(&self, now: Nanos, outcome: Outcome) {
        outlier::note(&self.set, self.index, now, outcome);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.set.load(self.index).closed();
    }
}

/// The endpoints of a set that may be picked now.
pub(super) struct Candidates<'a> {
    pub(super) set: &'a Endpoints,
    pub(super) now: Nanos,
    pub(super) exclude: &'a [usize],
    pub(super) avoid_ejected: bool,
}

/// Draws before a draw gives up on luck. At most half are ejected, so that most draws need one or two.
const DRAWS: usize = 8;
/// How many are weighed against each other after that.
const NEIGHBOURS: usize = 64;

impl Candidates<'_> {
    pub(super) fn allow(&self, index: usize) -> bool {
        !(self.exclude.contains(&index) || self.avoid_ejected && self.set.load(index).is_ejected(self.now))
    }

    /// One of them by weight, other than `besides`.
    pub(super) fn draw(&self, besides: Option<usize>, rng: &mut fastrand::Rng) -> Option<usize> {
        if self.set.is_empty() {
            return None;
        }
        for _ in 0..DRAWS {
            let index = self.set.draw(rng);
            if Some(index) != besides && self.allow(index) {
                return Some(index);
            }
        }
        self.search(besides, rng)
    }

    /// When luck ran out, because few are left or they have little weight: by weight among a stretch of the set that
    /// starts anywhere, and beyond it until the first is found.
    fn search(&self, besides: Option<usize>, rng: &mut fastrand::Rng) -> Option<usize> {
        let start = rng.usize(..self.set.len());
        let mut found = None;
        let mut weight_seen = 0_u64;
        for step in 0..self.set.len() {
            if step >= NEIGHBOURS && found.is_some() {
                break;
            }
            let index = (start + step) % self.set.len();
            if Some(index) == besides || !self.allow(index) {
                continue;
            }
            let weight = u64::from(self.set.weight(index));
            weight_seen += weight;
            if rng.u64(..weight_seen) < weight {
                found = Some(index);
            }
        }
        found
    }
}

/// Vose's construction: every slot gets the same share of all draws and passes on to a heavier one what it is too
/// light to keep. In whole numbers: a weight times the count of slots, compared with the total.
fn alias_table(weights: &[u64], total: u64) -> Vec<(u64, usize)> {
    const WHOLE: u64 = 1 << 32;
    let count = weights.len() as u128;
    let total = u128::from(total);
    let mut table: Vec<(u64, usize)> = (0..weights.len()).map(|index| (WHOLE, index)).collect();
    let mut shares: Vec<u128> = weights.iter().map(|weight| u128::from(*weight) * count).collect();
    let (mut light, mut heavy): (Vec<usize>, Vec<usize>) = (0..weights.len()).partition(|index| shares[*index] < total);
    while let (Some(from), Some(to)) = (light.pop(), heavy.last().copied()) {
        table[from] = ((shares[from] * u128::from(WHOLE) / total) as u64, to);
        shares[to] -= total - shares[from];
        if shares[to] < total {
            heavy.pop();
            light.push(to);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{destination, seconds};
    use super::*;

    #[test]
    fn the_alias_table_gives_each_its_weight() {
        let cases: [&[u64]; 6] = [&[1], &[1, 1], &[1, 9], &[5, 1, 1, 1], &[1, 1_000_000], &[3, 7, 11, 13, 17, 900]];
        for weights in cases {
            let total: u64 = weights.iter().sum();
            let mut shares = vec![0.0; weights.len()];
            for (index, (keep, alias)) in alias_table(weights, total).into_iter().enumerate() {
                let kept = keep as f64 / (1_u64 << 32) as f64;
                shares[index] += kept / weights.len() as f64;
                shares[alias] += (1.0 - kept) / weights.len() as f64;
            }
            for (share, weight) in shares.iter().zip(weights) {
                assert!((share - *weight as f64 / total as f64).abs() < 1e-6, "{weights:?}: {shares:?}");
            }
        }
    }

    #[test]
    fn a_load_survives_a_new_version_and_is_shared_between_workers() {
        let loads = Loads::default();
        let first = Arc::new(Endpoints::new(&destination(LoadBalancer::LeastRequest, &[1, 1]), None, &loads));
        let request = first.start(1).unwrap();
        let mut changed = destination(LoadBalancer::LeastRequest, &[1, 1, 1]);
        changed.endpoints.swap(0, 1);
        let second = Endpoints::new(&changed, Some(&first), &loads);
        let other_worker = Endpoints::new(&changed, None, &loads);
        for set in [&second, &other_worker] {
            assert_eq!(set.loads().map(Load::in_flight).collect::<Vec<_>>(), [1, 0, 0]);
        }
        drop(first);
        request.finish(seconds(1), Duration::from_millis(1), Outcome::Success);
        assert_eq!(second.load(0).in_flight(), 0);
        assert!(second.load(0).latency(seconds(1)).is_some());
    }

    #[test]
    fn what_is_dropped_is_no_longer_counted() {
        let set = Arc::new(Endpoints::new(&destination(LoadBalancer::Random, &[1]), None, &Loads::default()));
        let (request, connection) = (set.start(0).unwrap(), set.open(0).unwrap());
        assert_eq!((set.load(0).in_flight(), set.load(0).connections()), (1, 1));
        drop((request, connection));
        assert_eq!((set.load(0).in_flight(), set.load(0).connections()), (0, 0));
        assert!(set.start(1).is_none() && set.open(1).is_none() && set.endpoint(1).is_none());
    }

    #[test]
    fn a_search_finds_the_only_one_left() {
        let set = Endpoints::new(&destination(LoadBalancer::Random, &[1; 1000]), None, &Loads::default());
        let exclude: Vec<usize> = (0..1000).filter(|index| *index != 700).collect();
        let candidates = Candidates { set: &set, now: seconds(0), exclude: &exclude, avoid_ejected: false };
        let mut rng = fastrand::Rng::with_seed(1);
        assert_eq!(candidates.draw(None, &mut rng), Some(700));
        assert_eq!(candidates.draw(Some(700), &mut rng), None);
    }
}
