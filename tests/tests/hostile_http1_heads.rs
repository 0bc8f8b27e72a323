//! Promise: an HTTP/1.1 head that breaks the syntax is refused or arrives normalised, Host is one, the protocol switches
//! only when that was asked for and agreed to, and a head that is too large or too slow costs little and nobody else.

#[path = "hostile_http1/field.rs"]
mod field;

use std::time::{Duration, Instant};

use field::{Field, PLACES, Place, resident};
use outrigger_tests::Connection;
use outrigger_tests::application::Backend;
use outrigger_tests::eventually::soon;
use tokio::sync::Mutex;

/// What measures memory runs one at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

const MIB: usize = 1024 * 1024;
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: catalog\r\n\r\n";

const LINES: [&[u8]; 44] = [
    b"GET /target HTTP/1.1\nHost: catalog\n\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\n\r\n",
    b"GET /target HTTP/1.1\rHost: catalog\r\r",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX: a\rb\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX: a\r\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX: a\0b\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX\0: a\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX Y: a\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX : a\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX\t: a\r\n\r\n",
    b"GET /target HTTP/1.1\r\n Host: catalog\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX: a\r\n b\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\n: a\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX(y): a\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\n\xc3\xa4: a\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX: a\x7f\r\n\r\n",
    b"GET /target HTTP/1.1\r\nHost: catalog\r\nX: a\x01\r\n\r\n",
    b"GET /target\r\n\r\n",
    b"GET /target\r\nHost: catalog\r\n\r\n",
    b"GET /target HTTP/0.9\r\nHost: catalog\r\n\r\n",
    b"GET /target HTTP/1.2\r\nHost: catalog\r\n\r\n",
    b"GET /target HTTP/1.10\r\nHost: catalog\r\n\r\n",
    b"GET /target HTTP/2.0\r\nHost: catalog\r\n\r\n",
    b"GET /target HTTP/01.1\r\nHost: catalog\r\n\r\n",
    b"GET /target http/1.1\r\nHost: catalog\r\n\r\n",
    b"GET /target HTTP/1.1 \r\nHost: catalog\r\n\r\n",
    b"GET /target HTTP/1.1 x\r\nHost: catalog\r\n\r\n",
    b"GET  /target HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET /target  HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET\t/target\tHTTP/1.1\r\nHost: catalog\r\n\r\n",
    b" GET /target HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"G\0T /target HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"G(T /target HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET /tar get HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET /tar\x01get HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET /tar\0get HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET /tar\x7fget HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET /tar\rget HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET /target#fragment HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET target HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"GET ?target HTTP/1.1\r\nHost: catalog\r\n\r\n",
    b"\0GET /target HTTP/1.1\r\nHost: catalog\r\n\r\n",
];

