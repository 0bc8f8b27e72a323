//! Handshakes over an in-memory pipe: who gets in, who does not, and what resumption carries over.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use outrigger_api::identity::SpiffeId;
use outrigger_api::name::ServiceName;
use rcgen::ExtendedKeyUsagePurpose;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::clock::{from_unix_seconds, unix_seconds};
use super::test_authority::{Authority, LeafSpec, self_signed};
use super::*;
use crate::outcome::Reason;

type Leaf = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

const ENDPOINT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15006);

fn tls(credential: Credential) -> Tls {
    let tls = Tls::new(Clock::system());
    tls.install(credential).unwrap();
    tls
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://outrigger.local/ns/shop/sa/{account}")).unwrap()
}

fn name() -> ServerName<'static> {
    sni(&ServicePort { service: ServiceName::new("cart", "shop").unwrap(), port: 80 })
}

/// Both sides of one connection; the client writes a byte so that the server's verdict on it is seen.
async fn pair(
    server: &Tls,
    client: &Tls,
    alpn: MeshAlpn,
    expected: &SpiffeId,
) -> (Result<Peer, TlsError>, Result<Peer, TlsError>) {
    let (near, far) = duplex(64 * 1024);
    let (server, client) = (server.current().unwrap(), client.current().unwrap());
    let serving = async {
        let (mut stream, peer) = accept(&server, far).await?;
        let mut byte = [0];
        let _ = stream.read_exact(&mut byte).await;
        let _ = stream.write_all(b"!").await;
        Ok(peer)
    };
    let connecting = async {
        let (mut stream, peer) = connect(&client, near, alpn, name(), expected, ENDPOINT).await?;
        let mut byte = [0];
        stream.write_all(b"?").await.map_err(TlsError::from_io)?;
        stream.read_exact(&mut byte).await.map_err(TlsError::from_io)?;
        Ok(peer)
    };
    tokio::join!(serving, connecting)
}

#[test]
fn names_are_hints_of_the_destination() {
    assert_eq!(name(), ServerName::try_from("80.cart.shop.outrigger").unwrap());
    let long = ServiceName::new(&"a".repeat(63), &"b".repeat(63)).unwrap();
    let long = sni(&ServicePort { service: long, port: 65535 });
    assert!(matches!(long, ServerName::DnsName(_)));
    for alpn in MeshAlpn::ALL {
        assert_eq!(MeshAlpn::from_id(alpn.id()), Some(alpn));
    }
    assert_eq!(MeshAlpn::from_id(b"h2"), None);
}

#[tokio::test]
async fn two_sidecars_know_each_other() {
    let authority = Authority::new("outrigger.local");
    for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ED25519] {
        let spec = |account| LeafSpec { key_algorithm: algorithm, ..LeafSpec::valid("shop", account) };
        let server = tls(authority.credential(&spec("cart")));
        let client = tls(authority.credential(&spec("web")));
        for alpn in MeshAlpn::ALL {
            let (at_server, at_client) = pair(&server, &client, alpn, &id("cart")).await;
            let (at_server, at_client) = (at_server.unwrap(), at_client.unwrap());
            assert_eq!((&at_server.identity, &*at_server.workload, at_server.alpn), (&id("web"), "web-1", alpn));
            assert_eq!((&at_client.identity, &*at_client.workload, at_client.alpn), (&id("cart"), "cart-1", alpn));
            assert!(!at_server.resumed && !at_client.resumed, "the first connection per protocol");
            assert_eq!((at_server.generation, at_client.generation), (1, 1));
        }
    }
}

