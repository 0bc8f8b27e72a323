//! Promise: fields pass through a pair of sidecars as RFC 9110 and RFC 9112 have a proxy pass them, and in the letters in
//! which they came: Connection, Upgrade and TE, the head of a 101, Date, Host, Max-Forwards, targets in absolute form.

use std::net::SocketAddr;

use outrigger_api::name::Protocol;
use outrigger_tests::application::Backend;
use outrigger_tests::grpc::Http2;
use outrigger_tests::{Application, Connection, Mesh, MeshOptions, Sidecar, wire};

/// How a client comes to the application.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// Through both sidecars.
    Pair,
    /// Through both, by the forward proxy.
    Proxy,
    /// In plaintext to the sidecar of the application.
    Plaintext,
}

const WAYS: [Way; 3] = [Way::Pair, Way::Proxy, Way::Plaintext];

struct Field {
    near: Sidecar,
    far: Sidecar,
    app: SocketAddr,
    _mesh: Mesh,
}

impl Field {
    async fn new(app: SocketAddr) -> Field {
        let mesh = Mesh::start(MeshOptions::permissive()).await;
        mesh.service("catalog.shop", 80, app.port(), Some("http"));
        let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app);
        let far = far.port(app.port(), Some(Protocol::Http)).start().await;
        let near = mesh.sidecar("cart-1").outbound("catalog:80").http_proxy().start().await;
        Field { near, far, app, _mesh: mesh }
    }

    async fn client(&self, way: Way) -> Connection {
        let address = match way {
            Way::Pair => self.near.outbound(),
            Way::Proxy => self.near.http_proxy(),
            Way::Plaintext => self.far.address(&format!("inbound:{}", self.app.port())),
        };
        Connection::open(address).await
    }
}

fn head(way: Way, method: &str, path: &str, fields: &str) -> String {
    let target = if way == Way::Proxy { "http://catalog" } else { "" };
    format!("{method} {target}{path} HTTP/1.1\r\nHost: catalog\r\n{fields}\r\n")
}

/// The lines of a head, without those that the mesh adds.
fn lines(head: &[u8]) -> Vec<String> {
    let added = ["x-forwarded-client-cert", "x-outrigger-identity", "date"];
    let is_added = |line: &&str| line.split_once(':').is_some_and(|(name, _)| added.contains(&name));
    let text = wire::text(head);
    text.trim_end_matches("\r\n").split("\r\n").filter(|line| !is_added(line)).map(str::to_owned).collect()
}

#[tokio::test]
async fn requests_that_go_on() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address()).await;
    // What is sent between Host and the empty line, and what arrives there.
    let cases: [(&str, &[&str]); 12] = [
        (
            "Connection: Upgrade\r\nUpgrade: WebSocket\r\nX-A: b",
            &["Connection: Upgrade", "Upgrade: WebSocket", "X-A: b"],
        ),
        ("UPGRADE: websocket\r\nCONNECTION: UpGrade", &["UPGRADE: websocket", "CONNECTION: UpGrade"]),
        ("Connection: keep-alive, Upgrade\r\nUpgrade: foo/2, Bar", &["Connection: Upgrade", "Upgrade: foo/2, Bar"]),
        ("Connection: close\r\nConnection: upgrade\r\nUpgrade: a", &["Connection: upgrade", "Upgrade: a"]),
        ("Upgrade: websocket", &[]),
        ("Connection: Upgrade\r\nUpgrade: h2c", &[]),
        ("Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c", &[]),
        ("TE: trailers\r\nConnection: TE\r\nX-A: b", &["TE: trailers", "Connection: TE", "X-A: b"]),
        ("te: gzip, Trailers\r\nX-A: b", &["te: trailers", "X-A: b", "connection: TE"]),
        ("TE: gzip\r\nConnection: te", &[]),
        ("Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nConnection: X-A\r\nX-A: b\r\nX-B: c", &["X-B: c"]),
        ("Max-Forwards: 0\r\nConnection: keep-alive", &["Max-Forwards: 0"]),
    ];
    for way in WAYS {
        for (sent, expected) in cases {
            let mut client = field.client(way).await;
            client.send(head(way, "GET", "/", &format!("{sent}\r\n"))).await;
            let mut app = backend.accept().await;
            let got = lines(&app.take_until(b"\r\n\r\n").await);
            assert_eq!(got[..2], ["GET / HTTP/1.1", "Host: catalog"], "{way:?} {sent:?}");
            assert_eq!(got[2..], *expected, "{way:?} {sent:?}");
            app.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
            assert_eq!(client.response(false).await.status, 200, "{way:?} {sent:?}");
        }
    }
}

