//! Promise: nobody gets in who cannot prove to be of the mesh, and nobody is talked to who is not who was meant. What
//! fails the handshake never reaches the application, not even as an empty connection, and what was to be mutual TLS
//! never becomes plaintext.

use std::time::Duration;

use outrigger_sidecar::config::Limits;
use outrigger_tests::application::Backend;
use outrigger_tests::peer::{self, Authority, H1, H2, TCP};
use outrigger_tests::{Application, Connection, End, Mesh, MeshOptions, Peer, Sidecar, eventually};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";
const GET: &str = "GET /in HTTP/1.1\r\nHost: catalog\r\nConnection: close\r\n\r\n";

/// The mesh's own authority, as somebody has it who stole its key, to make certificates that differ from good ones in
/// one point only.
struct Stolen {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Stolen {
    fn of(mesh: &Mesh) -> Stolen {
        let read = |kind: &str| std::fs::read_to_string(mesh.path(&format!("control-plane/ca/intermediate.{kind}")));
        let (pem, key) = (read("pem").unwrap(), read("key").unwrap());
        let key = KeyPair::from_pem(&key).unwrap();
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        Stolen { issuer: Issuer::from_ca_cert_der(&certificate, key).unwrap(), certificate }
    }

    fn leaf(&self, uris: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Peer {
        let key = KeyPair::generate().unwrap();
        let certificate = params(uris, change).signed_by(&key, &self.issuer).unwrap();
        Peer { key, chain: vec![certificate.der().clone(), self.certificate.clone()] }
    }
}

fn params(uris: &[&str], change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "cart");
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2090, 1, 1);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    change(&mut params);
    params
}

struct Strict {
    mesh: Mesh,
    app: Application,
    far: Sidecar,
}

async fn strict(limits: impl FnOnce(&mut Limits)) -> Strict {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).limits(limits).start().await;
    Strict { mesh, app, far }
}

impl Strict {
    /// Tries to come in by every ALPN id, and gets nothing.
    async fn refuses(&self, who: &str, peer: &Peer) {
        for alpn in [H1, H2, TCP] {
            let Ok(mut connection) = peer.connect(self.far.inbound(), &[alpn]).await else { continue };
            let _ = connection.try_send(GET).await;
            let (answer, _) = connection.take_to_end().await;
            assert!(answer.is_empty(), "{who} by {alpn}: {}", outrigger_tests::wire::text(&answer));
        }
        assert_eq!(self.app.connections(), 0, "{who} reached the application");
    }

    /// The same way in, by somebody who may.
    async fn admits(&self, peer: &Peer) {
        let mut connection = peer.connect(self.far.inbound(), &[H1]).await.unwrap();
        assert_eq!(connection.ask(GET).await.status, 200);
        assert_eq!(self.app.connections(), 1);
    }

