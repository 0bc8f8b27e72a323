//! What would happen to a request or connection, and why: the decisions of the data path, asked by a person, over the
//! objects of a configuration. `outrigger explain` prints it, `outrigger test` compares it with what is expected. A stage
//! of the way is a file: `lookup`, the caller's `route`, then the called side (`inbound`).

mod answer;
mod inbound;
mod lookup;
mod outbound;
mod question;
mod route;
mod token;

pub use answer::{BackendShare, Decider, Explanation, Outcome};
pub use question::{Asked, Question, WrittenQuestion};
pub use route::{RetryShown, RouteTaken};

use std::net::IpAddr;

use crate::compile::{RouteTable, authentication, authorization, mtls_modes, protocol, rate_limits};
use crate::identity::TrustDomain;
use crate::name::ServicePort;
use crate::policy::jwt::RemoteKeys;
use crate::policy::trace::{Step, Trace};
use crate::resource::{Parsed, Resource, Resources, Service, ServicePort as ServicePortSpec, SourceFile};
use crate::snapshot;

use inbound::{Gate, Judged};
use lookup::{Candidate, candidates, lookup, service_object, shown_labels};
use route::{Share, follow};

/// Answers over a configuration without errors. `files` are those that it was parsed from.
pub fn explain(parsed: &Parsed, files: &[SourceFile], trust_domain: &TrustDomain, question: &Question) -> Explanation {
    let mut answer = Explanation::begin();
    let resources = &parsed.resources;
    let Some((_, port)) = lookup(resources, question, &mut answer) else {
        answer.fail(question, Outcome::Failed, "not_registered", 502, 14);
        return answer;
    };
    let front = ServicePort { service: question.to.clone(), port: port.port };
    // A caller without an identity has no sidecar that would follow routes.
    let table = RouteTable::new(resources);
    let routes = question.from.as_ref().and_then(|from| table.of(&front, from.namespace()));
    let shares = match routes {
        None => vec![Share { to: front, weight: 1, share: 1.0, question: question.clone() }],
        Some(routes) => match follow(routes, &front, question, &mut answer) {
            Some(shares) => shares,
            None => return answer,
        },
    };
    let mut decided: Option<Judged> = None;
    for share in &shares {
        let Some(backend) = backend(resources, share) else { continue };
        let judged = deliver(resources, trust_domain, share, backend, &mut answer);
        let Some(judged) = judged else {
            answer.fail(question, Outcome::Failed, "destination_unavailable", 503, 14);
            return answer;
        };
        // The one that refuses is what a user has to know about.
        if share.weight > 0 && decided.as_ref().is_none_or(|before| before.denied.is_none() && judged.denied.is_some())
        {
            decided = Some(judged);
        }
    }
    let Some(judged) = decided else { return answer };
    answer.conclude(question, judged, Some((parsed, files)));
    if answer.verdict == Outcome::Forwarded {
        for share in answer.backends.clone().into_iter().filter(|share| share.weight > 0) {
            let state = match share.endpoints {
                0 => "its endpoints register themselves".to_owned(),
                1 => "1 endpoint".to_owned(),
                many => format!("{many} endpoints"),
            };
            let name = share.service.split_once('.').map(|(name, namespace)| format!("Service/{namespace}/{name}"));
            answer.steps.push(Step::new("balance", name.unwrap_or_default(), "forwarded", state));
        }
    }
    answer
}

fn backend<'r>(resources: &'r Resources, share: &Share) -> Option<(&'r Resource<Service>, &'r ServicePortSpec)> {
    let name = &share.to.service;
    let service = resources.services.get(&(name.namespace.to_string(), name.name.to_string()))?;
    Some((service, service.spec.ports.iter().find(|port| port.port == share.to.port)?))
}

