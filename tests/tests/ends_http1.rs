//! Promise: an end means through the mesh what it means without it. A client that ends its direction behind a request gets
//! its answer, an answer that comes early does not end the upload, a client that is gone is noticed, and a server's
//! last words on an idle connection answer nobody.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use outrigger_api::name::Protocol;
use outrigger_tests::application::Backend;
use outrigger_tests::{Connection, End, Mesh, MeshOptions, Sidecar, eventually, wire};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

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
    async fn new(app: SocketAddr, protocol: Option<Protocol>) -> Field {
        let mesh = Mesh::start(MeshOptions::permissive()).await;
        mesh.service("catalog.shop", 80, app.port(), protocol.map(|_| "http"));
        let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app).port(app.port(), protocol);
        let far = far.start().await;
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

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

// --- a client that ends its direction ------------------------------------------------------------------------------

#[tokio::test]
async fn a_client_that_ends_its_direction_gets_its_answer() {
    for protocol in [Some(Protocol::Http), None] {
        let backend = Backend::start().await;
        let field = Field::new(backend.address(), protocol).await;
        for way in WAYS {
            let chunked = "Transfer-Encoding: chunked\r\n";
            for (name, request, end) in [
                ("GET", head(way, "GET", "/", ""), "\r\n\r\n"),
                ("GET and close", head(way, "GET", "/", "Connection: close\r\n"), "\r\n\r\n"),
                ("HTTP/1.0", head(way, "GET", "/", "").replace("HTTP/1.1", "HTTP/1.0"), "\r\n\r\n"),
                ("POST", head(way, "POST", "/", "Content-Length: 4\r\n") + "body", "body"),
                ("POST in chunks", head(way, "POST", "/", chunked) + "4\r\nbody\r\n0\r\n\r\n", "0\r\n\r\n"),
                ("a line end behind it", head(way, "POST", "/", "Content-Length: 4\r\n") + "body\r\n", "body"),
            ] {
                let name = format!("{protocol:?} {way:?} {name}");
                let mut client = field.client(way).await;
                client.send(&request).await;
                client.finish().await;
                let mut app = backend.accept().await;
                app.take_until(end.as_bytes()).await;
                // The application sees the end, as it would without sidecars, and answers all the same.
                assert_eq!(app.expect_end().await, End::Closed, "{name}");
                app.send("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n").await;
                app.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello").await;
                let (interim, first) = if name.contains("1.0") { (0, "HTTP/1.0 200") } else { (1, "HTTP/1.1 103") };
                assert!(client.take_until(b" 200 OK\r\n").await.starts_with(first.as_bytes()), "{name} {interim}");
                app.send("world").await;
                drop(app);
                let (rest, end) = client.take_to_end().await;
                assert!(rest.ends_with(b"\r\n\r\nhelloworld"), "{name}: {:?}", wire::text(&rest));
                assert_eq!(end, End::Closed, "{name}");
            }
        }
        for sidecar in [&field.near, &field.far] {
            eventually("all are counted as answered", async || {
                let samples = sidecar.metrics().await;
                let reasons = samples.values("outrigger_http_requests_total", "reason");
                (reasons.into_iter().collect::<Vec<_>>() == [""]).then_some(())
            })
            .await;
        }
    }
}

#[tokio::test]
async fn requests_in_a_row_and_then_the_end() {
    let app = outrigger_tests::Application::start("catalog").await;
    let field = Field::new(app.address(), Some(Protocol::Http)).await;
    for way in WAYS {
        let mut client = field.client(way).await;
        let gets: String = (0..5).map(|number| head(way, "GET", &format!("/{number}"), "")).collect();
        client.send(gets + &head(way, "POST", "/last", "Content-Length: 4\r\n") + "body").await;
        client.finish().await;
        for number in 0..5 {
            assert_eq!(client.response(false).await.text(), format!("GET /{number} 0\n"), "{way:?}");
        }
        assert_eq!(client.response(false).await.text(), "POST /last 4\n", "{way:?}");
        assert_eq!(client.expect_end().await, End::Closed, "{way:?}");
        // A request that is not whole is none.
        let mut client = field.client(way).await;
        client.send(head(way, "GET", "/whole", "") + "GET /half HTTP/1.1\r\nHo").await;
        client.finish().await;
        assert_eq!(client.response(false).await.text(), "GET /whole 0\n", "{way:?}");
        client.expect_end().await;
    }
    assert!(app.requests().iter().all(|seen| seen.target != "/half" && !seen.cancelled));
}

