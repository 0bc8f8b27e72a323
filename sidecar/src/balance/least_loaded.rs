//! Of two random endpoints the less loaded one. Two draws come close to the best of all at a constant price, and callers
//! that do not know of each other do not rush to the same endpoint.
//!
//! The draws are by weight, and the first one stands unless the second would, with this request on top, still be no
//! worse off than the first is without it. So a service with little to do is shared out by weight, and not sent to the
//! one endpoint that is faster by a hair; a busy one is shared out by what is in flight per weight; and one request in
//! flight more than another of the same weight and speed is enough to prefer the other.

use super::Kind;
use super::endpoints::Candidates;

/// Added to every latency, in nanoseconds: fractions of a millisecond are noise.
const NOISE: f64 = 1e6;

pub(super) fn pick(candidates: &Candidates<'_>, kind: Kind, rng: &mut fastrand::Rng) -> Option<usize> {
    let first = candidates.draw(None, rng)?;
    let Some(second) = candidates.draw(Some(first), rng) else {
        return Some(first);
    };
    let (latency_of_first, latency_of_second) = match kind {
        Kind::Http => latencies(candidates, first, second),
        Kind::Tcp => (1.0, 1.0),
    };
    let cost_of_first = latency_of_first * crowd(candidates, kind, first, 0);
    let cost_of_second = latency_of_second * crowd(candidates, kind, second, 1);
    Some(if cost_of_second <= cost_of_first { second } else { first })
}

/// Peak EWMA of both. An endpoint that was not measured yet counts as fast as the other one: it is not preferred, and
/// what it has in flight speaks for itself.
fn latencies(candidates: &Candidates<'_>, first: usize, second: usize) -> (f64, f64) {
    let latency = |index| candidates.set.load(index).latency(candidates.now);
    match (latency(first), latency(second)) {
        (Some(first), Some(second)) => (first + NOISE, second + NOISE),
        _ => (1.0, 1.0),
    }
}

/// How busy an endpoint is for its weight, with `more` on top of what it has; 1 when that is nothing.
fn crowd(candidates: &Candidates<'_>, kind: Kind, index: usize, more: u32) -> f64 {
    let load = candidates.set.load(index);
    let busy = match kind {
        Kind::Http => load.in_flight(),
        Kind::Tcp => load.connections(),
    };
    1.0 + (f64::from(busy) + f64::from(more)) * candidates.set.lightness(index)
}
