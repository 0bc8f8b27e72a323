//! What a head may carry from one hop to the next (RFC 9110 section 7.6.1) and what a caller may not say about
//! itself. Pure. `HeaderMap::remove` changes the order of what stays, so a head that needs cleaning is rebuilt.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::connect::unprocessed::UNPROCESSED;

/// What is taken out besides the hop-by-hop fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strip {
    /// On the way to another hop: hop-by-hop fields only.
    HopByHop,
    /// On the way to the application: what claims an identity, too.
    Identity,
}

/// The caller's identity in Envoy's format.
pub const CLIENT_CERTIFICATE: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// The caller's SPIFFE id alone.
pub const IDENTITY: HeaderName = HeaderName::from_static("x-outrigger-identity");

const KEEP_ALIVE: &str = "keep-alive";
const PROXY_CONNECTION: &str = "proxy-connection";
const HTTP2_SETTINGS: &str = "http2-settings";

/// A head on its way to the next hop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    /// `upgrade`: it asks for another protocol. HTTP/2 has no Connection and no Upgrade.
    Request { http2: bool, upgrade: bool },
    /// `upgrade`: it agrees to another protocol, or demands one (426).
    Answer { upgrade: bool },
}

/// Removes hop-by-hop fields, and with [`Strip::Identity`] every claim of an identity. What is made anew for the next hop
/// stands where it stood: Upgrade, TE, and the Connection that both need, in the letters in which they came. Framing
/// fields and Host cannot be nominated away by `Connection`.
pub fn clean(headers: &mut HeaderMap, strip: Strip, message: Message) {
    if !headers.keys().any(|name| is_hop_by_hop(name) || strip.takes(name)) {
        return;
    }
    let (upgrade, te, connection) = match message {
        Message::Request { http2, upgrade } => (upgrade && !http2, accepts_trailers(headers), !http2),
        Message::Answer { upgrade } => (upgrade, false, true),
    };
    let upgrade = upgrade && headers.get_all(header::UPGRADE).iter().any(|value| without_h2c(value).is_some());
    let mut options = if connection { options(headers, upgrade, te) } else { None };
    let nominated: Vec<HeaderName> = nominated(headers);
    let mut kept = HeaderMap::with_capacity(headers.len() + 1);
    let (mut last, mut te) = (None, te);
    for (name, value) in headers.drain() {
        let Some(name) = name.or_else(|| last.clone()) else { continue };
        last = Some(name.clone());
        let value = match name {
            header::CONNECTION => options.take(),
            header::UPGRADE if upgrade => without_h2c(&value),
            header::TE if std::mem::take(&mut te) => Some(only_trailers(value)),
            _ if is_hop_by_hop(&name) || strip.takes(&name) || nominated.contains(&name) => None,
            _ => Some(value),
        };
        if let Some(value) = value {
            kept.append(name, value);
        }
    }
    if let Some(options) = options {
        kept.append(header::CONNECTION, options);
    }
    *headers = kept;
}

/// The value of Connection that the fields of the next hop need.
fn options(headers: &HeaderMap, upgrade: bool, te: bool) -> Option<HeaderValue> {
    let as_it_came = |option: &'static str| {
        let values = headers.get_all(header::CONNECTION).iter();
        let options = values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
        let mut options = options.map(str::trim);
        options.find(|came| came.eq_ignore_ascii_case(option)).unwrap_or(option)
    };
    match (upgrade, te) {
        (false, false) => None,
        (true, false) => HeaderValue::from_str(as_it_came("Upgrade")).ok(),
        (false, true) => HeaderValue::from_str(as_it_came("TE")).ok(),
        (true, true) => HeaderValue::from_str(&format!("{}, {}", as_it_came("Upgrade"), as_it_came("TE"))).ok(),
    }
}

/// A value of Upgrade without h2c, which never passes; nothing when nothing is left.
fn without_h2c(value: &HeaderValue) -> Option<HeaderValue> {
    let text = value.to_str().ok()?;
    if !text.split(',').any(is_h2c) {
        return Some(value.clone());
    }
    let others: Vec<&str> = text.split(',').filter(|one| !is_h2c(one)).map(str::trim).collect();
    if others.is_empty() { None } else { HeaderValue::from_str(&others.join(", ")).ok() }
}

fn is_h2c(protocol: &str) -> bool {
    protocol.trim().get(..3).is_some_and(|start| start.eq_ignore_ascii_case("h2c"))
}

/// `trailers` is all of TE that goes on.
fn only_trailers(value: HeaderValue) -> HeaderValue {
    if value.as_bytes().eq_ignore_ascii_case(b"trailers") { value } else { HeaderValue::from_static("trailers") }
}

