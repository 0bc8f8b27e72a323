//! Promise: an identity is exactly one well-formed SPIFFE URI of this mesh's trust domain, in a leaf that is valid now and
//! meant for it. Everything else is refused on both sides of a connection, though the mesh's own authority signed it;
//! and who answers must be who was registered.

use std::time::Duration;

use outrigger_tests::application::Backend;
use outrigger_tests::peer::{Authority, H1, Peer};
use outrigger_tests::{Application, Mesh, MeshOptions, eventually, wire};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, SanType};

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";
const REQUEST: &str = "GET / HTTP/1.1\r\nHost: catalog\r\n\r\n";

type Change = fn(&mut CertificateParams);

/// A leaf's URIs, and what else is odd about it.
const ODD: &[(&str, &[&str], Change)] = &[
    ("no URI", &[], |_| {}),
    ("a DNS name instead", &[], |leaf| {
        leaf.subject_alt_names = vec![SanType::DnsName("cart.shop".try_into().unwrap())]
    }),
    ("two URIs", &[CART, "spiffe://outrigger.local/ns/shop/sa/admin"], |_| {}),
    ("the same URI twice", &[CART, CART], |_| {}),
    ("another trust domain", &["spiffe://other.local/ns/shop/sa/cart"], |_| {}),
    ("https", &["https://outrigger.local/ns/shop/sa/cart"], |_| {}),
    ("a port", &["spiffe://outrigger.local:443/ns/shop/sa/cart"], |_| {}),
    ("userinfo", &["spiffe://x@outrigger.local/ns/shop/sa/cart"], |_| {}),
    ("a query", &["spiffe://outrigger.local/ns/shop/sa/cart?x=1"], |_| {}),
    ("a fragment", &["spiffe://outrigger.local/ns/shop/sa/cart#x"], |_| {}),
    ("dot segments", &["spiffe://outrigger.local/ns/shop/sa/../sa/cart"], |_| {}),
    ("an escape", &["spiffe://outrigger.local/ns/shop/sa/c%61rt"], |_| {}),
    ("an empty segment", &["spiffe://outrigger.local/ns/shop//sa/cart"], |_| {}),
    ("a slash at the end", &["spiffe://outrigger.local/ns/shop/sa/cart/"], |_| {}),
    ("too short", &["spiffe://outrigger.local/ns/shop"], |_| {}),
    ("upper case", &["SPIFFE://OUTRIGGER.LOCAL/ns/shop/sa/cart"], |_| {}),
    ("ended", &[CART], |leaf| {
        leaf.not_before = rcgen::date_time_ymd(2020, 1, 1);
        leaf.not_after = rcgen::date_time_ymd(2021, 1, 1);
    }),
    ("not begun", &[CART], |leaf| leaf.not_before = rcgen::date_time_ymd(2090, 1, 1)),
    ("for servers only", &[CART], |leaf| leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
    ("for e-mail", &[CART], |leaf| leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::EmailProtection]),
    ("an authority", &[CART], |leaf| leaf.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained)),
];

#[tokio::test]
async fn odd_certificates_of_the_meshs_own_authority_are_refused() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let authority = Authority::of(&mesh);
    for (name, uris, change) in ODD {
        let peer = authority.leaf(uris, change);
        if let Ok(mut connection) = peer.connect(far.inbound(), &[H1]).await
            && connection.try_send(REQUEST).await.is_ok()
        {
            let (bytes, _) = connection.take_to_end().await;
            assert!(bytes.is_empty(), "{name}: {}", String::from_utf8_lossy(&bytes));
        }
        assert_eq!(app.connections(), 0, "{name}");
    }
    let refused = [("reason", "peer_certificate"), ("direction", "inbound")];
    eventually("each is counted", async || {
        let count = far.metrics().await.sum("outrigger_tcp_connections_closed_total", &refused);
        (count == ODD.len() as f64).then_some(())
    })
    .await;
    // The same authority's plain leaf is believed: it was the oddness that was refused.
    let plain = authority.leaf(&[CART], |_| {});
    assert_eq!(plain.connect(far.inbound(), &[H1]).await.unwrap().ask(REQUEST).await.status, 200);
    assert_eq!(app.last().all("x-outrigger-identity"), [CART]);
}

#[tokio::test]
async fn only_tls_1_3_is_spoken() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    let far = mesh.sidecar("catalog-1").inbound(app.address()).start().await;
    // A TLS 1.2 ClientHello that offers a mesh protocol: record, handshake, version, random, no session, one suite.
    let mut extension = vec![0x00, 0x10];
    let list: Vec<u8> = std::iter::once(12).chain(*b"outrigger/h1").collect();
    extension.extend(u16::try_from(list.len() + 2).unwrap().to_be_bytes());
    extension.extend(u16::try_from(list.len()).unwrap().to_be_bytes());
    extension.extend(&list);
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    hello.extend(u16::try_from(extension.len()).unwrap().to_be_bytes());
    hello.extend(&extension);
    let mut handshake = vec![1, 0];
    handshake.extend(u16::try_from(hello.len()).unwrap().to_be_bytes());
    handshake.extend(&hello);
    let mut record = vec![0x16, 3, 1];
    record.extend(u16::try_from(handshake.len()).unwrap().to_be_bytes());
    record.extend(&handshake);
    let mut client = wire::Connection::open(far.inbound()).await;
    client.send(&record).await;
    let (answer, _) = client.take_to_end().await;
    assert!(answer.is_empty() || answer[0] == 0x15, "an alert at most: {answer:?}");
    assert_eq!(app.connections(), 0);
}

