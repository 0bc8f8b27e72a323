//! Which requests a limit or fault is about: the matches of Gateway API's HTTPRoute, as far as they compare texts exactly.
//! Within one match everything must hold, of several one is enough.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::jwt::parameters;
use crate::facts::Request;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RequestMatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Name in lower case, and value.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(String, String)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub query: Vec<(String, String)>,
}

/// In the normal form of paths.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PathMatch {
    Exact(String),
    /// Element by element, without a slash at its end: `/a` holds for `/a`, `/a/` and `/a/b`, not for `/ab`. Empty: every path.
    Prefix(String),
}

/// Whether one of the matches holds; without any every request is meant. `query` is what stands behind the `?`.
pub fn any_holds(matches: &[RequestMatch], request: &Request<'_>, query: Option<&str>) -> bool {
    matches.is_empty() || matches.iter().any(|one| one.holds(request, query))
}

impl RequestMatch {
    fn holds(&self, request: &Request<'_>, query: Option<&str>) -> bool {
        let path = self.path.as_ref().is_none_or(|path| path.holds(&request.path.text));
        path && self.method.as_ref().is_none_or(|method| method == request.method)
            && self.headers.iter().all(|(name, value)| header_is(request, name, value))
            && self.query.iter().all(|(name, value)| parameter_is(query, name, value))
    }
}

impl PathMatch {
    fn holds(&self, path: &str) -> bool {
        match self {
            PathMatch::Exact(exact) => exact == path,
            PathMatch::Prefix(prefix) => {
                path.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

/// Several fields of a name are one whose values stand behind commas (RFC 9110 section 5.3).
fn header_is(request: &Request<'_>, name: &str, expected: &str) -> bool {
    let mut count = 0;
    let mut whole: Cow<'_, [u8]> = Cow::Borrowed(&[]);
    let mut first_is = false;
    request.headers.each_value(name, &mut |value| {
        count += 1;
        if count == 1 {
            first_is = value == expected.as_bytes();
        } else {
            whole.to_mut().extend_from_slice(b",");
        }
        whole.to_mut().extend_from_slice(value);
        true
    });
    if count == 1 { first_is } else { count > 1 && *whole == *expected.as_bytes() }
}

/// The first parameter of a name counts.
fn parameter_is(query: Option<&str>, name: &str, expected: &str) -> bool {
    let mut all = parameters(query.unwrap_or_default());
    all.find(|(key, _)| *key == name).is_some_and(|(_, value)| value == expected)
}
