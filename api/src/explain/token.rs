//! The called side's second question: what the request's token says, if it has one and any is looked for. The token is that
//! of the request's head, the one that the question has beside it (`--token`), or claims that are taken for verified ones.

use super::inbound::Gate;
use super::question::{Asked, Question};
use crate::facts::{Claims, Connection};
use crate::policy::jwt::{self, Authentication, Found, Refusal, Refused, Verified, same_field};
use crate::policy::trace::Step;

/// A request as rules see it behind the tokens' stage.
pub(super) struct Authenticated {
    pub(super) claims: Option<Claims>,
    pub(super) headers: Vec<(String, String)>,
}

/// The reason, a hint, and the object and rule.
pub(super) type Denied = (&'static str, String, Option<(String, Option<usize>)>);

pub(super) fn authenticate(
    gate: &Gate<'_>,
    question: &Question,
    connection: &Connection<'_>,
    asked: &Asked,
    steps: &mut Vec<Step>,
) -> Result<Authenticated, Denied> {
    let verified = match (&question.claims, &question.token) {
        (Some(claims), _) => Some(given(gate, claims, steps)),
        (None, Some(token)) => beside(gate, connection, token, question.at, steps).map_err(denied)?,
        (None, None) => {
            let query = asked.target.split_once('?').map(|(_, query)| query);
            let request = jwt::Asked { method: &asked.method, headers: &asked.headers, query };
            let told = gate.authentication.authenticate(connection, &request, gate.keys, question.at, steps);
            told.map_err(denied)?
        }
    };
    Ok(Authenticated {
        headers: headers(gate.authentication, asked, verified.as_ref(), question.token.is_none()),
        claims: verified.map(|verified| verified.claims),
    })
}

/// Claims that are as good as verified.
fn given(gate: &Gate<'_>, claims: &Claims, steps: &mut Vec<Step>) -> Verified {
    let issuer = claims.values().get("iss").and_then(serde_json::Value::as_str);
    let policies = gate.authentication.policies.iter().enumerate();
    let mut rules =
        policies.flat_map(|(policy, of)| of.rules.iter().enumerate().map(move |(rule, is)| (policy, rule, is)));
    let taken = rules.find(|(_, _, rule)| Some(rule.issuer.as_str()) == issuer);
    let why = match (gate.authentication.is_empty(), taken) {
        (true, _) => "as given; no RequestAuthentication selects it, so that on the wire no token would be verified",
        (false, Some(_)) => "as given, as of a verified token",
        (false, None) => "as given; no rule takes tokens of that issuer",
    };
    steps.push(Step::new("jwt", "", "claims", why.to_owned()));
    let (policy, rule) = taken.map_or((usize::MAX, usize::MAX), |(policy, rule, _)| (policy, rule));
    Verified { claims: claims.clone(), payload: String::new(), until: u64::MAX, policy, rule }
}

/// A token beside the request, as if it stood where a rule for its issuer looks for it.
fn beside<'g>(
    gate: &Gate<'g>,
    connection: &Connection<'_>,
    token: &str,
    at: u64,
    steps: &mut Vec<Step>,
) -> Result<Option<Verified>, Refused<'g>> {
    let policies = gate.authentication.policies.iter().filter(|policy| connection.is_of(&policy.services));
    let mut places =
        policies.flat_map(|policy| &policy.rules).flat_map(|rule| rule.from.iter().map(move |place| (rule, place)));
    let issuer = jwt::claimed_issuer(token);
    let first = places.clone().find(|(rule, _)| Some(&rule.issuer) == issuer.as_ref()).or_else(|| places.next());
    let Some((_, place)) = first else {
        let why = "no RequestAuthentication selects it: the token is not looked at".to_owned();
        steps.push(Step::new("jwt", "", "no token needed", why));
        return Ok(None);
    };
    let found = Found { text: token.into(), place };
    gate.authentication.verify(connection, &found, gate.keys, at, steps).map(Some)
}

/// The fields that rules and the application see: none that tell of a token but what the verified one tells.
fn headers(
    authentication: &Authentication,
    asked: &Asked,
    verified: Option<&Verified>,
    in_head: bool,
) -> Vec<(String, String)> {
    let told = |name: &str| authentication.told_fields().any(|told| same_field(told, name));
    let rule = verified.and_then(|verified| authentication.rule(verified));
    let taken = rule.filter(|rule| in_head && !rule.forward);
    let taken = |name: &str| {
        let mut places = taken.into_iter().flat_map(|rule| &rule.from);
        places.any(|place| matches!(place, jwt::Place::Header { name: of, .. } if of.eq_ignore_ascii_case(name)))
    };
    let mut headers: Vec<(String, String)> =
        asked.headers.iter().filter(|(name, _)| !told(name) && !taken(name)).cloned().collect();
    if let Some(verified) = verified {
        headers.extend(authentication.tells(verified).map(|(name, value)| (name.to_owned(), value)));
    }
    headers
}

pub(super) fn denied(refused: Refused<'_>) -> Denied {
    let by = refused.by.map(|by| (by.to_string(), by.rule));
    let flaw = &refused.flaw;
    let (reason, hint) = match refused.refusal {
        Refusal::Missing => ("jwt_missing", format!("{flaw}: send one, or take `required` away")),
        Refusal::Invalid => ("jwt_invalid", flaw.to_string()),
        Refusal::KeysUnavailable => (
            "jwks_unavailable",
            format!("{flaw}: files alone do not say it; ask the sidecar of the called workload, which fetches it"),
        ),
    };
    (reason, hint, by)
}
