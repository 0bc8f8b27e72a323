//! Which rule a request or a connection follows, and which of its backends gets it. Pure: a random number comes in.

use crate::facts::Request;
use crate::policy::trace::{Step, Trace};

use super::{Backend, Kind, Match, Routes, Rule};

/// A request, as routes look at it.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub request: &'a Request<'a>,
    /// Behind the `?`.
    pub query: Option<&'a str>,
    /// Its Content-Type is gRPC's.
    pub grpc: bool,
}

/// What was found.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'r> {
    pub rule: &'r Rule,
    /// The match that holds.
    pub by: &'r Match,
}

impl Routes {
    /// The rule that a request follows; None: none, and it goes nowhere.
    pub fn decide<'r>(&'r self, asked: &Asked<'_>, trace: &mut impl Trace) -> Option<Chosen<'r>> {
        if self.kind == Kind::Grpc && !asked.grpc {
            trace.step(|| {
                let why = "only GRPCRoutes bind the port, and this is no gRPC".to_owned();
                Step::new("route", "", "no match", why)
            });
            return None;
        }
        self.first(trace, |one, because| one.holds(asked, because))
    }

    /// The rule that a connection of opaque bytes follows. `server_name`: of the application's own TLS.
    pub fn decide_connection<'r>(&'r self, server_name: Option<&str>, trace: &mut impl Trace) -> Option<Chosen<'r>> {
        self.first(trace, |one, because| {
            let holds = one.holds_for(server_name);
            if !holds {
                let wanted = one.server_name.as_deref().unwrap_or_default();
                because(&|| format!("expected server name {wanted}, got {}", server_name.unwrap_or("none")));
            }
            holds
        })
    }

    fn first<'r, T: Trace>(
        &'r self,
        trace: &mut T,
        mut holds: impl FnMut(&Match, &mut dyn FnMut(&dyn Fn() -> String)) -> bool,
    ) -> Option<Chosen<'r>> {
        for (rule, number) in &self.order {
            let Some(rule) = self.rules.get(*rule) else { continue };
            let Some(by) = rule.matches.get(*number) else { continue };
            let mut because =
                |why: &dyn Fn() -> String| trace.step(|| Step::new("route", rule.to_string(), "no match", why()));
            if holds(by, &mut because) {
                return Some(Chosen { rule, by });
            }
        }
        None
    }
}

/// The backend that gets a request, by weight; `random` is evenly distributed below the sum that it is given. None: no
/// backend has a weight.
pub fn choose(backends: &[Backend], random: impl FnOnce(u64) -> u64) -> Option<(usize, &Backend)> {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut left = match backends {
        [] => return None,
        _ if total == 0 => return None,
        [_] => 0,
        _ => random(total),
    };
    for (index, backend) in backends.iter().enumerate() {
        let weight = u64::from(backend.weight);
        if left < weight {
            return Some((index, backend));
        }
        left -= weight;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::Filters;
    use super::*;

    fn backends(weights: &[u32]) -> Vec<Backend> {
        let backend = |weight: &u32| Backend { to: None, invalid: None, weight: *weight, filters: Filters::default() };
        weights.iter().map(backend).collect()
    }

    #[test]
    fn each_backend_gets_its_weight() {
        let cases: [&[u32]; 7] = [&[], &[0], &[0, 0], &[5], &[1, 1], &[90, 10], &[0, 3, 0, 1]];
        for weights in cases {
            let all = backends(weights);
            let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            let mut got = vec![0; weights.len()];
            for number in 0..total {
                let (index, _) = choose(&all, |below| if below == total { number } else { 0 }).unwrap();
                got[index] += 1;
            }
            if weights.len() > 1 {
                assert_eq!(got, weights);
            }
            assert_eq!(choose(&all, |_| 0).is_none(), total == 0, "{weights:?}");
        }
    }
}
