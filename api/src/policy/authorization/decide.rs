//! The decision: DENY before ALLOW before the default action, AUDIT and Shadow beside them. What one rule says of one set of
//! facts is in `rule`.

use std::fmt;

use super::form::{Action, Authorization, Condition, DefaultAction, Policy};
use super::index::{Index, Section};
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

/// Policies that are asked one after the other.
#[derive(Clone, Copy)]
enum Asked {
    Audit,
    Deny,
    Allow,
    /// ALLOW in Shadow mode.
    Trial,
}

impl Asked {
    fn reading(self) -> Reading {
        match self {
            Asked::Deny => Reading::Deny,
            Asked::Audit | Asked::Allow | Asked::Trial => Reading::Allow,
        }
    }

    fn includes(self, policy: &Policy) -> bool {
        match self {
            Asked::Audit => policy.action == Action::Audit,
            Asked::Deny => policy.action == Action::Deny,
            Asked::Allow => policy.action == Action::Allow && !policy.shadow,
            Asked::Trial => policy.action == Action::Allow && policy.shadow,
        }
    }

    fn of(self, index: &Index) -> &Section {
        match self {
            Asked::Audit => &index.audit,
            Asked::Deny => &index.deny,
            Asked::Allow => &index.allow,
            Asked::Trial => &index.trial,
        }
    }
}

impl Authorization {
    /// Makes decisions cheap where there are many rules; to be called when policies arrive. What is decided is the same.
    pub fn prepare(&self) {
        self.prepared.0.get_or_init(|| Box::new(Index::new(self)));
    }

    /// Bytes that the preparation takes, about.
    pub fn prepared_bytes(&self) -> usize {
        self.prepared.0.get().map_or(0, |index| index.bytes())
    }

    /// Decides about a request, or with `request` None about a connection of opaque bytes. With a trace every rule is
    /// looked at, so that the steps tell of each.
    pub fn decide<'p, T: Trace>(
        &'p self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        trace: &mut T,
    ) -> Verdict<'p> {
        let mut verdict = Verdict::default();
        if self.is_empty() {
            return verdict;
        }
        if let Some(ambiguous) = request.and_then(|request| request.path.ambiguous) {
            let looking =
                || self.policies.iter().filter(|policy| policy.looks_at_paths() && policy.applies(connection));
            if let Some(policy) = looking().find(|policy| !policy.shadow) {
                trace.step(|| Step::new("path", policy.full_name(), "refused", ambiguous.as_str().to_owned()));
                verdict.denied = Some(Denial::PathAmbiguous);
                verdict.by = Some(By::Policy { policy, rule: None });
                return verdict;
            }
            if let Some(policy) = looking().find(|policy| policy.shadow) {
                verdict.shadow.push(By::Policy { policy, rule: None });
            }
        }
        self.ask(Asked::Audit, connection, request, trace, |policy, rule| {
            verdict.audit.push(By::Policy { policy, rule: Some(rule) });
            true
        });
        self.ask(Asked::Deny, connection, request, trace, |policy, rule| {
            let by = By::Policy { policy, rule: Some(rule) };
            if policy.shadow {
                verdict.shadow.push(by);
                return true;
            }
            verdict.denied = Some(Denial::Policy);
            verdict.by = Some(by);
            false
        });
        if verdict.denied.is_none() {
            self.allow(connection, request, trace, &mut verdict);
        }
        verdict
    }

    fn allow<'p, T: Trace>(
        &'p self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        trace: &mut T,
        verdict: &mut Verdict<'p>,
    ) {
        self.ask(Asked::Allow, connection, request, trace, |policy, rule| {
            verdict.by = Some(By::Policy { policy, rule: Some(rule) });
            false
        });
        if verdict.by.is_some() {
            return;
        }
        let asked = |which: Asked| {
            self.policies.iter().filter(move |policy| which.includes(policy) && policy.applies(connection))
        };
        let mut enforced = asked(Asked::Allow);
        if let Some(policy) = enforced.next() {
            verdict.denied = Some(Denial::Policy);
            verdict.by = enforced.next().is_none().then_some(By::Policy { policy, rule: None });
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
        let mut matched = false;
        self.ask(Asked::Trial, connection, request, trace, |_, _| {
            matched = true;
            false
        });
        if !matched {
            verdict.shadow.extend(asked(Asked::Trial).map(|policy| By::Policy { policy, rule: None }));
        }
    }

    /// Calls `each` with every policy that matches, by its first rule that does, until it answers false.
    fn ask<'p, T: Trace>(
        &'p self,
        which: Asked,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
        trace: &mut T,
        mut each: impl FnMut(&'p Policy, usize) -> bool,
    ) {
        let Some(index) = self.prepared.0.get().filter(|_| !T::RECORDS) else {
            for policy in self.policies.iter().filter(|policy| which.includes(policy) && policy.applies(connection)) {
                let matched = policy.first_match(connection, request, which.reading(), trace);
                if matched.is_some_and(|rule| !each(policy, rule)) {
                    return;
                }
            }
            return;
        };
        let looked = Look { connection, request, reading: which.reading() };
        let mut done = None;
        which.of(index).candidates(connection, request, which.reading() == Reading::Deny, |place, rule| {
            let Some(policy) = self.policies.get(place).filter(|_| done != Some(place)) else { return true };
            let form = &policy.rules[rule];
            if !policy.applies(connection) || looked.first_mismatch(form).is_some() {
                return true;
            }
            done = Some(place);
            each(policy, rule)
        });
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
                rule.to.iter().any(|to| !to.paths.is_empty()) || rule.when.iter().any(Condition::looks_at_paths)
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
                        Step::new(self.stage(), object, result, format!("every condition holds{}", looked.doubts(rule)))
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
