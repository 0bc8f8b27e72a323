//! Join tokens: how a sidecar without a certificate proves who it is. `outrigger token create` makes them with
//! nothing but the state directory; the control plane verifies them with the same key. The form is
//! `outrigger1.<claims, JSON in base64url>.<HMAC-SHA256 in base64url>`; a token is a secret and is never logged.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use aws_lc_rs::hmac;
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ipnet::IpNet;
use outrigger_api::identity::{ROOT_NAMESPACE, is_account};
use outrigger_api::name::is_label;
use outrigger_api::resource::Labels;
use serde::{Deserialize, Serialize};

use super::certificate::unix_seconds;
use super::redemption::Grant;
use crate::config::{State, StateError, TRUST_DOMAIN};

const KEY: &str = "token.key";
const PREFIX: &str = "outrigger1";
const AUDIENCE: &str = "outrigger";
/// Far more than any set of labels needs.
const MAX_TOKEN: usize = 16 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("namespace {0:?} is not a DNS label; give --namespace")]
    Namespace(String),
    #[error("no token gives an identity in {ROOT_NAMESPACE}; choose another --namespace")]
    Reserved,
    #[error("service account {0:?} is not a DNS name; give --service-account")]
    Account(String),
    #[error("label {0:?} needs a key")]
    Label(String),
    #[error("--uses must be at least 1")]
    Uses,
    #[error("--ttl must be at least 1s")]
    Ttl,
    #[error("--address {0}: no workload can be reached there")]
    Address(IpNet),
    #[error("the labels and addresses are too long for a token")]
    TooLong,
    #[error("{0} holds no key; remove it, and every token that was made with it is void")]
    Key(std::path::PathBuf),
    #[error("the system's source of randomness failed")]
    Random,
}

/// Why a token is not believed. The first word of the status message (identity.proto).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("no join token was sent; make one with `outrigger token create`")]
    Missing,
    #[error("this is not a join token; make one with `outrigger token create`")]
    Malformed,
    #[error("the join token was made with another state directory; make one with this control plane's --state")]
    Signature,
    #[error("the join token is meant for something else; make one with this control plane's --state")]
    Audience,
    #[error("the join token has expired; make another with `outrigger token create`")]
    Expired,
    #[error("no token gives an identity in {ROOT_NAMESPACE}")]
    Reserved,
}

impl TokenError {
    pub fn word(self) -> &'static str {
        match self {
            TokenError::Missing => "token_missing",
            TokenError::Malformed => "token_malformed",
            TokenError::Signature => "token_signature",
            TokenError::Audience => "token_audience",
            TokenError::Expired => "token_expired",
            TokenError::Reserved => "namespace_reserved",
        }
    }
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    #[serde(rename = "aud")]
    pub audience: String,
    /// Absent when the token was made before the control plane's first start.
    #[serde(rename = "td", default, skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<String>,
    #[serde(rename = "ns")]
    pub namespace: String,
    #[serde(rename = "sa")]
    pub service_account: String,
    /// The labels that its holder may register.
    #[serde(default)]
    pub labels: Labels,
    /// The addresses that its holder may register besides the one from which it connects.
    #[serde(rename = "addr", default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpNet>,
    pub uses: u32,
    /// Unix seconds.
    #[serde(rename = "exp")]
    pub expiry: u64,
    /// Tells one token from another.
    #[serde(rename = "jti")]
    pub id: String,
}

/// The key that signs and verifies. Its Debug form says nothing.
pub struct TokenKey {
    key: hmac::Key,
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey")
    }
}

/// What a token is to say.
pub struct Asked<'a> {
    pub namespace: &'a str,
    pub service_account: &'a str,
    pub grant: Grant,
    pub uses: u32,
    pub ttl: Duration,
}

/// An address, which is a network of one, or a network in CIDR notation.
pub fn parse_address(text: &str) -> Option<IpNet> {
    match text.parse::<IpAddr>() {
        Ok(ip) => Some(IpNet::from(ip.to_canonical())),
        Err(_) => text.parse::<IpNet>().ok().map(|network| network.trunc()),
    }
}