/// What stands in for an endpoint: a Workload that has a sidecar, as the operator says.
fn workload(account: &str, address: std::net::SocketAddr) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: bank-1, namespace: shop}}\nspec: \
         {{address: {}, serviceAccount: {account}, labels: {{app: bank}}, mesh: true, ports: {{main: {}}}}}\n",
        address.ip(),
        address.port()
    )
}

#[tokio::test]
async fn an_endpoint_must_prove_the_identity_it_was_registered_with() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let impostor = Backend::start().await;
    mesh.service("bank.shop", 80, impostor.port(), Some("http"));
    mesh.write("bank.yaml", &workload("bank", impostor.address()));
    let near = mesh.sidecar("cart-1").outbound("bank:80").start().await;
    let authority = Authority::of(&mesh);
    let others = [
        ("another service's", Peer::issue(&mesh, "shop", "thief", "thief-1").await),
        ("another namespace's", authority.leaf(&["spiffe://outrigger.local/ns/evil/sa/bank"], |_| {})),
        (
            "the control plane's",
            authority.leaf(&["spiffe://outrigger.local/ns/outrigger-system/sa/control-plane"], |_| {}),
        ),
        ("a foreign authority's", Authority::new().leaf(&["spiffe://outrigger.local/ns/shop/sa/bank"], |_| {})),
        (
            "an old one",
            authority.leaf(&["spiffe://outrigger.local/ns/shop/sa/bank"], |leaf| {
                leaf.not_before = rcgen::date_time_ymd(2020, 1, 1);
                leaf.not_after = rcgen::date_time_ymd(2021, 1, 1);
            }),
        ),
    ];
    for (name, other) in &others {
        let (answer, received) = tokio::join!(wire::get(near.outbound(), "/balance"), async {
            let mut connection = other.accept(impostor.accept().await, &[H1]).await.ok()?;
            Some(connection.take_to_end().await.0)
        });
        assert_eq!((answer.status, answer.reason().as_str()), (503, "identity_mismatch"), "{name}");
        assert!(received.unwrap_or_default().is_empty(), "{name} read a byte of the request");
    }
}

#[tokio::test]
async fn a_mesh_endpoint_is_never_dialled_in_plaintext() {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let plain = Application::start("plain").await;
    mesh.service("bank.shop", 80, plain.port(), Some("http"));
    mesh.write("bank.yaml", &workload("bank", plain.address()));
    let near = mesh.sidecar("cart-1").outbound("bank:80").start().await;
    let answer = wire::get(near.outbound(), "/").await;
    assert_eq!(answer.status, 503, "PERMISSIVE is about who may come in: {}", answer.text());
    assert_eq!(plain.count(), 0);
    // Nor when the handshake is broken by a reset.
    let backend = Backend::start().await;
    mesh.service("vault.shop", 80, backend.port(), Some("http"));
    mesh.write("vault.yaml", &workload("vault", backend.address()).replace("bank", "vault"));
    let other = mesh.sidecar("web-1").outbound("vault:80").start().await;
    let (answer, first) = tokio::join!(wire::get(other.outbound(), "/"), async {
        let mut connection = backend.accept().await;
        let first = connection.take(1).await;
        connection.reset();
        first
    });
    assert_eq!((answer.status, first), (503, vec![0x16]), "{}", answer.text());
    tokio::time::sleep(Duration::from_millis(50)).await;
    while let Some(mut again) = backend.accepted().await {
        assert_eq!(again.take(1).await, [0x16], "TLS each time");
        again.reset();
    }
}

#[tokio::test]
async fn names_in_certificates_never_count() {
    let mesh = Mesh::start(MeshOptions::default()).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let far = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    let peer = Authority::of(&mesh).leaf(&[CART], |leaf| {
        leaf.distinguished_name.push(DnType::OrganizationName, "admin");
        leaf.subject_alt_names.push(SanType::DnsName("admin.shop".try_into().unwrap()));
    });
    let mut connection = peer.connect(far.inbound(), &[H1]).await.unwrap();
    assert_eq!(connection.ask(REQUEST).await.status, 200);
    assert_eq!(app.last().all("x-outrigger-identity"), [CART]);
    assert!(!app.last().header("x-forwarded-client-cert").unwrap().contains("admin"));
}
