//! The answers that the sidecar makes itself: problem+json (RFC 9457) with the reason and a Proxy-Status field
//! (RFC 9209), for gRPC trailers-only. A client can always tell the proxy's 503 from the application's.

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};

use super::body::ResponseBody;
use super::date;
use crate::connect::http1::{Spelling, head};
use crate::outcome::{Quota, Reason, Refuser};

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// What one who may know it is told beside the reason.
#[derive(Clone, Copy, Default)]
pub struct Told<'a> {
    /// The object that refused; for callers that prove who they are.
    pub by: Option<&'a Refuser>,
    /// What happened, with names and addresses; for the application beside this sidecar alone.
    pub detail: Option<&'a str>,
    /// The rate limit that is used up.
    pub quota: Option<&'a Quota>,
}

/// The answer to a request that ended here.
pub fn refuse(reason: Reason, grpc: bool, proxy: &str, told: Told<'_>) -> Response<ResponseBody> {
    let row = reason.row();
    let mut response;
    if grpc {
        response = Response::new(ResponseBody::empty());
        *response.headers_mut() = grpc_trailers(reason);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        let message = told.detail.map(|detail| HeaderValue::from_str(&format!("{}: {detail}", row.word)));
        if let Some(Ok(message)) = message {
            response.headers_mut().insert(GRPC_MESSAGE, message);
        }
    } else {
        response = Response::new(ResponseBody::local(problem(reason, told.detail)));
        *response.status_mut() = StatusCode::from_u16(row.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    }
    if let Some(quota) = told.quota {
        tell_quota(response.headers_mut(), quota);
    }
    if let Some(challenge) = challenge(reason).filter(|_| !grpc) {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    }
    if let Ok(status) = HeaderValue::from_str(&proxy_status(reason, proxy, told.by)) {
        response.headers_mut().insert(PROXY_STATUS, status);
    }
    response.headers_mut().insert(header::DATE, date::now());
    response
}

/// When to come again (RFC 9110 section 10.2.3), and of which limit (draft-ietf-httpapi-ratelimit-headers).
fn tell_quota(headers: &mut HeaderMap, quota: &Quota) {
    const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
    const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
    headers.insert(header::RETRY_AFTER, HeaderValue::from(quota.wait));
    let Quota { name, requests, window, wait } = quota;
    // Names of limits are checked words.
    let fields = [
        (RATE_LIMIT, format!("\"{name}\";r=0;t={wait}")),
        (RATE_LIMIT_POLICY, format!("\"{name}\";q={requests};w={window}")),
    ];
    for (name, value) in fields {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
}

/// Which credentials a 401 asks for (RFC 6750 section 3).
fn challenge(reason: Reason) -> Option<HeaderValue> {
    match reason {
        Reason::JwtMissing => Some(HeaderValue::from_static("Bearer")),
        Reason::JwtInvalid => Some(HeaderValue::from_static("Bearer error=\"invalid_token\"")),
        _ => None,
    }
}

/// The answer to an OPTIONS or TRACE whose Max-Forwards ends here (RFC 9110 section 7.6.2). A TRACE gets back what came,
/// without what must stay between the client and the application (section 9.3.8).
pub fn last_hop(mut parts: Parts, spelling: Option<&Spelling>, proxy: &str) -> Response<ResponseBody> {
    const SECRETS: [HeaderName; 3] = [header::AUTHORIZATION, header::PROXY_AUTHORIZATION, header::COOKIE];
    let mut response = Response::new(ResponseBody::empty());
    if parts.method == Method::TRACE {
        for secret in SECRETS {
            parts.headers.remove(secret);
        }
        let mut message = Vec::new();
        head::write_request(&mut message, &Request::from_parts(parts, ()), spelling);
        message.extend_from_slice(b"\r\n");
        response = Response::new(ResponseBody::local(Bytes::from(message)));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("message/http"));
    }
    if let Ok(status) = HeaderValue::from_str(&format!("{}; details=\"Max-Forwards ends here\"", item(proxy))) {
        response.headers_mut().insert(PROXY_STATUS, status);
    }
    response.headers_mut().insert(header::DATE, date::now());
    response
}

/// An answer that a route gives: a redirect, or that to a preflight.
pub fn of_route(status: u16, fields: HeaderMap) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::empty());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::FOUND);
    *response.headers_mut() = fields;
    response.headers_mut().insert(header::DATE, date::now());
    response
}

