//! Seeded simulations of the algorithms, and what the other files' tests build their sets with. A world of its own
//! clock: requests arrive at a steady rate, endpoints answer after their latency, nothing sleeps.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use outrigger_api::name::ServiceName;
use outrigger_api::snapshot::{Destination, Endpoint, EndpointTls, LoadBalancer};

use super::{Balancer, CONSECUTIVE_FAILURES, Endpoints, InFlight, Kind, Loads, Nanos, Open, Outcome};

const ALL: [LoadBalancer; 3] = [LoadBalancer::LeastRequest, LoadBalancer::RoundRobin, LoadBalancer::Random];

pub(super) fn seconds(seconds: u64) -> Nanos {
    Nanos::default() + Duration::from_secs(seconds)
}

pub(super) fn endpoint(number: u32, weight: u32) -> Endpoint {
    Endpoint {
        address: SocketAddr::from((number.to_be_bytes(), 80)),
        tls: EndpointTls::Plaintext,
        workload: "w".into(),
        namespace: "n".into(),
        instance: format!("w-{number}"),
        weight,
        application_port: 80,
    }
}

pub(super) fn destination(load_balancer: LoadBalancer, weights: &[u32]) -> Destination {
    Destination {
        service: ServiceName::new("s", "n").unwrap(),
        port: 80,
        protocol: None,
        load_balancer,
        endpoints: weights.iter().zip(1..).map(|(weight, number)| endpoint(number, *weight)).collect(),
        stale: false,
        why_empty: String::new(),
        no_such_port: false,
        routes: None,
    }
}

/// Ends a request to an endpoint as told.
pub(super) fn fail(set: &Arc<Endpoints>, index: usize, now: Nanos, outcome: Outcome) {
    set.start(index).unwrap().finish(now, Duration::from_millis(1), outcome);
}

/// Has an endpoint ejected and says until when.
pub(super) fn ejected_at(bench: &Bench, index: usize, now: Nanos) -> Nanos {
    for _ in 0..CONSECUTIVE_FAILURES {
        fail(&bench.set, index, now, Outcome::ConnectError);
    }
    assert!(bench.set.load(index).is_ejected(now));
    bench.set.load(index).ejected_until()
}

pub(super) struct Bench {
    pub(super) set: Arc<Endpoints>,
    balancer: Balancer,
    rng: fastrand::Rng,
}

impl Bench {
    pub(super) fn new(load_balancer: LoadBalancer, weights: &[u32]) -> Bench {
        Bench::of(Arc::new(Endpoints::new(&destination(load_balancer, weights), None, &Loads::default())))
    }

    pub(super) fn of(set: Arc<Endpoints>) -> Bench {
        Bench { set, balancer: Balancer::default(), rng: fastrand::Rng::with_seed(42) }
    }

    pub(super) fn pick(&mut self, kind: Kind, now: Nanos, exclude: &[usize]) -> Option<usize> {
        self.balancer.pick(&self.set, kind, now, &mut self.rng, exclude)
    }

    /// `count` requests at `rate` per second; `latency` says how long an endpoint takes for one. Returns how many each
    /// endpoint got.
    fn serve(&mut self, count: u64, rate: u64, latency: impl Fn(usize, &mut fastrand::Rng) -> Duration) -> Vec<u64> {
        let mut got = vec![0; self.set.len()];
        let mut ends: BinaryHeap<Reverse<(Nanos, u64)>> = BinaryHeap::new();
        let mut running: std::collections::HashMap<u64, (InFlight, Duration)> = Default::default();
        for request in 0..count {
            let now = Nanos(1 + request * 1_000_000_000 / rate);
            while let Some(Reverse((end, which))) = ends.peek().copied().filter(|Reverse((end, _))| *end <= now) {
                ends.pop();
                let (guard, latency) = running.remove(&which).unwrap();
                guard.finish(end, latency, Outcome::Success);
            }
            let index = self.pick(Kind::Http, now, &[]).unwrap();
            got[index] += 1;
            let latency = latency(index, &mut self.rng);
            running.insert(request, (self.set.start(index).unwrap(), latency));
            ends.push(Reverse((now + latency, request)));
        }
        got
    }
}

/// That each got its part of `total` by weight, with `tolerance` as a part of all.
fn assert_shares(got: &[u64], weights: &[u32], tolerance: f64, what: &str) {
    let (total, weight): (u64, u32) = (got.iter().sum(), weights.iter().sum());
    for (got_one, weight_one) in got.iter().zip(weights) {
        let (share, due) = (*got_one as f64 / total as f64, f64::from(*weight_one) / f64::from(weight));
        assert!((share - due).abs() <= tolerance, "{what}: {got:?} for {weights:?}");
    }
}

#[test]
fn weights_are_kept_within_two_percent() {
    let cases: [&[u32]; 6] = [&[1, 1], &[1, 9], &[1, 2, 3, 4], &[100, 1, 1], &[7], &[1; 50]];
    for algorithm in ALL {
        for weights in cases {
            // One request at a time, then twenty at once.
            for rate in [50, 2000] {
                let got = Bench::new(algorithm, weights).serve(50_000, rate, |_, _| Duration::from_millis(10));
                assert_shares(&got, weights, 0.02, &format!("{algorithm:?} at {rate}/s"));
            }
        }
    }
}