#[tokio::test]
async fn large_answers_and_uploads_of_a_client_that_ends_its_direction() {
    let app = outrigger_tests::Application::start("catalog").await;
    let field = Field::new(app.address(), Some(Protocol::Http)).await;
    for way in WAYS {
        let mut client = field.client(way).await;
        client.send(head(way, "GET", "/bytes/5000000", "")).await;
        client.finish().await;
        let answer = client.response(false).await;
        assert!(answer.is_whole() && answer.body.len() == 5_000_000, "{way:?}: {}", answer.body.len());
        let mut client = field.client(way).await;
        client.send(head(way, "POST", "/up", "Content-Length: 5000000\r\n")).await;
        client.send(vec![b'u'; 5_000_000]).await;
        client.finish().await;
        assert_eq!(client.response(false).await.text(), "POST /up 5000000\n", "{way:?}");
        client.expect_end().await;
    }
}

/// What an application does with a client's end is its own affair: without an answer there is none.
#[tokio::test]
async fn an_application_that_leaves_with_its_client_is_not_to_blame() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address(), Some(Protocol::Http)).await;
    for way in WAYS {
        for _ in 0..6 {
            let mut client = field.client(way).await;
            client.send(head(way, "GET", "/", "")).await;
            client.finish().await;
            let mut app = backend.accept().await;
            app.take_until(b"\r\n\r\n").await;
            app.expect_end().await;
            drop(app);
            client.expect_end().await;
        }
        assert!(backend.accepted().await.is_none(), "{way:?}: nothing is asked twice");
    }
    for sidecar in [&field.near, &field.far] {
        eventually("counted as the client's doing", async || {
            let samples = sidecar.metrics().await;
            let reasons = samples.values("outrigger_http_requests_total", "reason");
            (reasons.into_iter().collect::<Vec<_>>() == ["client_closed"]).then_some(())
        })
        .await;
        let codes = sidecar.metrics().await.values("outrigger_http_requests_total", "code");
        assert_eq!(codes.into_iter().collect::<Vec<_>>(), [""], "no answer was sent");
    }
    // Six failures in a row would have the endpoint left alone.
    let mut client = field.client(Way::Pair).await;
    client.send(head(Way::Pair, "GET", "/", "")).await;
    let mut app = backend.accept().await;
    app.take_until(b"\r\n\r\n").await;
    app.send(OK).await;
    assert_eq!(client.response(false).await.status, 200);
}

/// A reset behind the client's end is noticed though nobody reads or writes.
#[tokio::test]
async fn a_client_that_ended_and_is_gone_is_noticed() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address(), Some(Protocol::Http)).await;
    for way in WAYS {
        for answer in ["", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"] {
            let mut client = field.client(way).await;
            client.send(head(way, "GET", "/", "")).await;
            client.finish().await;
            let mut app = backend.accept().await;
            app.take_until(b"\r\n\r\n").await;
            app.expect_end().await;
            if !answer.is_empty() {
                app.send(answer).await;
                client.take_until(b"hello").await;
            }
            client.reset();
            // It has said nothing meanwhile, and is told.
            eventually("the application is reset", async || app.tcp().take_error().unwrap()).await;
        }
    }
    for (sidecar, count) in [(&field.near, 4.0), (&field.far, 6.0)] {
        eventually("counted as the client's doing", async || {
            let samples = sidecar.metrics().await;
            let left = samples.sum("outrigger_http_requests_total", &[("reason", "client_closed")]);
            (left == count && samples.sum("outrigger_http_requests_total", &[]) == count).then_some(())
        })
        .await;
    }
}

// --- an answer before the request's end ------------------------------------------------------------------------------

/// An application that answers at once, then stores what is sent to it.
struct Store {
    address: SocketAddr,
    stored: Arc<AtomicUsize>,
    _serving: JoinSet<()>,
}

impl Store {
    /// `answer` ends the head; the body is `stored`. Then the connection goes on, or is closed.
    async fn start(answer: &'static str, closes: bool) -> Store {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stored = Arc::<AtomicUsize>::default();
        let count = stored.clone();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut all = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                all.spawn(store(stream.into(), answer, closes, count.clone()));
            }
        });
        Store { address, stored, _serving: serving }
    }
}

