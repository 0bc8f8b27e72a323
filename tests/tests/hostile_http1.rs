//! Promise: an HTTP/1.1 message that two parsers could read in two ways (RFC 9112 section 11.2) is refused, or becomes
//! exactly one clean request. A second request hidden in the first is never forwarded, from neither side of the mesh.

#[path = "hostile_http1/field.rs"]
mod field;

use field::{Field, PLACES};

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: catalog\r\n\r\n";

fn post(fields: &str, body: &str) -> String {
    format!("POST /target HTTP/1.1\r\nHost: catalog\r\n{fields}\r\n\r\n{body}")
}

#[tokio::test]
async fn two_framings() {
    let field = Field::new().await;
    let chunked = format!("5\r\nhello\r\n0\r\n\r\n{SMUGGLED}");
    let length = chunked.len();
    let lengths = [0, 3, 4, 6, length];
    for place in PLACES {
        for length in lengths {
            for fields in [
                format!("Content-Length: {length}\r\nTransfer-Encoding: chunked"),
                format!("Transfer-Encoding: chunked\r\nContent-Length: {length}"),
                format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\nContent-Length: {length}"),
                format!("Content-Length: {length}\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked"),
                format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\nConnection: Transfer-Encoding"),
                format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\nConnection: Content-Length"),
            ] {
                let name = format!("{place:?} {fields:?}");
                let outcome = field.attack(place, post(&fields, &chunked)).await;
                if outcome.seen.is_empty() {
                    outcome.assert_refused_early(&name, 400);
                } else {
                    assert_eq!(outcome.targets(), ["/target"], "{name}: the connection is closed after the answer");
                    let seen = &outcome.seen[0];
                    assert_eq!((seen.body.as_slice(), seen.header("content-length")), (&b"hello"[..], None), "{name}");
                }
            }
        }
        // HTTP/1.0 has no Transfer-Encoding.
        let old = post("Transfer-Encoding: chunked\r\nContent-Length: 3", &chunked).replacen("HTTP/1.1", "HTTP/1.0", 1);
        field.attack(place, old).await.assert_refused_early("HTTP/1.0", 400);
    }
    field.assert_clean();
}

/// Fields that some server takes for `Transfer-Encoding: chunked` and another does not.
const SPELLINGS: [&[u8]; 34] = [
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding\t: chunked",
    b" Transfer-Encoding: chunked",
    b"\tTransfer-Encoding: chunked",
    b"Transfer-Encoding:\tchunked",
    b"Transfer-Encoding:chunked",
    b"Transfer-Encoding:  chunked  ",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: chunked\x0b",
    b"Transfer-Encoding: \x0cchunked",
    b"Transfer-Encoding: \0chunked",
    b"Transfer-Encoding: chunked\0",
    b"Transfer-Encoding\0: chunked",
    b"Transfer-Encoding: \"chunked\"",
    b"Transfer-Encoding: 'chunked'",
    b"Transfer-Encoding: chunked;q=1",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding: identity, chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: chunked,",
    b"Transfer-Encoding: , chunked",
    b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding:\r\n chunked",
    b"Transfer-Encoding\r\n: chunked",
    b"X: x\nTransfer-Encoding: chunked",
    b"X: x\rTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\rX: x",
    b"Transfer-Encoding: \xffchunked",
    b"Transfer-Encod\xc4\xb1ng: chunked",
    b"Transfer_Encoding: chunked",
    b"Transfer-Encoding: xchunked",
];

