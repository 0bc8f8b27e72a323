//! The rules for a request head that the HTTP library leaves to us (RFC 9112 section 3.2), and the form in which it
//! goes on. Pure. What is refused here never reaches an upstream.

use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Uri};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header};

use crate::connect::http1::body::plain_length;
use crate::outcome::Reason;

/// A head that breaks the rules: the reason and what is wrong, for the log.
pub type Refusal = (Reason, &'static str);

/// Checks an HTTP/1 head and puts its target into origin form. An absolute-form target wins over Host and replaces
/// it. `authority` stands in where HTTP/1.0 gave none.
pub fn check_http1(
    parts: &mut Parts,
    longest_target: usize,
    authority: impl FnOnce() -> String,
) -> Result<(), Refusal> {
    check_target(&parts.uri, longest_target)?;
    let host = check_fields(&parts.headers)?;
    if host.is_none() && parts.version == Version::HTTP_11 {
        return Err((Reason::BadRequest, "no Host field"));
    }
    if let Some(target) = parts.uri.authority().cloned() {
        if parts.uri.scheme().is_none() {
            return Err((Reason::BadRequest, "an authority alone is a target for CONNECT only"));
        }
        if has_userinfo(&target) {
            return Err((Reason::BadRequest, "the target has user information"));
        }
        let host =
            HeaderValue::from_str(target.as_str()).map_err(|_| (Reason::BadRequest, "the target's authority"))?;
        parts.headers.insert(header::HOST, host);
        parts.uri = origin_form(&parts.uri);
    } else if host.is_none() {
        let stand_in = HeaderValue::from_str(&authority()).map_err(|_| (Reason::Internal, "the stand-in authority"))?;
        parts.headers.insert(header::HOST, stand_in);
    }
    let asterisk = parts.uri.path() == "*";
    if asterisk != (parts.uri.path() == "*" && parts.method == Method::OPTIONS) || !is_path(&parts.uri) {
        return Err((Reason::BadRequest, "the target is neither a path nor an absolute URI"));
    }
    Ok(())
}

/// Checks an HTTP/2 head. The library has checked that the pseudo-header fields are there, once each; the byte stream below
/// it, what the library drops of them (`connect/http2/heads.rs`).
pub fn check_http2(
    parts: &mut Parts,
    longest_target: usize,
    authority: impl FnOnce() -> String,
) -> Result<(), Refusal> {
    check_target(&parts.uri, longest_target)?;
    let asterisk = parts.method == Method::OPTIONS && parts.uri.path_and_query().is_some_and(|path| path == "*");
    if !asterisk && !parts.uri.path_and_query().is_some_and(|path| path.as_str().starts_with('/')) {
        return Err((Reason::BadRequest, ":path is neither a path nor the asterisk of OPTIONS"));
    }
    let host = check_fields(&parts.headers)?.cloned();
    match (parts.uri.authority(), host) {
        (Some(target), _) if has_userinfo(target) => Err((Reason::BadRequest, ":authority has user information")),
        (Some(target), Some(host)) if !host.as_bytes().eq_ignore_ascii_case(target.as_str().as_bytes()) => {
            Err((Reason::BadRequest, ":authority and Host differ"))
        }
        (Some(_), _) => Ok(()),
        (None, host) => {
            let text = host.as_ref().and_then(|host| host.to_str().ok()).map(str::to_owned);
            let target = text.unwrap_or_else(authority).parse::<Authority>();
            let target = target.map_err(|_| (Reason::BadRequest, "the Host field is not host[:port]"))?;
            with_authority(parts, target)
        }
    }
}

/// Fields that say where a message ends, or that a server may take for such. The library takes the last coding of the
/// last line for the whole of Transfer-Encoding and ignores an Expect that it does not know. Gives the one Host. All in
/// one walk, which costs less than a search for each.
fn check_fields(headers: &HeaderMap) -> Result<Option<&HeaderValue>, Refusal> {
    let (mut host, mut coding, mut expect) = (None, None, None);
    for (name, value) in headers {
        let wrong = match *name {
            header::HOST => {
                if host.replace(value).is_some() {
                    "more than one Host field"
                } else if !value.is_empty() && !is_host(value.as_bytes()) {
                    "the Host field is not host[:port]"
                } else {
                    continue;
                }
            }
            header::TRANSFER_ENCODING if coding.replace(value).is_some() || !is(value, "chunked") => {
                "a Transfer-Encoding that is not chunked alone"
            }
            header::CONTENT_LENGTH if plain_length(value.as_bytes()).is_none() => {
                "a Content-Length that not every server reads alike"
            }
            header::EXPECT if expect.replace(value).is_some() || !is(value, "100-continue") => {
                "an Expect that is not 100-continue alone"
            }
            _ if TWINS.contains(&name.as_str()) => "a framing field spelled with an underscore",
            _ => continue,
        };
        return Err((Reason::BadRequest, wrong));
    }
    Ok(host)
}

fn is(value: &HeaderValue, expected: &str) -> bool {
    value.as_bytes().trim_ascii().eq_ignore_ascii_case(expected.as_bytes())
}

/// What servers that read `_` as `-` would take for framing fields.
const TWINS: [&str; 2] = ["transfer_encoding", "content_length"];

/// What may be left of Max-Forwards.
const MOST_FORWARDS: u64 = 255;

/// Counts this hop in the Max-Forwards of a TRACE or OPTIONS request (RFC 9110 section 7.6.2): false when there is no hop
/// left, and the request has to be answered here.
pub fn count_hop(parts: &mut Parts) -> Result<bool, Refusal> {
    if !matches!(parts.method, Method::OPTIONS | Method::TRACE) {
        return Ok(true);
    }
    let mut fields = parts.headers.get_all(header::MAX_FORWARDS).iter();
    let Some(hops) = fields.next() else { return Ok(true) };
    let digits = hops.as_bytes();
    if fields.next().is_some() || digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err((Reason::BadRequest, "a Max-Forwards that is no number"));
    }
    // More than fits is a number as well, and larger than any that we support.
    let hops = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse::<u64>().ok()).unwrap_or(u64::MAX);
    let Some(left) = hops.checked_sub(1) else { return Ok(false) };
    parts.headers.insert(header::MAX_FORWARDS, HeaderValue::from(left.min(MOST_FORWARDS)));
    Ok(true)
}

