//! Promise: all four sockets of a connection through two sidecars, accepted and dialled, have keep-alive and
//! TCP_USER_TIMEOUT, so that a peer whose cable was pulled is noticed on either side of either sidecar.

use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use outrigger_sidecar::config::Limits;
use outrigger_tests::application::Backend;
use outrigger_tests::wire::Connection;
use outrigger_tests::{Mesh, MeshOptions};
use socket2::SockRef;

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

fn check(what: &str, descriptor: RawFd) {
    let limits = Limits::default();
    let borrowed = borrow(descriptor);
    let socket = SockRef::from(&borrowed);
    assert!(socket.keepalive().unwrap(), "{what}: keep-alive");
    assert_eq!(socket.tcp_keepalive_time().unwrap(), limits.keepalive, "{what}");
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), limits.keepalive, "{what}");
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), limits.keepalive_probes, "{what}");
    assert_eq!(socket.tcp_user_timeout().unwrap(), Some(limits.user_timeout), "{what}");
    assert!(socket.tcp_nodelay().unwrap(), "{what}: no delay");
    assert!(limits.user_timeout <= Duration::from_secs(30));
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
