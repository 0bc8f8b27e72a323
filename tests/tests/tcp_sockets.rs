//! Promise: all four sockets of a connection through two sidecars, accepted and dialled, notice a peer whose cable was pulled:
//! by keep-alive when they are idle, by the ACKs that do not come when bytes wait. A peer that acknowledges is there, for as
//! long as it likes, and urgent data holds up nothing.

use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use outrigger_sidecar::config::Limits;
use outrigger_sidecar::net;
use outrigger_tests::application::Backend;
use outrigger_tests::eventually::soon;
use outrigger_tests::namespace::installed;
use outrigger_tests::wire::{Connection, End};
use outrigger_tests::{Mesh, MeshOptions, Namespace, eventually, under_test};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn all_four_sockets_notice_a_dead_peer() {
    for protocol in [Some("tcp"), None] {
        let mesh = Mesh::start(MeshOptions::default()).await;
        let backend = Backend::start().await;
        mesh.service("queue.shop", 5672, backend.port(), protocol);
        let far = mesh.sidecar("queue-1").label("app", "queue").inbound(backend.address()).start().await;
        let near = mesh.sidecar("cart-1").outbound("queue:5672").start().await;
        let mut client = Connection::open(near.outbound()).await;
        client.send(b"\0").await;
        let mut app = backend.accept().await;
        app.take(1).await;
        let here = |connection: &Connection| connection.tcp().local_addr().unwrap();
        let there = |connection: &Connection| connection.tcp().peer_addr().unwrap();
        // Accepted by the near one, dialled by it, accepted by the far one, dialled by it.
        let sockets = [
            socket("accepted by the near", |local, peer| local == near.outbound() && peer == here(&client)),
            socket("dialled by the near", |_, peer| peer == far.inbound()),
            socket("accepted by the far", |local, peer| local == far.inbound() && peer.port() != 0),
            socket("dialled by the far", |local, peer| local == there(&app) && peer == here(&app)),
        ];
        for (what, descriptor) in sockets {
            check(what, descriptor);
        }
    }
}

const BULK: usize = 24 * 1024 * 1024;
/// Less than the sidecars of the test give a silent peer.
const NO_ACK: Duration = Duration::from_secs(1);

/// Who rests for much longer than a silent peer is given is waited for: its kernel answers for it.
#[tokio::test]
async fn a_side_that_pauses_is_waited_for() {
    for protocol in ["tcp", "http"] {
        let mesh = Mesh::start(MeshOptions::default()).await;
        let backend = Backend::start().await;
        mesh.service("queue.shop", 5672, backend.port(), Some(protocol));
        let far = mesh.sidecar("queue-1").label("app", "queue").inbound(backend.address());
        let _far = far.limits(|limits| limits.no_ack_timeout = NO_ACK).start().await;
        let near = mesh.sidecar("cart-1").outbound("queue:5672");
        let near = near.limits(|limits| limits.no_ack_timeout = NO_ACK).start().await;
        for upload in [false, true] {
            let mut client = Connection::open(near.outbound()).await;
            let length = if upload { BULK } else { 0 };
            client.send(format!("POST / HTTP/1.1\r\nHost: queue\r\nContent-Length: {length}\r\n\r\n")).await;
            let mut app = backend.accept().await;
            app.take_until(b"\r\n\r\n").await;
            if !upload {
                app.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {BULK}\r\n\r\n")).await;
                client.take_until(b"\r\n\r\n").await;
            }
            let (sends, mut rests) = if upload { (client, app) } else { (app, client) };
            // Not `send`, which has less patience than the other side's rest may need.
            let mut sends = sends.into_tcp();
            let sending = tokio::spawn(async move {
                let sent = sends.write_all(&vec![7; BULK]).await;
                (sent, sends)
            });
            // This is the pause, and not a wait for anything.
            tokio::time::sleep(4 * NO_ACK).await;
            assert!(!sending.is_finished(), "{protocol}: all of it fits into buffers, and nothing was tried");
            assert_eq!(rests.take(BULK).await.len(), BULK, "{protocol}, upload: {upload}");
            let (sent, _sends) = soon("the end of sending", sending).await.unwrap();
            assert!(sent.is_ok(), "{protocol}, upload: {upload}: {sent:?}");
        }
    }
}