#[tokio::test]
async fn answers_that_go_on() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address()).await;
    // The head that the application sends, and that the client gets.
    let cases: [(&str, &[&str]); 9] = [
        (
            "HTTP/1.1 101 Now We Talk\r\nSec-WebSocket-Accept: x\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\nX-lower: Y",
            &[
                "HTTP/1.1 101 Now We Talk",
                "Sec-WebSocket-Accept: x",
                "Upgrade: WebSocket",
                "Connection: Upgrade",
                "X-lower: Y",
            ],
        ),
        (
            "HTTP/1.1 101 \r\nUPGRADE: websocket\r\nCONNECTION: upgrade",
            &["HTTP/1.1 101 ", "UPGRADE: websocket", "CONNECTION: upgrade"],
        ),
        (
            "HTTP/1.1 426 Upgrade Required\r\nConnection: Upgrade\r\nUpgrade: TLS/1.0, HTTP/1.1\r\nContent-Length: 0",
            &[
                "HTTP/1.1 426 Upgrade Required",
                "Connection: Upgrade",
                "Upgrade: TLS/1.0, HTTP/1.1",
                "Content-Length: 0",
            ],
        ),
        (
            "HTTP/1.1 426 Upgrade Required\r\nUpgrade: WebSocket\r\nContent-Length: 0\r\nConnection: upgrade, close",
            &["HTTP/1.1 426 Upgrade Required", "Upgrade: WebSocket", "Content-Length: 0", "Connection: upgrade"],
        ),
        (
            "HTTP/1.1 426 Upgrade Required\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0",
            &["HTTP/1.1 426 Upgrade Required", "Content-Length: 0"],
        ),
        (
            "HTTP/1.1 200 OK\r\nConnection: Upgrade\r\nUpgrade: h2,h2c\r\nContent-Length: 0",
            &["HTTP/1.1 200 OK", "Content-Length: 0"],
        ),
        (
            "HTTP/1.1 200 Fine\r\nX-XSS-Protection : 1\r\nx-tab\t \t:\t2\t\r\nSERVER  : A\r\nContent-Length : 0",
            &["HTTP/1.1 200 Fine", "X-XSS-Protection: 1", "x-tab: 2", "SERVER: A", "Content-Length: 0"],
        ),
        (
            "HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nTE: trailers\r\nContent-Length: 0",
            &["HTTP/1.1 200 OK", "Content-Length: 0"],
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: \r\ny:z",
            &["HTTP/1.1 200 OK", "Content-Length: 0", "X: ", "y: z"],
        ),
    ];
    for way in WAYS {
        for (sent, expected) in cases {
            let mut client = field.client(way).await;
            client.send(head(way, "GET", "/", "Connection: Upgrade\r\nUpgrade: WebSocket\r\n")).await;
            let mut app = backend.accept().await;
            app.take_until(b"\r\n\r\n").await;
            app.send(format!("{sent}\r\n\r\n")).await;
            let got = client.take_until(b"\r\n\r\n").await;
            assert_eq!(lines(&got), *expected, "{way:?} {sent:?}");
            let dated = wire::text(&got).contains("\r\ndate: ");
            assert_eq!(dated, !sent.contains(" 101 "), "{way:?}: {:?}", wire::text(&got));
        }
    }
}