/// How a gRPC call ends whose answer broke off behind its head.
pub fn grpc_trailers(reason: Reason) -> HeaderMap {
    let row = reason.row();
    let mut trailers = HeaderMap::new();
    trailers.insert(GRPC_STATUS, HeaderValue::from(u16::from(row.grpc)));
    if let Ok(message) = HeaderValue::from_str(&format!("{}: {}", row.word, row.title)) {
        trailers.insert(GRPC_MESSAGE, message);
    }
    trailers
}

/// The same answer as bytes of HTTP/1.1, for a head that the parser itself refused.
pub fn refuse_raw(reason: Reason, status: u16, proxy: &str) -> Vec<u8> {
    let body = problem(reason, None);
    let phrase = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Refused");
    let mut raw = format!(
        "HTTP/1.1 {status} {phrase}\r\ncontent-type: application/problem+json\r\nproxy-status: {}\r\ndate: {}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        proxy_status(reason, proxy, None),
        date::now().to_str().unwrap_or_default(),
        body.len(),
    )
    .into_bytes();
    raw.extend_from_slice(&body);
    raw
}

fn problem(reason: Reason, detail: Option<&str>) -> Bytes {
    let row = reason.row();
    // Words and titles are our own constants; a detail may hold a name that the client wrote.
    let detail = detail.map(|detail| format!(",\"detail\":{}", serde_json::Value::from(detail))).unwrap_or_default();
    Bytes::from(format!(
        "{{\"type\":\"about:blank\",\"title\":\"{}\",\"status\":{},\"reason\":\"{}\"{detail}}}\n",
        row.title, row.status, row.word
    ))
}

/// `name; error=type`; a caller that may know it is told the object and the rule that refused, as `details`.
fn proxy_status(reason: Reason, proxy: &str, by: Option<&Refuser>) -> String {
    let mut status = format!("{}; error={}", item(proxy), reason.row().proxy_status);
    if let Some(by) = by {
        let rule = by.rule.map(|rule| format!(" rule {rule}")).unwrap_or_default();
        // Kinds and names are checked words: nothing in them needs an escape.
        status.push_str(&format!("; details=\"{}{rule}\"", by.object));
    }
    status
}

/// The name is a token when it can be one, else a string (RFC 8941).
fn item(proxy: &str) -> String {
    if proxy.starts_with(|first: char| first.is_ascii_alphabetic()) { proxy.to_owned() } else { format!("\"{proxy}\"") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_well_formed_answer() {
        for reason in Reason::ALL {
            let body: serde_json::Value = serde_json::from_slice(&problem(reason, Some("a \"b\"\n"))).unwrap();
            assert_eq!(body["detail"], "a \"b\"\n");
            assert_eq!(body["reason"], reason.word());
            assert_eq!(body["status"], reason.row().status);
            let plain = refuse(reason, false, "cart-1", Told::default());
            assert_eq!(plain.status().as_u16(), reason.row().status);
            assert!(plain.headers()["proxy-status"].to_str().unwrap().starts_with("cart-1; error="));
            let grpc = refuse(reason, true, "1cart", Told::default());
            assert_eq!(grpc.status(), 200);
            assert_eq!(grpc.headers()["grpc-status"], reason.row().grpc.to_string().as_str());
            assert!(grpc.headers()["proxy-status"].to_str().unwrap().starts_with("\"1cart\"; error="));
        }
    }
}
