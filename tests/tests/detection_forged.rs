//! Promise: on a port whose protocol nobody declared, no claim of an identity that a client makes reaches the application,
//! in whatever a server reads as a request: in plaintext, inside mutual TLS, through the caller's own sidecar, and however
//! the bytes are cut.
//!
//! The inputs are what servers were seen to read (2026-11): Node and aiohttp any number of CR and LF in front, `RTSP/1.0`,
//! and HTTP/0.9; nginx the same blank lines, and a blank behind the version; Python's http.server, wsgiref and Flask any
//! blank of Latin-1 in front, between the words and behind them, any byte in a method, and fields behind an HTTP/0.9 line;
//! waitress blank lines, tabs, and any method in HTTP/0.9; Tornado CR in front; Java's HttpServer any method and any
//! version. The application here is the sum of them: it answers whatever is followed by an empty line.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_sidecar::config::Limits;
use outrigger_tests::application::Backend;
use outrigger_tests::peer::{Peer, TCP};
use outrigger_tests::wire::{Connection, find};
use outrigger_tests::{Mesh, MeshOptions, Sidecar, eventually};
use tokio::task::JoinSet;

/// Behind each of them, fields that claim to be somebody.
const HEADS: &[&[u8]] = &[
    // Blanks in front.
    b"\r\nGET / HTTP/1.1\r\n",
    b"\r\n\r\nGET / HTTP/1.1\r\n",
    b"\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\n",
    b"\nGET / HTTP/1.1\r\n",
    b"\n\n\n\nGET / HTTP/1.1\r\n",
    b"\rGET / HTTP/1.1\r\n",
    b"\r\r\nGET / HTTP/1.1\r\n",
    b"\n\rGET / HTTP/1.1\r\n",
    b" GET / HTTP/1.1\r\n",
    b"\tGET / HTTP/1.1\r\n",
    b"\x0b\x0cGET / HTTP/1.1\r\n",
    b"\r\n \t\n GET / HTTP/1.1\r\n",
    b"\x1c\x1d\x1e\x1fGET / HTTP/1.1\r\n",
    b"\x85\xa0GET / HTTP/1.1\r\n",
    // Between the words, and behind them.
    b"GET\t/\tHTTP/1.1\r\n",
    b"GET\x0b/\x0cHTTP/1.1\r\n",
    b"GET\x1c/\xa0HTTP/1.1\r\n",
    b"GET\r/\rHTTP/1.1\r\n",
    b"GET  /  HTTP/1.1\r\n",
    b"GET / HTTP/1.1 \r\n",
    b"GET / HTTP/1.1\t \t\r\n",
    b"GET / HTTP/1.1\r\r\n",
    b"GET / HTTP/1.1\n",
    b"GET /a b HTTP/1.1\r\n",
    // Methods.
    b"get / HTTP/1.1\r\n",
    b"Foo / HTTP/1.1\r\n",
    b"G\"T / HTTP/1.1\r\n",
    b"\0GET / HTTP/1.1\r\n",
    b"\xef\xbb\xbfGET / HTTP/1.1\r\n",
    b"\x16GET / HTTP/1.1\r\n",
    b"\x16\x03 / HTTP/1.1\r\n",
    b"83 / HTTP/1.1\r\n",
    b"A-METHOD-THAT-IS-LONGER-THAN-THIRTY-TWO-BYTES / HTTP/1.1\r\n",
    // Targets.
    b"GET http://a/ HTTP/1.1\r\n",
    b"GET HTTP://a/ HTTP/1.1\r\n",
    b"GET ftp://a/ HTTP/1.1\r\n",
    b"GET * HTTP/1.1\r\n",
    b"GET key HTTP/1.1\r\n",
    b"GET \0 HTTP/1.1\r\n",
    b"GET /\0 HTTP/1.1\r\n",
    b"CONNECT a:80 HTTP/1.1\r\n",
    // Versions.
    b"GET / HTTP/1.0\r\n",
    b"GET / HTTP/0.9\r\n",
    b"GET / HTTP/1.2\r\n",
    b"GET / HTTP/01.10\r\n",
    b"GET / HTTP/2.0\r\n",
    b"GET / HTTP/9.9\r\n",
    b"GET / http/1.1\r\n",
    b"GET / RTSP/1.0\r\n",
    b"GET /\r\n",
    b"GET / \r\n",
    b"GET key\r\n",
    b"POST /\n",
    b"FOO /\r\n",
    b"FOO / BAR/1.0\r\n",
    b"foo http://a/ bar\r\n",
    b"SOURCE / ICE/1.0\r\n",
    b"OPTIONS rtsp://a/ RTSP/1.0\r\n",
    // Something else in front.
    b"FOO\r\nGET / HTTP/1.1\r\n",
    b"FOO bar\nGET / HTTP/1.1\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1 80\r\nGET / HTTP/1.1\r\n",
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\x50\0\x50GET / HTTP/1.1\r\n",
];

/// Whatever of this comes to the application came past the sidecars.
const CLAIM: &[u8] = b"of-the-caller";
const FIELDS: &[&str] = &[
    "Host: a\r\nx-outrigger-identity: of-the-caller\r\nX-Forwarded-Client-Cert: of-the-caller\r\n\r\n",
    "X_Outrigger_Identity: of-the-caller\r\n\r\n",
];

#[derive(Clone, Copy, Debug)]
enum Cut {
    Nowhere,
    /// Between two pieces of so many bytes there is a moment.
    Pieces(usize),
    /// So many bytes first, and the rest when whatever stops short is taken for opaque.
    After(usize),
}