    async fn counted(&self, reason: &str) {
        eventually(&format!("{reason} is counted"), async || {
            let samples = self.far.metrics().await;
            let closed = samples.sum("outrigger_tcp_connections_closed_total", &[("reason", reason)]);
            (closed > 0.0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn certificates_that_prove_nothing_do_not_get_in() {
    let strict = strict(|_| {}).await;
    let stolen = Stolen::of(&strict.mesh);
    let foreign_of_the_same_name = {
        let key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        let parsed = x509_parser::parse_x509_certificate(&stolen.certificate).unwrap().1;
        ca.distinguished_name = DistinguishedName::new();
        for name in parsed.subject().iter_common_name() {
            ca.distinguished_name.push(DnType::CommonName, name.as_str().unwrap());
        }
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = ca.self_signed(&key).unwrap().der().clone();
        Stolen { issuer: Issuer::new(ca, key), certificate }
    };
    let issued = Peer::issue(&strict.mesh, "shop", "cart", "cart").await;
    let by_a_leaf = {
        let key = KeyPair::generate().unwrap();
        let issuer_key = KeyPair::try_from(issued.key.serialize_der().as_slice()).unwrap();
        let issuer = Issuer::new(params(&[CART], |_| {}), issuer_key);
        let certificate = params(&[CART], |_| {}).signed_by(&key, &issuer).unwrap();
        let mut chain = vec![certificate.der().clone()];
        chain.extend(issued.chain.iter().cloned());
        Peer { key, chain }
    };
    let peers = [
        ("no certificate", Peer::without_certificate()),
        ("self-signed", peer::self_signed(CART)),
        ("another authority's", Authority::new().leaf(&[CART], |_| {})),
        ("another authority's of the same name", foreign_of_the_same_name.leaf(&[CART], |_| {})),
        ("expired", stolen.leaf(&[CART], |params| params.not_after = date_time_ymd(2021, 1, 1))),
        ("not yet valid", stolen.leaf(&[CART], |params| params.not_before = date_time_ymd(2080, 1, 1))),
        (
            "for servers only",
            stolen.leaf(&[CART], |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
        ),
        (
            "for code",
            stolen.leaf(&[CART], |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
        ),
        ("signed by a leaf", by_a_leaf),
        ("without its intermediate", {
            let mut peer = Peer::issue(&strict.mesh, "shop", "cart", "cart").await;
            peer.chain.truncate(1);
            peer
        }),
    ];
    for (who, peer) in &peers {
        strict.refuses(who, peer).await;
    }
    strict.counted("peer_certificate").await;
    strict.admits(&issued).await;
}

#[tokio::test]
async fn an_identity_is_one_well_formed_spiffe_id_of_this_mesh() {
    let strict = strict(|_| {}).await;
    let stolen = Stolen::of(&strict.mesh);
    let other = "spiffe://outrigger.local/ns/shop/sa/other";
    let uris: [&[&str]; 19] = [
        &[],
        &[CART, other],
        &[CART, CART],
        &[CART, "https://example.com/"],
        &["spiffe://elsewhere/ns/shop/sa/cart"],
        &["spiffe://outrigger.local.evil/ns/shop/sa/cart"],
        &["https://outrigger.local/ns/shop/sa/cart"],
        &["spiffe://outrigger.local:443/ns/shop/sa/cart"],
        &["spiffe://user@outrigger.local/ns/shop/sa/cart"],
        &["spiffe://outrigger.local/ns/shop/sa/cart?a=b"],
        &["spiffe://outrigger.local/ns/shop/sa/cart#a"],
        &["spiffe://outrigger.local/ns/shop/sa/../sa/cart"],
        &["spiffe://outrigger.local/ns/shop/sa/cart/.."],
        &["spiffe://outrigger.local/ns/shop/sa/cart/"],
        &["spiffe://outrigger.local/ns//sa/cart"],
        &["spiffe://outrigger.local/ns/shop/sa/%63art"],
        &["spiffe://outrigger.local/ns/shop/sa"],
        &["spiffe://outrigger.local"],
        &["cart"],
    ];
    for uris in uris {
        strict.refuses(&format!("{uris:?}"), &stolen.leaf(uris, |_| {})).await;
    }
    let only_dns = stolen.leaf(&[], |params| {
        params.subject_alt_names = vec![SanType::DnsName("cart.shop".try_into().unwrap())];
    });
    strict.refuses("a DNS name alone", &only_dns).await;
    strict.counted("peer_certificate").await;
    // The authority itself is fine: the id alone was wrong.
    strict.admits(&stolen.leaf(&[CART], |_| {})).await;
}

/// A ClientHello without an extension for versions, as clients before TLS 1.3 send it.
fn old_hello(version: [u8; 2], suites: &[[u8; 2]]) -> Vec<u8> {
    let id = H1.as_bytes();
    let length = u8::try_from(id.len()).unwrap();
    let mut alpn = vec![0, 16, 0, length + 3, 0, length + 1, length];
    alpn.extend_from_slice(id);
    let mut hello = version.to_vec();
    hello.extend_from_slice(&[7; 32]);
    hello.push(0);
    hello.extend_from_slice(&u16::try_from(suites.len() * 2).unwrap().to_be_bytes());
    hello.extend(suites.iter().flatten());
    hello.extend_from_slice(&[1, 0]);
    hello.extend_from_slice(&u16::try_from(alpn.len()).unwrap().to_be_bytes());
    hello.extend(alpn);
    let mut record = vec![0x16, 3, 1];
    record.extend_from_slice(&u16::try_from(hello.len() + 4).unwrap().to_be_bytes());
    record.push(1);
    record.extend_from_slice(&u32::try_from(hello.len()).unwrap().to_be_bytes()[1..]);
    record.extend(hello);
    record
}

#[tokio::test]
async fn what_is_not_mutual_tls_1_3_does_not_get_in() {
    let strict = strict(|limits| limits.handshake_timeout = Duration::from_millis(300)).await;
    let issued = Peer::issue(&strict.mesh, "shop", "cart", "cart").await;
    let mut half = old_hello([3, 3], &[[0x13, 1]]);
    half.truncate(40);
    let mut huge = vec![0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
    huge.resize(100_000, 0);
    let attempts: [(&str, Vec<u8>); 15] = [
        ("HTTP", GET.into()),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec()),
        ("one byte", b"x".to_vec()),
        ("zeros", vec![0; 70_000]),
        ("garbage", (0..5000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()),
        ("garbage in a handshake record", [&[0x16, 3, 1, 2, 0][..], &[0xa5; 512]].concat()),
        ("a record that claims 16 MiB of handshake", huge),
        ("an alert", vec![0x15, 3, 3, 0, 2, 2, 40]),
        ("application data first", vec![0x17, 3, 3, 0, 5, 1, 2, 3, 4, 5]),
        ("half a ClientHello", half),
        ("TLS 1.2", old_hello([3, 3], &[[0xc0, 0x2b], [0xc0, 0x2f]])),
        ("TLS 1.1", old_hello([3, 2], &[[0xc0, 0x09]])),
        ("TLS 1.0", old_hello([3, 1], &[[0x00, 0x2f]])),
        ("weak suites", old_hello([3, 3], &[[0x00, 0x05], [0x00, 0x0a], [0x00, 0x01]])),
        ("nothing", Vec::new()),
    ];
    for (what, bytes) in attempts {
        let mut connection = Connection::open(strict.far.inbound()).await;
        let _ = connection.try_send(bytes).await;
        let (answer, _) = connection.take_to_end().await;
        // At most the alert that says why.
        assert!(answer.is_empty() || answer.starts_with(&[0x15, 3]), "{what}: {answer:?}");
        assert_eq!(strict.app.connections(), 0, "{what} reached the application");
    }
    // Good certificates by an ALPN id that is not the mesh's.
    for alpn in [&["h2"][..], &["http/1.1"], &[]] {
        let refused = match issued.connect(strict.far.inbound(), alpn).await {
            Ok(mut connection) => connection.take_to_end().await.0.is_empty(),
            Err(_) => true,
        };
        assert!(refused, "{alpn:?}");
    }
    assert_eq!(strict.app.connections(), 0);
    strict.counted("mtls_required").await;
    strict.counted("tls_handshake").await;
    strict.admits(&issued).await;
}

#[tokio::test]
async fn opaque_is_no_way_around_http() {
    let strict = strict(|_| {}).await;
    let issued = Peer::issue(&strict.mesh, "shop", "cart", "cart").await;
    let mut connection = issued.connect(strict.far.inbound(), &[TCP]).await.unwrap();
    connection.send(GET).await;
    assert!(connection.take_to_end().await.0.is_empty());
    strict.counted("protocol_mismatch").await;
    assert!(strict.app.requests().is_empty());
}

/// A service of shop whose only endpoint is this address, registered with the identity of catalog.
fn registered(port: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: catalog, namespace: shop}}\nspec: {{selector: {{app: \
         catalog}}, ports: [{{name: main, port: 80, targetPort: {port}}}]}}\n---\napiVersion: \
         outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: catalog-1, namespace: shop}}\nspec: {{address: \
         127.0.0.1, serviceAccount: catalog, mesh: true, labels: {{app: catalog}}, ports: {{main: {port}}}}}\n"
    )
}

fn permissive_with(port: u16) -> MeshOptions {
    MeshOptions { yaml: outrigger_tests::mesh::PERMISSIVE.to_owned() + &registered(port), ..MeshOptions::default() }
}

async fn caller(mesh: &Mesh, change: impl FnOnce(&mut Limits)) -> Sidecar {
    let quick = |limits: &mut Limits| {
        limits.connect_budget = Duration::from_secs(1);
        change(limits);
    };
    mesh.sidecar("cart-1").outbound("catalog:80").limits(quick).start().await
}

#[tokio::test]
async fn an_endpoint_with_another_identity_is_not_spoken_to() {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let app = Application::start("mallory").await;
    let mallory = mesh.sidecar("mallory-1").inbound(app.address()).start().await;
    let near = caller(&mesh, |_| {}).await;
    mesh.write("catalog.yaml", &registered(mallory.inbound().port()));
    let answer = eventually("the service is known", async || {
        let answer = outrigger_tests::wire::ask(near.outbound(), GET).await;
        (answer.reason() != "not_registered").then_some(answer)
    })
    .await;
    assert_eq!((answer.status, answer.reason().as_str()), (503, "identity_mismatch"), "{}", answer.text());
    assert!(answer.header("proxy-status").is_some(), "{:?}", answer.headers);
    // Bytes that are not parsed fare no better.
    let mut opaque = Connection::open(near.outbound()).await;
    opaque.send(b"\0\x01\x02\x03").await;
    assert_eq!(opaque.expect_end().await, End::Reset);
    assert_eq!((app.connections(), app.count()), (0, 0), "mallory's application");
    let samples = near.metrics().await;
    let labels = [("reason", "identity_mismatch"), ("direction", "outbound")];
    assert_eq!(samples.sum("outrigger_http_requests_total", &labels), 1.0, "{:#?}", samples.0);
}

#[tokio::test]
async fn certificates_that_prove_nothing_are_not_spoken_to() {
    let backend = Backend::start().await;
    let mesh = Mesh::start(permissive_with(backend.port())).await;
    let stolen = Stolen::of(&mesh);
    let catalog = "spiffe://outrigger.local/ns/shop/sa/catalog";
    let expired = stolen.leaf(&[catalog], |params| params.not_after = date_time_ymd(2021, 1, 1));
    let clients_only =
        stolen.leaf(&[catalog], |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
    let peers = [
        ("self-signed", peer::self_signed(catalog)),
        ("another authority's", Authority::new().leaf(&[catalog], |_| {})),
        ("expired", expired),
        ("for clients only", clients_only),
        ("two identities", stolen.leaf(&[catalog, CART], |_| {})),
        ("another trust domain's", stolen.leaf(&["spiffe://elsewhere/ns/shop/sa/catalog"], |_| {})),
    ];
    let near = caller(&mesh, |limits| limits.connect_tries = 1).await;
    for (who, peer) in &peers {
        let serving = async {
            match peer.accept(backend.accept().await, &[H1]).await {
                Ok(mut connection) => connection.take_to_end().await.0,
                Err(_) => Vec::new(),
            }
        };
        let (answer, heard) = tokio::join!(outrigger_tests::wire::ask(near.outbound(), GET), serving);
        assert_eq!((answer.status, answer.reason().as_str()), (503, "identity_mismatch"), "{who}");
        assert!(heard.is_empty(), "{who} heard {}", outrigger_tests::wire::text(&heard));
    }
}

#[tokio::test]
async fn a_broken_handshake_never_becomes_plaintext() {
    let backend = Backend::start().await;
    let mesh = Mesh::start(permissive_with(backend.port())).await;
    let near = caller(&mesh, |limits| limits.handshake_timeout = Duration::from_millis(300)).await;
    for attack in ["reset", "close", "garbage", "plain HTTP", "alert", "silence"] {
        for request in [GET.as_bytes(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\x01opaque"] {
            let mut client = Connection::open(near.outbound()).await;
            client.send(request).await;
            if request.starts_with(b"PRI") {
                // A whole request: settings, then GET /.
                client.send(b"\0\0\0\x04\0\0\0\0\0\0\0\x03\x01\x05\0\0\0\x01\x82\x86\x84").await;
            }
            let broken = async {
                loop {
                    let mut connection = backend.accept().await;
                    let first = connection.take(3).await;
                    assert_eq!(first[..2], [0x16, 3], "{attack}: a ClientHello and nothing else");
                    match attack {
                        "reset" => connection.reset(),
                        "close" => drop(connection),
                        "garbage" => connection.send([0x5a; 300]).await,
                        "plain HTTP" => connection.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await,
                        "alert" => connection.send([0x15, 3, 3, 0, 2, 2, 40]).await,
                        _ => {
                            let _ = connection.take_to_end().await;
                        }
                    }
                }
            };
            let refused = async {
                let mut answer = Vec::new();
                let failed = loop {
                    match client.read_some().await {
                        Ok(Some(_)) => {
                            answer = client.ahead().to_vec();
                            // HTTP/2: HEADERS of the answer, a literal status that begins with 5.
                            if answer.windows(2).any(|two| two == b"}\n") || answer.ends_with(b"}") {
                                break true;
                            }
                        }
                        Ok(None) | Err(_) => break true,
                    }
                };
                (failed, answer)
            };
            let (failed, answer) = tokio::select! {
                () = broken => unreachable!(),
                refused = tokio::time::timeout(outrigger_tests::PATIENCE, refused) => refused.unwrap(),
            };
            let text = outrigger_tests::wire::text(&answer);
            assert!(failed && !text.contains(" 200"), "{attack}: {text}");
            if request == GET.as_bytes() {
                assert!(text.starts_with("HTTP/1.1 503"), "{attack}: {text}");
            }
        }
    }
}

#[tokio::test]
async fn tls_to_a_plain_port_and_the_reverse() {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), Some("http"));
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address());
    let far = far.port(app.port(), Some(outrigger_api::name::Protocol::Http)).start().await;
    let near = mesh.sidecar("cart-1").outbound("catalog:80").start().await;
    let client = Peer::without_certificate();
    // The application speaks TLS to a port that is declared as HTTP.
    let Err(error) = client.connect(near.outbound(), &["http/1.1"]).await else { panic!("TLS on a plain port") };
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    let samples = near.metrics().await;
    let labels = [("reason", "protocol_mismatch"), ("direction", "outbound")];
    assert_eq!(samples.sum("outrigger_tcp_connections_closed_total", &labels), 1.0, "{:#?}", samples.0);
    // Somebody without a sidecar speaks plain HTTP to a port that takes both.
    assert_eq!(outrigger_tests::wire::ask(far.inbound(), GET).await.status, 200);
    assert_eq!(outrigger_tests::wire::ask(near.outbound(), GET).await.status, 200, "the others are served");
}
