//! What a rule does to a request and to its answer. The forms only: the sidecar applies them to heads.

use serde::{Deserialize, Serialize};

use super::Backend;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct Filters {
    #[serde(skip_serializing_if = "HeaderEdits::is_empty")]
    pub request_headers: HeaderEdits,
    #[serde(skip_serializing_if = "HeaderEdits::is_empty")]
    pub response_headers: HeaderEdits,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redirect: Option<Redirect>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewrite: Option<Rewrite>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<Mirror>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cors: Option<Cors>,
}

impl Filters {
    pub fn is_empty(&self) -> bool {
        *self == Filters::default()
    }
}

/// Names in lower case. What is set takes the place of what was there, what is added comes behind it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeaderEdits {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<(String, String)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<(String, String)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
}

impl HeaderEdits {
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }
}

/// Where a message ends, where it goes and who sends it is not a route's to say: why a field, in lower case, must be left
/// alone.
pub fn can_edit(name: &str) -> Result<(), &'static str> {
    match name {
        "connection" | "keep-alive" | "proxy-connection" | "te" | "trailer" | "transfer-encoding" | "upgrade"
        | "content-length" | "http2-settings" => Err("says how a message is framed, on one hop"),
        "host" => Err("says which host is meant: use the filter URLRewrite with `hostname`"),
        name if name.starts_with(':') => Err("is no header"),
        name if name.starts_with("x-outrigger-") || name == "x-forwarded-client-cert" => {
            Err("says who calls, which the mesh proves")
        }
        _ => Ok(()),
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<NewPath>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    pub status: u16,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rewrite {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<NewPath>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum NewPath {
    /// The whole path.
    Full(String),
    /// What stands for the prefix that matched.
    Prefix(String),
}

/// A share of the requests goes there as well, and what comes back is thrown away.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    pub backend: Backend,
    /// So many of `of`.
    pub share: u32,
    pub of: u32,
}

/// Which pages of other origins may read answers.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct Cors {
    /// `*`, an origin, or `https://*.` and the end of a name.
    pub allow_origins: Vec<String>,
    pub allow_credentials: bool,
    pub allow_methods: Vec<String>,
    pub allow_headers: Vec<String>,
    pub expose_headers: Vec<String>,
    /// In seconds.
    pub max_age: u32,
}

impl Cors {
    /// Whether pages of that origin are meant. Scheme and host are compared without regard to case.
    pub fn allows(&self, origin: &str) -> bool {
        let origin = origin.to_ascii_lowercase();
        self.allow_origins.iter().any(|allowed| match allowed.split_once('*') {
            None => *allowed == origin,
            Some(("", "")) => true,
            Some((before, after)) => {
                origin.len() > before.len() + after.len() && origin.starts_with(before) && origin.ends_with(after)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        let cases = [
            ("*", "https://a.test", true),
            ("https://a.test", "https://a.test", true),
            ("https://a.test", "https://A.test", true),
            ("https://a.test", "http://a.test", false),
            ("https://a.test", "https://a.test:8443", false),
            ("https://*.a.test", "https://b.a.test", true),
            ("https://*.a.test", "https://a.test", false),
            ("https://*.a.test", "https://.a.test", false),
            ("https://*.a.test", "https://b.a.test.evil", false),
        ];
        for (allowed, origin, expected) in cases {
            let cors = Cors { allow_origins: vec![allowed.to_owned()], ..Cors::default() };
            assert_eq!(cors.allows(origin), expected, "{allowed} {origin}");
        }
    }

    #[test]
    fn what_must_be_left_alone() {
        for name in ["x-team", "authorization", "traceparent", "x-outrigger", "cookie", "content-type"] {
            assert!(can_edit(name).is_ok(), "{name}");
        }
        for name in ["host", "connection", "content-length", "transfer-encoding", ":path", "x-outrigger-identity"] {
            assert!(can_edit(name).is_err(), "{name}");
        }
    }
}