#[tokio::test]
async fn the_key_exchange_is_post_quantum() {
    let authority = Authority::new("outrigger.local");
    let server = tls(authority.credential(&LeafSpec::valid("shop", "cart"))).current().unwrap();
    let client = tls(authority.credential(&LeafSpec::valid("shop", "web"))).current().unwrap();
    let (near, far) = duplex(64 * 1024);
    let expected = id("cart");
    let (at_server, at_client) =
        tokio::join!(accept(&server, far), connect(&client, near, MeshAlpn::H1, name(), &expected, ENDPOINT));
    let (stream, _) = at_server.unwrap();
    let connection = stream.get_ref().1;
    assert_eq!(connection.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(connection.negotiated_key_exchange_group().unwrap().name(), rustls::NamedGroup::X25519MLKEM768);
    assert_eq!(connection.server_name(), Some("80.cart.shop.outrigger"));
    at_client.unwrap();
}

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

#[tokio::test]
async fn a_handshake_under_an_older_bundle_is_judged_by_the_one_in_force() {
    let (old, new) = (Authority::new("outrigger.local"), Authority::new("outrigger.local"));
    let server = tls(old.credential(&LeafSpec::valid("shop", "cart")));
    let client = tls(old.credential(&LeafSpec::valid("shop", "web")));
    let held = client.current().unwrap();
    let both = Bundle::new(old.trust_domain.clone(), vec![old.root.clone(), new.root.clone()], 2).unwrap();
    let attempt = async || {
        let (near, far) = duplex(64 * 1024);
        let serving = server.current().unwrap();
        let expected = id("cart");
        let (_, connected) =
            tokio::join!(accept(&serving, far), connect(&held, near, MeshAlpn::H1, name(), &expected, ENDPOINT));
        connected.map(|(_, peer)| peer)
    };
    client.install_bundle(both).unwrap();
    assert_eq!(attempt().await.unwrap().generation, 2, "still believed, by the bundle in force");
    client.install_bundle(new.bundle(3)).unwrap();
    assert!(matches!(attempt().await.unwrap_err(), TlsError::Peer(PeerFault::Untrusted)));
}

#[tokio::test]
async fn any_root_of_the_bundle_will_do() {
    let (one, two) = (Authority::new("outrigger.local"), Authority::new("outrigger.local"));
    let bundle = Bundle::new(one.trust_domain.clone(), vec![one.root.clone(), two.root.clone()], 7).unwrap();
    let (chain, key) = one.leaf(&LeafSpec::valid("shop", "cart"));
    let server = tls(Credential::new(chain, key, bundle.clone()).unwrap());
    let (chain, key) = two.leaf(&LeafSpec::valid("shop", "web"));
    let client = tls(Credential::new(chain, key, bundle).unwrap());
    let (at_server, at_client) = pair(&server, &client, MeshAlpn::H1, &id("cart")).await;
    assert_eq!((at_server.unwrap().generation, at_client.unwrap().generation), (7, 7));
}

/// The attack tables: every certificate that must not get in, on both sides.
fn bad_leaves() -> Vec<(&'static str, Leaf, Reason)> {
    let ours = Authority::new("outrigger.local");
    bad_leaves_of(&ours)
}

fn bad_leaves_of(ours: &Authority) -> Vec<(&'static str, Leaf, Reason)> {
    let valid = || LeafSpec::valid("shop", "cart");
    let uris = |uris: &[&str]| LeafSpec { uris: uris.iter().map(|uri| (*uri).to_owned()).collect(), ..valid() };
    let usages = |usages: Vec<ExtendedKeyUsagePurpose>| LeafSpec { usages, ..valid() };
    let now = SystemTime::now();
    let own = "spiffe://outrigger.local/ns/shop/sa/cart";
    let specs = [
        ("expired", LeafSpec { not_before: now - Duration::from_secs(60), ..valid().times(now, 60, 0) }),
        ("future", LeafSpec { not_before: now + Duration::from_secs(600), ..valid() }),
        ("wrong EKU", usages(vec![ExtendedKeyUsagePurpose::CodeSigning])),
        ("authority as leaf", LeafSpec { authority: true, ..valid() }),
        ("two URI names", uris(&[own, "spiffe://outrigger.local/ns/shop/sa/pay"])),
        ("the same URI name twice", uris(&[own, own])),
        ("no URI name", uris(&[])),
        ("a DNS name only", LeafSpec { dns: vec!["cart.shop".to_owned()], ..uris(&[]) }),
        ("https URI", uris(&["https://outrigger.local/ns/shop/sa/cart"])),
        ("other trust domain", uris(&["spiffe://other.local/ns/shop/sa/cart"])),
        ("port", uris(&["spiffe://outrigger.local:443/ns/shop/sa/cart"])),
        ("query", uris(&["spiffe://outrigger.local/ns/shop/sa/cart?x=1"])),
        ("dot segments", uris(&["spiffe://outrigger.local/ns/../sa/cart"])),
        ("other path", uris(&["spiffe://outrigger.local/cart"])),
    ];
    let mut leaves: Vec<(&'static str, Leaf, Reason)> =
        specs.into_iter().map(|(what, spec)| (what, ours.leaf(&spec), Reason::PeerCertificate)).collect();
    // One second behind its end, whatever the clock's fraction.
    leaves.push(("self-signed", self_signed(&valid()), Reason::PeerCertificate));
    leaves.push((
        "foreign CA, same subject",
        Authority::new("outrigger.local").leaf(&valid()),
        Reason::PeerCertificate,
    ));
    leaves.push(("leaf-signed leaf", ours.leaf_by_leaf(&valid()), Reason::PeerCertificate));
    leaves
}

/// A client of the attacker's own making: presents what it is told to, believes anybody.
async fn attack_as_client(server: &Tls, leaf: Option<Leaf>, alpn: &[&[u8]]) -> Result<Peer, TlsError> {
    let (near, far) = duplex(64 * 1024);
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let mut config = match leaf {
        Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|id| id.to_vec()).collect();
    let material = server.current().unwrap();
    let serving = async { accept(&material, far).await.map(|(_, peer)| peer) };
    let (served, _) = tokio::join!(serving, async {
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name(), near).await?;
        stream.write_all(b"GET / HTTP/1.1\r\n").await?;
        stream.read_u8().await
    });
    served
}

/// A server of the attacker's own making, which a sidecar dials as `cart`.
async fn attack_as_server(client: &Tls, leaf: Leaf, alpn: &[&[u8]]) -> Result<Peer, TlsError> {
    let (near, far) = duplex(64 * 1024);
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(leaf.0, leaf.1)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|id| id.to_vec()).collect();
    let material = client.current().unwrap();
    let expected = id("cart");
    let (_, connected) = tokio::join!(
        TlsAcceptor::from(Arc::new(config)).accept(far),
        connect(&material, near, MeshAlpn::H1, name(), &expected, ENDPOINT)
    );
    connected.map(|(_, peer)| peer)
}

