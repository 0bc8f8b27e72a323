//! Outlier ejection: an endpoint that fails several times in a row is left alone for a while, longer each time. Called
//! with every outcome and before every pick. It never leaves less than half of a destination's endpoints: when
//! most of them fail, the fault lies elsewhere and leaving them out would make it worse.

use std::time::Duration;

use super::endpoints::Endpoints;
use super::load::{Nanos, Outcome};

/// Connect errors or 5xx in a row that eject.
pub const CONSECUTIVE_FAILURES: u32 = 5;
/// How long the first ejection lasts; the n-th in a row lasts n times as long.
pub const FIRST_EJECTION: Duration = Duration::from_secs(30);
/// No ejection is longer. An endpoint that behaved for as long since its last one starts from the first again.
pub const LONGEST_EJECTION: Duration = Duration::from_secs(300);

/// Takes note of an outcome and ejects the endpoint when it was one too many.
pub(super) fn note(set: &Endpoints, index: usize, now: Nanos, outcome: Outcome) {
    let load = set.load(index);
    match outcome {
        Outcome::Success => load.forgive(),
        Outcome::Failure5xx | Outcome::ConnectError => {
            // What was in flight when it was ejected says nothing new.
            if !load.is_ejected(now) && load.failed() >= CONSECUTIVE_FAILURES {
                eject(set, index, now);
            }
        }
        Outcome::Cancelled => {}
    }
}

fn eject(set: &Endpoints, index: usize, now: Nanos) {
    let load = set.load(index);
    let _one_at_a_time = set.registry().ejecting();
    // Also when it stays: it then takes as many failures again to ask again, and each asking counts all endpoints.
    load.forgive();
    let ejected = ejected(set, now);
    if load.is_ejected(now) || !leaves_half(ejected + 1, set.len()) {
        return;
    }
    let behaved_since = load.ejected_until() + LONGEST_EJECTION;
    let in_a_row = if now < behaved_since { load.ejections().saturating_add(1) } else { 1 };
    let until = now + FIRST_EJECTION.saturating_mul(in_a_row).min(LONGEST_EJECTION);
    load.eject(until, in_a_row);
    set.registry().ejected_until(until);
}

fn ejected(set: &Endpoints, now: Nanos) -> usize {
    set.loads().filter(|load| load.is_ejected(now)).count()
}

fn leaves_half(ejected: usize, of: usize) -> bool {
    ejected * 2 <= of
}

/// Whether ejections count for a destination. They may not although each left half when it was decided: the others can
/// have left the destination since, or an endpoint was ejected as part of another, larger one. Counting takes long for
/// large sets, so it is done only while something is ejected, and not for each pick.
#[derive(Default, Debug)]
pub(super) struct Threshold {
    set: u64,
    counted_at: Nanos,
    keeps: bool,
}

/// How long a count is good for.
const RECOUNT: Duration = Duration::from_millis(250);

