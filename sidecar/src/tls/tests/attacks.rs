//! Certificates that must not get in, shown by clients and by servers of an attacker's own making.

use rcgen::ExtendedKeyUsagePurpose;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::PrivateKeyDer;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::tls::test_authority::self_signed;

#[tokio::test]
async fn no_client_gets_in_without_a_certificate_of_the_mesh() {
    let authority = Authority::new("outrigger.local");
    let server = tls(authority.credential(&LeafSpec::valid("shop", "pay")));
    let mesh = [MeshAlpn::H1.id()];
    for (what, leaf, reason) in bad_leaves(&authority) {
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
    for (what, leaf, reason) in bad_leaves(&authority) {
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

type Leaf = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The attack tables: every certificate that must not get in, on both sides.
pub(super) fn bad_leaves(ours: &Authority) -> Vec<(&'static str, Leaf, Reason)> {
    let valid = || LeafSpec::valid("shop", "cart");
    let uris = |uris: &[&str]| LeafSpec { uris: uris.iter().map(|uri| (*uri).to_owned()).collect(), ..valid() };
    let usages = |usages: Vec<ExtendedKeyUsagePurpose>| LeafSpec { usages, ..valid() };
    let now = SystemTime::now();
    let own = "spiffe://outrigger.local/ns/shop/sa/cart";
    let specs = [
        // One second behind its end, whatever the clock's fraction.
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