async fn store(mut client: Connection, answer: &'static str, closes: bool, stored: Arc<AtomicUsize>) {
    while let Ok(head) = client.try_take_until(b"\r\n\r\n").await {
        let head = wire::text(&head).to_ascii_lowercase();
        if client.try_send(answer).await.is_err() {
            return;
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<usize>().ok());
        let mut left = length.unwrap_or(0);
        let mut chunk = Vec::new();
        if head.contains("transfer-encoding: chunked") {
            loop {
                let Ok(line) = client.try_take_until(b"\r\n").await else { return };
                let size = usize::from_str_radix(wire::text(&line).trim(), 16).unwrap();
                if client.try_take(size + 2, &mut chunk).await.is_err() {
                    return;
                }
                stored.fetch_add(size, Relaxed);
                if size == 0 {
                    break;
                }
            }
        }
        while left > 0 {
            let count = left.min(64 * 1024);
            if client.try_take(count, &mut chunk).await.is_err() {
                return;
            }
            stored.fetch_add(count, Relaxed);
            left -= count;
        }
        if closes {
            return;
        }
    }
}

#[tokio::test]
async fn an_answer_that_comes_early_does_not_end_the_upload() {
    let stays = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstored";
    let chunked = "HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nstored\r\n0\r\n\r\n";
    let closes = "HTTP/1.1 202 Accepted\r\nConnection: close\r\nContent-Length: 6\r\n\r\nstored";
    let nothing = "HTTP/1.1 204 No Content\r\n\r\n";
    for (answer, ends) in [(stays, false), (chunked, false), (nothing, false), (closes, true)] {
        let app = Store::start(answer, ends).await;
        let field = Field::new(app.address, Some(Protocol::Http)).await;
        for way in WAYS {
            for size in [10, 600_000, 3_000_000, 20_000_000] {
                for in_chunks in [false, true] {
                    // The largest once for each way.
                    if size == 20_000_000 && (in_chunks || answer != stays) {
                        continue;
                    }
                    let name = format!("{answer:?} {way:?} {size} {in_chunks}");
                    app.stored.store(0, Relaxed);
                    let mut client = field.client(way).await;
                    let framing = if in_chunks {
                        "Transfer-Encoding: chunked\r\n".to_owned()
                    } else {
                        format!("Content-Length: {size}\r\n")
                    };
                    client.send(head(way, "POST", "/store", &framing)).await;
                    // The answer is read to its end before a byte of the body is sent.
                    let early = client.response(false).await;
                    assert!(early.is_whole() && [200, 202, 204].contains(&early.status), "{name}: {early:?}");
                    let mut left = size;
                    while left > 0 {
                        let count = left.min(100_000);
                        let data = vec![b'd'; count];
                        if in_chunks {
                            client.send(format!("{count:x}\r\n")).await;
                        }
                        client.try_send(data).await.unwrap_or_else(|error| panic!("{name}: {error}"));
                        if in_chunks {
                            client.send("\r\n").await;
                        }
                        left -= count;
                    }
                    if in_chunks {
                        client.send("0\r\n\r\n").await;
                    }
                    eventually("all of it is stored", async || (app.stored.load(Relaxed) == size).then_some(())).await;
                    // The next request of this connection.
                    let next = client.ask(head(way, "POST", "/next", "Content-Length: 2\r\n") + "ok").await;
                    assert_eq!(next.status, early.status, "{name}");
                }
            }
        }
        for sidecar in [&field.near, &field.far] {
            let reasons = sidecar.metrics().await.values("outrigger_http_requests_total", "reason");
            assert_eq!(reasons.into_iter().collect::<Vec<_>>(), [""], "{answer:?}");
        }
    }
}

/// What nobody will read is not waited for: the application closes, and so do we.
#[tokio::test]
async fn an_application_that_closes_behind_an_early_answer_ends_the_upload() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address(), Some(Protocol::Http)).await;
    for way in WAYS {
        for how in ["close", "reset"] {
            let mut client = field.client(way).await;
            client.send(head(way, "POST", "/", "Content-Length: 100000000\r\n")).await;
            client.send("first").await;
            let mut app = backend.accept().await;
            app.take_until(b"first").await;
            app.send("HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno").await;
            let answer = client.response(false).await;
            assert_eq!((answer.status, answer.text().as_str()), (413, "no"), "{way:?} {how}");
            if how == "reset" {
                app.reset()
            } else {
                drop(app)
            }
            // An end, or a reset when we stop listening.
            let (rest, _) = client.take_to_end().await;
            assert!(rest.is_empty(), "{way:?} {how}: {:?}", wire::text(&rest));
        }
    }
}