#[test]
fn an_endpoint_ten_times_slower_gets_less_than_a_fifth_of_its_share() {
    for count in [2, 3, 5, 20] {
        for rate in [100, 1000] {
            let slow = |index: usize, _: &mut fastrand::Rng| Duration::from_millis(if index == 0 { 100 } else { 10 });
            let got = Bench::new(LoadBalancer::LeastRequest, &vec![1; count]).serve(60_000, rate, slow);
            let fair = 60_000 / count as u64;
            assert!(got[0] * 5 < fair, "{count} endpoints at {rate}/s: {got:?}");
            assert!(got[0] > 0, "it is tried again from time to time");
        }
    }
}

#[test]
fn an_idle_service_does_not_send_all_to_the_one_that_is_faster_by_a_hair() {
    let nearly =
        |index: usize, rng: &mut fastrand::Rng| Duration::from_micros(400 + 60 * index as u64 + rng.u64(..200));
    let got = Bench::new(LoadBalancer::LeastRequest, &[1; 3]).serve(30_000, 100, nearly);
    assert_shares(&got, &[1; 3], 0.02, "almost equal latencies");
}

#[test]
fn a_newcomer_takes_no_more_than_the_others() {
    let loads = Loads::default();
    let old = Arc::new(Endpoints::new(&destination(LoadBalancer::LeastRequest, &[1; 4]), None, &loads));
    let mut bench = Bench::of(old.clone());
    bench.serve(1000, 1000, |_, _| Duration::from_millis(20));
    let with_newcomer = destination(LoadBalancer::LeastRequest, &[1; 5]);
    bench.set = Arc::new(Endpoints::new(&with_newcomer, Some(&old), &loads));
    // All at the same moment: nothing comes back that could tell how fast it is.
    let running: Vec<(usize, InFlight)> = (0..100)
        .map(|_| {
            let index = bench.pick(Kind::Http, seconds(1), &[]).unwrap();
            (index, bench.set.start(index).unwrap())
        })
        .collect();
    let newcomers = running.iter().filter(|(index, _)| *index == 4).count();
    assert!((15..=25).contains(&newcomers), "{newcomers}");
}

#[test]
fn open_connections_follow_the_weights() {
    for weights in [&[1, 1, 1][..], &[1, 3], &[5, 1, 2]] {
        let mut bench = Bench::new(LoadBalancer::LeastRequest, weights);
        let mut open: Vec<(usize, Open)> = Vec::new();
        for _ in 0..800 {
            let index = bench.pick(Kind::Tcp, seconds(1), &[]).unwrap();
            open.push((index, bench.set.open(index).unwrap()));
        }
        let counts: Vec<u64> = bench.set.loads().map(|load| u64::from(load.connections())).collect();
        assert_shares(&counts, weights, 0.02, "open connections");
        // One endpoint loses its connections: the next ones go there.
        open.retain(|(index, _)| *index != 0);
        let lost = counts[0] / 2;
        let regained = (0..lost)
            .filter(|_| {
                let index = bench.pick(Kind::Tcp, seconds(1), &[]).unwrap();
                open.push((index, bench.set.open(index).unwrap()));
                index == 0
            })
            .count() as u64;
        assert!(regained * 2 > lost, "{regained} of {lost}");
    }
}

#[test]
fn what_is_excluded_is_never_picked() {
    let mut rng = fastrand::Rng::with_seed(7);
    for algorithm in ALL {
        for kind in [Kind::Http, Kind::Tcp] {
            for count in 0..12_usize {
                let weights: Vec<u32> = (0..count).map(|_| rng.u32(1..100)).collect();
                let mut bench = Bench::new(algorithm, &weights);
                for index in 0..count {
                    if bench.set.len() > 2 && rng.bool() {
                        for _ in 0..CONSECUTIVE_FAILURES {
                            fail(&bench.set, index, seconds(1), Outcome::Failure5xx);
                        }
                    }
                }
                for _ in 0..50 {
                    let exclude: Vec<usize> = (0..count).filter(|_| rng.bool()).collect();
                    let picked = bench.pick(kind, seconds(2), &exclude);
                    assert_eq!(picked.is_none(), exclude.len() == count, "{algorithm:?} {exclude:?} of {count}");
                    assert!(picked.is_none_or(|index| index < count && !exclude.contains(&index)));
                }
            }
        }
    }
}

#[test]
fn ten_thousand_endpoints_with_many_ejected() {
    for algorithm in ALL {
        let mut bench = Bench::new(algorithm, &[1; 10_000]);
        for index in 0..2_000 {
            ejected_at(&bench, index, seconds(1));
        }
        for _ in 0..20_000 {
            assert!(bench.pick(Kind::Http, seconds(2), &[]).unwrap() >= 2_000);
        }
    }
}