/// Checks an answer's framing. What is wrong with it, else whether it has a Date, and: a Content-Length in its one plain
/// form, and none where an answer has no body. The library takes an answer with both framings, and reads one in an unknown
/// coding to the end.
pub fn check_answer(status: StatusCode, headers: &mut HeaderMap) -> Result<bool, &'static str> {
    let (mut coding, mut first, mut several, mut dated) = (None, None, false, false);
    for (name, value) in &*headers {
        match *name {
            header::TRANSFER_ENCODING if coding.replace(value).is_some() || !is(value, "chunked") => {
                return Err("a Transfer-Encoding that is not chunked alone");
            }
            header::CONTENT_LENGTH => several |= first.replace(value).is_some(),
            header::DATE => dated = true,
            _ => {}
        }
    }
    let Some(first) = first else { return Ok(dated) };
    if coding.is_some() {
        return Err("Transfer-Encoding and Content-Length");
    }
    if several || plain_length(first.as_bytes()).is_none() {
        let length = one_length(headers).ok_or("a Content-Length that is no number, or several that differ")?;
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    if status == StatusCode::NO_CONTENT {
        headers.remove(header::CONTENT_LENGTH);
    }
    Ok(dated)
}

/// The number on which all lines and list members agree.
fn one_length(headers: &HeaderMap) -> Option<i64> {
    let mut one = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        for member in value.to_str().ok()?.split(',') {
            let member = member.trim_matches([' ', '\t']);
            if !member.bytes().all(|byte| byte.is_ascii_digit()) {
                return None;
            }
            // Signed: nothing larger is meant, and some would read it as negative.
            let length = member.parse::<i64>().ok()?;
            if one.replace(length).is_some_and(|before| before != length) {
                return None;
            }
        }
    }
    one
}

