//! Plain HTTP/1.1 for people, probes and Prometheus: admin, metrics and health, each a router of its own on a listener
//! of its own. Served on the control thread; routes and what they may do are the callers'. A listener for admin lets
//! only loopback names through, because a web page can make a browser call 127.0.0.1 (DNS rebinding, and forms that
//! post across origins), with the page's own name in Host or Origin.

use std::net::IpAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::header::{HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// Who may be named as the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hosts {
    Any,
    /// localhost, 127.0.0.0/8 and ::1, with any port.
    Loopback,
}

/// From connection or last answer to the end of the next head: also how long an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A whole connection may take no longer to end once it is told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections at once; scrapers and people need few.
const CONNECTIONS: usize = 256;
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
    let room = Semaphore::new(CONNECTIONS);
    let room = std::sync::Arc::new(room);
    let accept = async {
        loop {
            let Ok(permit) = std::sync::Arc::clone(&room).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let connection = connection(stream, router.clone(), stopped.clone());
                    tokio::spawn(async move {
                        connection.await;
                        drop(permit);
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
    drop(listener);
    let _ = stopping.send(true);
    let _ = tokio::time::timeout(STOP_TIMEOUT, room.acquire_many(CONNECTIONS as u32)).await;
}

async fn connection(stream: TcpStream, router: Router, mut stopped: watch::Receiver<bool>) {
    let service = TowerToHyperService::new(router);
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = std::pin::pin!(serving);
    // How a client leaves is its own affair: errors are not logged.
    tokio::select! {
        _ = serving.as_mut() => return,
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(STOP_TIMEOUT, serving).await;
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
}
