//! The caller's side: the rule that a request follows where routes bind the port, and the backends between which it is
//! shared.

use std::time::Duration;

use serde::Serialize;

use super::answer::{Explanation, Outcome};
use super::question::{Asked, Question};
use crate::facts::Request;
use crate::name::ServicePort;
use crate::path::NormalPath;
use crate::policy::trace::Step;
use crate::route::{self, Backend, Chosen, HeaderEdits, Match, Routes, Rule, location, rewritten};

/// The rule that is followed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RouteTaken {
    pub kind: String,
    pub namespace: String,
    pub name: String,
    pub rule: usize,
    /// What about the request matched.
    pub r#match: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RetryShown {
    pub attempts: u32,
    pub codes: Vec<u16>,
}

/// A backend that gets some of the requests.
pub(super) struct Share {
    pub(super) to: ServicePort,
    pub(super) weight: u32,
    /// Of all requests, 0 to 1.
    pub(super) share: f64,
    /// The question as that backend gets it.
    pub(super) question: Question,
}

/// Takes the rule, and says so in `answer`. None: it goes no further.
pub(super) fn follow(
    routes: &Routes,
    port: &ServicePort,
    question: &Question,
    answer: &mut Explanation,
) -> Option<Vec<Share>> {
    let Some(chosen) = decide(routes, question, answer) else {
        let kind = routes.kind;
        answer.hint =
            format!("no rule of the {kind}s that bind {port} matches: add one, or a rule for everything else");
        answer.fail(question, Outcome::Failed, "route_not_found", 404, 12);
        return None;
    };
    let Chosen { rule, by } = chosen;
    let shown = shown(by);
    answer.steps.push(Step::new("route", rule.to_string(), "match", shown.clone()));
    answer.route = Some(taken(rule, shown));
    note_limits(rule, answer);
    if let (Some(redirect), Some(asked)) = (&rule.filters.redirect, &question.request) {
        let place = location(redirect, by, &asked.host(question), port.port, asked.path_and_query());
        answer.steps.push(Step::new("redirect", rule.to_string(), redirect.status.to_string(), place.clone()));
        answer.hint = format!("to {place}");
        answer.verdict = Outcome::Redirected;
        answer.status = Some(redirect.status);
        return None;
    }
    share(chosen, question, answer)
}

fn decide<'r>(routes: &'r Routes, question: &Question, answer: &mut Explanation) -> Option<Chosen<'r>> {
    let asked = question.request.as_ref().filter(|_| routes.kind.is_http());
    let Some(asked) = asked else { return routes.decide_connection(question.sni.as_deref(), &mut answer.steps) };
    let target = asked.path_and_query();
    let path = NormalPath::of(target);
    let host = asked.host(question);
    let query = target.split_once('?').map(|(_, query)| query);
    let request =
        Request { method: &asked.method, path: &path, query, host: &host, headers: &asked.headers, claims: None };
    routes.decide(&route::Asked { request: &request, query, grpc: asked.is_grpc() }, &mut answer.steps)
}

/// Who gets which share, as it is written; what is invalid answers for itself.
fn share(chosen: Chosen<'_>, question: &Question, answer: &mut Explanation) -> Option<Vec<Share>> {
    let Chosen { rule, by } = chosen;
    let total: u64 = rule.backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut shares = Vec::new();
    for backend in &rule.backends {
        let name = backend.to.as_ref().map_or_else(|| "what is no Service".to_owned(), |to| to.0.to_string());
        let part = format!("{} of {total}", backend.weight);
        match (&backend.to, &backend.invalid) {
            (Some(to), None) => {
                answer.steps.push(Step::new("backend", name, part, "it gets this share".to_owned()));
                let share = if total == 0 { 0.0 } else { f64::from(backend.weight) / total as f64 };
                let question = as_sent(question, rule, by, backend);
                shares.push(Share { to: to.0.clone(), weight: backend.weight, share, question });
            }
            (_, invalid) => {
                let why = invalid.clone().unwrap_or_default();
                answer.steps.push(Step::new("backend", name, "invalid", format!("{part} get 500: {why}")));
                answer.hint = why;
            }
        }
    }
    if shares.iter().any(|share| share.weight > 0) {
        return Some(shares);
    }
    if answer.hint.is_empty() {
        answer.hint = format!("{rule} has no backend with a weight");
    }
    answer.fail(question, Outcome::Failed, "backend_invalid", 500, 14);
    None
}

/// The question behind the rule's filters.
fn as_sent(question: &Question, rule: &Rule, by: &Match, backend: &Backend) -> Question {
    let mut question = question.clone();
    let Some(asked) = &mut question.request else { return question };
    if let Some(rewrite) = &rule.filters.rewrite {
        if let Some(new) = &rewrite.path {
            asked.target = rewritten(new, by, asked.path_and_query());
        }
        if let Some(hostname) = &rewrite.hostname {
            asked.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("host"));
            asked.headers.push(("host".to_owned(), hostname.clone()));
        }
    }
    for edits in [&rule.filters.request_headers, &backend.filters.request_headers] {
        edit(asked, edits);
    }
    question
}

fn edit(asked: &mut Asked, edits: &HeaderEdits) {
    let gone = |name: &str| {
        edits.remove.iter().chain(edits.set.iter().map(|(name, _)| name)).any(|gone| gone.eq_ignore_ascii_case(name))
    };
    asked.headers.retain(|(name, _)| !gone(name));
    asked.headers.extend(edits.set.iter().chain(&edits.add).cloned());
}

fn taken(rule: &Rule, shown: String) -> RouteTaken {
    let mut parts = rule.object.splitn(3, '/').map(str::to_owned);
    let [kind, namespace, name] = std::array::from_fn(|_| parts.next().unwrap_or_default());
    RouteTaken { kind, namespace, name, rule: rule.index, r#match: shown }
}

fn note_limits(rule: &Rule, answer: &mut Explanation) {
    let limits = [("request", rule.timeouts.request), ("backendRequest", rule.timeouts.backend_request)];
    for (name, millis) in limits {
        if let Some(millis) = millis {
            answer.timeouts.insert(name, format!("{:?}", Duration::from_millis(millis)));
        }
    }
    answer.retry = rule.retry.as_ref().map(|retry| RetryShown { attempts: retry.attempts, codes: retry.codes.clone() });
}

fn shown(by: &Match) -> String {
    let mut words: Vec<String> = Vec::new();
    words.extend(by.path.as_ref().map(ToString::to_string));
    words.extend(by.method.as_ref().map(|method| format!("method {method}")));
    words.extend(by.headers.iter().map(|header| format!("header {}: {}", header.name, header.value)));
    words.extend(by.query.iter().map(|one| format!("query parameter {}={}", one.name, one.value)));
    words.extend(by.server_name.as_ref().map(|name| format!("server name {name}")));
    if words.is_empty() { "everything".to_owned() } else { words.join(", ") }
}
