//! Promise: how one side of an opaque connection ends is how the other sees it end, through two sidecars and the TLS
//! between them. An end passes as an end, in each direction by itself; a reset, or TLS that is cut off, as a reset; and
//! what was said before is delivered.

use std::time::Duration;

use outrigger_tests::application::Backend;
use outrigger_tests::peer::{Peer, TCP};
use outrigger_tests::wire::{Connection, End};
use outrigger_tests::{Mesh, MeshOptions, Sidecar, eventually};

struct Pair {
    app: Backend,
    near: Sidecar,
    far: Sidecar,
    mesh: Mesh,
}

async fn pair(protocol: Option<&str>) -> Pair {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Backend::start().await;
    mesh.service("queue.shop", 5672, app.port(), protocol);
    let far = mesh.sidecar("queue-1").label("app", "queue").inbound(app.address()).start().await;
    let near = mesh.sidecar("cart-1").outbound("queue:5672").start().await;
    Pair { app, near, far, mesh }
}

impl Pair {
    /// A client and its connection at the application.
    async fn open(&self) -> (Connection, Connection) {
        let mut client = Connection::open(self.near.outbound()).await;
        client.send(b"\x00").await;
        let mut app = self.app.accept().await;
        app.take(1).await;
        (client, app)
    }
}

/// More than the kernel's buffers on the way hold.
const MUCH: usize = 3_000_000;

