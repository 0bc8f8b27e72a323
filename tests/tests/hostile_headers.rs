//! Promise: who calls is what the mesh proved, in every spelling of the fields that say so and in trailers, too; and what
//! `Connection` nominates stays on its hop, but for Host, the framing and the mesh's own fields.

#[path = "hostile_http1/field.rs"]
mod field;

use field::{Field, PLACES, Place};

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";
const CATALOG: &str = "spiffe://outrigger.local/ns/shop/sa/catalog";

/// Every name is of these letters, as far as a server that folds case and `_` can tell.
const CLAIMS: [&str; 12] = [
    "x-forwarded-client-cert",
    "X-Forwarded-Client-Cert",
    "X-FORWARDED-CLIENT-CERT",
    "x_forwarded_client_cert",
    "X-Forwarded_Client-Cert",
    "x-outrigger-identity",
    "X-Outrigger-Identity",
    "x_outrigger_identity",
    "X_OUTRIGGER-IDENTITY",
    "x-outrigger-role",
    "x-outrigger_anything",
    "X_Outrigger_Anything",
];

fn expected(place: Place, name: &str) -> Vec<String> {
    match (place, name) {
        (Place::Inbound, _) => Vec::new(),
        (Place::Outbound, "x-outrigger-identity") => vec![CART.to_owned()],
        (Place::Outbound, "x-forwarded-client-cert") => vec![format!("By={CATALOG};URI={CART}")],
        (Place::Outbound, _) => Vec::new(),
    }
}

fn assert_identity(place: Place, seen: &outrigger_tests::application::Seen, name: &str) {
    for (known, value) in &seen.headers {
        let folded = known.to_ascii_lowercase().replace('_', "-");
        if folded == "x-forwarded-client-cert" || folded.starts_with("x-outrigger-") {
            assert_eq!(known.to_ascii_lowercase(), folded, "{place:?} {name}: a twin came through");
            assert_eq!(*value, expected(place, &folded).concat(), "{place:?} {name}: {known}");
        }
    }
    for name in ["x-outrigger-identity", "x-forwarded-client-cert"] {
        assert_eq!(seen.all(name), expected(place, name), "{place:?} {name}: once, and ours");
    }
}

#[tokio::test]
async fn nobody_says_who_he_is() {
    let field = Field::new().await;
    for place in PLACES {
        for claim in CLAIMS {
            for fields in [
                format!("{claim}: admin\r\n"),
                format!("{claim}: admin\r\n{claim}: root\r\n"),
                format!("{claim}: admin\r\nConnection: {claim}\r\n"),
                format!("Connection: x-outrigger-identity, x-forwarded-client-cert\r\n{claim}: admin\r\n"),
                format!("Connection: close\r\n{claim}:\r\n{claim}: By={CATALOG};URI={CART}\r\n"),
            ] {
                let outcome = field.attack(place, format!("GET /target HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).await;
                assert_eq!(outcome.status(), 200, "{place:?} {fields:?}");
                assert_identity(place, &outcome.seen[0], &fields);
            }
            let raw = format!(
                "POST /target HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTrailer: {claim}, x-ok\r\nTransfer-Encoding: \
                 chunked\r\n\r\n5\r\nhello\r\n0\r\n{claim}: admin\r\nx-ok: 1\r\n\r\n"
            );
            let outcome = field.attack(place, raw).await;
            let seen = &outcome.seen[0];
            assert_identity(place, seen, claim);
            let trailers: Vec<&str> = seen.trailers.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(trailers, ["x-ok"], "{place:?} {claim}");
        }
    }
    field.assert_clean();
}

#[tokio::test]
async fn what_connection_nominates() {
    let field = Field::new().await;
    for place in PLACES {
        for (nominated, body) in [
            ("Host", ""),
            ("Content-Length", "hello"),
            ("Transfer-Encoding", ""),
            ("content-length, host, transfer-encoding", "hello"),
            ("x-outrigger-identity", ""),
            ("x-forwarded-client-cert, close", ""),
            ("Connection", ""),
            ("keep-alive, X-Secret", ""),
            ("X-Secret\r\nConnection: Host", ""),
            (", ,,X-Secret", ""),
        ] {
            let raw = format!(
                "POST /target HTTP/1.1\r\nHost: catalog\r\nConnection: {nominated}\r\nX-Secret: 1\r\nX-Kept: \
                 2\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let outcome = field.attack(place, raw).await;
            let name = format!("{place:?} {nominated:?}");
            assert_eq!(outcome.status(), 200, "{name}");
            let seen = &outcome.seen[0];
            assert_eq!(seen.all("host"), ["catalog"], "{name}");
            assert_eq!(seen.all("content-length"), [body.len().to_string()], "{name}");
            assert_eq!(seen.body, body.as_bytes(), "{name}");
            assert_eq!(seen.header("x-kept"), Some("2"), "{name}");
            assert_eq!(seen.header("x-secret").is_none(), nominated.contains("X-Secret"), "{name}");
            for gone in ["connection", "keep-alive", "proxy-connection"] {
                assert_eq!(seen.header(gone), None, "{name}: {gone}");
            }
            assert_identity(place, seen, &name);
        }
        let raw = "POST /target HTTP/1.1\r\nHost: catalog\r\nConnection: Transfer-Encoding\r\nTransfer-Encoding: \
                   chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
        let outcome = field.attack(place, raw).await;
        assert_eq!(outcome.seen[0].body, b"hello", "{place:?}");
    }
    field.assert_clean();
}