#[tokio::test]
async fn lines() {
    let field = Field::new().await;
    for place in PLACES {
        for raw in LINES {
            let name = format!("{place:?} {:?}", String::from_utf8_lossy(raw));
            // Ends by itself also where the parser waits for more.
            let outcome = soon(&name, field.attack(place, [raw, b"\r\n\r\n"].concat())).await;
            outcome.assert_once_or_refused(&name, "/target");
        }
        let outcome = field.attack(place, "OPTIONS * HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
        assert_eq!(outcome.targets(), ["*", "/last"], "{place:?}");
    }
    field.assert_clean();
}

#[tokio::test]
async fn host() {
    let field = Field::new().await;
    for place in PLACES {
        for (target, hosts) in [
            ("/target", ""),
            ("/target", "Host: catalog\r\nHost: catalog\r\n"),
            ("/target", "Host: catalog\r\nHost: evil\r\n"),
            ("/target", "Host: catalog\r\nhost: evil\r\n"),
            ("/target", "Host:\r\nHost:\r\n"),
            ("/target", "Host: catalog/path\r\n"),
            ("/target", "Host: cata log\r\n"),
            ("/target", "Host: catalog evil\r\n"),
            ("/target", "Host: cata\0log\r\n"),
            ("/target", "Host: catalog, evil:80:80\r\n"),
            ("/target", "Host: catalog:port\r\n"),
            ("/target", "Host: catalog:-80\r\n"),
            ("/target", "Host: catalog:+80\r\n"),
            ("/target", "Host: catalog:65536\r\n"),
            ("/target", "Host: catalog:80:80\r\n"),
            ("/target", "Host: :80\r\n"),
            ("/target", "Host: user@catalog\r\n"),
            ("/target", "Host: http://catalog\r\n"),
            ("/target", "Host: catalog#x\r\n"),
            ("/target", "Host: catalog?x\r\n"),
            ("/target", "Host: cata\\log\r\n"),
            ("/target", "Host: [::1\r\n"),
            ("/target", "Host: [::1]x\r\n"),
            ("/target", "Host: c\u{e4}talog\r\n"),
            ("/target", "Host : catalog\r\n"),
            ("/target#x", "Host: catalog\r\n"),
            ("/target?q#", "Host: catalog\r\n"),
            ("http://catalog/target#x", "Host: catalog\r\n"),
            ("http://catalog#x", "Host: catalog\r\n"),
            ("#x", "Host: catalog\r\n"),
            ("http://user@catalog/target", "Host: catalog\r\n"),
            ("http://catalog/target", ""),
            ("http:///target", "Host: catalog\r\n"),
            ("catalog:80", "Host: catalog\r\n"),
            ("//catalog:x/", "Host: cata log\r\n"),
        ] {
            let name = format!("{place:?} {target} {hosts:?}");
            let outcome = field.attack(place, format!("GET {target} HTTP/1.1\r\n{hosts}\r\n")).await;
            outcome.assert_refused_early(&name, 400);
        }
        for (target, host, expected) in [
            ("http://other:81/target?q", "catalog", "other:81"),
            ("HTTP://OTHER/target?q", "catalog", "OTHER"),
            ("/target?q", "[::1]:80", "[::1]:80"),
            // A client whose target has no authority sends an empty one (RFC 9112 section 3.2).
            ("/target?q", "", ""),
        ] {
            let name = format!("{place:?} {target} {host}");
            let raw = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let outcome = field.attack(place, raw).await;
            assert_eq!(outcome.targets(), ["/target?q", "/last"], "{name}: {:?}", outcome.answers);
            assert_eq!(outcome.seen[0].all("host"), [expected], "{name}: absolute-form replaces Host");
        }
    }
    field.assert_clean();
}

#[tokio::test]
async fn upgrades() {
    let field = Field::new().await;
    for place in PLACES {
        // Answered with something else than 101, what follows is HTTP and no tunnel.
        for protocol in ["h2c", "foo", "websocket", "h2c, websocket", "websocket, h2c", "H2C", "TLS/1.0"] {
            for status in [200, 426] {
                let target = format!("/status/{status}");
                let raw = format!(
                    "GET {target} HTTP/1.1\r\nHost: catalog\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: \
                     {protocol}\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
                );
                let name = format!("{place:?} {protocol} {status}");
                let outcome = field.attack(place, raw).await;
                assert_eq!(outcome.targets(), [&target, "/last"], "{name}");
                let seen = &outcome.seen[0];
                assert_eq!(seen.header("http2-settings"), None, "{name}");
                let h2c = protocol.to_ascii_lowercase().contains("h2c");
                assert_eq!(seen.header("upgrade"), (!h2c).then_some(protocol), "{name}");
                let plain = !seen.all("connection").iter().any(|value| value.eq_ignore_ascii_case("upgrade"));
                assert_eq!(plain, h2c, "{name}: {:?}", seen.headers);
                let statuses: Vec<u16> = outcome.answers.iter().map(|answer| answer.status).collect();
                assert_eq!(statuses, [status, 200], "{name}");
            }
        }
        // Not asked for in due form: the field stays on its hop.
        let raw = "GET /upgrade HTTP/1.1\r\nHost: catalog\r\nUpgrade: websocket\r\n\r\n";
        let outcome = field.attack(place, raw).await;
        assert_eq!((outcome.status(), outcome.seen[0].header("upgrade")), (200, None), "{place:?}");
        // CONNECT is for the forward proxy.
        for target in ["catalog:80", "127.0.0.1:22", "/target", "http://catalog/"] {
            let raw = format!("CONNECT {target} HTTP/1.1\r\nHost: catalog\r\n\r\n{SMUGGLED}");
            let outcome = field.attack(place, raw).await;
            assert!([400, 405].contains(&outcome.status()), "{place:?} {target}: {:?}", outcome.answers);
            let status = outcome.status();
            outcome.assert_refused_early(&format!("{place:?} CONNECT {target}"), status);
        }
        // And rightly: raw bytes both ways, whatever they look like.
        let mut client = field.connect(place).await;
        let raw = "GET /upgrade HTTP/1.1\r\nHost: catalog\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        assert_eq!(client.ask(raw).await.status, 101, "{place:?}");
        client.send(SMUGGLED).await;
        assert_eq!(client.take(SMUGGLED.len()).await, SMUGGLED.as_bytes());
    }
}

/// A 101 that nobody asked for opens nothing (CVE-2026-2833), nor does a second request that came along with the first.
#[tokio::test]
async fn a_switch_that_was_not_asked_for() {
    let backend = Backend::start().await;
    let mesh = outrigger_tests::Mesh::start(outrigger_tests::MeshOptions::permissive()).await;
    let far = mesh.sidecar("catalog-1").inbound(backend.address());
    let far = far.port(backend.port(), Some(outrigger_api::name::Protocol::Http)).start().await;
    let mut client = Connection::open(far.address(&format!("inbound:{}", backend.port()))).await;
    client.send("GET / HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
    let mut served = backend.accept().await;
    served.take_until(b"\r\n\r\n").await;
    served.send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: foo\r\n\r\n").await;
    let answer = client.response(false).await;
    assert_eq!((answer.status, answer.reason().as_str()), (502, "upstream_protocol"));
    // Bytes that come before the 101 are not forwarded as long as nobody agreed.
    let mut client = Connection::open(far.address(&format!("inbound:{}", backend.port()))).await;
    let asked = "GET / HTTP/1.1\r\nHost: catalog\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    client.send(format!("{asked}{SMUGGLED}")).await;
    let mut served = backend.accept().await;
    let head = served.take_until(b"\r\n\r\n").await;
    assert!(head.starts_with(b"GET / "), "{}", outrigger_tests::wire::text(&head));
    assert!(served.stays_silent(Duration::from_millis(100)).await, "{:?}", served.ahead());
    served.send("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    assert_eq!(client.response(false).await.status, 403);
}

#[tokio::test]
async fn sizes() {
    let _alone = ALONE.lock().await;
    let field = Field::new().await;
    for place in PLACES {
        let head = |target: &str, fields: &str| format!("GET {target} HTTP/1.1\r\nHost: catalog\r\n{fields}\r\n");
        let long = |count: usize| "a".repeat(count);
        // Within the limits.
        for (name, raw) in [
            ("a target of 16,000", head(&format!("/{}", long(15_999)), "")),
            ("a head of 60 KiB", head("/target", &format!("X: {}\r\n", long(60_000)))),
            ("99 fields", head("/target", &"X: a\r\n".repeat(98))),
        ] {
            assert_eq!(field.attack(place, raw).await.status(), 200, "{place:?} {name}");
        }
        for (name, status, raw) in [
            ("a target of 16 KiB and more", 414, head(&format!("/{}", long(16 * 1024)), "")),
            ("a target of 20,000", 414, head(&format!("/?{}", long(20_000)), "")),
            ("101 fields", 431, head("/target", &"X: a\r\n".repeat(100))),
            ("a head of 70 KiB", 431, head("/target", &format!("X: {}\r\n", long(70 * 1024)))),
            ("a head of 70 KiB in small fields", 431, head("/target", &format!("X: {}\r\n", long(1000)).repeat(70))),
        ] {
            field.attack(place, raw).await.assert_refused_early(&format!("{place:?} {name}"), status);
        }
        // So large that the answer may be lost with the connection.
        let before = resident();
        for (name, raw) in [
            ("a field of 1 MiB", head("/target", &format!("X: {}\r\n", long(MIB)))),
            ("a target of 1 MiB", head(&format!("/{}", long(MIB)), "")),
            ("a method of 1 MiB", format!("{} /target HTTP/1.1\r\nHost: catalog\r\n\r\n", long(MIB))),
            ("a name of 1 MiB", head("/target", &format!("{}: a\r\n", long(MIB)))),
            ("20,000 fields", head("/target", &"X: a\r\n".repeat(20_000))),
            ("an endless field", head("/target", &format!("X: {}", long(16 * MIB)))),
            ("endless CRLF", "\r\n".repeat(MIB)),
            ("an endless method", long(16 * MIB)),
        ] {
            let begun = Instant::now();
            let outcome = field.attack(place, raw).await;
            let name = format!("{place:?} {name}");
            outcome.assert_refused(&name);
            assert!(outcome.seen.is_empty(), "{name}: {:?}", outcome.targets());
            assert!(begun.elapsed() < Duration::from_secs(5), "{name}: early");
        }
        let grown = resident().saturating_sub(before);
        // The test's own 16 MiB among it.
        assert!(grown < 64 * MIB, "{place:?}: grew by {grown} bytes");
    }
    field.assert_clean();
}

#[tokio::test]
async fn slowness() {
    let _alone = ALONE.lock().await;
    let field = Field::with(|limits| limits.head_timeout = Duration::from_millis(1500)).await;
    for place in PLACES {
        let before = resident();
        let mut slow = Vec::new();
        for begin in ["G", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: a\r\nX: ", "POST / HTTP/1.1\r\nHo"].repeat(25)
        {
            let mut client = field.connect(place).await;
            client.send(begin).await;
            slow.push(client);
        }
        // Bytes that trickle do not prolong it.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(600) {
            for client in slow.iter_mut().skip(2).step_by(4) {
                client.send("a").await;
            }
            let asked = Instant::now();
            assert_eq!(
                field.attack(place, "GET /target HTTP/1.1\r\nHost: a\r\n\r\n").await.targets(),
                ["/target", "/last"]
            );
            assert!(asked.elapsed() < Duration::from_secs(2), "others are served meanwhile");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for (index, client) in slow.iter_mut().enumerate() {
            let answer = client.response(false).await;
            assert_eq!((answer.status, answer.reason().as_str()), (408, "request_head_timeout"), "{place:?} {index}");
            client.expect_end().await;
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(6), "{place:?}: {took:?}");
        let grown = resident().saturating_sub(before);
        assert!(grown < 16 * MIB, "{place:?}: grew by {grown} bytes for 100 slow heads");
        // The second head of a connection has its own time.
        let mut client = field.connect(place).await;
        assert_eq!(client.ask("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status, 200);
        client.send("GET / HTTP/1.1\r\n").await;
        assert_eq!(client.response(false).await.status, 408, "{place:?}");
    }
}

/// A request whose answer comes before its body ends: the rest stays a body, or the connection is given up.
#[tokio::test]
async fn an_answer_before_the_body() {
    let backend = Backend::start().await;
    let mesh = outrigger_tests::Mesh::start(outrigger_tests::MeshOptions::permissive()).await;
    mesh.service("catalog.shop", 80, backend.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(backend.address());
    let far = far.port(backend.port(), Some(outrigger_api::name::Protocol::Http)).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let inbound = far.address(&format!("inbound:{}", backend.port()));
    for (place, address) in [(Place::Outbound, near.outbound()), (Place::Inbound, inbound)] {
        let mut client = Connection::open(address).await;
        client.send("POST /early HTTP/1.1\r\nHost: catalog\r\nContent-Length: 1000\r\n\r\nfirst").await;
        let mut served = backend.accept().await;
        served.take_until(b"first").await;
        served.send("HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno").await;
        assert_eq!(client.response(false).await.status, 403, "{place:?}");
        // Somebody else's request does not land in that body.
        let mut other = Connection::open(address).await;
        other.send("GET /other HTTP/1.1\r\nHost: catalog\r\n\r\n").await;
        let mut fresh = backend.accept().await;
        assert!(fresh.take_until(b"\r\n\r\n").await.starts_with(b"GET /other "), "{place:?}");
        fresh.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await;
        assert_eq!(other.response(false).await.text(), "ok", "{place:?}");
        // The rest of the body is no request, neither there nor here.
        let mut rest = SMUGGLED.as_bytes().to_vec();
        rest.resize(995, b'x');
        let _ = client.try_send(&rest).await;
        drop(client);
        let (body, _) = served.take_to_end().await;
        assert!(
            body.is_empty() || body.starts_with(SMUGGLED.as_bytes()),
            "{place:?}: {:?}",
            String::from_utf8_lossy(&body)
        );
        assert!(backend.accepted().await.is_none(), "{place:?}: nothing else was sent");
    }
}
