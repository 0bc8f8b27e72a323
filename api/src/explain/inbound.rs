//! What one workload's inbound side decides: mode, identity, token, policies, with a step for everything that was looked at.

use std::net::IpAddr;

use super::question::{Asked, Question};
use super::token;
use crate::facts::{Connection, Moment, Request};
use crate::name::{Protocol, ServiceName};
use crate::path::NormalPath;
use crate::policy::authorization::{Authorization, By, DefaultAction, Denial};
use crate::policy::jwt::{Authentication, RemoteKeys};
use crate::policy::mtls::{self, Arrival};
use crate::policy::rate_limit::RateLimits;
use crate::policy::trace::Step;
use crate::resource::Labels;
use crate::snapshot::MtlsMode;

pub(super) struct Judged {
    pub(super) steps: Vec<Step>,
    /// The reason and a hint.
    pub(super) denied: Option<(&'static str, String)>,
    pub(super) by: Option<(String, Option<usize>)>,
}

impl Judged {
    fn refused(self, (reason, hint, by): token::Denied) -> Judged {
        Judged { denied: Some((reason, hint)), by, ..self }
    }
}

/// What decides about one port of one workload.
pub(super) struct Gate<'g> {
    /// What a step calls the workload.
    pub(super) whom: String,
    pub(super) mode: MtlsMode,
    pub(super) authorization: &'g Authorization,
    pub(super) rate_limits: &'g RateLimits,
    pub(super) authentication: &'g Authentication,
    pub(super) keys: &'g dyn RemoteKeys,
    pub(super) labels: &'g Labels,
    pub(super) ip: Option<IpAddr>,
    /// The application's port.
    pub(super) port: u16,
    pub(super) service: Option<&'g ServiceName>,
    pub(super) protocol: Option<Protocol>,
}

impl Gate<'_> {
    pub(super) fn judge(&self, question: &Question) -> Judged {
        let mut judged = Judged { steps: Vec::new(), denied: None, by: None };
        let arrival = match (&question.from, self.mode) {
            (Some(_), MtlsMode::Strict | MtlsMode::Permissive) => Arrival::Mutual,
            // The caller's sidecar knows that this port takes plaintext alone.
            (Some(_), MtlsMode::Disable) | (None, _) => Arrival::Plaintext,
        };
        if let Err(why) = mtls::admit(self.mode, arrival) {
            judged.steps.push(Step::new("mtls", self.whom.as_str(), "refused", why.to_owned()));
            let hint = format!("give the caller a sidecar, or make port {} PERMISSIVE", self.port);
            judged.denied = Some(("mtls_required", hint));
            return judged;
        }
        let identity = question.from.as_ref().filter(|_| arrival == Arrival::Mutual);
        let proved = identity
            .map_or_else(|| "nothing is proved about the caller".to_owned(), |id| format!("the caller is {id}"));
        judged.steps.push(Step::new("mtls", self.whom.as_str(), self.mode.as_str(), proved));
        let opaque = matches!(self.protocol, Some(Protocol::Tcp | Protocol::Tls));
        let asked = question.request.as_ref().filter(|_| !opaque);
        if opaque && question.request.is_some() {
            let why = "the port is declared as bytes that are not parsed: rules see the connection alone".to_owned();
            judged.steps.push(Step::new("detect", self.whom.as_str(), "opaque", why));
        }
        let path = asked.map(|asked| NormalPath::of(&asked.target));
        let host = |asked: &Asked| {
            let mut hosts = asked.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("host"));
            hosts.next().map_or_else(|| question.to.to_string(), |(_, value)| value.clone())
        };
        let connection = Connection {
            identity,
            source_ip: question.from_ip,
            destination_ip: self.ip,
            destination_port: self.port,
            service: self.service,
            labels: self.labels,
            now: Moment::of_unix_time(question.at),
            sni: question.sni.as_deref().filter(|_| question.request.is_none()),
        };
        let authenticated = match asked {
            Some(asked) => match token::authenticate(self, question, &connection, asked, &mut judged.steps) {
                Ok(authenticated) => Some(authenticated),
                Err(denied) => return judged.refused(denied),
            },
            None => {
                if let Err(refused) = self.authentication.judge_opaque(&connection, &mut judged.steps) {
                    return judged.refused(token::denied(refused));
                }
                None
            }
        };
        let host = asked.map(host).unwrap_or_default();
        let request = asked.zip(path.as_ref()).zip(authenticated.as_ref()).map(|((asked, path), seen)| Request {
            method: &asked.method,
            path,
            query: asked.target.split_once('?').map(|(_, query)| query),
            host: &host,
            headers: &seen.headers,
            claims: seen.claims.as_ref(),
        });
        let verdict = self.authorization.decide(&connection, request.as_ref(), &mut judged.steps);
        if self.authorization.policies.is_empty() {
            let (result, why) = match self.authorization.default_action {
                DefaultAction::Allow => ("allowed", "no AuthorizationPolicy selects it and defaultAction is Allow"),
                DefaultAction::Deny => ("refused", "no AuthorizationPolicy selects it and defaultAction is Deny"),
            };
            judged.steps.push(Step::new("policy", By::Default.to_string(), result, why.to_owned()));
        }
        for shadow in &verdict.shadow {
            let why = "in Shadow mode: enforced it would refuse this".to_owned();
            judged.steps.push(Step::new("shadow", shadow.to_string(), "would refuse", why));
        }
        if let (None, Some(request), Some(asked)) = (verdict.denied, &request, asked)
            && let Some(denied) = self.limited(&connection, request, asked, &mut judged.steps)
        {
            return judged.refused(denied);
        }
        judged.by = verdict.by.map(|by| (by.to_string(), by.rule()));
        judged.denied = verdict.denied.map(|denial| match denial {
            Denial::PathAmbiguous => {
                ("path_ambiguous", "write the path in one way that every server reads alike".to_owned())
            }
            Denial::Policy => ("policy_denied", denied_hint(&judged.steps, verdict.by.as_ref(), question)),
        });
        judged
    }
}

