//! `RequestAuthentication`: which tokens (JWT) a workload takes. Ours and Istio's (`security.istio.io`) are one kind; ours
//! adds `required`. What is checked here is in the form that decides, [`crate::policy::jwt`].

use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Metadata;
use super::attachment::{Attachment, RawAttachment, RawTargetRef};
use super::duration::WrittenDuration;
use super::findings::Findings;
use super::path::{Path, Shortened};
use super::peer_authentication::RawSelector;
use crate::policy::jwt::{ClaimHeader, KeySet, KeySetUrl, Keys, Place, Rule};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestAuthentication {
    pub attachment: Attachment,
    /// A request without a token is refused.
    pub required: bool,
    pub rules: Vec<Rule>,
}

/// `spec` as written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawRequestAuthentication {
    selector: Option<RawSelector>,
    target_ref: Option<RawTargetRef>,
    target_refs: Option<Vec<RawTargetRef>>,
    required: bool,
    jwt_rules: Vec<RawRule>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawRule {
    issuer: Option<String>,
    audiences: Vec<String>,
    jwks: Option<String>,
    jwks_uri: Option<String>,
    /// An older name that Istio still reads.
    #[serde(rename = "jwks_uri")]
    jwks_uri_old: Option<IgnoredAny>,
    timeout: Option<WrittenDuration>,
    from_headers: Vec<RawHeader>,
    from_params: Vec<String>,
    from_cookies: Option<IgnoredAny>,
    forward_original_token: bool,
    output_payload_to_header: Option<String>,
    output_claim_to_headers: Vec<RawClaimHeader>,
    space_delimited_claims: Option<IgnoredAny>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawHeader {
    name: String,
    prefix: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawClaimHeader {
    header: String,
    claim: String,
}

/// For one fetch of a key set, and no rule may ask for longer.
const LONGEST_FETCH: Duration = Duration::from_secs(5);
const SHORTEST_FETCH: Duration = Duration::from_millis(1);

impl RawRequestAuthentication {
    /// `path` is that of `spec`.
    pub(super) fn check(self, metadata: &Metadata, path: &Path, findings: &mut Findings) -> RequestAuthentication {
        let target_refs = self.target_refs.unwrap_or_default();
        let attachment = RawAttachment { selector: self.selector, target_ref: self.target_ref, target_refs };
        let attachment = attachment.check(metadata, path, findings);
        match (self.jwt_rules.is_empty(), self.required) {
            (true, true) => {
                let message = "no token can be valid without `jwtRules`: write at least one".to_owned();
                findings.error_at_key(&path.key("required"), message);
            }
            (true, false) => findings.warning(path, "without `jwtRules` it does nothing".to_owned()),
            (false, _) => {}
        }
        let at_rules = path.key("jwtRules");
        let rules = self.jwt_rules.into_iter().enumerate();
        let rules = rules.filter_map(|(index, rule)| rule.check(&at_rules.index(index), findings)).collect();
        RequestAuthentication { attachment, required: self.required, rules }
    }
}

impl RawRule {
    fn check(self, path: &Path, findings: &mut Findings) -> Option<Rule> {
        let unsupported = [
            ("jwks_uri", self.jwks_uri_old.is_some(), "write `jwksUri`"),
            ("fromCookies", self.from_cookies.is_some(), "not supported: use `fromHeaders` or `fromParams`"),
            (
                "spaceDelimitedClaims",
                self.space_delimited_claims.is_some(),
                "not supported: `scope` and `permission` are lists of words, other claims are not",
            ),
        ];
        for (field, _, message) in unsupported.into_iter().filter(|(_, there, _)| *there) {
            findings.error_at_key(&path.key(field), message.to_owned());
        }
        for (index, audience) in self.audiences.iter().enumerate().filter(|(_, audience)| audience.is_empty()) {
            let message = format!("{audience:?} is nobody: leave `audiences` out to take tokens for anybody");
            findings.error(&path.key("audiences").index(index), message);
        }
        let from = places(self.from_headers, self.from_params, path, findings);
        let at = path.key("outputClaimToHeaders");
        let told = self.output_claim_to_headers.into_iter().enumerate();
        let claim_headers = told.filter_map(|(index, told)| told.check(&at.index(index), findings)).collect();
        let payload_header = self
            .output_payload_to_header
            .and_then(|name| told_field(&name, &path.key("outputPayloadToHeader"), findings));
        let keys = keys(self.jwks, self.jwks_uri, self.timeout, path, findings);
        let Some(issuer) = self.issuer.filter(|issuer| !issuer.is_empty()) else {
            findings.error(path, "`issuer` is missing: the `iss` of the tokens that are taken".to_owned());
            return None;
        };
        let forward = self.forward_original_token;
        Some(Rule { issuer, audiences: self.audiences, keys: keys?, from, forward, claim_headers, payload_header })
    }
}

fn keys(
    jwks: Option<String>,
    url: Option<String>,
    timeout: Option<WrittenDuration>,
    path: &Path,
    findings: &mut Findings,
) -> Option<Keys> {
    let timeout = timeout.map_or(LONGEST_FETCH, |timeout| timeout.0);
    if timeout > LONGEST_FETCH || timeout < SHORTEST_FETCH {
        findings.error(&path.key("timeout"), "a key set is waited for between 1ms and 5s".to_owned());
    }
    match (jwks, url) {
        (Some(_), Some(_)) => {
            findings.error_at_key(&path.key("jwksUri"), "stands beside `jwks`: write one of the two".to_owned());
            None
        }
        (None, None) => {
            let message =
                "neither `jwks` nor `jwksUri`: one of them has the issuer's keys (OpenID discovery is not done)";
            findings.error(path, message.to_owned());
            None
        }
        (Some(text), None) => {
            let path = path.key("jwks");
            if holds_a_secret(&text) {
                findings.error(&path, "it has a private key or a shared secret: leave only public keys".to_owned());
                return None;
            }
            let set = KeySet::parse(&text).map_err(|message| findings.error(&path, message)).ok()?;
            for why in set.unusable() {
                findings.warning(&path, format!("{why}; it is not used"));
            }
            Some(Keys::Inline(set))
        }
        (None, Some(text)) => {
            let path = path.key("jwksUri");
            let url = KeySetUrl::parse(&text);
            let url = url.map_err(|why| findings.error(&path, format!("{}: {why}", Shortened(&text)))).ok()?;
            Some(Keys::Remote { url, timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or_default() })
        }
    }
}

/// `d` is the private part of every kind of key, `k` a shared secret.
fn holds_a_secret(text: &str) -> bool {
    let Ok(set) = serde_json::from_str::<serde_json::Value>(text) else { return false };
    let keys = set.get("keys").and_then(serde_json::Value::as_array);
    keys.is_some_and(|keys| keys.iter().any(|key| key.get("d").is_some() || key.get("k").is_some()))
}

fn places(headers: Vec<RawHeader>, parameters: Vec<String>, path: &Path, findings: &mut Findings) -> Vec<Place> {
    let mut places = Vec::new();
    for (index, header) in headers.into_iter().enumerate() {
        let path = path.key("fromHeaders").index(index);
        match field_name(&header.name) {
            Ok(name) => places.push(Place::Header { name, prefix: header.prefix }),
            Err(message) => findings.error(&path.key("name"), message),
        }
    }
    for (index, name) in parameters.into_iter().enumerate() {
        if name.is_empty() {
            findings.error(&path.key("fromParams").index(index), "a parameter without a name".to_owned());
        } else {
            places.push(Place::Parameter(name));
        }
    }
    if places.is_empty() {
        places.push(Place::authorization());
    }
    places
}

impl RawClaimHeader {
    fn check(self, path: &Path, findings: &mut Findings) -> Option<ClaimHeader> {
        let header = told_field(&self.header, &path.key("header"), findings)?;
        match claim_path(&self.claim) {
            Ok(claim) => Some(ClaimHeader { header, claim }),
            Err(message) => {
                findings.error(&path.key("claim"), message);
                None
            }
        }
    }
}

/// The name of a field that tells the application something: it is taken from every caller, so it must be none that a
/// request needs.
fn told_field(name: &str, path: &Path, findings: &mut Findings) -> Option<String> {
    const NEEDED: [&str; 17] = [
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "cookie",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "via",
        "x-forwarded-client-cert",
    ];
    match field_name(name) {
        Ok(name) if NEEDED.contains(&name.as_str()) || name.starts_with("x-outrigger-") => {
            findings
                .error(path, format!("{name} means something else already: choose another name, such as x-jwt-sub"));
            None
        }
        Ok(name) => Some(name),
        Err(message) => {
            findings.error(path, message);
            None
        }
    }
}

/// The names that lead to a claim. As in Istio a dot leads to one inside.
pub(super) fn claim_path(text: &str) -> Result<Vec<String>, String> {
    let names: Vec<String> = text.split('.').map(str::to_owned).collect();
    if names.iter().any(String::is_empty) {
        return Err(format!("{} is no claim: NAME, or NAME.NAME for one inside", Shortened(text)));
    }
    Ok(names)
}

/// A field's name in lower case (RFC 9110 section 5.1).
pub(super) fn field_name(name: &str) -> Result<String, String> {
    const MARKS: &[u8] = b"!#$%&'*+-.^_`|~";
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || MARKS.contains(&byte);
    if name.is_empty() || name.len() > 128 || !name.bytes().all(is_token) {
        return Err(format!("{} is not the name of a header", Shortened(name)));
    }
    Ok(name.to_ascii_lowercase())
}
