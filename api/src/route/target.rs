//! The target of a rewritten request and the place that a redirect names. Pure.

use std::borrow::Cow;

use super::{Match, NewPath, PathMatch, Redirect};
use crate::path::NormalPath;

/// The new path with the query that came. `target`: path and query as they came.
pub fn rewritten(new: &NewPath, by: &Match, target: &str) -> String {
    let (path, query) = target.split_at(target.find('?').unwrap_or(target.len()));
    let path = match new {
        NewPath::Full(text) => text.clone(),
        NewPath::Prefix(text) => with_prefix(text, by, path),
    };
    format!("{path}{query}")
}

fn with_prefix(replacement: &str, by: &Match, path: &str) -> String {
    let prefix = match &by.path {
        Some(PathMatch::Prefix(prefix)) => prefix,
        _ => "",
    };
    let rest = match NormalPath::of(path).text {
        // As it came.
        Cow::Borrowed(text) => text.get(prefix.len()..).unwrap_or_default().to_owned(),
        Cow::Owned(text) => escaped(text.get(prefix.len()..).unwrap_or_default()),
    };
    let joined = match rest.is_empty() {
        true => replacement.to_owned(),
        false => format!("{}{rest}", replacement.strip_suffix('/').unwrap_or(replacement)),
    };
    if joined.is_empty() { "/".to_owned() } else { joined }
}

/// A part of a path in normal form as a request may carry it. The escapes that are left in that form stay.
fn escaped(path: &str) -> String {
    let bytes = path.as_bytes();
    let mut out = String::with_capacity(bytes.len());
    for (at, byte) in bytes.iter().enumerate() {
        let is_escape = || bytes.get(at + 1..at + 3).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        match byte {
            b'%' if is_escape() => out.push('%'),
            byte if byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(byte) => out.push(char::from(*byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// The value of Location. `host` is the request's authority, `port` that of the Service, `target` path and query.
pub fn location(redirect: &Redirect, by: &Match, host: &str, port: u16, target: &str) -> String {
    let scheme = redirect.scheme.as_deref().unwrap_or("http");
    let well_known = if scheme == "https" { 443 } else { 80 };
    let port = redirect.port.unwrap_or(if redirect.scheme.is_some() { well_known } else { port });
    let host = redirect.hostname.as_deref().unwrap_or_else(|| without_port(host));
    let path = redirect.path.as_ref().map_or_else(|| target.to_owned(), |new| rewritten(new, by, target));
    match port == well_known {
        true => format!("{scheme}://{host}{path}"),
        false => format!("{scheme}://{host}:{port}{path}"),
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        Some(_) | None => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Match {
        Match { path: Some(PathMatch::Prefix(text.into())), ..Match::default() }
    }

    /// The table of Gateway API, with prefixes as they are kept here, without a slash at the end.
    #[test]
    fn a_prefix_is_replaced() {
        let cases = [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo/bar?a=/foo", "/foo", "/xyz", "/xyz/bar?a=/foo"),
            ("/a/../foo/b%20c", "/foo", "/xyz", "/xyz/b%20c"),
            ("/foo/a%2fb", "/foo", "/xyz", "/xyz/a%2Fb"),
            ("/foo/100%25", "/foo", "/xyz", "/xyz/100%25"),
            ("/bar", "", "/xyz", "/xyz/bar"),
            ("/", "", "/xyz", "/xyz/"),
        ];
        for (target, matched, new, expected) in cases {
            let new = NewPath::Prefix(new.to_owned());
            assert_eq!(rewritten(&new, &prefix(matched), target), expected, "{target} {matched} {new:?}");
        }
        assert_eq!(rewritten(&NewPath::Full("/x".into()), &prefix("/foo"), "/foo/bar?q"), "/x?q");
    }

    #[test]
    fn locations() {
        let nothing = Redirect { scheme: None, hostname: None, path: None, port: None, status: 302 };
        let https = Redirect { scheme: Some("https".into()), ..nothing.clone() };
        let cases = [
            (nothing.clone(), "a.test", 80, "http://a.test/p?q"),
            (nothing.clone(), "a.test:8080", 8080, "http://a.test:8080/p?q"),
            (nothing.clone(), "[::1]:8080", 8080, "http://[::1]:8080/p?q"),
            (nothing.clone(), "[::1]", 80, "http://[::1]/p?q"),
            (Redirect { hostname: Some("b.test".into()), ..nothing.clone() }, "a.test", 80, "http://b.test/p?q"),
            (Redirect { port: Some(8083), ..nothing.clone() }, "a.test", 80, "http://a.test:8083/p?q"),
            (Redirect { port: Some(80), ..nothing.clone() }, "a.test", 8080, "http://a.test/p?q"),
            (https.clone(), "a.test", 80, "https://a.test/p?q"),
            (https.clone(), "a.test:8080", 8080, "https://a.test/p?q"),
            (Redirect { port: Some(443), ..https.clone() }, "a.test", 80, "https://a.test/p?q"),
            (Redirect { port: Some(8443), ..https }, "a.test", 80, "https://a.test:8443/p?q"),
            (Redirect { path: Some(NewPath::Full("/x".into())), ..nothing }, "a.test", 80, "http://a.test/x?q"),
        ];
        for (redirect, host, port, expected) in cases {
            assert_eq!(location(&redirect, &prefix(""), host, port, "/p?q"), expected, "{redirect:?}");
        }
    }
}
