//! The decision: DENY before ALLOW before the default action, AUDIT and Shadow beside them. What one rule says of one set of
//! facts is in `rule`.

use std::fmt;

use super::form::{Action, Attribute, Authorization, DefaultAction, Policy};
use super::rule::{Look, Reading};
use crate::facts::{Connection, Request};
use crate::policy::trace::{Step, Trace};

/// Which object decided, and by which of its rules (from 0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By<'p> {
    Policy {
        policy: &'p Policy,
        rule: Option<usize>,
    },
    /// `MeshConfig` `default`, by its defaultAction.
    Default,
}

/// `KIND/NAMESPACE/NAME`, as answers, logs and metrics name an object.
impl fmt::Display for By<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            By::Policy { policy, .. } => write!(f, "AuthorizationPolicy/{}/{}", policy.namespace, policy.name),
            By::Default => write!(f, "MeshConfig/{}/default", crate::identity::ROOT_NAMESPACE),
        }
    }
}

impl By<'_> {
    pub fn rule(&self) -> Option<usize> {
        match self {
            By::Policy { rule, .. } => *rule,
            By::Default => None,
        }
    }
}

/// Why not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Denial {
    Policy,
    /// A rule looks at paths, and this path can be read in two ways.
    PathAmbiguous,
}

/// What was decided.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdict<'p> {
    pub denied: Option<Denial>,
    /// What denied it, or the ALLOW that let it in.
    pub by: Option<By<'p>>,
    /// Policies in Shadow mode that would have denied it.
    pub shadow: Vec<By<'p>>,
    /// AUDIT policies that matched.
    pub audit: Vec<By<'p>>,
}

impl Authorization {
    pub fn decide<'p>(
        &'p self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        trace: &mut impl Trace,
    ) -> Verdict<'p> {
        let mut verdict = Verdict::default();
        if self.is_empty() {
            return verdict;
        }
        let here: fn(&Policy, &Connection<'_>) -> bool = Policy::applies;
        let enforced = |policy: &&Policy| !policy.shadow && here(policy, connection);
        let shadowed = |policy: &&Policy| policy.shadow && here(policy, connection);
        if let Some(ambiguous) = request.and_then(|request| request.path.ambiguous) {
            let mut looking = self.policies.iter().filter(|policy| policy.looks_at_paths());
            if let Some(policy) = looking.clone().find(enforced) {
                trace.step(|| Step::new("path", policy.full_name(), "refused", ambiguous.as_str().to_owned()));
                verdict.denied = Some(Denial::PathAmbiguous);
                verdict.by = Some(By::Policy { policy, rule: None });
                return verdict;
            }
            if let Some(policy) = looking.find(shadowed) {
                verdict.shadow.push(By::Policy { policy, rule: None });
            }
        }
        for policy in self.policies.iter().filter(|policy| policy.action == Action::Audit) {
            if here(policy, connection)
                && let Some(rule) = policy.first_match(connection, request, Reading::Allow, trace)
            {
                verdict.audit.push(By::Policy { policy, rule: Some(rule) });
            }
        }
        for policy in self.policies.iter().filter(|policy| policy.action == Action::Deny) {
            if !here(policy, connection) {
                continue;
            }
            let Some(rule) = policy.first_match(connection, request, Reading::Deny, trace) else { continue };
            let by = By::Policy { policy, rule: Some(rule) };
            if policy.shadow {
                verdict.shadow.push(by);
            } else {
                verdict.denied = Some(Denial::Policy);
                verdict.by = Some(by);
                return verdict;
            }
        }
        self.allow(connection, request, trace, &mut verdict);
        verdict
    }

    fn allow<'p>(
        &'p self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        trace: &mut impl Trace,
        verdict: &mut Verdict<'p>,
    ) {
        let allows = || {
            let policies = self.policies.iter();
            policies.filter(|policy| policy.action == Action::Allow && policy.applies(connection))
        };
        let mut enforced = 0_usize;
        for policy in allows().filter(|policy| !policy.shadow) {
            enforced += 1;
            if let Some(rule) = policy.first_match(connection, request, Reading::Allow, trace) {
                verdict.by = Some(By::Policy { policy, rule: Some(rule) });
                return;
            }
        }
        if enforced > 0 {
            verdict.denied = Some(Denial::Policy);
            let mut all = allows().filter(|policy| !policy.shadow);
            verdict.by = all.next().filter(|_| enforced == 1).map(|policy| By::Policy { policy, rule: None });
            return;
        }
        if self.default_action == DefaultAction::Deny {
            trace.step(|| {
                let why = "no ALLOW policy applies to this workload and port".to_owned();
                Step::new("default", By::Default.to_string(), "refused", why)
            });
            verdict.denied = Some(Denial::Policy);
            verdict.by = Some(By::Default);
            return;
        }
        // Nothing is enforced: with its shadows in force a request would need one of them to match.
        let mut shadows = Vec::new();
        for policy in allows().filter(|policy| policy.shadow) {
            if policy.first_match(connection, request, Reading::Allow, trace).is_some() {
                return;
            }
            shadows.push(By::Policy { policy, rule: None });
        }
        verdict.shadow.append(&mut shadows);
    }
}

impl Policy {
    fn full_name(&self) -> String {
        format!("AuthorizationPolicy/{}/{}", self.namespace, self.name)
    }

    /// Whether it is about the Service of this connection's port.
    fn applies(&self, connection: &Connection<'_>) -> bool {
        self.services.is_empty()
            || connection.service.is_some_and(|called| {
                let is_called = |service: &String| {
                    let parts = service.split_once('.');
                    parts.is_some_and(|(name, namespace)| *called.name == *name && *called.namespace == *namespace)
                };
                self.services.iter().any(is_called)
            })
    }

    fn looks_at_paths(&self) -> bool {
        self.action != Action::Audit
            && self.rules.iter().any(|rule| {
                rule.to.iter().any(|to| !to.paths.is_empty())
                    || rule.when.iter().any(|condition| condition.key == Attribute::Path)
            })
    }

    fn first_match(
        &self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        reading: Reading,
        trace: &mut impl Trace,
    ) -> Option<usize> {
        for (index, rule) in self.rules.iter().enumerate() {
            let looked = Look { connection, request, reading };
            match looked.first_mismatch(rule) {
                None => {
                    trace.step(|| {
                        let result = match (self.shadow, self.action) {
                            (true, _) => "would match",
                            (false, Action::Deny) => "refused",
                            (false, Action::Allow) => "allowed",
                            (false, Action::Audit) => "audited",
                        };
                        let object = format!("{} rule {index}", self.full_name());
                        Step::new(self.stage(), object, result, "every condition holds".to_owned())
                    });
                    return Some(index);
                }
                Some(mismatch) => trace.step(|| {
                    let object = format!("{} rule {index}", self.full_name());
                    Step::new(self.stage(), object, "no match", looked.why(rule, mismatch))
                }),
            }
        }
        if self.rules.is_empty() {
            trace.step(|| Step::new(self.stage(), self.full_name(), "no match", "it has no rules".to_owned()));
        }
        None
    }

    fn stage(&self) -> &'static str {
        match self.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
            Action::Audit => "audit",
        }
    }
}
