//! Plain HTTP/1.1 for people, probes and Prometheus: admin, metrics and health, each a router of its own on a listener
//! of its own. Served on the control thread; routes and what they may do are the callers'. A listener for admin lets
//! only loopback names through, because a web page can make a browser call 127.0.0.1 (DNS rebinding, and forms that
//! post across origins), with the page's own name in Host or Origin.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::header::{CONNECTION, HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tower::ServiceExt;

use crate::places::{Bounds, Place, Places};

/// Who may be named as the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hosts {
    Any,
    /// localhost, 127.0.0.0/8 and ::1, with any port.
    Loopback,
}

/// A client that connects asks at once: probes, scrapers and people all do.
const FIRST_BYTE: Duration = Duration::from_secs(2);
/// From connection or last answer to the end of the next head: also how long an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// From a head to its answer, the request's body included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A client that takes no byte of its answer for this long does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// From a head to the last byte of its answer, however the client reads.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a connection's times are looked at.
const TICK: Duration = Duration::from_secs(1);
/// A whole connection may take no longer to end once it is told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections at once. Scrapers and people need few; with all places taken the one that is idle for longest goes, so
/// that nobody can keep the probes of Kubernetes out, from whatever address these come.
const PLACES: Bounds = Bounds { total: 256, per_source: 64 };
const HEAD_BYTES: usize = 64 * 1024;
/// After an accept that failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop` resolves, then lets running answers end. Must run on a tokio runtime with time and I/O.
pub async fn serve(listener: TcpListener, router: Router, hosts: Hosts, stop: impl Future<Output = ()>) {
    let router = match hosts {
        Hosts::Any => router,
        Hosts::Loopback => router.layer(from_fn(loopback_only)),
    };
    let (stopping, stopped) = watch::channel(false);
    // Every connection holds a sender: the channel closes when all have ended.
    let (running, mut ended) = mpsc::channel::<Infallible>(1);
    let places = Places::new(PLACES);
    let accept = async {
        loop {
            match listener.accept().await {
                Ok((stream, client)) => {
                    let place = places.take(client.ip());
                    let connection = connection(stream, router.clone(), stopped.clone(), place);
                    let running = running.clone();
                    tokio::spawn(async move {
                        connection.await;
                        drop(running);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "an admin connection cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = accept => {}
        () = stop => {}
    }
    drop((listener, running));
    let _ = stopping.send(true);
    let _ = timeout(STOP_TIMEOUT, ended.recv()).await;
}

async fn connection(stream: TcpStream, router: Router, mut stopped: watch::Receiver<bool>, place: Place) {
    let eviction = place.eviction();
    let progress = Arc::new(Progress::new(place, Instant::now()));
    let asked = progress.clone();
    let service = service_fn(move |request| {
        asked.asked(Instant::now());
        answer(router.clone(), request)
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(Watched { stream, progress: progress.clone() }), service);
    let mut serving = std::pin::pin!(serving);
    // How a client leaves is its own affair: errors are not logged.
    tokio::select! {
        _ = serving.as_mut() => return,
        () = eviction => return,
        () = progress.overdue() => return,
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = timeout(STOP_TIMEOUT, serving).await;
}

async fn answer(router: Router, request: hyper::Request<Incoming>) -> Result<Response, Infallible> {
    match timeout(ANSWER_TIMEOUT, router.oneshot(request)).await {
        Ok(answer) => answer,
        // The body of the request did not arrive.
        Err(_) => Ok((StatusCode::REQUEST_TIMEOUT, [(CONNECTION, "close")]).into_response()),
    }
}

/// What a connection has done so far, and since when it has done nothing.
struct Progress {
    place: Place,
    heard: AtomicBool,
    times: Mutex<Times>,
}

struct Times {
    accepted: Instant,
    /// When the head of the last request was complete.
    asked: Option<Instant>,
    /// Since when the client takes nothing.
    blocked: Option<Instant>,
}

impl Progress {
    fn new(place: Place, now: Instant) -> Progress {
        let times = Times { accepted: now, asked: None, blocked: None };
        Progress { place, heard: AtomicBool::new(false), times: Mutex::new(times) }
    }

    /// A byte of a head is no progress, a head is: a client that sends a byte now and then counts as idle.
    fn asked(&self, now: Instant) {
        self.place.progress();
        self.times().asked = Some(now);
    }

    fn written(&self) {
        self.place.progress();
        self.times().blocked = None;
    }

    fn blocked(&self, now: Instant) {
        self.times().blocked.get_or_insert(now);
    }

    /// When the connection is to be ended, as things stand.
    fn deadline(&self) -> Option<Instant> {
        let times = self.times();
        let first_byte = (!self.heard.load(Ordering::Relaxed)).then(|| times.accepted + FIRST_BYTE);
        let write = times.blocked.map(|since| since + WRITE_TIMEOUT);
        let whole = times.blocked.and(times.asked).map(|since| since + WHOLE_TIMEOUT);
        [first_byte, write, whole].into_iter().flatten().min()
    }

    /// Completes when the client has been too slow.
    async fn overdue(&self) {
        loop {
            let (now, deadline) = (Instant::now(), self.deadline());
            match deadline {
                Some(deadline) if deadline <= now => return,
                Some(deadline) => sleep_until(deadline.min(now + TICK)).await,
                None => sleep_until(now + TICK).await,
            }
        }
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's socket that tells [`Progress`] what moves.
struct Watched {
    stream: TcpStream,
    progress: Arc<Progress>,
}

impl Watched {
    fn wrote(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Pending => self.progress.blocked(Instant::now()),
            Poll::Ready(Ok(_)) => self.progress.written(),
            Poll::Ready(Err(_)) => {}
        }
        written
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buf);
        if buf.filled().len() > before {
            self.progress.heard.store(true, Ordering::Relaxed);
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

async fn loopback_only(request: Request, next: Next) -> Response {
    let authority = request.uri().authority().map(Authority::as_str);
    match foreign_name(authority, request.headers()) {
        None => next.run(request).await,
        Some(name) => {
            let body = serde_json::json!({
                "reason": "host_not_allowed",
                "hint": format!("{name} is not a loopback name; ask for 127.0.0.1 or localhost from this machine itself"),
            });
            (StatusCode::FORBIDDEN, axum::Json(body)).into_response()
        }
    }
}

/// What in a request names somebody else than this machine, or names nobody.
fn foreign_name(authority: Option<&str>, headers: &HeaderMap) -> Option<String> {
    let mut named = authority.is_some();
    let mut names: Vec<&[u8]> = authority.into_iter().map(str::as_bytes).collect();
    for host in headers.get_all(HOST) {
        named = true;
        names.push(host.as_bytes());
    }
    for origin in headers.get_all(ORIGIN) {
        let origin = origin.as_bytes();
        names.push(origin.strip_prefix(b"http://").or(origin.strip_prefix(b"https://")).unwrap_or(origin));
    }
    if !named {
        return Some("a request without Host".to_owned());
    }
    let foreign = names.into_iter().find(|name| !std::str::from_utf8(name).is_ok_and(is_loopback));
    foreign.map(|name| String::from_utf8_lossy(name).into_owned())
}

/// `host` or `host:port`.
fn is_loopback(authority: &str) -> bool {
    let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, rest)) => match rest.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None => return false,
        },
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let right_port = port.is_none_or(|port| port.parse::<u16>().is_ok());
    right_port && (host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()))
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use axum::routing::{get, post};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    use super::*;

    #[test]
    fn loopback_names() {
        for name in ["localhost", "LocalHost:15000", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:15000"] {
            assert!(is_loopback(name), "{name}");
        }
        for name in [
            "",
            "example.com",
            "localhost.example.com",
            "127.0.0.1.nip.io",
            "10.0.0.1",
            "[::2]",
            "[::1",
            "[::1]x",
            "::1",
            "localhost:",
            "localhost:http",
            "localhost:80:80",
            "user@localhost",
            "localhost.",
            "0.0.0.0",
        ] {
            assert!(!is_loopback(name), "{name}");
        }
    }

    async fn ask(address: std::net::SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{head}\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn only_loopback_names_reach_the_router() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/config", get(|| async { "told" })).route("/quit", post(|| async { "gone" }));
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(serve(listener, router, Hosts::Loopback, async {
            let _ = stopped.await;
        }));
        let port = address.port();
        for (head, status) in [
            (format!("GET /config HTTP/1.1\r\nHost: 127.0.0.1:{port}"), 200),
            ("GET /config HTTP/1.1\r\nHost: localhost".to_owned(), 200),
            ("GET http://localhost/config HTTP/1.1\r\nHost: localhost".to_owned(), 200),
            ("POST /quit HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost:3000".to_owned(), 200),
            ("GET /config HTTP/1.1\r\nHost: evil.example".to_owned(), 403),
            ("GET http://evil.example/config HTTP/1.1\r\nHost: localhost".to_owned(), 403),
            ("GET /config HTTP/1.1\r\nHost: localhost\r\nHost: evil.example".to_owned(), 403),
            ("GET /config HTTP/1.0".to_owned(), 403),
            ("POST /quit HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example".to_owned(), 403),
            ("POST /quit HTTP/1.1\r\nHost: localhost\r\nOrigin: null".to_owned(), 403),
            ("POST /config HTTP/1.1\r\nHost: localhost".to_owned(), 405),
            ("GET /nothing HTTP/1.1\r\nHost: localhost".to_owned(), 404),
        ] {
            let answer = ask(address, &head).await;
            let got: u16 = answer.split(' ').nth(1).unwrap_or_default().parse().unwrap_or_default();
            assert_eq!(got, status, "{head}\n{answer}");
        }
        stop.send(()).unwrap();
        server.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn stopping_lets_an_answer_end_and_closes_idle_connections() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (began, mut begins) = tokio::sync::mpsc::channel(1);
        let (go_on, gate) = watch::channel(false);
        let slow = move || {
            let (began, mut gate) = (began.clone(), gate.clone());
            async move {
                began.send(()).await.unwrap();
                gate.wait_for(|open| *open).await.unwrap();
                "done"
            }
        };
        let router = Router::new().route("/slow", get(slow));
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(serve(listener, router, Hosts::Any, async {
            let _ = stopped.await;
        }));
        let mut idle = TcpStream::connect(address).await.unwrap();
        let asking = tokio::spawn(async move { ask(address, "GET /slow HTTP/1.1\r\nHost: mesh.example").await });
        begins.recv().await.unwrap();
        stop.send(()).unwrap();
        assert_eq!(idle.read(&mut [0; 1]).await.unwrap(), 0);
        go_on.send(true).unwrap();
        assert!(asking.await.unwrap().ends_with("done"));
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_head_that_never_ends_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, Router::new(), Hosts::Any, std::future::pending()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost:").await.unwrap();
        tokio::time::pause();
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(HEAD_TIMEOUT * 2, stream.read_to_end(&mut answer)).await;
        ended.expect("the connection outlived the timeout").unwrap();
        server.abort();
    }

    /// What a client does that shall not keep others out.
    #[derive(Clone, Copy, Debug)]
    enum Nuisance {
        Silent,
        /// Sends a byte of a head, and another one each time it is asked to.
        Dripping,
        NeverReading,
    }

    async fn annoy(address: std::net::SocketAddr, how: Nuisance) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let first: &[u8] = match how {
            Nuisance::Silent => b"",
            Nuisance::Dripping => b"G",
            Nuisance::NeverReading => b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n",
        };
        let _ = stream.write_all(first).await;
        stream
    }

    #[tokio::test]
    async fn no_number_of_idle_connections_keeps_a_probe_out() {
        for how in [Nuisance::Silent, Nuisance::Dripping, Nuisance::NeverReading] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let large = Bytes::from("x".repeat(8 << 20));
            let router = Router::new()
                .route("/live", get(|| async { "live" }))
                .route("/large", get(move || async move { large.clone() }));
            let server = tokio::spawn(serve(listener, router, Hosts::Any, std::future::pending()));
            let mut nuisances = Vec::new();
            for _ in 0..2 {
                for _ in 0..PLACES.total + 1 {
                    nuisances.push(annoy(address, how).await);
                }
                if matches!(how, Nuisance::Dripping) {
                    for nuisance in &mut nuisances {
                        // Those that lost their place are gone.
                        let _ = nuisance.write_all(b"E").await;
                    }
                }
                // Before the places could be free because time is up.
                let asked = ask(address, "GET /live HTTP/1.1\r\nHost: localhost");
                let longest = HEAD_TIMEOUT - Duration::from_secs(1);
                let answer = timeout(longest, asked).await.unwrap_or_else(|_| panic!("{how:?} kept the probe out"));
                assert!(answer.ends_with("live"), "{how:?}: {answer}");
            }
            server.abort();
        }
    }

    #[tokio::test]
    async fn who_says_nothing_or_reads_nothing_is_ended() {
        for (how, longest) in [(Nuisance::Silent, FIRST_BYTE), (Nuisance::NeverReading, WRITE_TIMEOUT)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (dropped, mut ends) = mpsc::channel::<Infallible>(1);
            let large = Bytes::from("x".repeat(32 << 20));
            let router = Router::new().route("/large", get(move || async move { large.clone() }));
            let (stream, _) = {
                let nuisance = annoy(address, how);
                let (nuisance, accepted) = tokio::join!(nuisance, listener.accept());
                (
                    nuisance,
                    accepted.map(|(accepted, _)| {
                        let place = Places::new(PLACES).take(address.ip());
                        let (_stop, stopped) = watch::channel(false);
                        tokio::spawn(async move {
                            let _dropped = dropped;
                            connection(accepted, router, stopped, place).await;
                            drop(_stop);
                        });
                    }),
                )
            };
            let begun = Instant::now();
            tokio::time::pause();
            assert!(ends.recv().await.is_none());
            let lasted = begun.elapsed();
            tokio::time::resume();
            assert!(lasted >= longest && lasted <= longest + 2 * TICK, "{how:?}: {lasted:?}");
            drop(stream);
        }
    }

    #[tokio::test]
    async fn a_body_that_does_not_arrive_is_answered_408() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/level", post(|body: String| async move { body }));
        let server = tokio::spawn(serve(listener, router, Hosts::Any, std::future::pending()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"POST /level HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\ninfo").await.unwrap();
        tokio::time::pause();
        let mut answer = String::new();
        let read = timeout(ANSWER_TIMEOUT * 2, stream.read_to_string(&mut answer)).await;
        read.expect("the connection outlived the timeout").unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        server.abort();
    }
}
