//! Tokens of requests: asks whether one counts, remembers those that did, and puts the head into the form in which rules
//! and the application see it. A signature is looked at once per token and worker, not once per request.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use outrigger_api::facts::Claims;
use outrigger_api::policy::jwt::{
    Asked, Authentication, Found, KeySetUrl, Place, Refusal, Refused, RemoteKeys, Verified, same_field,
    without_parameter,
};
use outrigger_api::snapshot::Workload;

use super::{Call, Fields, connection};
use crate::outcome::{Error, Reason, Refuser, Side, Stage};

/// Tokens that one worker remembers: so many, and as many of those before.
const REMEMBERED: usize = 1_000;

/// The tokens that were verified, by their digest and place. Two generations: when one is full, the older one goes.
#[derive(Default)]
pub struct Memory {
    /// What they were verified by; with something else nothing is remembered.
    by: Option<(Arc<Authentication>, u64)>,
    new: HashMap<Digest, Arc<Verified>>,
    old: HashMap<Digest, Arc<Verified>>,
}

type Digest = [u8; digest::SHA256_OUTPUT_LEN];

impl Memory {
    /// Forgets everything when the rules or a key set are others than before.
    fn follow(&mut self, rules: &Arc<Authentication>, keys: u64) {
        let same = self.by.as_ref().is_some_and(|(known, of)| Arc::ptr_eq(known, rules) && *of == keys);
        if !same {
            *self = Memory { by: Some((rules.clone(), keys)), ..Memory::default() };
        }
    }

    fn find(&mut self, digest: &Digest) -> Option<Arc<Verified>> {
        if let Some(verified) = self.new.get(digest) {
            return Some(verified.clone());
        }
        let verified = self.old.remove(digest)?;
        self.keep(*digest, verified.clone());
        Some(verified)
    }

    fn keep(&mut self, digest: Digest, verified: Arc<Verified>) {
        if self.new.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.new);
        }
        self.new.insert(digest, verified);
    }
}

fn digest_of(found: &Found<'_, '_>) -> Digest {
    let mut context = digest::Context::new(&digest::SHA256);
    let (kind, name) = match found.place {
        Place::Header { name, .. } => (b'h', name),
        Place::Parameter(name) => (b'p', name),
    };
    context.update(&[kind]);
    context.update(name.as_bytes());
    context.update(&[0]);
    context.update(found.text.as_bytes());
    let mut bytes = Digest::default();
    bytes.copy_from_slice(context.finish().as_ref());
    bytes
}

/// A request that goes no further, or not yet.
pub struct Rejected {
    pub error: Error,
    /// The key set that a fresh fetch may bring.
    pub lacking: Option<KeySetUrl>,
}