#[tokio::test]
async fn no_client_gets_in_without_a_certificate_of_the_mesh() {
    let authority = Authority::new("outrigger.local");
    let server = tls(authority.credential(&LeafSpec::valid("shop", "pay")));
    let mesh = [MeshAlpn::H1.id()];
    for (what, leaf, reason) in bad_leaves_of(&authority) {
        let error = attack_as_client(&server, Some(leaf), &mesh).await.expect_err(what);
        assert_eq!(error.reason(), reason, "{what}: {error}");
    }
    let only_server = LeafSpec { usages: vec![ExtendedKeyUsagePurpose::ServerAuth], ..LeafSpec::valid("shop", "web") };
    let error = attack_as_client(&server, Some(authority.leaf(&only_server)), &mesh).await.unwrap_err();
    assert!(matches!(error, TlsError::Peer(PeerFault::Purpose)), "{error}");
    let error = attack_as_client(&server, None, &mesh).await.unwrap_err();
    assert!(matches!(error, TlsError::NoCertificate), "{error}");
    let good = || authority.leaf(&LeafSpec::valid("shop", "web"));
    for alpn in [[b"h2".as_slice()].as_slice(), &[]] {
        let error = attack_as_client(&server, Some(good()), alpn).await.unwrap_err();
        assert_eq!(error.reason(), Reason::MtlsRequired, "{alpn:?}: {error}");
    }
    assert_eq!(attack_as_client(&server, Some(good()), &mesh).await.unwrap().identity, id("web"));
}

