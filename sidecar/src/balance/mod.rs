//! Which endpoint takes the next request or connection. The connect stage calls [`Balancer::pick`] with the destination's
//! [`Endpoints`] and tells the outcome through the guard that it got from [`Endpoints::start`] or [`Endpoints::open`].
//! Nothing here reads a clock, does I/O or waits: time and randomness are passed in, so that simulations are exact.
//!
//! One file per algorithm. To add one: a variant of `snapshot::LoadBalancer`, a file, and the arm in [`Balancer::pick`]
//! that the compiler then asks for.

mod endpoints;
mod least_loaded;
mod load;
mod outlier;
mod random;
mod round_robin;
#[cfg(test)]
mod simulation;

pub use endpoints::{Endpoints, InFlight, Open};
pub use load::{Load, Loads, Nanos, Outcome};
pub use outlier::{CONSECUTIVE_FAILURES, FIRST_EJECTION, LONGEST_EJECTION};

use outrigger_api::snapshot::LoadBalancer;

use endpoints::Candidates;
use outlier::Threshold;
use round_robin::RoundRobin;

/// What is being balanced, and so what "loaded" means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Single requests: latency and requests in flight.
    Http,
    /// Connections as a whole: how many are open.
    Tcp,
}

/// One per worker and destination; it holds what an algorithm remembers between two picks. It may be kept when the
/// destination's endpoints or its algorithm change.
#[derive(Default, Debug)]
pub struct Balancer {
    round_robin: RoundRobin,
    threshold: Threshold,
}

impl Balancer {
    /// The index, in `set`, of the endpoint to use. `exclude` are those that this request has tried already: they are
    /// never picked again, and `None` says that no other is left. An ejected endpoint is picked only when there is
    /// nothing else to try. Allocates nothing; independent of the number of endpoints, except that round robin is
    /// logarithmic in it.
    pub fn pick(
        &mut self,
        set: &Endpoints,
        kind: Kind,
        now: Nanos,
        rng: &mut fastrand::Rng,
        exclude: &[usize],
    ) -> Option<usize> {
        let avoid_ejected = self.threshold.permits(set, now);
        let mut candidates = Candidates { set, now, exclude, avoid_ejected };
        let picked = self.ask(&candidates, kind, rng);
        if picked.is_some() || !avoid_ejected {
            return picked;
        }
        candidates.avoid_ejected = false;
        self.ask(&candidates, kind, rng)
    }

    /// The first, in the order of `set`, of those that may be picked: for the addresses of one host.
    pub fn first(&mut self, set: &Endpoints, now: Nanos, exclude: &[usize]) -> Option<usize> {
        let avoid_ejected = self.threshold.permits(set, now);
        let first = |avoid_ejected| {
            let candidates = Candidates { set, now, exclude, avoid_ejected };
            (0..set.len()).find(|index| candidates.allow(*index))
        };
        first(avoid_ejected).or_else(|| first(false))
    }

    fn ask(&mut self, candidates: &Candidates<'_>, kind: Kind, rng: &mut fastrand::Rng) -> Option<usize> {
        match candidates.set.load_balancer() {
            LoadBalancer::LeastRequest => least_loaded::pick(candidates, kind, rng),
            LoadBalancer::RoundRobin => self.round_robin.pick(candidates, rng),
            LoadBalancer::Random => random::pick(candidates, rng),
        }
    }
}
