//! Who says so: RequestAuthentications in the form in which they are in force for one workload, and the decision whether
//! the token of a request counts. Pure: the keys of key sets behind URLs and the time are passed in. The sidecar asks in two
//! steps, [`Authentication::find`] and [`Authentication::verify`], between which it remembers what it has verified.
//!
//! Semantics are Istio's: all rules of all objects that select a workload count together; a request without a token goes
//! on, unless one of the objects says `required`; a token that is there must be valid.

mod keys;
mod place;
mod token;
mod url;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::trace::{Step, Trace};
use crate::facts::{Claims, Connection, Headers};
pub use keys::{KeySet, MOST_BYTES as MOST_KEY_SET_BYTES};
pub use place::{Place, parameters, without_parameter};
pub use token::{Flaw, MOST_BYTES as MOST_TOKEN_BYTES};
pub use url::KeySetUrl;

/// Every RequestAuthentication that selects the workload.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Authentication {
    pub policies: Vec<Policy>,
}

/// One RequestAuthentication.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Policy {
    pub namespace: String,
    pub name: String,
    /// `name.namespace` of the Services that its targetRefs name; empty: all ports of the workload.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
    /// A request without a token is refused. Without rules no token is valid: that stands in for a broken document.
    pub required: bool,
    pub rules: Vec<Rule>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Rule {
    pub issuer: String,
    /// Empty: whatever the token is for.
    pub audiences: Vec<String>,
    pub keys: Keys,
    /// At least one.
    pub from: Vec<Place>,
    /// The token goes on to the application.
    pub forward: bool,
    pub claim_headers: Vec<ClaimHeader>,
    /// In lower case: the field that gets the payload as it came.
    pub payload_header: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub enum Keys {
    Inline(KeySet),
    #[serde(rename_all = "camelCase")]
    Remote {
        url: KeySetUrl,
        /// For one fetch, in milliseconds.
        timeout_ms: u64,
    },
}

/// A field that gets the value of a claim.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimHeader {
    /// In lower case.
    pub header: String,
    pub claim: Vec<String>,
}

/// The key sets behind URLs, as far as they are known.
pub trait RemoteKeys {
    /// None: never had, or too old.
    fn of(&self, url: &KeySetUrl) -> Option<Arc<KeySet>>;
}

/// Nobody fetches anything: offline.
impl RemoteKeys for () {
    fn of(&self, _: &KeySetUrl) -> Option<Arc<KeySet>> {
        None
    }
}

/// What of a request is looked at.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub method: &'a str,
    pub headers: &'a dyn Headers,
    /// Behind the `?`, as it came.
    pub query: Option<&'a str>,
}

/// A token that is to be verified.
#[derive(Clone, Debug)]
pub struct Found<'a, 'p> {
    pub text: Cow<'a, str>,
    pub place: &'p Place,
}

/// What a verified token says.
#[derive(Clone, PartialEq, Debug)]
pub struct Verified {
    pub claims: Claims,
    /// The payload as it came, in base64url.
    pub payload: String,
    /// Seconds since the Unix epoch at which it no longer counts.
    pub until: u64,
    /// Which object, and which of its rules, takes it: indices into [`Authentication::policies`].
    pub policy: usize,
    pub rule: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    Missing,
    Invalid,
    /// No key set is known that could say.
    KeysUnavailable,
}

/// Why a request goes no further.
#[derive(Clone, PartialEq, Debug)]
pub struct Refused<'p> {
    pub refusal: Refusal,
    pub flaw: Flaw,
    /// The one object, and the one rule, that it is about; None where several might be meant.
    pub by: Option<By<'p>>,
    /// The key set in which the token's key was looked for in vain, or that is not known.
    pub lacking: Option<&'p KeySetUrl>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct By<'p> {
    pub policy: &'p Policy,
    pub rule: Option<usize>,
}

impl fmt::Display for By<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.policy.full_name())
    }
}

