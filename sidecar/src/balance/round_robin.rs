//! Each in turn, a heavier one more often, and its turns spread evenly between the others'. Every endpoint has the time
//! at which it is due, on a clock that only this file reads; who is due first goes, and is due again after a step that
//! is the shorter the heavier it is. A worker has turns of its own, from a random start, so that workers do not march
//! in step.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::endpoints::{Candidates, Endpoints};

/// The step of weight 1. The clock has 128 bits: 2^64 turns fit behind it.
const STEP: u128 = 1 << 64;

#[derive(Default, Debug)]
pub(super) struct RoundRobin {
    /// The set that the turns are for; 0 is none.
    set: u64,
    turns: BinaryHeap<Reverse<Turn>>,
    /// Room for those who may not go when their turn comes; empty between picks.
    passed: Vec<usize>,
}

/// Compared by the first field first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Turn {
    due: u128,
    index: usize,
}

impl RoundRobin {
    pub(super) fn pick(&mut self, candidates: &Candidates<'_>, rng: &mut fastrand::Rng) -> Option<usize> {
        let set = candidates.set;
        if self.set != set.id() {
            self.begin(set, rng);
        }
        let mut now = 0;
        let mut picked = None;
        while let Some(Reverse(turn)) = self.turns.pop() {
            now = turn.due;
            if candidates.allow(turn.index) {
                picked = Some(turn.index);
                break;
            }
            self.passed.push(turn.index);
        }
        // Who could not go has lost the turn and saves nothing up: an endpoint that comes back gets its share, not
        // all that it missed.
        for index in self.passed.drain(..).chain(picked) {
            self.turns.push(Reverse(Turn { due: now + step(set, index), index }));
        }
        picked
    }

    fn begin(&mut self, set: &Endpoints, rng: &mut fastrand::Rng) {
        self.set = set.id();
        self.passed = Vec::with_capacity(set.len());
        self.turns = (0..set.len())
            .map(|index| Reverse(Turn { due: u128::from(rng.u64(..)) * step(set, index) / STEP, index }))
            .collect();
    }
}

fn step(set: &Endpoints, index: usize) -> u128 {
    STEP / u128::from(set.weight(index))
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{Bench, ejected_at};
    use super::super::{Kind, Nanos};
    use outrigger_api::snapshot::LoadBalancer;

    #[test]
    fn all_have_one_turn_before_one_has_two() {
        let mut bench = Bench::new(LoadBalancer::RoundRobin, &[1; 7]);
        for _ in 0..5 {
            let mut round: Vec<_> = (0..7).map(|_| bench.pick(Kind::Http, Nanos(0), &[]).unwrap()).collect();
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2, 3, 4, 5, 6]);
        }
    }

    #[test]
    fn turns_are_spread_by_weight() {
        let mut bench = Bench::new(LoadBalancer::RoundRobin, &[5, 1, 1]);
        let picks: Vec<_> = (0..70).map(|_| bench.pick(Kind::Http, Nanos(0), &[]).unwrap()).collect();
        for window in picks.windows(7) {
            let heavy = window.iter().filter(|index| **index == 0).count();
            assert!((4..=6).contains(&heavy), "{picks:?}");
        }
        assert_eq!(picks.iter().filter(|index| **index == 0).count(), 50);
    }

    #[test]
    fn one_that_comes_back_does_not_catch_up() {
        let mut bench = Bench::new(LoadBalancer::RoundRobin, &[1, 1, 1, 1]);
        let back = ejected_at(&bench, 2, Nanos(0));
        for _ in 0..300 {
            assert_ne!(bench.pick(Kind::Http, Nanos(1), &[]), Some(2));
        }
        let picks = (0..40).filter(|_| bench.pick(Kind::Http, back, &[]) == Some(2)).count();
        assert!((9..=11).contains(&picks), "{picks}");
    }

    #[test]
    fn a_heavy_one_that_may_not_go_costs_one_look() {
        let mut bench = Bench::new(LoadBalancer::RoundRobin, &[1_000_000_000, 1]);
        for _ in 0..1000 {
            assert_eq!(bench.pick(Kind::Http, Nanos(0), &[0]), Some(1));
        }
    }
}