/// What the workloads of one backend do with its share. None: it has none.
fn deliver(
    resources: &Resources,
    trust_domain: &TrustDomain,
    share: &Share,
    (service, port): (&Resource<Service>, &ServicePortSpec),
    answer: &mut Explanation,
) -> Option<Judged> {
    let candidates = candidates(resources, service, port);
    answer.backends.push(BackendShare {
        service: share.to.service.to_string(),
        port: share.to.port,
        weight: share.weight,
        endpoints: candidates.iter().filter(|candidate| candidate.name.is_some()).count(),
        share: share.share,
    });
    if candidates.is_empty() {
        answer.steps.step(|| {
            let why = format!("no workload matches its selector {}", shown_labels(&service.spec.selector));
            Step::new("balance", service_object(service), "failed", why)
        });
        answer.hint = format!("start a workload with the labels {}", shown_labels(&service.spec.selector));
        return None;
    }
    // Every candidate is asked: the one that refuses is what a user has to know about.
    let mut first = None;
    for candidate in &candidates {
        let judged = judge(resources, trust_domain, share, service, port, candidate);
        let refuses = judged.denied.is_some();
        if first.is_none() || refuses {
            first = Some(judged);
        }
        if refuses {
            break;
        }
    }
    first
}

fn judge(
    resources: &Resources,
    trust_domain: &TrustDomain,
    share: &Share,
    service: &Resource<Service>,
    port: &ServicePortSpec,
    candidate: &Candidate<'_>,
) -> Judged {
    let namespace = &service.metadata.namespace;
    let whom = candidate
        .name
        .map_or_else(|| format!("any workload of {}", share.to.service), |name| format!("{name}.{namespace}"));
    if !candidate.mesh {
        let step = Step::new("mtls", whom, "plaintext", "it has no sidecar: no policy of its own".to_owned());
        return Judged { steps: vec![step], denied: None, by: None };
    }
    let policies = resources.peer_authentications.values().map(|policy| (&policy.metadata, &policy.spec));
    let modes = mtls_modes(policies, namespace, candidate.labels);
    let application = candidate.port.unwrap_or(port.port);
    let gate = Gate {
        whom,
        mode: modes.ports.get(&application).copied().unwrap_or(modes.default),
        authorization: &authorization(resources, trust_domain, namespace, candidate.labels),
        rate_limits: &rate_limits(resources, namespace, candidate.labels),
        authentication: &authentication(resources, namespace, candidate.labels),
        keys: &(),
        labels: candidate.labels,
        ip: candidate.ip,
        port: application,
        service: Some(&share.to.service),
        protocol: protocol(resources, None, Some(port), candidate.port),
    };
    gate.judge(&share.question)
}

/// The same of a sidecar, about its own workload: what it knows now decides. None when no port of the workload belongs to
/// the Service that is asked about. `keys`: the key sets that it has fetched.
pub fn explain_own(own: &snapshot::Workload, keys: &dyn RemoteKeys, question: &Question) -> Option<Explanation> {
    let mut ports = own.ports.iter().filter(|(_, port)| port.service.as_ref() == Some(&question.to));
    let (port, _) = ports.next()?;
    Some(explain_port(own, keys, *port, None, question))
}

/// The same about one of its ports, at one of its addresses.
pub fn explain_port(
    own: &snapshot::Workload,
    keys: &dyn RemoteKeys,
    port: u16,
    ip: Option<IpAddr>,
    question: &Question,
) -> Explanation {
    let gate = Gate {
        whom: format!("{}.{}", own.name, own.namespace),
        mode: own.mtls_mode(port),
        authorization: &own.authorization,
        rate_limits: &own.rate_limits,
        authentication: &own.authentication,
        keys,
        labels: &own.labels,
        ip,
        port,
        service: own.ports.get(&port).and_then(|port| port.service.as_ref()),
        protocol: own.protocol(port),
    };
    let mut answer = Explanation::begin();
    let backend = BackendShare { service: question.to.to_string(), port, weight: 1, endpoints: 1, share: 1.0 };
    answer.backends.push(backend);
    let judged = gate.judge(question);
    answer.conclude(question, judged, None);
    answer
}