impl Authentication {
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    fn here<'p>(&'p self, connection: &Connection<'_>) -> impl Iterator<Item = (usize, &'p Policy)> + Clone {
        let connection = *connection;
        self.policies.iter().enumerate().filter(move |(_, policy)| connection.is_of(&policy.services))
    }

    /// The key sets that are to be fetched.
    pub fn remote(&self) -> impl Iterator<Item = (&KeySetUrl, u64)> {
        self.policies.iter().flat_map(|policy| &policy.rules).filter_map(|rule| match &rule.keys {
            Keys::Inline(_) => None,
            Keys::Remote { url, timeout_ms } => Some((url, *timeout_ms)),
        })
    }

    /// The fields that tell the application what a token says. No caller may send one, with or without a token.
    pub fn told_fields(&self) -> impl Iterator<Item = &str> {
        let rules = self.policies.iter().flat_map(|policy| &policy.rules);
        rules
            .flat_map(|rule| rule.claim_headers.iter().map(|told| &told.header).chain(&rule.payload_header))
            .map(String::as_str)
    }

    /// May opaque bytes come in? They carry no token.
    pub fn judge_opaque<'p>(&'p self, connection: &Connection<'_>, trace: &mut impl Trace) -> Result<(), Refused<'p>> {
        let Some((_, policy)) = self.here(connection).find(|(_, policy)| policy.required) else { return Ok(()) };
        trace.step(|| Step::new(STAGE, policy.full_name(), "refused", Flaw::Opaque.to_string()));
        let by = Some(By { policy, rule: None });
        Err(Refused { refusal: Refusal::Missing, flaw: Flaw::Opaque, by, lacking: None })
    }

    /// May a request that was let in with these claims, or without a token, stay? It may as long as a rule takes tokens of
    /// that issuer, or none is required.
    pub fn judge_running<'p>(
        &'p self,
        connection: &Connection<'_>,
        claims: Option<&Claims>,
    ) -> Result<(), Refused<'p>> {
        let refused = |refusal, flaw| Refused { refusal, flaw, by: None, lacking: None };
        let Some(claims) = claims else {
            let required = self.here(connection).any(|(_, policy)| policy.required);
            return if required { Err(refused(Refusal::Missing, Flaw::Missing)) } else { Ok(()) };
        };
        let issuer = claims.values().get("iss").and_then(serde_json::Value::as_str).unwrap_or_default();
        let mut here = self.here(connection).map(|(_, policy)| policy).peekable();
        let nobody = here.peek().is_none();
        let mut taken = nobody;
        for policy in here {
            if policy.required && policy.rules.is_empty() {
                return Err(refused(Refusal::Invalid, Flaw::Broken));
            }
            taken |= policy.rules.iter().any(|rule| rule.issuer == issuer);
        }
        if taken { Ok(()) } else { Err(refused(Refusal::Invalid, Flaw::NoIssuer)) }
    }

    /// The request's token; None where none is needed and none is there.
    pub fn find<'a, 'p>(
        &'p self,
        connection: &Connection<'_>,
        asked: &Asked<'a>,
        trace: &mut impl Trace,
    ) -> Result<Option<Found<'a, 'p>>, Refused<'p>> {
        if self.here(connection).next().is_none() {
            return Ok(None);
        }
        if is_preflight(asked) {
            trace.step(|| Step::new(STAGE, "", "no token needed", "it is a CORS preflight".to_owned()));
            return Ok(None);
        }
        let mut places: Vec<&Place> = Vec::new();
        for place in self.here(connection).flat_map(|(_, policy)| &policy.rules).flat_map(|rule| &rule.from) {
            if !places.contains(&place) {
                places.push(place);
            }
        }
        let mut found = Vec::new();
        for place in &places {
            match place.find(asked.headers, asked.query) {
                Ok(text) => found.extend(text.map(|text| Found { text, place })),
                Err(flaw) => return Err(self.invalid(connection, flaw, None, trace)),
            }
        }
        if found.len() > 1 {
            return Err(self.invalid(connection, Flaw::Several(found.len()), None, trace));
        }
        if let Some(found) = found.pop() {
            return Ok(Some(found));
        }
        let Some((_, policy)) = self.here(connection).find(|(_, policy)| policy.required) else {
            trace.step(|| {
                let places: Vec<String> = places.iter().map(ToString::to_string).collect();
                Step::new(STAGE, "", "no token", format!("none in {}, and none is required", places.join(", ")))
            });
            return Ok(None);
        };
        trace.step(|| Step::new(STAGE, policy.full_name(), "refused", Flaw::Missing.to_string()));
        let by = Some(By { policy, rule: None });
        Err(Refused { refusal: Refusal::Missing, flaw: Flaw::Missing, by, lacking: None })
    }

    /// Whether a token counts, by the first rule that takes it. `now`: seconds since the Unix epoch.
    pub fn verify<'p>(
        &'p self,
        connection: &Connection<'_>,
        found: &Found<'_, 'p>,
        keys: &dyn RemoteKeys,
        now: u64,
        trace: &mut impl Trace,
    ) -> Result<Verified, Refused<'p>> {
        if let Some((_, policy)) = self.here(connection).find(|(_, policy)| policy.required && policy.rules.is_empty())
        {
            return Err(self.invalid(connection, Flaw::Broken, Some(By { policy, rule: None }), trace));
        }
        let token = match token::Token::parse(&found.text) {
            Ok(token) => token,
            Err(flaw) => return Err(self.invalid(connection, flaw, None, trace)),
        };
        let issuer = match token.issuer() {
            Ok(issuer) => issuer,
            Err(flaw) => return Err(self.invalid(connection, flaw, None, trace)),
        };
        let mut refused: Option<Refused<'p>> = None;
        for (policy_index, policy) in self.here(connection) {
            for (rule_index, rule) in policy.rules.iter().enumerate() {
                if rule.issuer != issuer || !rule.from.contains(found.place) {
                    continue;
                }
                let object = || format!("{} rule {rule_index}", policy.full_name());
                match rule.verify(&token, keys, now) {
                    Ok(until) => {
                        let claims = Claims::new(token.claims);
                        trace.step(|| {
                            let who = claims.principal().unwrap_or(&rule.issuer);
                            Step::new(STAGE, object(), "verified", format!("the token is of {who}"))
                        });
                        let payload = token.payload.to_owned();
                        return Ok(Verified { claims, payload, until, policy: policy_index, rule: rule_index });
                    }
                    Err((refusal, flaw, lacking)) => {
                        trace.step(|| Step::new(STAGE, object(), "refused", flaw.to_string()));
                        // A key set that is not known may be the one that would have said yes.
                        if refused.as_ref().is_none_or(|before| before.refusal != Refusal::KeysUnavailable) {
                            let by = Some(By { policy, rule: Some(rule_index) });
                            refused = Some(Refused { refusal, flaw, by, lacking });
                        }
                    }
                }
            }
        }
        refused.map_or_else(
            || {
                let mut known: Vec<&str> = Vec::new();
                for rule in self.here(connection).flat_map(|(_, policy)| &policy.rules) {
                    known.extend((!known.contains(&rule.issuer.as_str())).then_some(rule.issuer.as_str()));
                }
                let flaw = Flaw::Issuer {
                    issuer: token::cut(issuer),
                    place: found.place.to_string(),
                    known: known.join(", "),
                };
                Err(self.invalid(connection, flaw, None, trace))
            },
            Err,
        )
    }

    /// Both steps at once, for who remembers nothing.
    pub fn authenticate<'p>(
        &'p self,
        connection: &Connection<'_>,
        asked: &Asked<'_>,
        keys: &dyn RemoteKeys,
        now: u64,
        trace: &mut impl Trace,
    ) -> Result<Option<Verified>, Refused<'p>> {
        let Some(found) = self.find(connection, asked, trace)? else { return Ok(None) };
        self.verify(connection, &found, keys, now, trace).map(Some)
    }

    /// Whether what was verified for one connection still counts for another one, which may be one of another Service.
    pub fn still_takes(&self, connection: &Connection<'_>, verified: &Verified, keys: &dyn RemoteKeys) -> bool {
        let known = |rule: &Rule| match &rule.keys {
            Keys::Inline(_) => true,
            Keys::Remote { url, .. } => keys.of(url).is_some(),
        };
        self.policies.get(verified.policy).is_some_and(|policy| connection.is_of(&policy.services))
            && self.rule(verified).is_some_and(known)
            && !self.here(connection).any(|(_, policy)| policy.required && policy.rules.is_empty())
    }

    /// The rule that took a token.
    pub fn rule(&self, verified: &Verified) -> Option<&Rule> {
        self.policies.get(verified.policy)?.rules.get(verified.rule)
    }

    /// What the application is told of a token: the fields of its rule that have a value.
    pub fn tells<'p>(&'p self, verified: &'p Verified) -> impl Iterator<Item = (&'p str, String)> {
        let rule = self.rule(verified);
        let claims = rule.into_iter().flat_map(|rule| &rule.claim_headers);
        let claims = claims.filter_map(|told| Some((told.header.as_str(), verified.claims.field(&told.claim)?)));
        let payload = rule.and_then(|rule| rule.payload_header.as_deref());
        claims.chain(payload.map(|header| (header, verified.payload.clone())))
    }

    fn invalid<'p>(
        &'p self,
        connection: &Connection<'_>,
        flaw: Flaw,
        by: Option<By<'p>>,
        trace: &mut impl Trace,
    ) -> Refused<'p> {
        let mut all = self.here(connection);
        let only = all.next().filter(|_| all.next().is_none());
        let by = by.or_else(|| only.map(|(_, policy)| By { policy, rule: None }));
        trace.step(|| {
            let object = by.map(|by| by.to_string()).unwrap_or_default();
            Step::new(STAGE, object, "refused", flaw.to_string())
        });
        Refused { refusal: Refusal::Invalid, flaw, by, lacking: None }
    }
}