/// May this request come in, by its token? The head is left as it is. `keys_version`: see `KeySets::version`.
pub fn authenticate(
    own: &Workload,
    call: &Call<'_>,
    parts: &Parts,
    memory: &mut Memory,
    keys: &dyn RemoteKeys,
    keys_version: u64,
) -> Result<Option<Arc<Verified>>, Box<Rejected>> {
    let rules = &own.authentication;
    let connection = connection(own, call);
    let fields = Fields(&parts.headers);
    let asked = Asked { method: parts.method.as_str(), headers: &fields, query: parts.uri.query() };
    let told = call.identity.is_some();
    let Some(found) = rules.find(&connection, &asked, &mut ()).map_err(|refused| rejected(&refused, told))? else {
        return Ok(None);
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    memory.follow(rules, keys_version);
    let digest = digest_of(&found);
    if let Some(verified) = memory.find(&digest)
        && verified.until > now
        && rules.still_takes(&connection, &verified, keys)
    {
        return Ok(Some(verified));
    }
    let verified = rules.verify(&connection, &found, keys, now, &mut ());
    let verified = Arc::new(verified.map_err(|refused| rejected(&refused, told))?);
    memory.keep(digest, verified.clone());
    Ok(Some(verified))
}

/// The same refusal for bytes that nobody parses.
pub(super) fn refusal(refused: &Refused<'_>, told: bool) -> Error {
    let reason = match refused.refusal {
        Refusal::Missing => Reason::JwtMissing,
        Refusal::Invalid => Reason::JwtInvalid,
        Refusal::KeysUnavailable => Reason::JwksUnavailable,
    };
    let by = refused.by.map(|by| Refuser { object: by.to_string(), rule: by.rule, told });
    let error = Error::own(Stage::Policy, reason, refused.flaw.to_string()).by(by);
    Error { side: Side::Own, ..error }
}

fn rejected(refused: &Refused<'_>, told: bool) -> Box<Rejected> {
    Box::new(Rejected { error: refusal(refused, told), lacking: refused.lacking.cloned() })
}

/// Puts the head into the form in which rules and the application see it: whatever a caller says in the fields that tell of
/// a token is removed, the token too unless it is to go on, and what it tells is added.
/// What was verified stays beside the head, for rules to look at.
pub fn tell(rules: &Authentication, verified: Option<Arc<Verified>>, parts: &mut Parts) {
    let rule = verified.as_ref().and_then(|verified| rules.rule(verified));
    let taken = rule.filter(|rule| !rule.forward).map_or(&[][..], |rule| &rule.from);
    let goes = |name: &HeaderName| {
        let carries = |place: &Place| matches!(place, Place::Header { name: of, .. } if *of == name.as_str());
        is_told(rules, name) || taken.iter().any(carries)
    };
    if parts.headers.keys().any(goes) {
        parts.headers = kept(std::mem::take(&mut parts.headers), |name| !goes(name));
    }
    for place in taken {
        if let Place::Parameter(name) = place {
            remove_parameter(&mut parts.uri, name);
        }
    }
    let Some(verified) = verified else { return };
    for (name, value) in rules.tells(&verified) {
        let field = HeaderName::from_bytes(name.as_bytes()).ok().zip(HeaderValue::from_str(&value).ok());
        if let Some((name, value)) = field {
            parts.headers.append(name, value);
        }
    }
    parts.extensions.insert(verified);
}

/// What the token of a request says, behind [`tell`].
pub fn claims(parts: &Parts) -> Option<&Claims> {
    parts.extensions.get::<Arc<Verified>>().map(|verified| &verified.claims)
}

/// Whether a request that runs would still be let in by its token. That it has ended meanwhile does not end the request.
pub(super) fn judge_running(own: &Workload, call: &Call<'_>, parts: &Parts) -> Option<Error> {
    let outcome = own.authentication.judge_running(&connection(own, call), claims(parts));
    outcome.err().map(|refused| refusal(&refused, call.identity.is_some()))
}

/// Removes from a trailer section what tells of a token.
pub fn remove_told(rules: &Authentication, trailers: &mut HeaderMap) {
    if trailers.keys().any(|name| is_told(rules, name)) {
        *trailers = kept(std::mem::take(trailers), |name| !is_told(rules, name));
    }
}

/// Whether a field, or its twin with `_` for `-`, is one that tells of a token.
fn is_told(rules: &Authentication, name: &HeaderName) -> bool {
    rules.told_fields().any(|told| same_field(told, name.as_str()))
}

/// The fields that `keeps`, in their order, which `HeaderMap::remove` would change.
fn kept(mut headers: HeaderMap, keeps: impl Fn(&HeaderName) -> bool) -> HeaderMap {
    let mut kept = HeaderMap::with_capacity(headers.len());
    let mut last = None;
    for (name, value) in headers.drain() {
        let Some(name) = name.or_else(|| last.clone()) else { continue };
        if keeps(&name) {
            kept.append(name.clone(), value);
        }
        last = Some(name);
    }
    kept
}

fn remove_parameter(uri: &mut Uri, name: &str) {
    let Some(query) = uri.query() else { return };
    let target = match without_parameter(query, name) {
        Some(rest) if rest == query => return,
        Some(rest) => format!("{}?{rest}", uri.path()),
        None => uri.path().to_owned(),
    };
    let mut parts = uri.clone().into_parts();
    if let Ok(target) = target.parse::<PathAndQuery>() {
        parts.path_and_query = Some(target);
        if let Ok(shorter) = Uri::from_parts(parts) {
            *uri = shorter;
        }
    }
}
