//! The conditions of a rule and whether they hold for one request. A trace learns the first one that does not.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::decide::Asked;
use super::text::{Pattern, Text};

/// Holds when all of it does.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct Match {
    /// Absent: every path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HeaderMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub query: Vec<QueryMatch>,
    /// A server name, or `*.` and the end of one, in lower case. Of TLSRoutes alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum PathMatch {
    /// In the normal form of paths.
    Exact(Arc<str>),
    /// Element by element: `/a` holds for `/a`, `/a/` and `/a/b`, not for `/ab`. In normal form, without a slash at its
    /// end; empty: every path.
    Prefix(Arc<str>),
    Regex(Pattern),
    /// A call of gRPC by its service and method.
    Grpc {
        service: Option<Text>,
        method: Option<Text>,
    },
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeaderMatch {
    /// In lower case.
    pub name: String,
    pub value: Text,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryMatch {
    pub name: String,
    pub value: Text,
}

impl PathMatch {
    pub fn matches(&self, path: &str) -> bool {
        match self {
            PathMatch::Exact(text) => path == &**text,
            PathMatch::Prefix(prefix) => {
                path.strip_prefix(&**prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            PathMatch::Regex(pattern) => pattern.is_match(path),
            PathMatch::Grpc { service, method } => {
                let call = path.strip_prefix('/').and_then(|path| path.split_once('/'));
                call.is_some_and(|(called, of)| {
                    service.as_ref().is_none_or(|service| service.matches(called))
                        && method.as_ref().is_none_or(|method| method.matches(of))
                })
            }
        }
    }

    /// What spans and people call it: few values, and never the path of one request.
    pub fn template(&self) -> Arc<str> {
        match self {
            PathMatch::Exact(text) => text.clone(),
            PathMatch::Prefix(prefix) => format!("{prefix}/*").into(),
            PathMatch::Regex(pattern) => pattern.as_str().into(),
            PathMatch::Grpc { service, method } => {
                let word = |text: &Option<Text>| text.as_ref().map_or("*".to_owned(), |text| text.as_str().to_owned());
                format!("/{}/{}", word(service), word(method)).into()
            }
        }
    }
}

impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PathMatch::Exact(text) => write!(f, "path {text}"),
            PathMatch::Prefix(prefix) if prefix.is_empty() => f.write_str("every path"),
            PathMatch::Prefix(prefix) => write!(f, "path {prefix} or below"),
            PathMatch::Regex(pattern) => write!(f, "path that matches {}", pattern.as_str()),
            PathMatch::Grpc { service, method } => {
                let word = |text: &Option<Text>| text.as_ref().map_or("any".to_owned(), ToString::to_string);
                write!(f, "gRPC service {}, method {}", word(service), word(method))
            }
        }
    }
}

impl HeaderMatch {
    /// Nothing is allocated for a field that stands there once.
    fn holds(&self, asked: &Asked<'_>) -> bool {
        if self.name == "host" {
            return self.value.matches(asked.request.host);
        }
        let (mut lines, mut holds) = (0, false);
        asked.request.headers.each_value(&self.name, &mut |value| {
            holds = std::str::from_utf8(value).is_ok_and(|value| self.value.matches(value));
            lines += 1;
            lines < 2
        });
        match lines {
            0 => false,
            1 => holds,
            _ => header_value(asked, &self.name).is_some_and(|value| self.value.matches(&value)),
        }
    }
}

impl Match {
    /// Whether it holds for a request; `because` gets the first thing that does not.
    pub(super) fn holds(&self, asked: &Asked<'_>, because: &mut dyn FnMut(&dyn Fn() -> String)) -> bool {
        let request = asked.request;
        if let Some(path) = &self.path
            && !path.matches(&request.path.text)
        {
            because(&|| format!("expected {path}, got {}", request.path.text));
            return false;
        }
        if let Some(method) = &self.method
            && method != request.method
        {
            because(&|| format!("expected method {method}, got {}", request.method));
            return false;
        }
        for header in &self.headers {
            if !header.holds(asked) {
                because(&|| {
                    unequal("header", &header.name, &header.value, header_value(asked, &header.name).as_deref())
                });
                return false;
            }
        }
        for parameter in &self.query {
            let value = query_value(asked.query, &parameter.name);
            if !value.as_ref().is_some_and(|value| parameter.value.matches(value)) {
                because(&|| unequal("query parameter", &parameter.name, &parameter.value, value.as_deref()));
                return false;
            }
        }
        true
    }

