//! One token: a JWS in compact form (RFC 7515 section 3.1) whose payload is a set of claims (RFC 7519). Strict where a
//! lenient reader could be led astray, and deaf to what a token says about its own key: `jwk`, `jku`, `x5u` and `x5c` are
//! not looked at, so that no key and no address out of a token is ever used.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use super::keys::{Algorithm, NotVerified};

/// Longer tokens are refused unread.
pub const MOST_BYTES: usize = 16 << 10;
/// How far the clocks of who issued a token and of who verifies it may be apart, in seconds.
pub const LEEWAY: u64 = 60;

/// Why a token does not count. What it says is shown to the one who asks (`explain`) and in the log, never to a caller.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum Flaw {
    #[error("{0} has more than one value")]
    Repeated(String),
    #[error("the request has {0} tokens, and one may be there")]
    Several(usize),
    #[error("the token is empty")]
    Empty,
    #[error("the token is longer than {MOST_BYTES} bytes")]
    TooLong,
    #[error("the token is not three parts of base64url with dots between: {0}")]
    Form(&'static str),
    #[error("the token's {0} is not a JSON object")]
    Json(&'static str),
    #[error("the token has no `alg`")]
    NoAlgorithm,
    #[error("the token's alg {0:?} is not a signature with a public key")]
    Algorithm(String),
    #[error("the token's header has {0}, which nobody here understands")]
    Critical(&'static str),
    #[error("the token's kid is not a text")]
    KeyId,
    #[error("the token has no issuer (iss)")]
    NoIssuer,
    #[error("no rule takes tokens of the issuer {issuer:?} from {place}; the rules say {known}")]
    Issuer { issuer: String, place: String, known: String },
    #[error("the key set has no key {0}")]
    UnknownKey(String),
    #[error("no key of that name allows {0}")]
    KeyAlgorithm(String),
    #[error("the signature is not that of a key of the issuer")]
    Signature,
    #[error("the token has no end (exp)")]
    NoEnd,
    #[error("{0} is not a time: a number of seconds since 1970")]
    NoTime(&'static str),
    #[error("the token ended at {exp} (exp), {LEEWAY} s of leeway included; it is {now} now")]
    Expired { exp: u64, now: u64 },
    #[error("the token begins at {nbf} (nbf), {LEEWAY} s of leeway included; it is {now} now")]
    NotYet { nbf: u64, now: u64 },
    #[error("the token is for {found}, expected one of {expected} (aud)")]
    Audience { found: String, expected: String },
    #[error("no key set of {0} is known")]
    NoKeys(String),
    #[error("the document that says which tokens are valid is broken")]
    Broken,
    #[error("a token is required and the request has none")]
    Missing,
    #[error("a token is required, and bytes that nobody parses have none")]
    Opaque,
}

/// A token of which nothing is believed yet.
pub struct Token<'t> {
    pub algorithm: Algorithm,
    /// The name of its algorithm and of its key.
    pub written_algorithm: String,
    pub key_id: Option<String>,
    pub claims: Map<String, Value>,
    /// As it came, in base64url.
    pub payload: &'t str,
    pub signed: &'t [u8],
    pub signature: Vec<u8>,
}

impl<'t> Token<'t> {
    pub fn parse(text: &'t str) -> Result<Token<'t>, Flaw> {
        if text.is_empty() {
            return Err(Flaw::Empty);
        }
        if text.len() > MOST_BYTES {
            return Err(Flaw::TooLong);
        }
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Flaw::Form("another number of dots"));
        };
        let signed = text.get(..header.len() + 1 + payload.len()).unwrap_or_default().as_bytes();
        let decode = |part: &str, name| URL_SAFE_NO_PAD.decode(part).map_err(|_| Flaw::Form(name));
        let object = |bytes: &[u8], name| match serde_json::from_slice(bytes) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) | Err(_) => Err(Flaw::Json(name)),
        };
        let header = object(&decode(header, "the header")?, "header")?;
        let claims = object(&decode(payload, "the payload")?, "payload")?;
        let signature = decode(signature, "the signature")?;
        for name in ["crit", "b64", "zip"] {
            if header.contains_key(name) {
                return Err(Flaw::Critical(name));
            }
        }
        let written = match header.get("alg") {
            None => return Err(Flaw::NoAlgorithm),
            Some(Value::String(written)) => written.clone(),
            Some(other) => return Err(Flaw::Algorithm(cut(&other.to_string()))),
        };
        let algorithm = Algorithm::parse(&written).ok_or_else(|| Flaw::Algorithm(cut(&written)))?;
        let key_id = match header.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.clone()),
            Some(_) => return Err(Flaw::KeyId),
        };
        Ok(Token { algorithm, written_algorithm: written, key_id, claims, payload, signed, signature })
    }

    pub fn issuer(&self) -> Result<&str, Flaw> {
        self.claims.get("iss").and_then(Value::as_str).ok_or(Flaw::NoIssuer)
    }

    /// The second at which it ends, leeway included. `now`: seconds since the Unix epoch.
    pub fn check_time(&self, now: u64) -> Result<u64, Flaw> {
        let exp = match self.claims.get("exp") {
            None => return Err(Flaw::NoEnd),
            Some(value) => seconds(value).ok_or(Flaw::NoTime("exp"))?,
        };
        let until = exp.saturating_add(LEEWAY);
        if now >= until {
            return Err(Flaw::Expired { exp, now });
        }
        if let Some(value) = self.claims.get("nbf") {
            let nbf = seconds(value).ok_or(Flaw::NoTime("nbf"))?;
            if now.saturating_add(LEEWAY) < nbf {
                return Err(Flaw::NotYet { nbf, now });
            }
        }
        Ok(until)
    }

    /// Empty `expected`: any.
    pub fn check_audience(&self, expected: &[String]) -> Result<(), Flaw> {
        if expected.is_empty() {
            return Ok(());
        }
        let found = match self.claims.get("aud") {
            Some(Value::String(one)) => vec![one.as_str()],
            Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        if found.iter().any(|found| expected.iter().any(|expected| expected == found)) {
            return Ok(());
        }
        let found = if found.is_empty() { "nobody".to_owned() } else { cut(&found.join(", ")) };
        Err(Flaw::Audience { found, expected: expected.join(", ") })
    }

    pub fn not_verified(&self, why: NotVerified) -> Flaw {
        match why {
            NotVerified::UnknownKey => Flaw::UnknownKey(self.key_id.as_deref().map_or_else(String::new, cut)),
            NotVerified::Algorithm => Flaw::KeyAlgorithm(self.written_algorithm.clone()),
            NotVerified::Signature => Flaw::Signature,
        }
    }
}

/// A NumericDate (RFC 7519 section 2), which may have a fraction.
fn seconds(value: &Value) -> Option<u64> {
    let whole = || value.as_f64().filter(|number| *number >= 0.0 && number.is_finite()).map(|number| number as u64);
    value.as_u64().or_else(whole)
}

/// What a caller wrote, as short as a log line can bear.
pub(super) fn cut(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(80).collect()
}
