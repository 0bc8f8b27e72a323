//! `outrigger bench --policies`: what a decision costs with 10, 100 and 1,000 rules in force, with what is prepared when
//! policies arrive and by looking at every rule, and the memory that it takes. In this process and on one thread: nothing
//! else has a part in it.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use outrigger_api::facts::{Connection, Moment, Request};
use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_api::path::NormalPath;
use outrigger_api::policy::authorization::{
    Account, Action, Authorization, DefaultAction, Lists, Operation, Policy, Prepared, Rule, Source,
};
use outrigger_api::policy::pattern::Pattern;
use outrigger_runtime::stdout;

/// Rules per policy.
const RULES: usize = 10;
const COUNTS: [usize; 3] = [10, 100, 1_000];
/// Each way is measured so often, the ways in turns, and the best time counts.
const ROUNDS: usize = 9;

pub(super) fn run() -> anyhow::Result<()> {
    stdout::say("rules  prepared ns  every rule ns  ratio  prepared KiB");
    for count in COUNTS {
        let naive = authorization(count);
        let prepared = naive.clone();
        prepared.prepare();
        let (mut best_prepared, mut best_naive) = (f64::MAX, f64::MAX);
        for _ in 0..ROUNDS {
            best_prepared = best_prepared.min(nanos(&prepared, count)?);
            best_naive = best_naive.min(nanos(&naive, count)?);
        }
        let kib = prepared.prepared_bytes().div_ceil(1024);
        let ratio = best_naive / best_prepared.max(1.0);
        stdout::say(&format!("{count:>5}  {best_prepared:>11.0}  {best_naive:>13.0}  {ratio:>5.1}  {kib:>12}"));
    }
    Ok(())
}

/// Nanoseconds of one decision, over requests that match the first, the middle, the last, and no rule.
fn nanos(authorization: &Authorization, count: usize) -> anyhow::Result<f64> {
    let identity = SpiffeId::new(&TrustDomain::new("outrigger.local")?, "shop", "caller-7")?;
    let labels = BTreeMap::new();
    let connection = Connection {
        identity: Some(&identity),
        source_ip: None,
        destination_ip: None,
        destination_port: 8080,
        service: None,
        labels: &labels,
        now: Moment::default(),
        sni: None,
    };
    let paths = [0, count / 2, count - 1, count].map(|rule| format!("/service-{rule}/items/list"));
    let headers: Vec<(String, String)> = Vec::new();
    let turns = 200_000 / count.max(20);
    let began = Instant::now();
    for _ in 0..turns {
        for target in &paths {
            let path = NormalPath::of(target);
            let (query, claims) = (None, None);
            let request = Request { method: "GET", path: &path, query, host: "shop", headers: &headers, claims };
            black_box(authorization.decide(&connection, Some(&request), &mut ()));
        }
    }
    Ok(began.elapsed().as_nanos() as f64 / (turns * paths.len()) as f64)
}

/// ALLOW policies of ten rules, each for one path of ten callers.
fn authorization(count: usize) -> Authorization {
    let rule = |number: usize| Rule {
        from: vec![Source {
            service_accounts: Lists {
                any_of: (0..10).map(|n| Account { namespace: "shop".into(), name: format!("caller-{n}") }).collect(),
                none_of: Vec::new(),
            },
            ..Source::default()
        }],
        to: vec![Operation {
            methods: Lists { any_of: vec![Pattern::new("GET"), Pattern::new("HEAD")], none_of: Vec::new() },
            paths: Lists { any_of: vec![Pattern::new(&format!("/service-{number}/*"))], none_of: Vec::new() },
            ..Operation::default()
        }],
        when: Vec::new(),
    };
    let policy = |first: usize| Policy {
        namespace: "shop".into(),
        name: format!("policy-{first}"),
        action: Action::Allow,
        shadow: false,
        services: Vec::new(),
        rules: (first..(first + RULES).min(count)).map(rule).collect(),
    };
    let policies = (0..count).step_by(RULES).map(policy).collect();
    Authorization { policies, default_action: DefaultAction::Allow, prepared: Prepared::default() }
}