#[tokio::test]
async fn an_end_of_one_direction_leaves_the_other_open() {
    for protocol in [Some("tcp"), None] {
        let pair = pair(protocol).await;
        let (mut client, mut app) = pair.open().await;
        client.finish().await;
        assert_eq!(app.expect_end().await, End::Closed, "the client's end");
        for _ in 0..3 {
            app.send(b"later").await;
            assert_eq!(client.take(5).await, b"later");
        }
        app.finish().await;
        assert_eq!(client.expect_end().await, End::Closed, "and the server's, after what it said");

        let (mut client, mut app) = pair.open().await;
        app.finish().await;
        assert_eq!(client.expect_end().await, End::Closed, "the server's end");
        for _ in 0..3 {
            client.send(b"later").await;
            assert_eq!(app.take(5).await, b"later");
        }
        client.finish().await;
        assert_eq!(app.expect_end().await, End::Closed);
        eventually("counted without a reason", async || {
            let samples = pair.near.metrics().await;
            let closed = samples.sum("outrigger_tcp_connections_closed_total", &[("reason", "")]);
            (closed == 2.0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_reset_is_a_reset_on_the_other_side() {
    for protocol in [Some("tcp"), None] {
        let pair = pair(protocol).await;
        let (client, mut app) = pair.open().await;
        client.reset();
        assert_eq!(app.expect_end().await, End::Reset, "the client's");
        let (mut client, app) = pair.open().await;
        app.reset();
        assert_eq!(client.expect_end().await, End::Reset, "the server's");
    }
}

/// Who has ended and waits for the other's answer may still break: the other learns of it without a word of its own.
#[tokio::test]
async fn a_reset_behind_an_end_is_a_reset_on_the_other_side() {
    for protocol in [Some("tcp"), None] {
        let pair = pair(protocol).await;
        for from_client in [true, false] {
            let (client, app) = pair.open().await;
            let (mut from, mut to) = if from_client { (client, app) } else { (app, client) };
            from.finish().await;
            assert_eq!(to.expect_end().await, End::Closed);
            from.reset();
            // The reader is at its end: only a write, or the socket's own error, tells of the reset.
            eventually("the reset arrives", async || to.tcp().take_error().unwrap()).await;
        }
    }
}

#[tokio::test]
async fn what_was_said_before_a_reset_is_delivered() {
    let pair = pair(Some("tcp")).await;
    for from_client in [true, false] {
        let (client, app) = pair.open().await;
        let (mut from, mut to) = if from_client { (client, app) } else { (app, client) };
        let sent = tokio::spawn(async move {
            from.send(vec![7; MUCH]).await;
            // A reset takes back what the sender's own kernel still has: that is no loss of the mesh's.
            while unsent(&from) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            from.reset();
        });
        // The reader is slow to begin: what waits for it waits in the sidecars and in the kernel.
        let first = to.take(MUCH / 2).await;
        let (rest, end) = to.take_to_end().await;
        sent.await.unwrap();
        assert_eq!((first.len() + rest.len(), end), (MUCH, End::Reset), "from the client: {from_client}");
    }
}

#[tokio::test]
async fn what_a_server_said_before_it_broke_is_read_by_a_client_that_still_talks() {
    let pair = pair(Some("tcp")).await;
    let (mut client, mut app) = pair.open().await;
    app.send(b"refused: too many").await;
    app.reset();
    // The reset meets the client's own bytes on the way.
    for _ in 0..50 {
        if client.try_send(b"more and more").await.is_err() {
            break;
        }
    }
    let (said, end) = client.take_to_end().await;
    assert_eq!((said.as_slice(), end), (&b"refused: too many"[..], End::Reset));
}

/// Mutual TLS whose TCP connection ends without close_notify: nobody can tell that from an attacker's cut.
#[tokio::test]
async fn a_cut_inside_tls_is_a_reset() {
    let pair = pair(Some("tcp")).await;
    let peer = Peer::issue(&pair.mesh, "shop", "web", "web-1").await;
    for in_order in [true, false] {
        let mut client = peer.connect(pair.far.inbound(), &[TCP]).await.unwrap();
        client.send(b"half a mess").await;
        let mut app = pair.app.accept().await;
        assert_eq!(app.take(11).await, b"half a mess");
        if in_order {
            client.finish().await;
            assert_eq!(app.expect_end().await, End::Closed);
        } else {
            // A plain FIN below TLS.
            drop(client.into_tcp());
            assert_eq!(app.expect_end().await, End::Reset);
        }
    }
}

/// The other hop: the sidecar of the server goes away in the middle.
#[tokio::test]
async fn a_sidecar_that_dies_cuts_its_connections_visibly() {
    let pair = pair(Some("tcp")).await;
    let (mut client, mut app) = pair.open().await;
    app.send(b"half an ans").await;
    assert_eq!(client.take(11).await, b"half an ans");
    pair.far.stop().await;
    assert_eq!(client.expect_end().await, End::Reset);
    assert_eq!(app.expect_end().await, End::Reset);
}

/// What the kernel of this end has not brought to the other.
#[expect(unsafe_code, reason = "ioctl(2) has no safe form")]
fn unsent(connection: &Connection) -> i32 {
    use std::os::fd::AsRawFd;
    let mut bytes = 0;
    // SAFETY: the descriptor is open and the kernel writes one int.
    let done = unsafe { libc::ioctl(connection.tcp().as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
    assert_eq!(done, 0);
    bytes
}

/// How a side closes is its own affair. It is a failure when it loses what the other side said.
#[tokio::test]
async fn a_close_that_loses_nothing_has_no_reason() {
    let pair = pair(Some("tcp")).await;
    let count = async |reason: &str| {
        let near = pair.near.metrics().await.sum("outrigger_tcp_connections_closed_total", &[("reason", reason)]);
        let far = pair.far.metrics().await.sum("outrigger_tcp_connections_closed_total", &[("reason", reason)]);
        (near, far)
    };
    // A client or a server that goes: in order, by a reset, or in order and then by the reset with which a closed socket
    // answers what still comes.
    let mut expected = 0.0;
    for from_client in [true, false] {
        for how in ["reset", "end", "end and then reset"] {
            let (client, app) = pair.open().await;
            let (mut from, mut to) = if from_client { (client, app) } else { (app, client) };
            from.send(b"last words").await;
            assert_eq!(to.take(10).await, b"last words");
            match how {
                "reset" => from.reset(),
                "end" => {
                    from.finish().await;
                    to.expect_end().await;
                    to.finish().await;
                    from.expect_end().await;
                }
                _ => {
                    drop(from);
                    to.expect_end().await;
                    to.send(b"for nobody").await;
                    // The other end is told by a write, or by the socket itself.
                    eventually("the reset comes back", async || to.tcp().take_error().unwrap()).await;
                }
            }
            drop(to);
            expected += 1.0;
            eventually(how, async || (count("").await == (expected, expected)).then_some(())).await;
        }
    }
    // Bytes of the server that the client does not take any more.
    let (client, mut app) = pair.open().await;
    let block = vec![7; 64 * 1024];
    while let Ok(sent) = tokio::time::timeout(Duration::from_millis(500), app.try_send(&block)).await {
        sent.unwrap();
    }
    client.reset();
    eventually("both say so", async || (count("client_closed").await == (1.0, 1.0)).then_some(())).await;
}