    /// Whether it holds for a connection of opaque bytes; `name` is the server name of the application's TLS.
    pub(super) fn holds_for(&self, name: Option<&str>) -> bool {
        let Some(wanted) = &self.server_name else { return true };
        let Some(name) = name else { return false };
        let name = name.strip_suffix('.').unwrap_or(name);
        match wanted.strip_prefix('*') {
            // One label or more in front, as in Gateway API.
            Some(end) => name.len() > end.len() && ends_with(name, end),
            None => name.eq_ignore_ascii_case(wanted),
        }
    }
}

fn ends_with(name: &str, end: &str) -> bool {
    let from = name.len().saturating_sub(end.len());
    name.get(from..).is_some_and(|tail| tail.eq_ignore_ascii_case(end))
}

fn unequal(what: &str, name: &str, expected: &Text, got: Option<&str>) -> String {
    match got {
        Some(got) => format!("expected {what} {name} to be {expected}, got {got}"),
        None => format!("expected {what} {name} to be {expected}, there is none"),
    }
}

/// The value of a field; that of several lines is joined by commas (RFC 9110 section 5.3). `host` is the authority.
fn header_value<'a>(asked: &Asked<'a>, name: &str) -> Option<Cow<'a, str>> {
    if name == "host" {
        return Some(Cow::Borrowed(asked.request.host));
    }
    let mut joined: Option<String> = None;
    asked.request.headers.each_value(name, &mut |value| {
        let value = String::from_utf8_lossy(value);
        match &mut joined {
            Some(joined) => {
                joined.push(',');
                joined.push_str(&value);
            }
            None => joined = Some(value.into_owned()),
        }
        true
    });
    joined.map(Cow::Owned)
}

/// The first value of a parameter, with its escapes decoded.
fn query_value<'a>(query: Option<&'a str>, name: &str) -> Option<Cow<'a, str>> {
    query?.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (unescaped(key) == name).then(|| unescaped(value))
    })
}

fn unescaped(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digit = |offset: usize| bytes.get(at + offset).and_then(|byte| char::from(*byte).to_digit(16));
        match (byte, digit(1), digit(2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_compared_by_elements() {
        let cases = [
            ("", "/", true),
            ("", "/x", true),
            ("/a", "/a", true),
            ("/a", "/a/", true),
            ("/a", "/a/b", true),
            ("/a", "/ab", false),
            ("/a", "/", false),
            ("/a", "/b/a", false),
            ("/a/b", "/a", false),
        ];
        for (prefix, path, expected) in cases {
            assert_eq!(PathMatch::Prefix(prefix.into()).matches(path), expected, "{prefix} {path}");
        }
    }

    #[test]
    fn grpc_calls() {
        let text = |text: &str| Some(Text::Exact(text.to_owned()));
        let call = |service, method| PathMatch::Grpc { service, method };
        let cases = [
            (call(text("a.B"), text("C")), "/a.B/C", true),
            (call(text("a.B"), text("C")), "/a.B/D", false),
            (call(text("a.B"), None), "/a.B/D", true),
            (call(text("a.B"), None), "/a.Bx/D", false),
            (call(text("a.B"), None), "/a.B", false),
            (call(None, text("C")), "/x/C", true),
            (call(None, text("C")), "/x/y/C", false),
        ];
        for (path, called, expected) in cases {
            assert_eq!(path.matches(called), expected, "{path} {called}");
        }
    }

    #[test]
    fn query_parameters() {
        let cases = [
            (Some("a=b"), "a", Some("b")),
            (Some("x=1&a=b&a=c"), "a", Some("b")),
            (Some("a"), "a", Some("")),
            (Some("a=b%20c"), "a", Some("b c")),
            (Some("%61=b"), "a", Some("b")),
            (Some("a=%zz%4"), "a", Some("%zz%4")),
            (Some("A=b"), "a", None),
            (Some(""), "a", None),
            (None, "a", None),
        ];
        for (query, name, expected) in cases {
            assert_eq!(query_value(query, name).as_deref(), expected, "{query:?} {name}");
        }
    }

    #[test]
    fn server_names() {
        let wanted = |name: &str| Match { server_name: Some(name.to_owned()), ..Match::default() };
        let cases = [
            ("a.test", Some("a.test"), true),
            ("a.test", Some("A.TEST."), true),
            ("a.test", Some("b.a.test"), false),
            ("*.test", Some("a.test"), true),
            ("*.test", Some("b.a.test"), true),
            ("*.test", Some("test"), false),
            ("*.test", Some(".test"), false),
            ("*.test", None, false),
            ("a.test", None, false),
        ];
        for (pattern, name, expected) in cases {
            assert_eq!(wanted(pattern).holds_for(name), expected, "{pattern} {name:?}");
        }
        assert!(Match::default().holds_for(None));
    }
}