#[tokio::test]
async fn blanks_behind_the_names_of_trailers_are_removed_from_answers() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address()).await;
    for way in WAYS {
        for (section, expected) in [
            ("X-Sum : 1\r\nX-Two\t :  2\r\n", Some(vec![("x-sum", "1"), ("x-two", "2")])),
            ("X-Sum: a : b\r\n", Some(vec![("x-sum", "a : b")])),
            (" X-Sum: 1\r\n", None),
            ("X Y : 1\r\n", None),
            (" : 1\r\n", None),
        ] {
            let mut client = field.client(way).await;
            client.send(head(way, "GET", "/", "TE: trailers\r\nConnection: TE\r\n")).await;
            let mut app = backend.accept().await;
            app.take_until(b"\r\n\r\n").await;
            let chunks = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\nok\r\n0\r\n";
            app.send(format!("{chunks}{section}\r\n")).await;
            let answer = client.response(false).await;
            assert_eq!(answer.is_whole(), expected.is_some(), "{way:?} {section:?}");
            if let Some(expected) = expected {
                let got: Vec<(String, &str)> =
                    answer.trailers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.as_str())).collect();
                let got: Vec<(&str, &str)> = got.iter().map(|(name, value)| (name.as_str(), *value)).collect();
                assert_eq!(got, expected, "{way:?} {section:?}");
            }
        }
    }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`
fn is_date(text: &str) -> bool {
    text.len() == 29 && text.ends_with(" GMT") && text.as_bytes()[3] == b',' && text.as_bytes()[19] == b':'
}

#[tokio::test]
async fn an_answer_without_a_date_gets_one() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address()).await;
    for way in WAYS {
        for status in ["200 OK", "204 No Content", "304 Not Modified", "404 Not Found", "500 Internal Server Error"] {
            for own in [None, Some("Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"), Some("DATE: yesterday\r\n")] {
                let mut client = field.client(way).await;
                client.send(head(way, "GET", "/", "")).await;
                let mut app = backend.accept().await;
                app.take_until(b"\r\n\r\n").await;
                app.send("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n").await;
                let length = if status.starts_with(['4', '5']) { "Content-Length: 0\r\n" } else { "" };
                let length = if status.starts_with("200") { "Content-Length: 0\r\n" } else { length };
                app.send(format!("HTTP/1.1 {status}\r\n{}{length}\r\n", own.unwrap_or_default())).await;
                drop(app);
                let answer = client.response(false).await;
                let name = format!("{way:?} {status} {own:?}: {answer:?}");
                let dates: Vec<&str> = answer
                    .headers
                    .iter()
                    .filter(|(name, _)| name.eq_ignore_ascii_case("date"))
                    .map(|(_, value)| value.as_str())
                    .collect();
                match own {
                    None => assert!(dates.len() == 1 && is_date(dates[0]), "{name}"),
                    Some(own) => assert_eq!(dates, [own.trim_end().split_once(": ").unwrap().1], "{name}"),
                }
                assert_eq!(answer.interim[0].header("date"), None, "{name}");
            }
        }
        // Answers of the mesh itself.
        for (request, status) in [("GET / HTTP/1.1\r\n\r\n", 400), ("G@T / HTTP/1.1\r\nHost: a\r\n\r\n", 400)] {
            let answer = field.client(way).await.ask(request).await;
            assert_eq!(answer.status, status, "{way:?} {request:?}");
            assert!(answer.header("date").is_some_and(is_date), "{way:?} {request:?}: {answer:?}");
        }
    }
}

#[tokio::test]
async fn targets_in_absolute_form() {
    let app = Application::start("catalog").await;
    let field = Field::new(app.address()).await;
    for way in WAYS {
        for (method, target, expected) in [
            ("OPTIONS", "http://catalog", "*"),
            ("OPTIONS", "http://catalog:80", "*"),
            ("OPTIONS", "http://catalog/", "/"),
            ("OPTIONS", "http://catalog?a", "/?a"),
            ("OPTIONS", "http://catalog/*", "/*"),
            ("GET", "http://catalog", "/"),
            ("GET", "http://catalog:80", "/"),
            ("GET", "http://catalog?a=1", "/?a=1"),
            ("GET", "http://catalog:80?a=/b", "/?a=/b"),
            ("GET", "http://catalog/?a=1", "/?a=1"),
            ("GET", "http://catalog//?a=1", "//?a=1"),
            ("GET", "http://catalog/a?http://b", "/a?http://b"),
        ] {
            app.forget();
            let mut client = field.client(way).await;
            let answer = client.ask(format!("{method} {target} HTTP/1.1\r\nHost: other\r\n\r\n")).await;
            assert_eq!(answer.status, 200, "{way:?} {method} {target}");
            let authority = target.trim_start_matches("http://").split(['/', '?']).next().unwrap();
            let seen = app.last();
            assert_eq!(
                (seen.target.as_str(), seen.all("host")),
                (expected, vec![authority]),
                "{way:?} {method} {target}"
            );
        }
    }
}

#[tokio::test]
async fn an_empty_host_is_one() {
    let app = Application::start("catalog").await;
    let field = Field::new(app.address()).await;
    for way in [Way::Pair, Way::Plaintext] {
        for (version, host) in [("1.1", "Host:"), ("1.1", "Host: "), ("1.1", "host:\t"), ("1.0", "Host:")] {
            app.forget();
            let mut client = field.client(way).await;
            let answer = client.ask(format!("GET /x HTTP/{version}\r\n{host}\r\n\r\n")).await;
            assert_eq!(answer.status, 200, "{way:?} {host:?}");
            assert_eq!(app.last().all("host"), [""], "{way:?} {host:?}");
        }
    }
}

/// Each sidecar is an intermediary, and counts one hop.
#[tokio::test]
async fn max_forwards_is_counted_down() {
    let app = Application::start("catalog").await;
    let field = Field::new(app.address()).await;
    for way in WAYS {
        let (hops, last) = if way == Way::Plaintext { (1, "catalog-1") } else { (2, "catalog-1") };
        for method in ["OPTIONS", "TRACE"] {
            let ask = async |value: &str| {
                app.forget();
                let fields =
                    format!("Max-Forwards: {value}\r\nX-Mine: 1\r\nAuthorization: secret\r\nCookie: secret\r\n");
                field.client(way).await.ask(head(way, method, "/x", &fields)).await
            };
            let name = format!("{way:?} {method}");
            for more in [0, 1, 7] {
                let answer = ask(&(hops + more).to_string()).await;
                assert_eq!((answer.status, answer.header("x-app")), (200, Some("catalog")), "{name} {more}");
                assert_eq!(app.last().header("max-forwards"), Some(more.to_string().as_str()), "{name}");
            }
            for (value, by) in [(hops - 1, last), (0, if way == Way::Plaintext { "catalog-1" } else { "cart-1" })] {
                let answer = ask(&value.to_string()).await;
                assert_eq!((answer.status, app.count()), (200, 0), "{name} {value}");
                assert!(answer.header("proxy-status").unwrap().starts_with(by), "{name} {value}: {answer:?}");
                if method == "TRACE" {
                    assert_eq!(answer.header("content-type"), Some("message/http"));
                    let text = answer.text();
                    let first =
                        text.starts_with("TRACE /x HTTP/1.1\r\nHost: catalog\r\nMax-Forwards: 0\r\nX-Mine: 1\r\n");
                    assert!(first && !text.contains("secret"), "{name}: {text}");
                } else {
                    assert!(answer.body.is_empty(), "{name}: {answer:?}");
                }
            }
            for wrong in ["-1", "a", "1, 2", ""] {
                assert_eq!(ask(wrong).await.status, 400, "{name} {wrong:?}");
                assert_eq!(app.count(), 0, "{name} {wrong:?}");
            }
        }
    }
    for (sidecar, direction) in [(&field.near, "outbound"), (&field.far, "inbound")] {
        let samples = sidecar.metrics().await;
        let labels = [("direction", direction), ("code", "200"), ("reason", "")];
        assert!(samples.sum("outrigger_http_requests_total", &labels) > 0.0);
    }
}

#[tokio::test]
async fn on_http2_hops_and_dates_are_the_same() {
    let app = Application::start("catalog").await;
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, app.port(), Some("http2"));
    let _far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let client = Http2::open(near.outbound()).await;
    let ask = async |value: &'static str| {
        let request = http::Request::options("http://catalog/x").header("max-forwards", value).header("te", "trailers");
        client.ask(request.body(()).unwrap(), b"").await.unwrap()
    };
    let answer = ask("2").await;
    assert_eq!(answer.status, 200);
    assert!(answer.headers.get("date").is_some_and(|date| is_date(date.to_str().unwrap())), "{:?}", answer.headers);
    let seen = app.last();
    assert_eq!((seen.header("max-forwards"), seen.header("te")), (Some("0"), Some("trailers")));
    assert_eq!(seen.header("connection"), None);
    for (value, by) in [("1", "catalog-1"), ("0", "cart-1")] {
        let answer = ask(value).await;
        assert_eq!((answer.status.as_u16(), app.count()), (200, 1));
        assert!(answer.headers["proxy-status"].to_str().unwrap().starts_with(by), "{:?}", answer.headers);
    }
}

/// A long operation reports as often as it likes.
#[tokio::test]
async fn hundreds_of_interim_answers_pass() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address()).await;
    for way in WAYS {
        let mut client = field.client(way).await;
        client.send(head(way, "GET", "/", "")).await;
        let mut app = backend.accept().await;
        app.take_until(b"\r\n\r\n").await;
        for number in 0..500 {
            app.send(format!("HTTP/1.1 102 Processing\r\nX-Number: {number}\r\n\r\n")).await;
            let passed = client.take_until(b"\r\n\r\n").await;
            assert_eq!(
                wire::text(&passed),
                format!("HTTP/1.1 102 Processing\r\nX-Number: {number}\r\n\r\n"),
                "{way:?}"
            );
        }
        app.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await;
        assert_eq!(client.response(false).await.text(), "ok", "{way:?}");
    }
}
