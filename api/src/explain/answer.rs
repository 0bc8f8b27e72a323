//! The answer, in the form of `explain -o json`: the verdict, by which object, and the steps of the way.

use std::collections::BTreeMap;

use serde::Serialize;

use super::inbound::Judged;
use super::question::{Asked, Question};
use super::route::{RetryShown, RouteTaken};
use crate::policy::trace::Step;
use crate::resource::{ObjectName, Parsed, SourceFile};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// An application gets it.
    Forwarded,
    /// A policy says no.
    Refused,
    Redirected,
    /// Nothing says no, and it does not arrive all the same.
    Failed,
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Forwarded => "forwarded",
            Outcome::Refused => "refused",
            Outcome::Redirected => "redirected",
            Outcome::Failed => "failed",
        }
    }
}

/// The answer, in the form of `explain -o json`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Explanation {
    pub verdict: Outcome,
    /// What an HTTP client sees of the mesh's own answer; of an application's own nothing is known but that it comes.
    pub status: Option<u16>,
    pub grpc_status: Option<u8>,
    /// The word of metrics and logs.
    pub reason: Option<&'static str>,
    pub by: Option<Decider>,
    /// The rule that is followed; None where no route binds the port, or none of its rules matches.
    pub route: Option<RouteTaken>,
    pub backends: Vec<BackendShare>,
    pub timeouts: BTreeMap<&'static str, String>,
    pub retry: Option<RetryShown>,
    pub steps: Vec<Step>,
    pub hint: String,
}

/// The object that decided.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Decider {
    pub kind: String,
    pub namespace: String,
    pub name: String,
    pub rule: Option<usize>,
    pub file: Option<String>,
    pub line: Option<usize>,
}

impl std::fmt::Display for Decider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct BackendShare {
    /// `name.namespace`
    pub service: String,
    pub port: u16,
    pub weight: u32,
    /// Those of Workload documents; sidecars that register themselves are not known offline.
    pub endpoints: usize,
    /// Of all requests, 0 to 1.
    pub share: f64,
}

impl Explanation {
    pub(super) fn begin() -> Explanation {
        Explanation {
            verdict: Outcome::Forwarded,
            status: None,
            grpc_status: None,
            reason: None,
            by: None,
            route: None,
            backends: Vec::new(),
            timeouts: BTreeMap::from([("connect", "5s".to_owned())]),
            retry: None,
            steps: Vec::new(),
            hint: String::new(),
        }
    }

    pub(super) fn fail(
        &mut self,
        question: &Question,
        outcome: Outcome,
        reason: &'static str,
        status: u16,
        grpc_status: u8,
    ) {
        self.verdict = outcome;
        self.reason = Some(reason);
        if let Some(asked) = &question.request {
            let grpc = asked.is_grpc();
            self.status = Some(if grpc { 200 } else { status });
            self.grpc_status = grpc.then_some(grpc_status);
        }
    }

    /// Takes over what was judged. `configuration`: where objects stand, if that is known.
    pub(super) fn conclude(
        &mut self,
        question: &Question,
        judged: Judged,
        configuration: Option<(&Parsed, &[SourceFile])>,
    ) {
        self.steps.extend(judged.steps);
        self.by = judged.by.map(|(object, rule)| decider(configuration, object, rule));
        match judged.denied {
            Some(("mtls_required", why)) => {
                // The connection is closed before a byte reaches the application: there is no status.
                self.verdict = Outcome::Refused;
                self.reason = Some("mtls_required");
                self.hint = why;
            }
            Some((reason, hint)) => {
                let (outcome, status, grpc_status) = match reason {
                    "path_ambiguous" => (Outcome::Refused, 400, 3),
                    "jwt_missing" | "jwt_invalid" => (Outcome::Refused, 401, 16),
                    "jwks_unavailable" => (Outcome::Failed, 503, 14),
                    _ => (Outcome::Refused, 403, 7),
                };
                self.hint = hint;
                self.fail(question, outcome, reason, status, grpc_status);
            }
            None => {
                let grpc = question.request.as_ref().is_some_and(Asked::is_grpc);
                self.status = question.request.is_some().then_some(200);
                self.grpc_status = grpc.then_some(0);
            }
        }
    }
}

fn decider(configuration: Option<(&Parsed, &[SourceFile])>, object: String, rule: Option<usize>) -> Decider {
    let mut parts = object.splitn(3, '/').map(str::to_owned);
    let [kind, namespace, name] = std::array::from_fn(|_| parts.next().unwrap_or_default());
    let known = ["AuthorizationPolicy", "MeshConfig", "PeerAuthentication", "RequestAuthentication", "RateLimitPolicy"];
    let kind_name = known.into_iter().find(|known| *known == kind);
    let place = kind_name.zip(configuration).and_then(|(kind, (parsed, files))| {
        parsed.place(files, &ObjectName { kind, namespace: namespace.clone(), name: name.clone() })
    });
    let (file, line) = place.map_or((None, None), |(file, line)| (Some(file), Some(line)));
    Decider { kind, namespace, name, rule, file, line }
}