/// What a trailer section must not carry: framing, routing and identity (RFC 9110 section 6.5.1).
pub fn clean_trailers(trailers: &mut HeaderMap) {
    let forbidden = |name: &HeaderName| {
        is_hop_by_hop(name)
            || Strip::Identity.takes(name)
            || [header::CONTENT_LENGTH, header::HOST, header::TRAILER, header::AUTHORIZATION, header::COOKIE]
                .contains(name)
    };
    let names: Vec<HeaderName> = trailers.keys().filter(|name| forbidden(name)).cloned().collect();
    for name in names {
        trailers.remove(name);
    }
}

impl Strip {
    fn takes(self, name: &HeaderName) -> bool {
        match self {
            Strip::HopByHop => false,
            Strip::Identity => claims_identity(name.as_str()),
        }
    }
}

/// `x-forwarded-client-cert` and `x-outrigger-*`, also with `_` for `-`, which many servers treat alike.
fn claims_identity(name: &str) -> bool {
    let bytes = name.as_bytes();
    if !matches!(bytes, [b'x', b'-' | b'_', ..]) {
        return false;
    }
    let same = |text: &str| {
        bytes.len() >= text.len() && bytes.iter().zip(text.bytes()).all(|(a, b)| *a == b || (*a == b'_' && b == b'-'))
    };
    same("x-outrigger-") || (bytes.len() == CLIENT_CERTIFICATE.as_str().len() && same("x-forwarded-client-cert"))
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    match *name {
        header::CONNECTION | header::TE | header::TRANSFER_ENCODING | header::UPGRADE => true,
        _ => matches!(name.as_str(), KEEP_ALIVE | PROXY_CONNECTION | HTTP2_SETTINGS) || *name == UNPROCESSED,
    }
}

/// The fields that `Connection` names, without those that nobody may nominate away.
fn nominated(headers: &HeaderMap) -> Vec<HeaderName> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse::<HeaderName>().ok())
        .filter(|name| ![header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING].contains(name))
        .collect()
}