#[tokio::test]
async fn spellings_of_transfer_encoding() {
    let field = Field::new().await;
    let body = format!("0\r\n\r\n{SMUGGLED}");
    for place in PLACES {
        for spelling in SPELLINGS {
            for length in [None, Some(body.len())] {
                let mut raw = b"POST /target HTTP/1.1\r\nHost: catalog\r\n".to_vec();
                if let Some(length) = length {
                    raw.extend_from_slice(format!("Content-Length: {length}\r\n").as_bytes());
                }
                raw.extend_from_slice(spelling);
                raw.extend_from_slice(b"\r\n\r\n");
                // Without a length the body must not be a request that follows rightly.
                raw.extend_from_slice(if length.is_some() { body.as_bytes() } else { b"0\r\n\r\n" });
                let outcome = field.attack(place, &raw).await;
                let name = format!("{place:?} {:?} {length:?}", String::from_utf8_lossy(spelling));
                outcome.assert_once_or_refused(&name, "/target");
            }
        }
    }
    field.assert_clean();
}

const LENGTHS: [&[u8]; 37] = [
    b"+5",
    b"-5",
    b"-0",
    b"0x5",
    b"5.0",
    b"5.",
    b"5e0",
    b"0b101",
    b"5,6",
    b"5, 6",
    b"6,5",
    b"5,",
    b",5",
    b"5;",
    b"5 5",
    b"0 5",
    b"\"5\"",
    b"five",
    b"",
    b"%35",
    b"5_0",
    b"005",
    b"5\x0b",
    b"5\0",
    b"\xd9\xa5",
    b"\xef\xbc\x95",
    b"NaN",
    b"9223372036854775808",
    b"9223372036854775813",
    b"18446744073709551615",
    b"18446744073709551616",
    b"18446744073709551621",
    b"340282366920938463463374607431768211461",
    b"5\r\n 5",
    b"\r\n 5",
    b"5\r\nContent-Length: 6",
    b"5\rContent-Length: 0",
];

#[tokio::test]
async fn values_of_content_length() {
    let field = Field::new().await;
    for place in PLACES {
        for value in LENGTHS {
            let mut raw = b"POST /target HTTP/1.1\r\nHost: catalog\r\nContent-Length: ".to_vec();
            raw.extend_from_slice(value);
            raw.extend_from_slice(format!("\r\n\r\nhello{SMUGGLED}").as_bytes());
            let name = format!("{place:?} {:?}", String::from_utf8_lossy(value));
            let outcome = field.attack(place, &raw).await;
            outcome.assert_refused_early(&name, 400);
        }
        for same in ["5\r\nContent-Length: 5", "5, 5"] {
            let outcome = field.attack(place, post(&format!("Content-Length: {same}"), "hello")).await;
            outcome.assert_once_or_refused(same, "/target");
            if let Some(seen) = outcome.seen.first() {
                assert_eq!((seen.all("content-length"), seen.body.as_slice()), (vec!["5"], &b"hello"[..]), "{same}");
            }
        }
        let twin = post("Content_Length: 5", "");
        field.attack(place, twin).await.assert_refused_early("content_length", 400);
    }
    field.assert_clean();
}

