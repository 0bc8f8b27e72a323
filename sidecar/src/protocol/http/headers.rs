//! What a head may carry from one hop to the next (RFC 9110 section 7.6.1) and what a caller may not say about
//! itself. Pure. `HeaderMap::remove` changes the order of what stays, so a head that needs cleaning is rebuilt.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

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

/// Removes hop-by-hop fields, and with [`Strip::Identity`] every claim of an identity. `upgrade` is the protocol that
/// is being asked for and keeps its fields. Framing fields and Host cannot be nominated away by `Connection`.
pub fn clean(headers: &mut HeaderMap, strip: Strip, upgrade: bool) {
    if !headers.keys().any(|name| is_hop_by_hop(name) || strip.takes(name)) {
        return;
    }
    let trailers = accepts_trailers(headers);
    let nominated: Vec<HeaderName> = nominated(headers);
    let upgrade_to = if upgrade { headers.get(header::UPGRADE).cloned() } else { None };
    let mut kept = HeaderMap::with_capacity(headers.len());
    let mut last = None;
    for (name, value) in headers.drain() {
        let Some(name) = name.or_else(|| last.clone()) else { continue };
        last = Some(name.clone());
        if is_hop_by_hop(&name) || strip.takes(&name) || nominated.contains(&name) {
            continue;
        }
        kept.append(name, value);
    }
    if trailers {
        kept.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade_to {
        kept.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        kept.insert(header::UPGRADE, protocol);
    }
    *headers = kept;
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
        _ => matches!(name.as_str(), KEEP_ALIVE | PROXY_CONNECTION | HTTP2_SETTINGS),
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
    let Some(te) = headers.get(header::TE) else { return false };
    te.to_str().is_ok_and(|te| te.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")))
}

/// True when the request asks for a protocol that may pass: anything but h2c, with `Connection: upgrade`.
pub fn asks_upgrade(headers: &HeaderMap) -> bool {
    let Some((_, protocol)) = headers.iter().find(|(name, _)| **name == header::UPGRADE) else { return false };
    let names_h2c = protocol
        .to_str()
        .map_or(true, |text| text.split(',').any(|one| one.trim().to_ascii_lowercase().starts_with("h2c")));
    !names_h2c && nominated(headers).contains(&header::UPGRADE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        fields.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    fn cleaned(fields: &[(&'static str, &'static str)], strip: Strip, upgrade: bool) -> Vec<(String, String)> {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        clean(&mut headers, strip, upgrade);
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
            false,
        );
        let expected = pairs(&[
            ("host", "a"),
            ("accept", "*/*"),
            ("cookie", "a"),
            ("cookie", "b"),
            ("user-agent", "z"),
            ("te", "trailers"),
        ]);
        assert_eq!(got, expected);
    }

    #[test]
    fn host_and_framing_cannot_be_nominated_away() {
        let got = cleaned(
            &[("host", "a"), ("connection", "host, content-length, x-forwarded-client-cert"), ("content-length", "3")],
            Strip::HopByHop,
            false,
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
            false,
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
        ];
        for (fields, expected) in cases {
            assert_eq!(asks_upgrade(&map(fields)), *expected, "{fields:?}");
        }
        let got = cleaned(&[("connection", "upgrade"), ("upgrade", "websocket")], Strip::HopByHop, true);
        assert_eq!(got, pairs(&[("connection", "upgrade"), ("upgrade", "websocket")]));
    }
}