fn accepts_trailers(headers: &HeaderMap) -> bool {
    let mut lines = headers.get_all(header::TE).iter().filter_map(|te| te.to_str().ok());
    lines.any(|te| te.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")))
}

/// True when the request asks for protocols that may pass: any but h2c, with `Connection: upgrade`.
pub fn asks_upgrade(headers: &HeaderMap) -> bool {
    if !headers.keys().any(|name| *name == header::UPGRADE) {
        return false;
    }
    let names_h2c = |value: &HeaderValue| value.to_str().map_or(true, |text| text.split(',').any(is_h2c));
    !headers.get_all(header::UPGRADE).iter().any(names_h2c) && nominated(headers).contains(&header::UPGRADE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        fields.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    const REQUEST: Message = Message::Request { http2: false, upgrade: false };
    const UPGRADE: Message = Message::Request { http2: false, upgrade: true };

    fn cleaned(fields: &[(&'static str, &'static str)], strip: Strip, message: Message) -> Vec<(String, String)> {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        clean(&mut headers, strip, message);
        headers.iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap().to_owned())).collect()
    }

    fn pairs(fields: &[(&str, &str)]) -> Vec<(String, String)> {
        fields.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn hop_by_hop_fields_stay_on_their_hop_and_order_is_kept() {
        let got = cleaned(
            &[
                ("host", "a"),
                ("connection", "keep-alive, x-secret"),
                ("x-secret", "1"),
                ("accept", "*/*"),
                ("keep-alive", "timeout=5"),
                ("transfer-encoding", "chunked"),
                ("te", "gzip, trailers"),
                ("cookie", "a"),
                ("cookie", "b"),
                ("proxy-connection", "x"),
                ("upgrade", "h2c"),
                ("http2-settings", "AAA"),
                ("user-agent", "z"),
            ],
            Strip::HopByHop,
            REQUEST,
        );
        let expected = pairs(&[
            ("host", "a"),
            ("connection", "TE"),
            ("accept", "*/*"),
            ("te", "trailers"),
            ("cookie", "a"),
            ("cookie", "b"),
            ("user-agent", "z"),
        ]);
        assert_eq!(got, expected);
    }

    #[test]
    fn host_and_framing_cannot_be_nominated_away() {
        let got = cleaned(
            &[("host", "a"), ("connection", "host, content-length, x-forwarded-client-cert"), ("content-length", "3")],
            Strip::HopByHop,
            REQUEST,
        );
        assert_eq!(got, pairs(&[("host", "a"), ("content-length", "3")]));
    }

    #[test]
    fn identity_claims_go_in_every_spelling() {
        let got = cleaned(
            &[
                ("x-forwarded-client-cert", "1"),
                ("x_forwarded_client_cert", "2"),
                ("x-forwarded_client-cert", "3"),
                ("x-outrigger-identity", "4"),
                ("x_outrigger_identity", "5"),
                ("x-outrigger-", "6"),
                ("x-outrigger", "kept"),
                ("x-forwarded-client-certs", "kept"),
                ("x-forwarded-for", "kept"),
            ],
            Strip::Identity,
            REQUEST,
        );
        assert_eq!(got.len(), 3, "{got:?}");
        assert!(got.iter().all(|(_, value)| value == "kept"));
        let mut trailers =
            map(&[("x-outrigger-identity", "1"), ("content-length", "2"), ("host", "h"), ("grpc-status", "0")]);
        clean_trailers(&mut trailers);
        assert_eq!(trailers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["grpc-status"]);
    }

    #[test]
    fn upgrades_pass_when_asked_for_rightly() {
        let cases: &[(&[(&'static str, &'static str)], bool)] = &[
            (&[("connection", "Upgrade"), ("upgrade", "websocket")], true),
            (&[("connection", "keep-alive, upgrade"), ("upgrade", "foo")], true),
            (&[("upgrade", "websocket")], false),
            (&[("connection", "upgrade")], false),
            (&[("connection", "upgrade"), ("upgrade", "h2c")], false),
            (&[("connection", "upgrade"), ("upgrade", "websocket, H2C")], false),
            (&[("connection", "upgrade"), ("upgrade", "websocket, foo/1.1")], true),
        ];
        for (fields, expected) in cases {
            assert_eq!(asks_upgrade(&map(fields)), *expected, "{fields:?}");
        }
        let mut second = map(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        second.append("upgrade", HeaderValue::from_static("h2c"));
        assert!(!asks_upgrade(&second), "in another line as well");
    }

    #[test]
    fn what_the_next_hop_needs_is_made_anew_where_it_stood_and_as_it_was_spelled() {
        type Case = (Message, &'static [(&'static str, &'static str)], &'static [(&'static str, &'static str)]);
        const HTTP2: Message = Message::Request { http2: true, upgrade: false };
        const ANSWER: Message = Message::Answer { upgrade: false };
        const AGREED: Message = Message::Answer { upgrade: true };
        let cases: &[Case] = &[
            (
                UPGRADE,
                &[("connection", "Upgrade"), ("upgrade", "WebSocket"), ("a", "b")],
                &[("connection", "Upgrade"), ("upgrade", "WebSocket"), ("a", "b")],
            ),
            (
                UPGRADE,
                &[("a", "b"), ("upgrade", "websocket"), ("connection", "keep-alive, UPGRADE")],
                &[("a", "b"), ("upgrade", "websocket"), ("connection", "UPGRADE")],
            ),
            (
                UPGRADE,
                &[("connection", "close"), ("connection", "x,\tupgrade"), ("x", "1"), ("upgrade", "a, B/2")],
                &[("connection", "upgrade"), ("upgrade", "a, B/2")],
            ),
            (
                UPGRADE,
                &[("connection", "te, Upgrade"), ("te", "Trailers"), ("upgrade", "a")],
                &[("connection", "Upgrade, te"), ("te", "Trailers"), ("upgrade", "a")],
            ),
            (REQUEST, &[("te", "trailers"), ("a", "b")], &[("te", "trailers"), ("a", "b"), ("connection", "TE")]),
            (
                REQUEST,
                &[("connection", "TE, close"), ("te", "gzip;q=0.5, TRAILERS")],
                &[("connection", "TE"), ("te", "trailers")],
            ),
            (REQUEST, &[("connection", "TE"), ("te", "gzip")], &[]),
            (REQUEST, &[("connection", "upgrade"), ("upgrade", "websocket")], &[]),
            (HTTP2, &[("te", "trailers"), ("a", "b")], &[("te", "trailers"), ("a", "b")]),
            (ANSWER, &[("connection", "Upgrade"), ("upgrade", "h2,h2c"), ("te", "trailers")], &[]),
            (ANSWER, &[("x-outrigger-unprocessed", "connection_refused"), ("a", "b")], &[("a", "b")]),
            (AGREED, &[("a", "b"), ("x-outrigger-unprocessed", "")], &[("a", "b")]),
            (REQUEST, &[("x-outrigger-unprocessed", "connection_refused")], &[]),
            (
                AGREED,
                &[("upgrade", "TLS/1.0, HTTP/1.1")],
                &[("upgrade", "TLS/1.0, HTTP/1.1"), ("connection", "Upgrade")],
            ),
            (
                AGREED,
                &[("connection", "upgrade"), ("upgrade", "h2c, websocket")],
                &[("connection", "upgrade"), ("upgrade", "websocket")],
            ),
            (AGREED, &[("connection", "Upgrade"), ("upgrade", "h2c")], &[]),
        ];
        for (message, fields, expected) in cases {
            assert_eq!(cleaned(fields, Strip::HopByHop, *message), pairs(expected), "{message:?} {fields:?}");
        }
    }
}