impl Gate<'_> {
    /// The limits that a request is counted in. What the buckets hold now only the sidecar knows; a path that can be read in
    /// two ways is refused whatever they hold.
    fn limited(
        &self,
        connection: &Connection<'_>,
        request: &Request<'_>,
        asked: &Asked,
        steps: &mut Vec<Step>,
    ) -> Option<token::Denied> {
        if let Some(ambiguous) = request.path.ambiguous
            && let Some(policy) = self.rate_limits.looks_at_paths(connection)
        {
            steps.push(Step::new("limit", policy.full_name(), "refused", ambiguous.as_str().to_owned()));
            let hint = "write the path in one way that every server reads alike".to_owned();
            return Some(("path_ambiguous", hint, Some((policy.full_name(), None))));
        }
        let query = asked.target.split_once('?').map(|(_, query)| query);
        self.rate_limits.counted(connection, request, query, &mut |counted| {
            let Some(limit) = counted.policy.limits.get(counted.limit_index) else { return };
            let object = format!("{} rule {}", counted.policy.full_name(), counted.limit_index);
            let shadow = if counted.policy.shadow { ", in Shadow mode" } else { "" };
            let why = format!("{}: {}, by {}{shadow}", limit.name, counted.rate, limit.by.shown(connection, request));
            steps.push(Step::new("limit", object, "counted", why));
        });
        None
    }
}

/// What to do about it: a rule that says no is named; where none says yes, the one that came nearest.
fn denied_hint(steps: &[Step], by: Option<&By<'_>>, question: &Question) -> String {
    let whom = question
        .from
        .as_ref()
        .map_or_else(|| "a caller without an identity".to_owned(), |id| format!("{}/{}", id.namespace(), id.account()));
    match by {
        Some(by @ By::Policy { rule: Some(rule), .. }) => {
            format!("rule {rule} of {by} denies it: narrow that rule if {whom} shall get through")
        }
        Some(By::Default) => format!("write an AuthorizationPolicy with action ALLOW for {whom}"),
        Some(By::Policy { rule: None, .. }) | None => {
            let near = steps.iter().rev().find(|step| step.stage == "allow" && step.result == "no match");
            match near {
                Some(step) => format!("no rule allows {whom}; nearest: {}: {}", step.object, step.why),
                None => format!("no rule allows {whom}"),
            }
        }
    }
}