impl Threshold {
    pub(super) fn permits(&mut self, set: &Endpoints, now: Nanos) -> bool {
        if !set.registry().any_ejected(now) {
            return false;
        }
        if self.set != set.id() || now >= self.counted_at + RECOUNT {
            *self = Threshold { set: set.id(), counted_at: now, keeps: leaves_half(ejected(set, now), set.len()) };
        }
        self.keeps
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use outrigger_api::snapshot::LoadBalancer;

    use super::super::simulation::{Bench, destination, ejected_at, fail, seconds};
    use super::super::{Endpoints, Kind, Outcome};
    use super::*;

    const ALL: [LoadBalancer; 3] = [LoadBalancer::LeastRequest, LoadBalancer::RoundRobin, LoadBalancer::Random];

    #[test]
    fn five_in_a_row_eject_and_anything_good_between_does_not() {
        use Outcome::{Cancelled, ConnectError, Failure5xx, Success};
        let cases: [(&[Outcome], bool); 6] = [
            (&[Failure5xx; 5], true),
            (&[ConnectError; 5], true),
            (&[Failure5xx; 4], false),
            (&[Failure5xx, ConnectError, Failure5xx, ConnectError, Failure5xx], true),
            (&[Failure5xx, Failure5xx, Success, Failure5xx, Failure5xx, Failure5xx], false),
            (&[Failure5xx, Failure5xx, Cancelled, Failure5xx, Failure5xx, Failure5xx], true),
        ];
        for (outcomes, expected) in cases {
            let bench = Bench::new(LoadBalancer::Random, &[1, 1]);
            for outcome in outcomes {
                fail(&bench.set, 0, seconds(1), *outcome);
            }
            assert_eq!(bench.set.load(0).is_ejected(seconds(1)), expected, "{outcomes:?}");
            let by_connection = Bench::new(LoadBalancer::Random, &[1, 1]);
            for outcome in outcomes {
                by_connection.set.open(0).unwrap().connected(seconds(1), *outcome);
            }
            assert_eq!(by_connection.set.load(0).is_ejected(seconds(1)), expected, "{outcomes:?}");
        }
    }

    #[test]
    fn each_ejection_in_a_row_is_longer_up_to_a_limit() {
        let bench = Bench::new(LoadBalancer::Random, &[1, 1]);
        let mut now = seconds(100);
        for expected in [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300, 300] {
            let back = ejected_at(&bench, 0, now);
            assert_eq!(back, now + Duration::from_secs(expected));
            now = back;
        }
        let behaved = now + LONGEST_EJECTION;
        assert_eq!(ejected_at(&bench, 0, behaved), behaved + FIRST_EJECTION);
    }

    #[test]
    fn an_ejected_one_is_left_alone_and_comes_back() {
        for algorithm in ALL {
            let mut bench = Bench::new(algorithm, &[1, 1, 1]);
            let back = ejected_at(&bench, 1, seconds(1));
            let mut picks = |now| (0..300).filter(|_| bench.pick(Kind::Http, now, &[]) == Some(1)).count();
            assert_eq!(picks(seconds(2)), 0, "{algorithm:?}");
            let share = picks(back);
            assert!((80..=120).contains(&share), "{algorithm:?}: {share} of 300, a fair share would be 100");
        }
    }

    #[test]
    fn never_less_than_half_are_left() {
        for (count, allowed) in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (10, 5), (11, 5)] {
            let bench = Bench::new(LoadBalancer::Random, &vec![1; count]);
            for _ in 0..3 {
                for index in 0..count {
                    for _ in 0..CONSECUTIVE_FAILURES {
                        fail(&bench.set, index, seconds(1), Outcome::ConnectError);
                    }
                }
            }
            assert_eq!(ejected(&bench.set, seconds(1)), allowed, "of {count}");
        }
    }

    #[test]
    fn when_the_others_leave_ejections_no_longer_count() {
        let loads = super::super::Loads::default();
        let whole = destination(LoadBalancer::Random, &[1; 4]);
        let set = Arc::new(Endpoints::new(&whole, None, &loads));
        for index in [0, 1] {
            for _ in 0..CONSECUTIVE_FAILURES {
                fail(&set, index, seconds(1), Outcome::ConnectError);
            }
        }
        let mut shrunk = whole;
        shrunk.endpoints.pop();
        let mut bench = Bench::of(Arc::new(Endpoints::new(&shrunk, Some(&set), &loads)));
        let mut seen = [false; 3];
        for _ in 0..100 {
            seen[bench.pick(Kind::Http, seconds(2), &[]).unwrap()] = true;
        }
        assert_eq!(seen, [true; 3]);
    }

    #[test]
    fn an_ejected_one_is_better_than_none() {
        for algorithm in ALL {
            let mut bench = Bench::new(algorithm, &[1, 1]);
            ejected_at(&bench, 0, seconds(1));
            assert_eq!(bench.pick(Kind::Http, seconds(2), &[1]), Some(0), "{algorithm:?}");
            assert_eq!(bench.pick(Kind::Http, seconds(2), &[1, 0]), None, "{algorithm:?}");
        }
    }
}