/// A peer that is gone without a word: found by what it does not acknowledge, with its window open or closed.
#[tokio::test]
async fn a_peer_that_acknowledges_nothing_is_given_up() {
    if !installed(&["nft"]) {
        return;
    }
    for closed in [false, true] {
        let Some(lone) = Namespace::lone() else { return };
        let listener = lone.listen("127.0.0.1:80".parse().unwrap());
        let (client, accepted) = tokio::join!(lone.connect("127.0.0.1:80".parse().unwrap()), listener.accept());
        let (_peer, _) = accepted.unwrap();
        let mut stream = net::Stream::from(client.into_tcp());
        if closed {
            while tokio::time::timeout(Duration::from_millis(200), stream.write_all(&[7; 65536])).await.is_ok() {}
            let begun = std::time::Instant::now();
            while begun.elapsed() < 3 * NO_ACK {
                let mut byte = [0; 1];
                net::give_up_silent_peers(NO_ACK);
                let read = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut byte)).await;
                assert!(read.is_err(), "it is only not reading: {read:?}");
            }
        }
        lone.run(
            "nft -f - <<'X'\ntable inet cable {\nchain pulled {\ntype filter hook input priority 0; policy drop;\n}\n}\nX",
        );
        if !closed {
            stream.write_all(b"is somebody there?").await.unwrap();
        }
        let error = eventually("it is given up", async || {
            let mut byte = [0; 1];
            net::give_up_silent_peers(NO_ACK);
            let read = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut byte)).await;
            read.ok().map(|read| read.unwrap_err())
        })
        .await;
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "{error}");
    }
}

/// Whatever is sent as urgent is a byte in its place and holds up nothing, in either direction and however the connection
/// began.
#[tokio::test]
async fn urgent_data_stalls_nothing() {
    const ROUNDS: usize = 20;
    for protocol in [Some("tcp"), None] {
        let mesh = Mesh::start(MeshOptions::default()).await;
        let backend = Backend::start().await;
        mesh.service("queue.shop", 5672, backend.port(), protocol);
        let far = mesh.sidecar("queue-1").label("app", "queue").inbound(backend.address());
        let mut far = far.spawn(under_test!()).await;
        far.ready().await;
        let near = mesh.sidecar("cart-1").outbound("queue:5672").http_proxy();
        let mut near = near.spawn(under_test!()).await;
        near.ready().await;
        let (door, proxy) = (near.address("outbound:queue.shop:5672").await, near.address("http-proxy").await);
        for round in 0..ROUNDS {
            let tunnel = round % 2 == 1;
            let mut client = Connection::open(if tunnel { proxy } else { door }).await;
            if tunnel {
                client.send("CONNECT queue.shop:5672 HTTP/1.1\r\nHost: queue.shop:5672\r\n\r\n").await;
                client.take_until(b"\r\n\r\n").await;
            }
            urgent(&mut client).await;
            let mut app = backend.accept().await;
            assert_eq!(app.take(6).await, b"ab!cd\n", "{protocol:?}, {round}: to the server");
            urgent(&mut app).await;
            assert_eq!(client.take(6).await, b"ab!cd\n", "{protocol:?}, {round}: to the client");
            urgent(&mut client).await;
            assert_eq!(app.take(6).await, b"ab!cd\n", "{protocol:?}, {round}: again");
            client.finish().await;
            assert_eq!(app.expect_end().await, End::Closed);
        }
    }
}

async fn urgent(side: &mut Connection) {
    urgent_at(side, "ab", "!", "cd\n").await;
}

async fn urgent_at(side: &mut Connection, before: &str, urgent: &str, behind: &str) {
    side.send(before).await;
    assert_eq!(SockRef::from(side.tcp()).send_out_of_band(urgent.as_bytes()).unwrap(), urgent.len());
    side.send(behind).await;
}

