//! The rules for a request head that the HTTP library leaves to us (RFC 9112 section 3.2), and the form in which it
//! goes on. Pure. What is refused here never reaches an upstream.

use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Uri};
use http::{HeaderValue, Method, Version, header};

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
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err((Reason::BadRequest, "more than one Host field"));
    }
    if let Some(host) = host
        && !is_host(host.as_bytes())
    {
        return Err((Reason::BadRequest, "the Host field is not host[:port]"));
    }
    if host.is_none() && parts.version == Version::HTTP_11 {
        return Err((Reason::BadRequest, "no Host field"));
    }
    if let Some(target) = parts.uri.authority().cloned() {
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

/// Checks an HTTP/2 head; the library has checked the pseudo-headers.
pub fn check_http2(
    parts: &mut Parts,
    longest_target: usize,
    authority: impl FnOnce() -> String,
) -> Result<(), Refusal> {
    check_target(&parts.uri, longest_target)?;
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next().cloned();
    if hosts.next().is_some() {
        return Err((Reason::BadRequest, "more than one Host field"));
    }
    if host.as_ref().is_some_and(|host| !is_host(host.as_bytes())) {
        return Err((Reason::BadRequest, "the Host field is not host[:port]"));
    }
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
    Uri::from(path)
}

fn is_path(uri: &Uri) -> bool {
    uri.path_and_query().is_some_and(|path| path.as_str().starts_with('/') || path.as_str() == "*")
}

fn has_userinfo(authority: &Authority) -> bool {
    authority.as_str().contains('@')
}

/// `uri-host [":" port]` (RFC 9110 section 7.2); an empty Host is allowed by the grammar and refused here, because
/// nobody can be meant by it.
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
    use super::*;

    fn parts(target: &str, version: Version, hosts: &[&str]) -> Parts {
        let mut request = http::Request::builder().uri(target).version(version);
        for host in hosts {
            request = request.header("host", *host);
        }
        request.body(()).unwrap().into_parts().0
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
            ("/", Version::HTTP_11, &[""], None),
            ("/", Version::HTTP_11, &["a/b"], None),
            ("/", Version::HTTP_11, &["a b"], None),
            ("/", Version::HTTP_11, &["a@b"], None),
            ("/", Version::HTTP_11, &["a:b"], None),
            ("/", Version::HTTP_11, &["a:65536"], None),
            ("/", Version::HTTP_11, &["a:80:80"], None),
            ("/", Version::HTTP_11, &["a#"], None),
            ("http://b/x?y", Version::HTTP_11, &["a"], Some("b")),
            ("http://u@b/", Version::HTTP_11, &["a"], None),
        ];
        for (target, version, hosts, expected) in cases {
            let mut parts = parts(target, *version, hosts);
            let got = check_http1(&mut parts, 100, || "stand-in".to_owned());
            assert_eq!(got.is_ok(), expected.is_some(), "{target} {hosts:?}: {got:?}");
            if let Some(expected) = expected {
                assert_eq!(parts.headers[header::HOST], *expected);
                assert!(parts.uri.authority().is_none() && parts.uri.path().starts_with('/'));
            }
        }
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