const CUTS: [Cut; 7] =
    [Cut::Nowhere, Cut::Pieces(1), Cut::Pieces(13), Cut::After(1), Cut::After(2), Cut::After(4), Cut::After(9)];

struct Pair {
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
    /// Everything that the application got.
    arrived: Arc<Mutex<Vec<u8>>>,
    _application: JoinSet<()>,
}

const SHORT: Duration = Duration::from_millis(30);

async fn pair() -> Pair {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let backend = Backend::start().await;
    mesh.service("catalog.shop", 80, backend.port(), None);
    let short = |limits: &mut Limits| limits.detect_short = SHORT;
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(backend.address()).limits(short).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").limits(short).start().await;
    let arrived = Arc::<Mutex<Vec<u8>>>::default();
    let mut application = JoinSet::new();
    application.spawn(serve(backend, arrived.clone()));
    Pair { near, far, mesh, arrived, _application: application }
}

async fn serve(backend: Backend, arrived: Arc<Mutex<Vec<u8>>>) {
    let mut connections = JoinSet::new();
    loop {
        let Some(mut client) = backend.accepted().await else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let arrived = arrived.clone();
        connections.spawn(async move {
            let mut answered = false;
            while let Ok(Some(count)) = client.read_some().await {
                let bytes = client.take(count).await;
                let whole = {
                    let mut all = arrived.lock().unwrap();
                    all.extend_from_slice(&bytes);
                    all.ends_with(b"\r\n\r\n")
                };
                if whole && !std::mem::replace(&mut answered, true) {
                    let _ = client.try_send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
                }
            }
        });
    }
}

/// Says all of it, as far as it is taken, and waits for the end or for an answer.
async fn say(mut client: Connection, bytes: &[u8], cut: Cut) {
    let pieces: Vec<&[u8]> = match cut {
        Cut::Nowhere => vec![bytes],
        Cut::Pieces(size) => bytes.chunks(size).collect(),
        Cut::After(count) => vec![&bytes[..count], &bytes[count..]],
    };
    for piece in pieces {
        if client.try_send(piece).await.is_err() {
            return;
        }
        match cut {
            Cut::Nowhere => {}
            Cut::Pieces(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            Cut::After(_) => tokio::time::sleep(4 * SHORT).await,
        }
    }
    let end =
        async { while !client.ahead().ends_with(b"\r\n\r\n") && matches!(client.read_some().await, Ok(Some(_))) {} };
    outrigger_tests::eventually::soon("an answer or the end", end).await;
}

async fn nothing_passes(pair: &Pair, what: &str, open: impl AsyncFn() -> Connection) {
    for fields in FIELDS {
        for cut in CUTS {
            for batch in HEADS.chunks(16) {
                let whole: Vec<Vec<u8>> = batch.iter().map(|head| [head, fields.as_bytes()].concat()).collect();
                let all = whole.iter().map(async |bytes| say(open().await, bytes, cut).await);
                futures_util::future::join_all(all).await;
            }
            let arrived = pair.arrived.lock().unwrap();
            if let Some(at) = find(&arrived, CLAIM) {
                let around = &arrived[at.saturating_sub(200)..at + 20];
                panic!("{what}, {cut:?}: {}", around.escape_ascii());
            }
        }
    }
}

#[tokio::test]
async fn a_stranger_claims_nothing() {
    let pair = pair().await;
    let door: SocketAddr = pair.far.inbound();
    nothing_passes(&pair, "in plaintext", async || Connection::open(door).await).await;
}

#[tokio::test]
async fn an_application_behind_its_own_sidecar_claims_nothing() {
    let pair = pair().await;
    let door = pair.near.outbound();
    nothing_passes(&pair, "through the own sidecar", async || Connection::open(door).await).await;
}

#[tokio::test]
async fn inside_what_was_announced_as_opaque_nothing_is_claimed() {
    let pair = pair().await;
    let peer = Peer::issue(&pair.mesh, "evil", "web", "web-1").await;
    nothing_passes(&pair, "inside mutual TLS", async || peer.connect(pair.far.inbound(), &[TCP]).await.unwrap()).await;
}

/// What is let go because it stops short is watched: an ordinary request that goes on behind it ends the connection.
#[tokio::test]
async fn what_was_let_go_and_becomes_a_request_ends() {
    let pair = pair().await;
    for (first, rest) in [
        (&b"R"[..], &b"EAD / HTTP/1.1\r\n"[..]),
        (b"\r\n", b"GET /\r\n"),
        (b"ruok", b"\nGET / HTTP/1.1\r\n"),
        (b"\0", b"\nGET / HTTP/1.1\r\n"),
    ] {
        for (door, sidecar) in [(pair.near.outbound(), &pair.near), (pair.far.inbound(), &pair.far)] {
            let ended = async || {
                let labels = [("reason", "protocol_mismatch")];
                sidecar.metrics().await.sum("outrigger_tcp_connections_closed_total", &labels)
            };
            let before = ended().await;
            pair.arrived.lock().unwrap().clear();
            let mut client = Connection::open(door).await;
            client.send(first).await;
            eventually("let go", async || (*pair.arrived.lock().unwrap() == first).then_some(())).await;
            client.send(rest).await;
            client.expect_end().await;
            eventually("counted", async || (ended().await == before + 1.0).then_some(())).await;
            assert_eq!(*pair.arrived.lock().unwrap(), first);
        }
    }
}
