//! What the filters of a route do to heads. Values were checked when the route arrived; what is no header all the same is
//! left out.

use http::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Uri};
use outrigger_api::route::{HeaderEdits, Match, Rewrite, rewritten};

/// Removes, sets and adds, in this order.
pub(super) fn edit(headers: &mut HeaderMap, edits: &HeaderEdits) {
    for name in &edits.remove {
        if headers.contains_key(name) {
            headers.remove(name);
        }
    }
    for (name, value) in &edits.set {
        if let Some((name, value)) = field(name, value) {
            headers.insert(name, value);
        }
    }
    for (name, value) in &edits.add {
        if let Some((name, value)) = field(name, value) {
            headers.append(name, value);
        }
    }
}

fn field(name: &str, value: &str) -> Option<(HeaderName, HeaderValue)> {
    Some((HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_str(value).ok()?))
}

/// Another host, another path.
pub(super) fn rewrite(parts: &mut Parts, rewrite: &Rewrite, by: &Match) {
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    if let Some(new) = &rewrite.path {
        let target = uri.path_and_query.as_ref().map_or("/", PathAndQuery::as_str);
        let new = rewritten(new, by, target);
        uri.path_and_query = PathAndQuery::try_from(new).ok().or(uri.path_and_query);
    }
    if let Some(hostname) = &rewrite.hostname {
        // On HTTP/2 both may say it, and must not differ.
        if uri.authority.is_some() {
            uri.authority = Authority::try_from(hostname.as_str()).ok().or(uri.authority);
        }
        if parts.headers.contains_key(HOST)
            && let Ok(value) = HeaderValue::from_str(hostname)
        {
            parts.headers.insert(HOST, value);
        }
    }
    parts.uri = Uri::from_parts(uri).unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use outrigger_api::route::{NewPath, PathMatch};

    use super::*;

    fn pairs(written: &[(&str, &str)]) -> Vec<(String, String)> {
        written.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn headers_are_removed_set_and_added() {
        let mut headers = HeaderMap::new();
        for (name, value) in [("a", "1"), ("b", "2"), ("b", "3"), ("c", "4"), ("d", "5")] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let edits = HeaderEdits {
            set: pairs(&[("b", "set"), ("e", "new")]),
            add: pairs(&[("c", "more"), ("f", "first"), ("bad name", "x"), ("g", "bad\nvalue")]),
            remove: vec!["d".to_owned(), "absent".to_owned()],
        };
        edit(&mut headers, &edits);
        let mut got: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        got.sort_unstable();
        assert_eq!(got, [("a", "1"), ("b", "set"), ("c", "4"), ("c", "more"), ("e", "new"), ("f", "first")]);
    }

    #[test]
    fn hosts_and_paths_are_rewritten() {
        let by = Match { path: Some(PathMatch::Prefix("/a".into())), ..Match::default() };
        let path = |text: &str| Some(NewPath::Prefix(text.to_owned()));
        let host = Some("b.test".to_owned());
        let cases = [
            ("/a/x?q", Rewrite { hostname: None, path: path("/z") }, "/z/x?q", "a.test"),
            ("/a/x?q", Rewrite { hostname: host.clone(), path: None }, "/a/x?q", "b.test"),
            ("http://a.test/a/x", Rewrite { hostname: host, path: path("") }, "http://b.test/x", "b.test"),
        ];
        for (target, rule, uri, host) in cases {
            let request = http::Request::builder().uri(target).header("host", "a.test").body(()).unwrap();
            let mut parts = request.into_parts().0;
            rewrite(&mut parts, &rule, &by);
            assert_eq!((parts.uri.to_string().as_str(), parts.headers["host"].to_str().unwrap()), (uri, host));
        }
    }
}