/// Makes a token. Needs the state directory only, and makes its key when there is none yet.
pub fn create(state: &State, asked: &Asked<'_>, now: SystemTime) -> Result<String, CreateError> {
    let Asked { namespace, service_account, grant: Grant { labels, addresses }, uses, ttl } = asked;
    let (namespace, service_account, uses, ttl) = (*namespace, *service_account, *uses, *ttl);
    if !is_label(namespace) {
        return Err(CreateError::Namespace(namespace.to_owned()));
    }
    if namespace == ROOT_NAMESPACE {
        return Err(CreateError::Reserved);
    }
    if !is_account(service_account) {
        return Err(CreateError::Account(service_account.to_owned()));
    }
    if let Some((_, value)) = labels.iter().find(|(key, _)| key.is_empty()) {
        return Err(CreateError::Label(format!("={value}")));
    }
    let useless =
        |network: &&IpNet| network.prefix_len() == network.max_prefix_len() && network.addr().is_unspecified();
    if let Some(network) = addresses.iter().find(useless) {
        return Err(CreateError::Address(*network));
    }
    if uses == 0 {
        return Err(CreateError::Uses);
    }
    if ttl < Duration::from_secs(1) {
        return Err(CreateError::Ttl);
    }
    let mut id = [0; 16];
    SystemRandom::new().fill(&mut id).map_err(|_| CreateError::Random)?;
    let trust_domain = state.read(TRUST_DOMAIN)?.and_then(|bytes| String::from_utf8(bytes).ok());
    let claims = Claims {
        audience: AUDIENCE.to_owned(),
        trust_domain: trust_domain.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()),
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        labels: labels.clone(),
        addresses: addresses.clone(),
        uses,
        expiry: unix_seconds(now).saturating_add(ttl.as_secs()),
        id: URL_SAFE_NO_PAD.encode(id),
    };
    let token = TokenKey::open(state)?.sign(&claims);
    if token.len() > MAX_TOKEN { Err(CreateError::TooLong) } else { Ok(token) }
}

impl TokenKey {
    /// Reads STATE/token.key, or makes it.
    pub fn open(state: &State) -> Result<TokenKey, CreateError> {
        if state.read(KEY)?.is_none() {
            let mut secret = [0; 32];
            SystemRandom::new().fill(&mut secret).map_err(|_| CreateError::Random)?;
            // Another process may make it at the same time: whose file is there first is the key.
            state.create(KEY, URL_SAFE_NO_PAD.encode(secret).as_bytes())?;
        }
        let text = state.read(KEY)?.unwrap_or_default();
        let secret = URL_SAFE_NO_PAD.decode(text.trim_ascii()).unwrap_or_default();
        if secret.len() != 32 {
            return Err(CreateError::Key(state.path(KEY)));
        }
        Ok(TokenKey { key: hmac::Key::new(hmac::HMAC_SHA256, &secret) })
    }

