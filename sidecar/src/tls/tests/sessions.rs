//! What resumption carries over, and what ends it: another identity, a new leaf or bundle, a certificate's end.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::tls::clock::{from_unix_seconds, unix_seconds};

#[tokio::test]
async fn the_second_connection_resumes_and_says_the_same() {
    let authority = Authority::new("outrigger.local");
    let server = tls(authority.credential(&LeafSpec::valid("shop", "cart")));
    let client = tls(authority.credential(&LeafSpec::valid("shop", "web")));
    let first = pair(&server, &client, MeshAlpn::H2, &id("cart")).await;
    for _ in 0..3 {
        let second = pair(&server, &client, MeshAlpn::H2, &id("cart")).await;
        for (first, second) in [(&first.0, &second.0), (&first.1, &second.1)] {
            let (first, second) = (first.as_ref().unwrap(), second.as_ref().unwrap());
            assert!(!first.resumed && second.resumed);
            assert_eq!((&first.identity, &first.workload), (&second.identity, &second.workload));
            assert_eq!((first.not_after, first.generation), (second.not_after, second.generation));
        }
    }
    // Another protocol to the same endpoint has sessions of its own; the first one's are still there.
    assert!(!pair(&server, &client, MeshAlpn::Tcp, &id("cart")).await.1.unwrap().resumed);
    assert!(pair(&server, &client, MeshAlpn::H2, &id("cart")).await.1.unwrap().resumed);
}

#[tokio::test]
async fn a_session_never_speaks_for_another_identity() {
    let authority = Authority::new("outrigger.local");
    let server = tls(authority.credential(&LeafSpec::valid("shop", "cart")));
    let client = tls(authority.credential(&LeafSpec::valid("shop", "web")));
    pair(&server, &client, MeshAlpn::H1, &id("cart")).await.1.unwrap();
    // The endpoint is now registered for somebody else: the ticket must not be used for it.
    let (_, refused) = pair(&server, &client, MeshAlpn::H1, &id("pay")).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::IdentityMismatch);
}

#[tokio::test]
async fn a_new_leaf_or_bundle_ends_all_sessions() {
    let authority = Authority::new("outrigger.local");
    let server = tls(authority.credential(&LeafSpec::valid("shop", "cart")));
    let client = tls(authority.credential(&LeafSpec::valid("shop", "web")));
    let connect = async || pair(&server, &client, MeshAlpn::H1, &id("cart")).await.1.unwrap();
    connect().await;
    assert!(connect().await.resumed);
    client.install(authority.credential(&LeafSpec::valid("shop", "web"))).unwrap();
    assert!(!connect().await.resumed, "the client's new leaf has to be shown");
    assert!(connect().await.resumed);
    server.install(authority.credential(&LeafSpec::valid("shop", "cart"))).unwrap();
    assert!(!connect().await.resumed, "the server's new leaf has to be shown");
    assert!(connect().await.resumed);
    assert!(server.install_bundle(authority.bundle(2)).unwrap());
    assert!(!connect().await.resumed, "the server checks the client by the new bundle");
    assert!(client.install_bundle(authority.bundle(2)).unwrap());
    assert_eq!(connect().await.generation, 2);
}

/// A leaf's end is looked at after a resumption too, where rustls verifies nothing.
#[tokio::test]
async fn a_resumed_peer_whose_certificate_has_expired_is_refused() {
    let authority = Authority::new("outrigger.local");
    let start = SystemTime::now();
    let seconds = Arc::new(AtomicU64::new(unix_seconds(start)));
    let clock = {
        let seconds = Arc::clone(&seconds);
        Clock::new(move || from_unix_seconds(seconds.load(Ordering::Relaxed)))
    };
    let long = |account| LeafSpec::valid("shop", account).times(start, 1, 40_000);
    let short = |account| LeafSpec::valid("shop", account).times(start, 1, 100);
    for (server_spec, client_spec) in [(short("cart"), long("web")), (long("cart"), short("web"))] {
        seconds.store(unix_seconds(start), Ordering::Relaxed);
        let (server, client) = (Tls::new(clock.clone()), Tls::new(clock.clone()));
        server.install(authority.credential(&server_spec)).unwrap();
        client.install(authority.credential(&client_spec)).unwrap();
        assert!(!pair(&server, &client, MeshAlpn::H1, &id("cart")).await.1.unwrap().resumed);
        seconds.store(unix_seconds(start) + 24, Ordering::Relaxed);
        assert!(pair(&server, &client, MeshAlpn::H1, &id("cart")).await.1.unwrap().resumed);
        // The own side would refuse to use its expired leaf: only the other one's clock moves.
        let late = from_unix_seconds(unix_seconds(start) + 101);
        let server_is_short = server_spec.not_after < client_spec.not_after;
        let (at_server, at_client) =
            with_late_clock(&authority, &server_spec, &client_spec, server_is_short, late).await;
        let verdict = if server_is_short { at_client } else { at_server };
        assert!(matches!(verdict.unwrap_err(), TlsError::Peer(PeerFault::Expired { .. })));
    }
}

/// One connection in time, then a second one by a ticket, when the side that believes is at `late`.
async fn with_late_clock(
    authority: &Authority,
    server_spec: &LeafSpec,
    client_spec: &LeafSpec,
    client_is_late: bool,
    late: SystemTime,
) -> (Result<Peer, TlsError>, Result<Peer, TlsError>) {
    let offset = Arc::new(AtomicU64::new(0));
    let moving = {
        let offset = Arc::clone(&offset);
        let start = SystemTime::now();
        Clock::new(move || if offset.load(Ordering::Relaxed) == 0 { start } else { late })
    };
    let clocks = if client_is_late { (Clock::system(), moving) } else { (moving, Clock::system()) };
    let (server, client) = (Tls::new(clocks.0), Tls::new(clocks.1));
    // Tickets of the long-lived side outlive the short leaf.
    server.install(authority.credential(server_spec)).unwrap();
    client.install(authority.credential(client_spec)).unwrap();
    pair(&server, &client, MeshAlpn::H1, &id("cart")).await.1.unwrap();
    offset.store(1, Ordering::Relaxed);
    pair(&server, &client, MeshAlpn::H1, &id("cart")).await
}

#[test]
fn tickets_live_a_quarter_of_the_leaf() {
    let life = |seconds| material::ticket_life(Duration::from_secs(seconds)).as_secs();
    assert_eq!([life(86_400), life(4 * 3600), life(20), life(0)], [3600, 3600, 5, 0]);
}
