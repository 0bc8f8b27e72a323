//! Where a request carries a token: a field of its head, or a parameter of its query.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::token::Flaw;
use crate::facts::Headers;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Place {
    /// `name` in lower case; `prefix` as `Bearer `, compared without regard to case, or empty.
    Header {
        name: String,
        prefix: String,
    },
    Parameter(String),
}

impl Place {
    /// `Authorization: Bearer`, where a rule names no other.
    pub fn authorization() -> Place {
        Place::Header { name: "authorization".to_owned(), prefix: "Bearer ".to_owned() }
    }

    /// The token at this place. A field or parameter that stands there twice is a flaw, whatever its values are: which of
    /// them an application reads is not known.
    pub fn find<'a>(&self, headers: &dyn Headers, query: Option<&'a str>) -> Result<Option<Cow<'a, str>>, Flaw> {
        match self {
            Place::Header { name, prefix } => {
                let mut count = 0;
                let mut found = None;
                headers.each_value(name, &mut |value| {
                    count += 1;
                    found = token_behind(prefix, value);
                    count < 2
                });
                if count > 1 { Err(Flaw::Repeated(name.clone())) } else { Ok(found.map(Cow::Owned)) }
            }
            Place::Parameter(name) => {
                let mut values = parameters(query.unwrap_or_default()).filter(|(key, _)| decoded(key) == *name);
                let first = values.next().map(|(_, value)| decoded(value));
                if values.next().is_some() { Err(Flaw::Repeated(name.clone())) } else { Ok(first) }
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Header { name, .. } => write!(f, "the header {name}"),
            Place::Parameter(name) => write!(f, "the query parameter {name}"),
        }
    }
}

/// None: the value has another prefix, and so no token for us.
fn token_behind(prefix: &str, value: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(value);
    let scheme = prefix.trim_end();
    let (before, rest) = text.split_at_checked(scheme.len())?;
    let apart = scheme.len() == prefix.len() || rest.is_empty() || rest.starts_with([' ', '\t']);
    (before.eq_ignore_ascii_case(scheme) && apart).then(|| rest.trim_matches([' ', '\t']).to_owned())
}

/// The parameters of a query, as they are written.
pub fn parameters(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// A query without the parameters of a name; None where nothing is left of it.
pub fn without_parameter(query: &str, name: &str) -> Option<String> {
    let others = query.split('&').filter(|pair| decoded(pair.split_once('=').map_or(*pair, |(key, _)| key)) != name);
    let others: Vec<&str> = others.collect();
    (!others.is_empty()).then(|| others.join("&"))
}

/// Escapes decoded once. One that is broken stays as it is.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let digit = |index: usize| behind.get(index).and_then(|byte| char::from(*byte).to_digit(16));
        match (first, digit(0).zip(digit(1))) {
            (b'%', Some((high, low))) => {
                bytes.push((high * 16 + low) as u8);
                rest = behind.get(2..).unwrap_or_default();
            }
            (byte, _) => {
                bytes.push(*byte);
                rest = behind;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Found = Result<Option<String>, Flaw>;

    fn found(place: &Place, fields: &[(&str, &str)], query: &str) -> Found {
        let fields: Vec<(String, String)> =
            fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        place.find(&fields, Some(query)).map(|found| found.map(Cow::into_owned))
    }

    #[test]
    fn tokens_in_fields() {
        let bearer = Place::authorization();
        let some = |text: &str| Ok(Some(text.to_owned()));
        let cases: [(&[(&str, &str)], Found); 9] = [
            (&[("Authorization", "Bearer a.b.c")], some("a.b.c")),
            (&[("authorization", "bEARER  a ")], some("a")),
            (&[("authorization", "Bearer")], some("")),
            (&[("authorization", "Bearera")], Ok(None)),
            (&[("authorization", "Basic a")], Ok(None)),
            (&[("authorization", "Be")], Ok(None)),
            (&[], Ok(None)),
            (
                &[("authorization", "Bearer a"), ("Authorization", "Bearer a")],
                Err(Flaw::Repeated("authorization".into())),
            ),
            (
                &[("authorization", "Basic a"), ("authorization", "Bearer b")],
                Err(Flaw::Repeated("authorization".into())),
            ),
        ];
        for (fields, expected) in cases {
            assert_eq!(found(&bearer, fields, ""), expected, "{fields:?}");
        }
        let bare = Place::Header { name: "x-jwt".into(), prefix: String::new() };
        assert_eq!(found(&bare, &[("x-jwt", " a ")], ""), some("a"));
        let joined = Place::Header { name: "x-jwt".into(), prefix: "jwt=".into() };
        assert_eq!(found(&joined, &[("x-jwt", "JWT=a")], ""), some("a"));
    }

    #[test]
    fn tokens_in_queries() {
        let place = Place::Parameter("token".into());
        let some = |text: &str| Ok(Some(text.to_owned()));
        let cases = [
            ("token=a", some("a")),
            ("x=1&token=a.b%2Ec&y", some("a.b.c")),
            ("tok%65n=a", some("a")),
            ("tokens=a", Ok(None)),
            ("token", some("")),
            ("", Ok(None)),
            ("token=a&token=b", Err(Flaw::Repeated("token".into()))),
            ("token=a&tok%65n=b", Err(Flaw::Repeated("token".into()))),
        ];
        for (query, expected) in cases {
            assert_eq!(found(&place, &[], query), expected, "{query}");
        }
        assert_eq!(without_parameter("a=1&token=x&b", "token").as_deref(), Some("a=1&b"));
        assert_eq!(without_parameter("tok%65n=x", "token"), None);
    }
}