    fn sign(&self, claims: &Claims) -> String {
        let json = serde_json::to_vec(claims).unwrap_or_default();
        let signed = format!("{PREFIX}.{}", URL_SAFE_NO_PAD.encode(json));
        let tag = hmac::sign(&self.key, signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag))
    }

    /// Believes a token, or says why not. Nothing of it is read before its signature is verified.
    pub fn verify(&self, token: &str, trust_domain: &str, now: SystemTime) -> Result<Claims, TokenError> {
        let token = token.trim_ascii();
        if token.is_empty() {
            return Err(TokenError::Missing);
        }
        if token.len() > MAX_TOKEN {
            return Err(TokenError::Malformed);
        }
        let (signed, tag) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let body = signed.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('.')).ok_or(TokenError::Malformed)?;
        let tag = URL_SAFE_NO_PAD.decode(tag).map_err(|_| TokenError::Malformed)?;
        hmac::verify(&self.key, signed.as_bytes(), &tag).map_err(|_| TokenError::Signature)?;
        let body = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Malformed)?;
        let claims: Claims = serde_json::from_slice(&body).map_err(|_| TokenError::Malformed)?;
        let other_domain = claims.trust_domain.as_deref().is_some_and(|domain| domain != trust_domain);
        if claims.audience != AUDIENCE || other_domain {
            return Err(TokenError::Audience);
        }
        if claims.expiry <= unix_seconds(now) {
            return Err(TokenError::Expired);
        }
        if claims.namespace == ROOT_NAMESPACE {
            return Err(TokenError::Reserved);
        }
        if !is_label(&claims.namespace) || !is_account(&claims.service_account) {
            return Err(TokenError::Malformed);
        }
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    const NOW: SystemTime = UNIX_EPOCH;
    const HOUR: Duration = Duration::from_secs(3600);

    fn state() -> (tempfile::TempDir, State) {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        (directory, state)
    }

    fn make(state: &State) -> String {
        let labels = Labels::from([("app".to_owned(), "cart".to_owned())]);
        let addresses = ["10.0.0.7", "fd00::/64"].map(|text| parse_address(text).unwrap()).to_vec();
        let grant = Grant { labels, addresses };
        let asked = Asked { namespace: "shop", service_account: "cart", grant, uses: 2, ttl: HOUR };
        create(state, &asked, NOW).unwrap()
    }

    #[test]
    fn what_was_granted_comes_back() {
        let (_directory, state) = state();
        let token = make(&state);
        let key = TokenKey::open(&state).unwrap();
        let claims = key.verify(&format!("{token}\n"), "outrigger.local", NOW).unwrap();
        assert_eq!((claims.namespace.as_str(), claims.service_account.as_str(), claims.uses), ("shop", "cart", 2));
        assert_eq!(claims.labels["app"], "cart");
        assert_eq!(claims.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.7/32", "fd00::/64"]);
        assert_ne!(token, make(&state), "each token is its own");
        assert_eq!(format!("{key:?}"), "TokenKey");
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let (_directory, ours) = state();
        let (_other_directory, theirs) = state();
        let token = make(&ours);
        let key = TokenKey::open(&ours).unwrap();
        let sign = |change: fn(&mut Claims)| {
            let mut claims = key.verify(&token, "td", NOW).unwrap();
            change(&mut claims);
            key.sign(&claims)
        };
        let (head, tag) = token.rsplit_once('.').unwrap();
        let unsigned = format!("{}.{tag}", head.replace("outrigger1.", "outrigger1.e30"));
        let cases: [(&str, String, TokenError); 12] = [
            ("nothing", String::new(), TokenError::Missing),
            ("white space", " \n".into(), TokenError::Missing),
            ("a word", "token".into(), TokenError::Malformed),
            ("two parts", "outrigger1.abc".into(), TokenError::Malformed),
            ("another form", token.replace("outrigger1.", "outrigger2."), TokenError::Malformed),
            ("too long", "x".repeat(1 << 20), TokenError::Malformed),
            ("changed claims", unsigned, TokenError::Signature),
            ("no signature", format!("{head}."), TokenError::Signature),
            ("another state", make(&theirs), TokenError::Signature),
            ("another audience", sign(|claims| claims.audience = "kubernetes".into()), TokenError::Audience),
            ("another trust domain", sign(|claims| claims.trust_domain = Some("x".into())), TokenError::Audience),
            ("the mesh's own", sign(|claims| claims.namespace = ROOT_NAMESPACE.into()), TokenError::Reserved),
        ];
        for (name, token, expected) in cases {
            assert_eq!(key.verify(&token, "td", NOW), Err(expected), "{name}");
        }
        assert_eq!(key.verify(&token, "td", NOW + HOUR), Err(TokenError::Expired));
    }

    #[test]
    fn addresses_are_one_or_a_network() {
        let cases = [
            ("10.0.0.7", Some("10.0.0.7/32")),
            ("10.0.0.7/24", Some("10.0.0.0/24")),
            ("::ffff:10.0.0.7", Some("10.0.0.7/32")),
            ("fd00::1", Some("fd00::1/128")),
            ("fd00::1/64", Some("fd00::/64")),
            ("10.0.0", None),
            ("10.0.0.0/33", None),
            ("cart.test", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_address(text).map(|network| network.to_string()).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn senseless_grants_are_not_made() {
        let (_directory, state) = state();
        let none = Labels::new();
        let try_create = |namespace, service_account, labels: &Labels, uses, ttl| {
            let grant = Grant { labels: labels.clone(), addresses: Vec::new() };
            create(&state, &Asked { namespace, service_account, grant, uses, ttl }, NOW).is_err()
        };
        assert!(try_create(ROOT_NAMESPACE, "control-plane", &none, 1, HOUR));
        assert!(try_create("No", "cart", &none, 1, HOUR));
        assert!(try_create("shop", "a/b", &none, 1, HOUR));
        assert!(try_create("shop", "cart", &none, 0, HOUR));
        assert!(try_create("shop", "cart", &none, 1, Duration::ZERO));
        assert!(try_create("shop", "cart", &Labels::from([("a".into(), "x".repeat(20_000))]), 1, HOUR));
    }
}
