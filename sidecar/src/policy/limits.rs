//! Asks the rate limits about one request. All enforced limits must have room, else none of them counts it; then those in
//! Shadow count it for themselves.

use outrigger_api::facts::{Connection, Request};
use outrigger_api::policy::rate_limit::{Counted, Full};
use outrigger_api::snapshot::Workload;

use super::Noted;
use super::buckets::Followed;
use crate::outcome::{Error, Quota, Reason, Refuser, Side, Stage};

/// What the limits say.
#[derive(Default)]
pub(super) struct Limited {
    pub(super) refused: Option<Error>,
    /// Limits in Shadow that would have refused it.
    pub(super) shadow: Vec<Noted>,
}

/// `query`: behind the `?`; `now`: nanoseconds since the process's epoch.
pub(super) fn limit(
    own: &Workload,
    connection: &Connection<'_>,
    request: &Request<'_>,
    query: Option<&str>,
    buckets: &Followed,
    now: u64,
) -> Limited {
    let told = connection.identity.is_some();
    let rules = &own.rate_limits;
    if let Some(ambiguous) = request.path.ambiguous
        && let Some(policy) = rules.looks_at_paths(connection)
    {
        let by = Some(Refuser { object: policy.full_name(), rule: None, told });
        let error = Error::own(Stage::Policy, Reason::PathAmbiguous, ambiguous.as_str()).by(by);
        return Limited { refused: Some(Error { side: Side::Own, ..error }), shadow: Vec::new() };
    }
    let mut counted = Vec::new();
    rules.counted(connection, request, query, &mut |one| counted.push(one));
    let facts = (connection, request);
    let mut taken = Vec::new();
    for one in counted.iter().filter(|one| !one.policy.shadow) {
        match buckets.take(one, facts, now) {
            Ok(one) => taken.push(one),
            Err(full) => {
                taken.into_iter().for_each(super::buckets::Taken::give_back);
                return Limited { refused: Some(refusal(one, full, told)), shadow: Vec::new() };
            }
        }
    }
    let full = |one: &&Counted<'_>| one.policy.shadow && buckets.take(one, facts, now).is_err();
    let noted = |one: &Counted<'_>| Noted { object: one.policy.full_name(), rule: Some(one.limit_index) };
    Limited { refused: None, shadow: counted.iter().filter(full).map(noted).collect() }
}

fn refusal(counted: &Counted<'_>, full: Full, told: bool) -> Error {
    const SECOND: u64 = 1_000_000_000;
    let by = Some(Refuser { object: counted.policy.full_name(), rule: Some(counted.limit_index), told });
    let name = counted.policy.limits.get(counted.limit_index).map(|limit| limit.name.clone()).unwrap_or_default();
    let detail = format!("the limit {name} ({}) is used up", counted.rate);
    let quota = Quota {
        name,
        requests: counted.rate.requests,
        window: counted.rate.per_ms.div_ceil(1_000).max(1),
        wait: full.wait.div_ceil(SECOND).max(1),
    };
    let error = Error::own(Stage::Policy, Reason::RateLimited, detail).by(by);
    Error { side: Side::Own, quota: Some(Box::new(quota)), ..error }
}
