//! Whether the demo kept its promise: every request answered, every edge mutually authenticated on both sides, and
//! nobody without an identity let in. Pure; called once at the end.

use super::edge::{CALLS, Call, Edge, Side};
use super::services;

/// What was broken, as a reader of the exit code wants to be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("no request was answered")]
    NoRequests,
    #[error("{count} of {all} requests failed; the first: {first}")]
    Failed { count: u64, all: u64, first: String },
    #[error("{edge}: {seen} of {count} calls were not under mutual TLS ({side} side)")]
    NotMutual { edge: String, side: &'static str, seen: u64, count: u64 },
    #[error("{edge}: {count} calls failed in the mesh ({side} side){why}")]
    EdgeFailed { edge: String, side: &'static str, count: u64, why: String },
    #[error("{edge}: the {side} side counted {seen} calls, at least {expected} were made")]
    Uncounted { edge: String, side: &'static str, seen: u64, expected: u64 },
    #[error("{edge}: the {side} side knows {seen} instead of {expected}")]
    Identity { edge: String, side: &'static str, seen: String, expected: String },
    #[error("{edge}: was carried as {seen} instead of {expected}")]
    Protocol { edge: String, seen: String, expected: &'static str },
    #[error("{service} was told that {seen} called instead of {expected}")]
    Told { service: &'static str, seen: String, expected: String },
    #[error("plaintext straight to {service}'s inbound port was not refused: it answered {answer:?}")]
    Admitted { service: &'static str, answer: String },
    #[error("{count} requests or connections without an identity were served")]
    ServedToNobody { count: u64 },
}

/// What came of a plaintext request straight to a STRICT inbound port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Intrusion {
    pub service: &'static str,
    /// What was answered instead of a refusal.
    pub admitted: Option<String>,
}

/// Everything that is judged.
pub(super) struct Facts<'a> {
    pub load: &'a services::Report,
    pub edges: &'a [Edge; CALLS.len()],
    pub intrusions: &'a [Intrusion],
    pub served_to_nobody: u64,
}

/// Nothing when all was well; else the faults, those that a user notices first.
pub(super) fn verdict(facts: &Facts<'_>) -> Vec<Fault> {
    let load = facts.load;
    let mut faults = Vec::new();
    if load.failed > 0 {
        let first = load.first_failure.clone().unwrap_or_default();
        faults.push(Fault::Failed { count: load.failed, all: load.ok + load.failed, first });
    }
    if load.ok == 0 {
        faults.push(Fault::NoRequests);
    }
    for (call, edge) in CALLS.iter().zip(facts.edges) {
        judge(call, edge, load.ok, &mut faults);
    }
    if load.ok > 0 {
        told("web", &load.web_caller, &CALLS[0], &mut faults);
        told("catalog", &load.catalog_caller, &CALLS[1], &mut faults);
    }
    faults.extend(facts.intrusions.iter().filter_map(|intrusion| {
        let answer = intrusion.admitted.clone()?;
        Some(Fault::Admitted { service: intrusion.service, answer })
    }));
    if facts.served_to_nobody > 0 {
        faults.push(Fault::ServedToNobody { count: facts.served_to_nobody });
    }
    faults
}

fn judge(call: &Call, edge: &Edge, answered: u64, faults: &mut Vec<Fault>) {
    // The service's side can have counted more (somebody else called), never less than what the caller's side sent.
    let expected = answered * call.per_request;
    for (side, counts, least) in
        [("outbound", &edge.outbound, expected), ("inbound", &edge.inbound, expected.max(answered_of(&edge.outbound)))]
    {
        let edge = || call.to_string();
        if counts.ended < least {
            faults.push(Fault::Uncounted { edge: edge(), side, seen: counts.ended, expected: least });
        }
        if counts.plaintext > 0 {
            faults.push(Fault::NotMutual { edge: edge(), side, seen: counts.plaintext, count: counts.ended });
        }
        if counts.failed > 0 {
            faults.push(Fault::EdgeFailed { edge: edge(), side, count: counts.failed, why: why(counts) });
        }
        if counts.ended > 0 {
            identities(call, side, &counts.principals, call.caller_identity(), faults);
        }
        if let Some(seen) = counts.protocols.iter().find(|protocol| *protocol != call.protocol) {
            faults.push(Fault::Protocol { edge: edge(), seen: seen.clone(), expected: call.protocol });
        }
    }
    if edge.outbound.ended > 0 {
        identities(call, "outbound", &edge.demanded, call.service_identity(), faults);
    }
}

fn answered_of(side: &Side) -> u64 {
    side.ended.saturating_sub(side.failed)
}

fn why(side: &Side) -> String {
    let words: Vec<_> = side.reasons.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    if words.is_empty() { String::new() } else { format!(": {}", words.join(", ")) }
}

/// Exactly the expected one, and no other.
fn identities(
    call: &Call,
    side: &'static str,
    seen: &std::collections::BTreeSet<String>,
    expected: String,
    faults: &mut Vec<Fault>,
) {
    if seen.len() == 1 && seen.contains(&expected) {
        return;
    }
    let named = |identity: &String| if identity.is_empty() { "nobody".to_owned() } else { identity.clone() };
    let mut wrong: Vec<_> = seen.iter().filter(|identity| **identity != expected).map(named).collect();
    if wrong.is_empty() {
        wrong.push("nobody".to_owned());
    }
    faults.push(Fault::Identity { edge: call.to_string(), side, seen: wrong.join(", "), expected });
}

fn told(service: &'static str, seen: &Option<String>, call: &Call, faults: &mut Vec<Fault>) {
    let expected = call.caller_identity();
    if seen.as_ref() != Some(&expected) {
        let seen = seen.clone().unwrap_or_else(|| "nobody".to_owned());
        faults.push(Fault::Told { service, seen, expected });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good_edge(call: &Call, requests: u64) -> Edge {
        let side = Side {
            ended: requests * call.per_request,
            principals: [call.caller_identity()].into(),
            protocols: [call.protocol.to_owned()].into(),
            ..Side::default()
        };
        Edge { outbound: side.clone(), inbound: side, demanded: [call.service_identity()].into() }
    }

    /// The verdict on 10 good requests after `spoil` has touched the facts.
    fn faults(spoil: impl FnOnce(&mut services::Report, &mut [Edge; 3], &mut Vec<Intrusion>, &mut u64)) -> Vec<String> {
        let mut load = services::Report {
            ok: 10,
            web_caller: Some(CALLS[0].caller_identity()),
            catalog_caller: Some(CALLS[1].caller_identity()),
            ..services::Report::default()
        };
        let mut edges = CALLS.each_ref().map(|call| good_edge(call, 10));
        let mut intrusions = vec![Intrusion { service: "web", admitted: None }];
        let mut served_to_nobody = 0;
        spoil(&mut load, &mut edges, &mut intrusions, &mut served_to_nobody);
        let facts = Facts { load: &load, edges: &edges, intrusions: &intrusions, served_to_nobody };
        verdict(&facts).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn all_well_is_no_fault() {
        assert_eq!(faults(|_, _, _, _| {}), Vec::<String>::new());
    }

    #[test]
    fn a_failed_request_is_told_with_its_reason() {
        let all = faults(|load, edges, _, _| {
            load.failed = 2;
            load.first_failure = Some("web answered 503".to_owned());
            edges[2].outbound.ended += 1;
            edges[2].outbound.failed = 1;
            edges[2].outbound.reasons = [("connect_timeout".to_owned(), 1)].into();
        });
        assert_eq!(
            all,
            [
                "2 of 12 requests failed; the first: web answered 503",
                "web -> ledger: 1 calls failed in the mesh (outbound side): connect_timeout 1",
            ]
        );
        assert_eq!(faults(|load, _, _, _| load.ok = 0), ["no request was answered"]);
    }

    #[test]
    fn an_edge_without_mutual_tls_is_told_with_its_side() {
        let all = faults(|_, edges, _, _| edges[1].inbound.plaintext = 3);
        assert_eq!(all, ["web -> catalog: 3 of 20 calls were not under mutual TLS (inbound side)"]);
        let all = faults(|_, edges, _, _| edges[2].inbound = Side::default());
        assert_eq!(all, ["web -> ledger: the inbound side counted 0 calls, at least 10 were made"]);
    }

    #[test]
    fn identities_are_those_that_were_registered() {
        let web = "spiffe://outrigger.local/ns/demo/sa/web";
        let all = faults(|_, edges, _, _| edges[0].inbound.principals = [String::new()].into());
        assert_eq!(
            all,
            ["load -> web: the inbound side knows nobody instead of spiffe://outrigger.local/ns/demo/sa/load"]
        );
        let all =
            faults(|_, edges, _, _| edges[0].demanded = [web.to_owned(), "spiffe://x/ns/a/sa/b".to_owned()].into());
        assert_eq!(all, [format!("load -> web: the outbound side knows spiffe://x/ns/a/sa/b instead of {web}")]);
        let all = faults(|load, _, _, _| load.catalog_caller = None);
        assert_eq!(all, [format!("catalog was told that nobody called instead of {web}")]);
    }

    #[test]
    fn nobody_gets_in_without_an_identity() {
        let all = faults(|_, _, intrusions, served| {
            intrusions[0].admitted = Some("HTTP/1.1 200 OK".to_owned());
            *served = 1;
        });
        assert_eq!(all.len(), 2);
        assert!(all[0].starts_with("plaintext straight to web's inbound port was not refused"), "{all:?}");
    }
}