fn with_authority(parts: &mut Parts, authority: Authority) -> Result<(), Refusal> {
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.scheme.get_or_insert(http::uri::Scheme::HTTP);
    uri.authority = Some(authority);
    uri.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
    parts.uri = Uri::from_parts(uri).map_err(|_| (Reason::BadRequest, "the target"))?;
    Ok(())
}

fn check_target(uri: &Uri, longest: usize) -> Result<(), Refusal> {
    let length = uri.path_and_query().map_or(0, |path| path.as_str().len())
        + uri.authority().map_or(0, |authority| authority.as_str().len());
    if length > longest { Err((Reason::RequestTargetTooLong, "the target")) } else { Ok(()) }
}

fn origin_form(uri: &Uri) -> Uri {
    let path = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    if path.as_str().starts_with('?') {
        // RFC 9112 section 3.2.1: an empty path goes on as "/", before a query, too.
        return Uri::try_from(format!("/{}", path.as_str())).unwrap_or_default();
    }
    Uri::from(path)
}

fn is_path(uri: &Uri) -> bool {
    uri.path_and_query().is_some_and(|path| path.as_str().starts_with('/') || path.as_str() == "*")
}

fn has_userinfo(authority: &Authority) -> bool {
    authority.as_str().contains('@')
}

/// `uri-host [":" port]` (RFC 9110 section 7.2) that names a host. An empty field is what a client sends whose target has
/// no authority (RFC 9112 section 3.2); a port alone is no authority at all (RFC 9110 section 4.2.1).
fn is_host(host: &[u8]) -> bool {
    let (name, port) = match host {
        [b'[', rest @ ..] => {
            let Some(end) = rest.iter().position(|byte| *byte == b']') else { return false };
            let inside = &rest[..end];
            if inside.is_empty() || !inside.iter().all(|byte| byte.is_ascii_hexdigit() || b":.%".contains(byte)) {
                return false;
            }
            (&b"v6"[..], &rest[end + 1..])
        }
        host => match host.iter().position(|byte| *byte == b':') {
            Some(colon) => (&host[..colon], &host[colon..]),
            None => (host, &b""[..]),
        },
    };
    let name_ok =
        !name.is_empty() && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%".contains(byte));
    let port_ok = match port {
        [] | [b':'] => true,
        [b':', digits @ ..] => {
            digits.iter().all(u8::is_ascii_digit)
                && std::str::from_utf8(digits).is_ok_and(|digits| digits.parse::<u16>().is_ok())
        }
        _ => false,
    };
    name_ok && port_ok
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn parts(target: &str, version: Version, hosts: &[&str]) -> Parts {
        let mut request = http::Request::builder().uri(target).version(version);
        for host in hosts {
            request = request.header("host", *host);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn framing_rules() {
        let cases: &[(&str, &str, bool)] = &[
            ("transfer-encoding", "chunked", true),
            ("transfer-encoding", "Chunked ", true),
            ("transfer-encoding", "gzip, chunked", false),
            ("transfer-encoding", "chunked, chunked", false),
            ("expect", "100-Continue", true),
            ("expect", "y 100-continue", false),
            ("content-length", "0", true),
            ("content-length", "10", true),
            ("content-length", "010", false),
            ("content-length", "9223372036854775807", true),
            ("content-length", "9223372036854775808", false),
            ("content-length", "+1", false),
            ("content_length", "1", false),
            ("transfer_encoding", "x", false),
        ];
        for (name, value, good) in cases {
            let mut headers = HeaderMap::new();
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
            assert_eq!(check_fields(&headers).is_ok(), *good, "{name}: {value}");
        }
    }

    #[test]
    fn answer_rules() {
        type Case<'a> = (u16, &'a [(&'static str, &'static str)], Option<Option<&'a str>>);
        let cases: &[Case<'_>] = &[
            (200, &[("content-length", "5")], Some(Some("5"))),
            (200, &[("content-length", "5"), ("content-length", "5")], Some(Some("5"))),
            (200, &[("content-length", "5, 05")], Some(Some("5"))),
            (200, &[("content-length", "5, 6")], None),
            (200, &[("content-length", "-5")], None),
            (200, &[("content-length", "")], None),
            (204, &[("content-length", "5")], Some(None)),
            (304, &[("content-length", "5")], Some(Some("5"))),
            (200, &[("transfer-encoding", "chunked")], Some(None)),
            (200, &[("transfer-encoding", "gzip")], None),
            (200, &[("transfer-encoding", "chunked"), ("content-length", "5")], None),
        ];
        for (status, fields, expected) in cases {
            let mut headers = HeaderMap::new();
            for (name, value) in *fields {
                headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
            }
            let checked = check_answer(StatusCode::from_u16(*status).unwrap(), &mut headers).is_ok();
            assert_eq!(checked, expected.is_some(), "{fields:?}");
            if let Some(length) = expected {
                let got: Vec<_> = headers.get_all("content-length").iter().map(|v| v.to_str().unwrap()).collect();
                assert_eq!(got, length.iter().copied().collect::<Vec<_>>(), "{fields:?}");
            }
        }
    }

    #[test]
    fn host_rules() {
        let cases: &[(&str, Version, &[&str], Option<&str>)] = &[
            ("/", Version::HTTP_11, &["a"], Some("a")),
            ("/", Version::HTTP_11, &["a:80"], Some("a:80")),
            ("/", Version::HTTP_11, &["[::1]:80"], Some("[::1]:80")),
            ("/", Version::HTTP_11, &[], None),
            ("/", Version::HTTP_10, &[], Some("stand-in")),
            ("/", Version::HTTP_11, &["a", "a"], None),
            ("/", Version::HTTP_11, &["a", "b"], None),
            // What RFC 9112 section 3.2 has a client send whose target has no authority.
            ("/", Version::HTTP_11, &[""], Some("")),
            ("/", Version::HTTP_10, &[""], Some("")),
            ("/", Version::HTTP_11, &["", ""], None),
            ("/", Version::HTTP_11, &[":80"], None),
            ("/", Version::HTTP_11, &[":"], None),
            ("/", Version::HTTP_11, &["a/b"], None),
            ("/", Version::HTTP_11, &["a b"], None),
            ("/", Version::HTTP_11, &["a@b"], None),
            ("/", Version::HTTP_11, &["a:b"], None),
            ("/", Version::HTTP_11, &["a:65536"], None),
            ("/", Version::HTTP_11, &["a:80:80"], None),
            ("/", Version::HTTP_11, &["a#"], None),
            ("http://b/x?y", Version::HTTP_11, &["a"], Some("b")),
            ("http://b?y", Version::HTTP_11, &["a"], Some("b")),
            ("http://u@b/", Version::HTTP_11, &["a"], None),
        ];
        for (target, version, hosts, expected) in cases {
            let mut parts = parts(target, *version, hosts);
            let got = check_http1(&mut parts, 100, || "stand-in".to_owned());
            assert_eq!(got.is_ok(), expected.is_some(), "{target} {hosts:?}: {got:?}");
            if let Some(expected) = expected {
                assert_eq!(parts.headers[header::HOST], *expected);
                assert!(parts.uri.authority().is_none() && parts.uri.to_string().starts_with('/'));
            }
        }
    }

    #[test]
    fn an_empty_path_becomes_a_slash() {
        for (target, expected) in [
            ("http://b", "/"),
            ("http://b/", "/"),
            ("http://b?y", "/?y"),
            ("http://b:1?", "/?"),
            ("http://b//x", "//x"),
        ] {
            let mut parts = parts(target, Version::HTTP_11, &["a"]);
            check_http1(&mut parts, 100, String::new).unwrap();
            let path = parts.uri.path_and_query().unwrap().as_str();
            assert_eq!(path.trim_end_matches('?'), expected.trim_end_matches('?'), "{target}");
        }
    }

    #[test]
    fn hops_are_counted() {
        // What is left; an empty text when nothing is, none when it is no number.
        let cases: &[(Method, &[&str], Option<&str>)] = &[
            (Method::OPTIONS, &["5"], Some("4")),
            (Method::TRACE, &["1"], Some("0")),
            (Method::OPTIONS, &["010"], Some("9")),
            (Method::TRACE, &["1000"], Some("255")),
            (Method::OPTIONS, &["99999999999999999999999"], Some("255")),
            (Method::OPTIONS, &["0"], Some("")),
            (Method::TRACE, &["00"], Some("")),
            (Method::OPTIONS, &["-1"], None),
            (Method::TRACE, &["1, 2"], None),
            (Method::TRACE, &["1", "2"], None),
            (Method::OPTIONS, &[""], None),
            (Method::OPTIONS, &["a"], None),
            (Method::GET, &["0"], Some("0")),
            (Method::GET, &["a"], Some("a")),
        ];
        for (method, fields, expected) in cases {
            let mut parts = parts("/", Version::HTTP_11, &["a"]);
            parts.method = method.clone();
            for field in *fields {
                parts.headers.append(header::MAX_FORWARDS, HeaderValue::from_static(field));
            }
            let counted = count_hop(&mut parts);
            match expected {
                None => assert!(counted.is_err(), "{method} {fields:?}"),
                Some("") => assert!(!counted.unwrap(), "{method} {fields:?}"),
                Some(left) => {
                    assert!(counted.unwrap(), "{method} {fields:?}");
                    assert_eq!(parts.headers[header::MAX_FORWARDS], *left, "{method} {fields:?}");
                }
            }
        }
        assert!(count_hop(&mut parts("/", Version::HTTP_11, &["a"])).unwrap());
    }

    #[test]
    fn targets() {
        let long = format!("/{}", "a".repeat(200));
        let refused = check_http1(&mut parts(&long, Version::HTTP_11, &["a"]), 100, String::new);
        assert_eq!(refused.unwrap_err().0, Reason::RequestTargetTooLong);
        let mut asterisk = parts("*", Version::HTTP_11, &["a"]);
        assert!(check_http1(&mut asterisk, 100, String::new).is_err());
        asterisk.method = Method::OPTIONS;
        assert!(check_http1(&mut asterisk, 100, String::new).is_ok());
    }

    #[test]
    fn http2_targets() {
        let cases: &[(Method, &str, bool)] = &[
            (Method::GET, "/", true),
            (Method::GET, "/?a", true),
            (Method::GET, "?a", false),
            (Method::GET, "*", false),
            (Method::GET, "a", false),
            (Method::GET, "http://a/", false),
            (Method::OPTIONS, "*", true),
            (Method::OPTIONS, "/", true),
            (Method::OPTIONS, "*?a", false),
            (Method::OPTIONS, "?a", false),
        ];
        for (method, path, good) in cases {
            let mut uri = http::uri::Parts::default();
            (uri.scheme, uri.authority) = (Some(http::uri::Scheme::HTTP), Some(Authority::from_static("a")));
            // As the library makes it, which takes more than an http::Uri that is parsed whole.
            let Ok(path_and_query) = PathAndQuery::from_maybe_shared(*path) else {
                assert!(!good, "{path}");
                continue;
            };
            uri.path_and_query = Some(path_and_query);
            let mut head = parts("/", Version::HTTP_2, &[]);
            (head.method, head.uri) = (method.clone(), Uri::from_parts(uri).unwrap());
            assert_eq!(check_http2(&mut head, 100, String::new).is_ok(), *good, "{method} {path}");
        }
    }

    #[test]
    fn http2_authority() {
        let mut own = parts("/x", Version::HTTP_2, &["a:1"]);
        check_http2(&mut own, 100, String::new).unwrap();
        assert_eq!(own.uri.to_string(), "http://a:1/x");
        let mut none = parts("/x", Version::HTTP_2, &[]);
        check_http2(&mut none, 100, || "svc.ns:80".to_owned()).unwrap();
        assert_eq!(none.uri.to_string(), "http://svc.ns:80/x");
        let mut differ = parts("http://a/x", Version::HTTP_2, &["b"]);
        assert!(check_http2(&mut differ, 100, String::new).is_err());
    }
}