#[tokio::test]
async fn no_server_is_believed_to_be_another() {
    let authority = Authority::new("outrigger.local");
    let client = tls(authority.credential(&LeafSpec::valid("shop", "web")));
    let mesh = [MeshAlpn::H1.id()];
    for (what, leaf, reason) in bad_leaves_of(&authority) {
        let error = attack_as_server(&client, leaf, &mesh).await.expect_err(what);
        assert_eq!(error.reason(), reason, "{what}: {error}");
    }
    let other = authority.leaf(&LeafSpec::valid("shop", "pay"));
    let error = attack_as_server(&client, other, &mesh).await.unwrap_err();
    assert_eq!(error.reason(), Reason::IdentityMismatch, "a valid certificate of another service: {error}");
    let good = || authority.leaf(&LeafSpec::valid("shop", "cart"));
    let error = attack_as_server(&client, good(), &[]).await.unwrap_err();
    assert!(matches!(error, TlsError::NotMesh), "no protocol agreed on: {error}");
    let error = attack_as_server(&client, good(), &[b"outrigger/h2"]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::TlsHandshake, "another protocol only: {error}");
    assert_eq!(attack_as_server(&client, good(), &mesh).await.unwrap().identity, id("cart"));
}

#[tokio::test]
async fn a_leaf_with_the_wrong_purpose_is_refused_as_a_server() {
    let authority = Authority::new("outrigger.local");
    let client = tls(authority.credential(&LeafSpec::valid("shop", "web")));
    let spec = LeafSpec { usages: vec![ExtendedKeyUsagePurpose::ClientAuth], ..LeafSpec::valid("shop", "cart") };
    let error = attack_as_server(&client, authority.leaf(&spec), &[MeshAlpn::H1.id()]).await.unwrap_err();
    assert!(matches!(error, TlsError::Peer(PeerFault::Purpose)), "{error}");
}

#[test]
fn bad_certificates_make_no_credential_either() {
    let authority = Authority::new("outrigger.local");
    for (what, (chain, key), _) in bad_leaves_of(&authority) {
        // Time alone does not unmake a credential: it may be restored from disk, and says so when asked.
        let credential = Credential::new(chain, key, authority.bundle(1));
        match what {
            "expired" | "future" => assert!(credential.unwrap().check_time(SystemTime::now()).is_err(), "{what}"),
            _ => assert!(credential.is_err(), "{what}"),
        }
    }
    let (chain, _) = authority.leaf(&LeafSpec::valid("shop", "cart"));
    let (_, key) = authority.leaf(&LeafSpec::valid("shop", "cart"));
    assert!(matches!(Credential::new(chain, key, authority.bundle(1)), Err(CredentialError::KeyMismatch)));
    let (_, key) = authority.leaf(&LeafSpec::valid("shop", "cart"));
    assert!(matches!(Credential::new(vec![], key, authority.bundle(1)), Err(CredentialError::NoChain)));
    assert!(Bundle::new(authority.trust_domain.clone(), vec![], 1).is_err());
    assert!(Bundle::new(authority.trust_domain.clone(), vec![vec![1, 2, 3].into()], 1).is_err());
    assert!(!bad_leaves().is_empty());
}

#[test]
fn no_key_is_ever_shown() {
    let authority = Authority::new("outrigger.local");
    let shown = format!("{:?}", authority.credential(&LeafSpec::valid("shop", "cart")));
    assert!(
        shown.contains("spiffe://outrigger.local/ns/shop/sa/cart") && !shown.to_lowercase().contains("key"),
        "{shown}"
    );
}

#[tokio::test]
async fn an_expired_own_certificate_fails_closed() {
    let authority = Authority::new("outrigger.local");
    let now = SystemTime::now();
    let expired = authority.credential(&LeafSpec::valid("shop", "cart").times(now, 60, 0));
    let late = Clock::new(move || now + Duration::from_secs(2));
    let server = Tls::new(late.clone());
    server.install(expired.clone()).unwrap();
    let client = tls(authority.credential(&LeafSpec::valid("shop", "web")));
    let (at_server, _) = pair(&server, &client, MeshAlpn::H1, &id("cart")).await;
    assert_eq!(at_server.unwrap_err().reason(), Reason::NotReady);
    let (_, at_client) = pair(&client, &server, MeshAlpn::H1, &id("web")).await;
    assert_eq!(at_client.unwrap_err().reason(), Reason::NotReady);
}