const STAGE: &str = "jwt";

impl Policy {
    pub fn full_name(&self) -> String {
        format!("RequestAuthentication/{}/{}", self.namespace, self.name)
    }
}

type NotTaken<'p> = (Refusal, Flaw, Option<&'p KeySetUrl>);

impl Rule {
    /// Until when the token counts.
    fn verify<'p>(&'p self, token: &token::Token<'_>, keys: &dyn RemoteKeys, now: u64) -> Result<u64, NotTaken<'p>> {
        let invalid = |flaw: Flaw| (Refusal::Invalid, flaw, None);
        // What costs nothing comes first; a token that ended is no reason to look at its signature.
        let until = token.check_time(now).map_err(invalid)?;
        token.check_audience(&self.audiences).map_err(invalid)?;
        let fetched;
        let (set, url) = match &self.keys {
            Keys::Inline(set) => (set, None),
            Keys::Remote { url, .. } => {
                let none = || (Refusal::KeysUnavailable, Flaw::NoKeys(url.to_string()), Some(url));
                fetched = keys.of(url).ok_or_else(none)?;
                (&*fetched, Some(url))
            }
        };
        let verified = set.verify(token.key_id.as_deref(), token.algorithm, token.signed, &token.signature);
        verified.map_err(|why| {
            let lacking = url.filter(|_| why == keys::NotVerified::UnknownKey);
            (Refusal::Invalid, token.not_verified(why), lacking)
        })?;
        Ok(until)
    }
}

/// Whether two names of fields are one to a server that takes `_` for `-`.
pub fn same_field(one: &str, other: &str) -> bool {
    let folded = |byte: u8| if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    one.len() == other.len() && one.bytes().zip(other.bytes()).all(|(a, b)| folded(a) == folded(b))
}

/// What a token says of its issuer, believed by nobody: it only chooses what is tried.
pub fn claimed_issuer(text: &str) -> Option<String> {
    token::Token::parse(text).ok()?.issuer().ok().map(str::to_owned)
}

/// A CORS preflight (Fetch standard, section 3.2.2), which browsers send without credentials.
fn is_preflight(asked: &Asked<'_>) -> bool {
    let has = |name: &str| {
        let mut any = false;
        asked.headers.each_value(name, &mut |_| {
            any = true;
            false
        });
        any
    };
    asked.method == "OPTIONS" && has("origin") && has("access-control-request-method")
}

#[cfg(test)]
mod tests;