/// The same where the bytes are HTTP: in a head, in a body, and where the next request begins.
#[tokio::test]
async fn urgent_data_stalls_no_http() {
    const ROUNDS: usize = 20;
    const LENGTH: &str = "Host: queue\r\nContent-Length: 6\r\n\r\n";
    for protocol in [Some("http"), None] {
        let mesh = Mesh::start(MeshOptions::default()).await;
        let backend = Backend::start().await;
        mesh.service("queue.shop", 5672, backend.port(), protocol);
        let far = mesh.sidecar("queue-1").label("app", "queue").inbound(backend.address());
        let mut far = far.spawn(under_test!()).await;
        far.ready().await;
        let mut near = mesh.sidecar("cart-1").outbound("queue:5672").spawn(under_test!()).await;
        near.ready().await;
        let door = near.address("outbound:queue.shop:5672").await;
        let mut client = Connection::open(door).await;
        urgent_at(&mut client, "POST /0 HT", "T", &format!("P/1.1\r\n{LENGTH}")).await;
        let mut app = None;
        for round in 0..ROUNDS {
            urgent_at(&mut client, "ab", "!", "cd\n").await;
            let app = match &mut app {
                Some(app) => app,
                app => app.insert(backend.accept().await),
            };
            let head = outrigger_tests::wire::text(&app.take_until(b"\r\n\r\n").await);
            assert!(head.starts_with(&format!("POST /{round} HTTP/1.1\r\n")), "{protocol:?}: {head}");
            assert_eq!(app.take(6).await, b"ab!cd\n", "{protocol:?}, {round}: to the server");
            // The next request is on its way before the answer is.
            urgent_at(&mut client, "", "P", &format!("OST /{} HTTP/1.1\r\n{LENGTH}", round + 1)).await;
            urgent_at(app, "HTTP/1.1 200 OK\r\nContent-Len", "g", "th: 6\r\n\r\n").await;
            urgent_at(app, "ab", "!", "cd\n").await;
            let answer = client.response(false).await;
            assert_eq!(
                (answer.status, answer.text().as_str()),
                (200, "ab!cd\n"),
                "{protocol:?}, {round}: to the client"
            );
        }
    }
}

fn check(what: &str, descriptor: RawFd) {
    let limits = Limits::default();
    let borrowed = borrow(descriptor);
    let socket = SockRef::from(&borrowed);
    assert!(socket.keepalive().unwrap(), "{what}: keep-alive");
    assert_eq!(socket.tcp_keepalive_time().unwrap(), limits.keepalive, "{what}");
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), limits.keepalive_interval, "{what}");
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), limits.keepalive_probes, "{what}");
    let idle = limits.keepalive + limits.keepalive_interval * limits.keepalive_probes;
    assert!(idle <= Duration::from_secs(120), "a pulled cable");
    // It would end a connection whose peer pauses.
    assert_eq!(socket.tcp_user_timeout().unwrap(), None, "{what}");
    assert!(socket.tcp_nodelay().unwrap(), "{what}: no delay");
    assert!(socket.out_of_band_inline().unwrap(), "{what}: urgent data is in its place");
    assert!(limits.no_ack_timeout <= Duration::from_secs(30));
}

/// The descriptor of this process whose addresses are these. The sidecars run in it.
fn socket(what: &str, wanted: impl Fn(SocketAddr, SocketAddr) -> bool) -> (&str, RawFd) {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<RawFd>().ok());
    let found = numbers.filter(|number| {
        let borrowed = borrow(*number);
        let socket = SockRef::from(&borrowed);
        let local = socket.local_addr().ok().and_then(|address| address.as_socket());
        let peer = socket.peer_addr().ok().and_then(|address| address.as_socket());
        local.zip(peer).is_some_and(|(local, peer)| wanted(local, peer))
    });
    let found: Vec<RawFd> = found.collect();
    assert_eq!(found.len(), 1, "{what}: {found:?}");
    (what, found[0])
}

#[expect(unsafe_code, reason = "descriptors of others in this process have no owner here")]
fn borrow(descriptor: RawFd) -> BorrowedFd<'static> {
    // SAFETY: only asked for options; one that is closed meanwhile answers EBADF.
    unsafe { BorrowedFd::borrow_raw(descriptor) }
}