#[test]
fn the_later_bundle_stays_unless_it_disbelieves_the_new_leaf() {
    let (one, two) = (Authority::new("outrigger.local"), Authority::new("outrigger.local"));
    let tls = tls(one.credential(&LeafSpec::valid("shop", "cart")));
    assert!(tls.install_bundle(one.bundle(5)).unwrap());
    assert!(!tls.install_bundle(one.bundle(4)).unwrap(), "an older one is not taken");
    let with = |generation| {
        let roots = one.bundle(0).roots().iter().chain(two.bundle(0).roots()).cloned().collect();
        Bundle::new(one.bundle(0).trust_domain().clone(), roots, generation).unwrap()
    };
    for generation in [1, 4, 5] {
        let refused = tls.install_bundle(with(generation)).unwrap_err();
        assert!(matches!(refused, TlsError::OlderBundle { in_force: 5, .. }), "{generation}: {refused}");
    }
    tls.install(one.credential(&LeafSpec::valid("shop", "cart"))).unwrap();
    assert_eq!(tls.current().unwrap().credential().bundle().generation(), 5);
    tls.install(two.credential(&LeafSpec::valid("shop", "cart"))).unwrap();
    let installed = tls.current().unwrap();
    assert_eq!(installed.credential().bundle().generation(), 1, "of another authority");
    assert!(installed.credential().verifies());
    let foreign = Authority::new("other.local");
    assert!(tls.install_bundle(foreign.bundle(9)).is_err());
}

#[test]
fn tickets_live_a_quarter_of_the_leaf() {
    let life = |seconds| material::ticket_life(Duration::from_secs(seconds)).as_secs();
    assert_eq!([life(86_400), life(4 * 3600), life(20), life(0)], [3600, 3600, 5, 0]);
}

/// The hello of a client of the mesh, as it is on the wire.
fn hello(alpn: &[&[u8]], sni: Option<&str>) -> Vec<u8> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|id| id.to_vec()).collect();
    let name = match sni {
        Some(sni) => ServerName::try_from(sni.to_owned()).unwrap(),
        None => ServerName::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST).into()),
    };
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).unwrap();
    bytes
}

#[test]
fn first_bytes_are_told_apart() {
    let mesh = hello(&[b"outrigger/h1"], None);
    assert!(mesh.len() > 1_200, "post-quantum, and so of more than one segment: {}", mesh.len());
    assert!(matches!(read_hello(&mesh), Hello::Mesh(_)));
    for end in 0..mesh.len() {
        assert!(matches!(read_hello(&mesh[..end]), Hello::Incomplete), "cut at {end}");
    }
    assert!(matches!(read_hello(&hello(&[b"h2", b"outrigger/h2"], None)), Hello::Mesh(_)));
    for alpn in [[b"h2".as_slice(), b"http/1.1"].as_slice(), &[], &[b"outrigger/h3"]] {
        match read_hello(&hello(alpn, Some("example.com"))) {
            Hello::Foreign { sni } => assert_eq!(sni.as_deref(), Some("example.com")),
            other => panic!("{alpn:?}: {other:?}"),
        }
    }
    assert!(matches!(read_hello(&hello(&[], None)), Hello::Foreign { sni: None }));
    for bytes in [
        b"GET / HTTP/1.1\r\n\r\n".as_slice(),
        b"\0\0\0\0",
        b"\x16\x02\x01\x00\x05",
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00",
        b"\x16\x03\x01\xff\xff",
    ] {
        assert!(matches!(read_hello(bytes), Hello::Invalid), "{bytes:?}");
    }
    let endless = [b"\x16\x03\x01\x40\x00\x01\x00\xff\xf0".as_slice(), &vec![0; MAX_HELLO_PLUS]].concat();
    assert!(matches!(read_hello(&endless), Hello::Invalid));
}