#[tokio::test]
async fn a_body_stays_a_body() {
    let field = Field::new().await;
    for place in PLACES {
        for method in ["GET", "HEAD", "DELETE", "OPTIONS", "TRACE", "PROPFIND"] {
            let length = SMUGGLED.len();
            for (framing, body) in [
                (format!("Content-Length: {length}"), SMUGGLED.to_owned()),
                ("Transfer-Encoding: chunked".to_owned(), format!("{length:x}\r\n{SMUGGLED}\r\n0\r\n\r\n")),
            ] {
                let raw = format!("{method} /target HTTP/1.1\r\nHost: catalog\r\n{framing}\r\n\r\n{body}");
                let outcome = field.attack(place, raw).await;
                let name = format!("{place:?} {method} {framing}");
                assert_eq!(outcome.targets(), ["/target", "/last"], "{name}");
                assert_eq!(outcome.seen[0].body, SMUGGLED.as_bytes(), "{name}");
                assert!(outcome.answers.iter().all(|answer| answer.status == 200), "{name}: {:?}", outcome.answers);
            }
        }
        for expect in ["y 100-continue", "100-continue, y", "100-continue\r\nExpect: y", "y", "", "100-continue;q=1"] {
            let raw = post(&format!("Expect: {expect}\r\nContent-Length: {}", SMUGGLED.len()), SMUGGLED);
            field.attack(place, raw).await.assert_refused_early(&format!("{place:?} Expect: {expect:?}"), 400);
        }
        // A rightful one gets its 100 and then its answer.
        let mut client = field.connect(place).await;
        client.send("POST /target HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await;
        assert_eq!(client.take_until(b"\r\n\r\n").await, b"HTTP/1.1 100 Continue\r\n\r\n", "{place:?}");
        client.send("hello").await;
        assert_eq!(client.response(false).await.text(), "POST /target 5\n");
    }
    field.assert_clean();
}

const BAD_CHUNKS: [&str; 50] = [
    "5\nhello\r\n0\r\n\r\n",
    "5\r\nhello\n0\r\n\r\n",
    "5\r\nhello\r\n0\n\r\n",
    "5\r\nhello\r\n0\r\n\n",
    "5\r\nhello\r\n0\n\n",
    "5;a\nhello\r\n0\r\n\r\n",
    "5;a=b\nX\r\nhello\r\n0\r\n\r\n",
    "5;a=\"\n\"\r\nhello\r\n0\r\n\r\n",
    "5;a\rb\r\nhello\r\n0\r\n\r\n",
    "5\r\nhello\r\n0;a\n\r\n",
    "0x5\r\nhello\r\n0\r\n\r\n",
    "+5\r\nhello\r\n0\r\n\r\n",
    "-5\r\nhello\r\n0\r\n\r\n",
    "5.0\r\nhello\r\n0\r\n\r\n",
    "5,5\r\nhello\r\n0\r\n\r\n",
    "5_0\r\nhello\r\n0\r\n\r\n",
    "\"5\"\r\nhello\r\n0\r\n\r\n",
    " 5\r\nhello\r\n0\r\n\r\n",
    "\t5\r\nhello\r\n0\r\n\r\n",
    "\r\n5\r\nhello\r\n0\r\n\r\n",
    "\r\nhello\r\n0\r\n\r\n",
    ";a=b\r\nhello\r\n0\r\n\r\n",
    "g\r\nhello\r\n0\r\n\r\n",
    "5 5\r\nhello\r\n0\r\n\r\n",
    "10000000000000005\r\nhello\r\n0\r\n\r\n",
    "ffffffffffffffff5\r\nhello\r\n0\r\n\r\n",
    "5\r\nhelloo\r\n0\r\n\r\n",
    "5\r\nhell\r\n0\r\n\r\n",
    "5\r\nhello0\r\n\r\n",
    "5\r\r\nhello\r\n0\r\n\r\n",
    "5\rhello\r\n0\r\n\r\n",
    "5\r\nhello\r\r\n0\r\n\r\n",
    "5\r\nhello\r\n0\r\n\rX",
    // Blanks that are none, and extensions that no grammar knows (RFC 9112 section 7.1.1).
    "5\r;a\r\nhello\r\n0\r\n\r\n",
    "5\x0c;a\r\nhello\r\n0\r\n\r\n",
    "5\x0b;a\r\nhello\r\n0\r\n\r\n",
    "5\u{a0};a\r\nhello\r\n0\r\n\r\n",
    "5\x0c\r\nhello\r\n0\r\n\r\n",
    "5\x0b\r\nhello\r\n0\r\n\r\n",
    "5 \r\nhello\r\n0\r\n\r\n",
    "5;\r\nhello\r\n0\r\n\r\n",
    "5;a=\r\nhello\r\n0\r\n\r\n",
    "5;a=\"b\r\nhello\r\n0\r\n\r\n",
    "5;a=\"b\\\"\r\nhello\r\n0\r\n\r\n",
    "5;a=\"\x0b\"\r\nhello\r\n0\r\n\r\n",
    "5;a\x0c=b\r\nhello\r\n0\r\n\r\n",
    "5;a b\r\nhello\r\n0\r\n\r\n",
    "5\r\nhello\r\n0\r;a\r\n\r\n",
    "5\r\nhello\r\n0\x0c;a\r\n\r\n",
    "5\r\nhello\r\n0;\r\n\r\n",
];

#[tokio::test]
async fn chunks() {
    let field = Field::new().await;
    for place in PLACES {
        for body in BAD_CHUNKS {
            let raw = post("Transfer-Encoding: chunked", &format!("{body}{SMUGGLED}"));
            let outcome = field.attack(place, raw).await;
            let name = format!("{place:?} {body:?}");
            outcome.assert_refused(&name);
            assert!(!outcome.targets().contains(&"/smuggled"), "{name}: {:?}", outcome.seen);
        }
        // Odd and allowed: extensions end here.
        for body in [
            "5;a=b\r\nhello\r\n0\r\n\r\n",
            "5 ;a\t= \"\\\";\"\r\nhello\r\n000;x=\"y\"\r\n\r\n",
            "0005\r\nhello\r\n0\r\n\r\n",
        ] {
            let outcome = field.attack(place, post("Transfer-Encoding: chunked", body)).await;
            assert_eq!(
                (outcome.targets(), &*outcome.seen[0].body),
                (vec!["/target", "/last"], &b"hello"[..]),
                "{body:?}"
            );
        }
        // 16 KiB of extensions, in one chunk or in many, are the most.
        let many = format!("1;{}\r\nx\r\n", "a".repeat(60)).repeat(400);
        for body in [format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(17_000)), format!("{many}0\r\n\r\n")] {
            field.attack(place, post("Transfer-Encoding: chunked", &body)).await.assert_refused("extensions");
        }
    }
    field.assert_clean();
}