#[tokio::test]
async fn a_client_that_breaks_off_behind_an_early_answer_ends_the_upload() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address(), Some(Protocol::Http)).await;
    for way in WAYS {
        for how in ["close", "reset"] {
            let mut client = field.client(way).await;
            client.send(head(way, "POST", "/", "Content-Length: 100000\r\n") + "first").await;
            let mut app = backend.accept().await;
            app.take_until(b"first").await;
            app.send(OK).await;
            assert_eq!(client.response(false).await.status, 200);
            client.send("more").await;
            app.take_until(b"more").await;
            if how == "reset" {
                client.reset()
            } else {
                drop(client)
            }
            app.expect_end().await;
        }
    }
    for (sidecar, count) in [(&field.near, 4.0), (&field.far, 6.0)] {
        eventually("the answers were whole", async || {
            let samples = sidecar.metrics().await;
            let labels = [("code", "200"), ("reason", "")];
            (samples.sum("outrigger_http_requests_total", &labels) == count).then_some(())
        })
        .await;
    }
}

/// A server that wants an upload for ever is bounded as any stream is on which nothing moves.
#[tokio::test]
async fn an_upload_that_stands_still_behind_its_answer_is_ended() {
    let backend = Backend::start().await;
    let mesh = Mesh::start(MeshOptions::default()).await;
    mesh.service("catalog.shop", 80, backend.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(backend.address());
    let short = |limits: &mut outrigger_sidecar::config::Limits| {
        limits.stream_idle = Duration::from_millis(300);
        limits.head_timeout = Duration::from_millis(200);
    };
    let _far = far.start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(short).start().await;
    let mut client = Connection::open(near.outbound()).await;
    client.send(head(Way::Pair, "POST", "/", "Content-Length: 100000\r\n") + "first").await;
    let mut app = backend.accept().await;
    app.take_until(b"first").await;
    app.send(OK).await;
    assert_eq!(client.response(false).await.status, 200);
    client.expect_end().await;
    app.expect_end().await;
}

// --- what a server says on an idle connection --------------------------------------------------------------------------

const GAVE_UP: &str = "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";

#[tokio::test]
async fn words_on_an_idle_connection_answer_nobody() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address(), Some(Protocol::Http)).await;
    for way in WAYS {
        for (words, ends) in [(GAVE_UP, true), (GAVE_UP, false), (OK, false), ("x", false), ("", true)] {
            for request in [
                head(way, "GET", "/", ""),
                head(way, "POST", "/", "Content-Length: 4\r\n") + "body",
                head(way, "POST", "/", "Transfer-Encoding: chunked\r\n") + "4\r\nbody\r\n0\r\n\r\n",
            ] {
                let name = format!("{way:?} {words:?} {ends} {request:?}");
                let mut client = field.client(way).await;
                client.send(&request).await;
                let mut app = backend.accept().await;
                app.take_until(b"\r\n\r\n").await;
                app.send(OK).await;
                assert_eq!(client.response(false).await.status, 200, "{name}");
                app.send(words).await;
                if ends {
                    app.finish().await;
                }
                // It has arrived, though nobody has looked: connections that rested are asked for news.
                tokio::time::sleep(Duration::from_millis(30)).await;
                client.send(&request).await;
                let mut fresh = backend.accept().await;
                fresh.take_until(b"\r\n\r\n").await;
                fresh.send("HTTP/1.1 201 Created\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").await;
                assert_eq!(client.response(false).await.status, 201, "{name}");
                drop(app);
            }
        }
    }
}

/// The words cross the request on their way.
#[tokio::test]
async fn a_408_that_crosses_a_request_is_not_its_answer() {
    let backend = Backend::start().await;
    let field = Field::new(backend.address(), Some(Protocol::Http)).await;
    for way in WAYS {
        let mut client = field.client(way).await;
        client.send(head(way, "GET", "/", "")).await;
        let mut app = backend.accept().await;
        app.take_until(b"\r\n\r\n").await;
        app.send(OK).await;
        assert_eq!(client.response(false).await.status, 200);
        client.send(head(way, "GET", "/", "")).await;
        app.take_until(b"\r\n\r\n").await;
        app.send(GAVE_UP).await;
        let mut fresh = backend.accept().await;
        fresh.take_until(b"\r\n\r\n").await;
        // One that is said on a fresh connection is an answer.
        fresh.send(GAVE_UP).await;
        assert_eq!(client.response(false).await.status, 408, "{way:?}");
        drop(app);
    }
}