const MAX_HELLO_PLUS: usize = 16 * 1024 + 64;

#[tokio::test]
async fn a_hello_that_was_read_ahead_goes_on_from_there() {
    let authority = Authority::new("outrigger.local");
    let server = tls(authority.credential(&LeafSpec::valid("shop", "cart"))).current().unwrap();
    let client = tls(authority.credential(&LeafSpec::valid("shop", "web"))).current().unwrap();
    let (near, mut far) = duplex(64 * 1024);
    let expected = id("cart");
    let serving = async {
        let mut bytes = Vec::new();
        loop {
            far.read_buf(&mut bytes).await.unwrap();
            match read_hello(&bytes) {
                Hello::Incomplete => {}
                Hello::Mesh(accepted) => break accept_hello(&server, *accepted, far).await,
                other => panic!("{other:?}"),
            }
        }
    };
    let (served, connected) = tokio::join!(serving, connect(&client, near, MeshAlpn::Tcp, name(), &expected, ENDPOINT));
    assert_eq!(served.unwrap().1.identity, id("web"));
    assert_eq!(connected.unwrap().1.identity, id("cart"));
}

/// A ClientHello of TLS 1.2 at most, with a mesh protocol: no version can be agreed on.
#[tokio::test]
async fn tls_1_2_is_refused() {
    let authority = Authority::new("outrigger.local");
    let server = tls(authority.credential(&LeafSpec::valid("shop", "cart"))).current().unwrap();
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(0);
    body.extend([0, 2, 0xc0, 0x2b, 1, 0]);
    let alpn = b"\x00\x10\x00\x0f\x00\x0d\x0coutrigger/h1";
    let groups = b"\x00\x0a\x00\x04\x00\x02\x00\x1d";
    let schemes = b"\x00\x0d\x00\x04\x00\x02\x04\x03";
    let extensions = [alpn.as_slice(), groups, schemes].concat();
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut record = vec![0x16, 3, 1];
    record.extend((body.len() as u16 + 4).to_be_bytes());
    record.extend([1, 0]);
    record.extend((body.len() as u16).to_be_bytes());
    record.extend(body);
    let (mut near, far) = duplex(64 * 1024);
    near.write_all(&record).await.unwrap();
    let error = accept(&server, far).await.map(|_| ()).unwrap_err();
    assert_eq!(error.reason(), Reason::TlsHandshake, "{error}");
    let mut answer = Vec::new();
    near.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, [0x15, 3, 3, 0, 2, 2, 70], "the alert protocol_version and nothing else");
}

#[tokio::test]
async fn garbage_and_silence_end_the_handshake() {
    let authority = Authority::new("outrigger.local");
    let material = tls(authority.credential(&LeafSpec::valid("shop", "cart"))).current().unwrap();
    for garbage in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0; 100], &[0x16, 3, 1, 0xff, 0xff], b""] {
        let (mut near, far) = duplex(64 * 1024);
        near.write_all(garbage).await.unwrap();
        near.shutdown().await.unwrap();
        let error = accept(&material, far).await.map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), Reason::TlsHandshake, "{error}");
        let (mut far, near) = duplex(64 * 1024);
        far.write_all(garbage).await.unwrap();
        far.shutdown().await.unwrap();
        let error =
            connect(&material, near, MeshAlpn::H1, name(), &id("cart"), ENDPOINT).await.map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), Reason::TlsHandshake, "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_is_given_ten_seconds() {
    let authority = Authority::new("outrigger.local");
    let material = tls(authority.credential(&LeafSpec::valid("shop", "cart"))).current().unwrap();
    let (_near, far) = duplex(64);
    let start = tokio::time::Instant::now();
    assert!(matches!(accept(&material, far).await, Err(TlsError::Timeout(_))));
    assert_eq!(start.elapsed().as_secs(), 10);
}

#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