#[tokio::test]
async fn trailers() {
    let field = Field::new().await;
    let names = "X-Ok, Transfer-Encoding, Content-Length, Host, X-Outrigger-Identity, Authorization";
    for place in PLACES {
        let section = "X-Ok: 1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\nHost: evil\r\nX-Outrigger-Identity: \
                       a\r\nX_Outrigger_Identity: b\r\nX-Forwarded-Client-Cert: c\r\nAuthorization: d\r\nConnection: \
                       close\r\n";
        let raw = post(
            &format!("Trailer: {names}\r\nTE: trailers\r\nTransfer-Encoding: chunked"),
            &format!("5\r\nhello\r\n0\r\n{section}\r\n"),
        );
        let outcome = field.attack(place, raw).await;
        assert_eq!(
            (outcome.targets(), outcome.status()),
            (vec!["/target", "/last"], 200),
            "{place:?}: what follows trailers is the next request"
        );
        let seen = &outcome.seen[0];
        let got: Vec<String> = seen.trailers.iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
        assert!(got == ["x-ok"], "{place:?}: {:?}", seen.trailers);
        assert_eq!(seen.header("x-ok"), None, "never merged into the head");
        assert_eq!((seen.all("host"), seen.header("authorization")), (vec!["catalog"], None));
        assert!(!seen.all("x-outrigger-identity").contains(&"a"));
        for (name, section) in [
            ("no colon", "X-Ok\r\n".to_owned()),
            ("space before the colon", "X-Ok : 1\r\n".to_owned()),
            ("fold", "X-Ok: 1\r\n 2\r\n".to_owned()),
            ("NUL", "X-Ok: \0\r\n".to_owned()),
            ("one of 17 KB", format!("X-Ok: {}\r\n", "a".repeat(17_000))),
            ("many", "X-Ok: 1\r\n".repeat(101)),
            ("2 MB", format!("X-Ok: {}\r\n", "a".repeat(1000)).repeat(2000)),
        ] {
            let body = format!("5\r\nhello\r\n0\r\n{section}\r\n{SMUGGLED}");
            let outcome = field.attack(place, post("Trailer: X-Ok\r\nTransfer-Encoding: chunked", &body)).await;
            let name = format!("{place:?} {name}");
            outcome.assert_refused(&name);
            assert!(!outcome.targets().contains(&"/smuggled"), "{name}");
        }
    }
    field.assert_clean();
}
