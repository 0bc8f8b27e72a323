//! Promise: a STRICT port serves mesh peers and nobody else, and whoever else comes is closed before a byte reaches the
//! application. A PERMISSIVE port serves plaintext without a principal, and passes an application's own TLS through.

use outrigger_tests::application::Backend;
use outrigger_tests::peer::{self, Authority, H1, H2, TCP};
use outrigger_tests::wire::{Connection, End};
use outrigger_tests::{Application, Mesh, MeshOptions, Peer, Sidecar, eventually};

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";
const REQUEST: &str = "GET /secret HTTP/1.1\r\nHost: catalog\r\nX-Outrigger-Identity: admin\r\n\r\n";

struct Served {
    app: Application,
    sidecar: Sidecar,
    mesh: Mesh,
}

async fn served(options: MeshOptions) -> Served {
    let mesh = Mesh::start(options).await;
    let app = Application::start("catalog").await;
    mesh.service("catalog.shop", 80, app.port(), None);
    let sidecar = mesh.sidecar("catalog-1").label("app", "catalog").inbound(app.address()).start().await;
    Served { app, sidecar, mesh }
}

/// Sends a request over whatever came of a handshake and says whether anything at all came back.
async fn asks_in_vain(connection: std::io::Result<Connection>) {
    let Ok(mut connection) = connection else { return };
    if connection.try_send(REQUEST).await.is_ok() {
        let (bytes, _) = connection.take_to_end().await;
        assert!(bytes.is_empty(), "answered {:?}", String::from_utf8_lossy(&bytes));
    }
}

#[tokio::test]
async fn plaintext_ends_without_an_answer() {
    let served = served(MeshOptions::default()).await;
    let mut client = Connection::open(served.sidecar.inbound()).await;
    client.send(REQUEST).await;
    assert!(client.take_to_end().await.0.is_empty());
    let mut http2 = Connection::open(served.sidecar.inbound()).await;
    http2.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    assert!(http2.take_to_end().await.0.is_empty());
    let mut garbage = Connection::open(served.sidecar.inbound()).await;
    garbage.send([0xff; 512]).await;
    assert!(garbage.take_to_end().await.0.is_empty());
    assert_eq!((served.app.connections(), served.app.count()), (0, 0));
    let refused = [("direction", "inbound"), ("reason", "mtls_required")];
    eventually("the refusals are counted", async || {
        let samples = served.sidecar.metrics().await;
        (samples.sum("outrigger_tcp_connections_closed_total", &refused) == 3.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn tls_without_a_mesh_protocol_gets_an_alert() {
    let served = served(MeshOptions::default()).await;
    let peer = Peer::issue(&served.mesh, "shop", "cart", "cart-1").await;
    for alpn in [&[][..], &["h2", "http/1.1"], &["outrigger/h3"]] {
        let error = peer.connect(served.sidecar.inbound(), alpn).await.err().expect("a refusal");
        let alert = error.get_ref().map(ToString::to_string).unwrap_or_default();
        assert!(alert.contains("NoApplicationProtocol"), "{alpn:?}: {error}");
    }
    assert_eq!(served.app.connections(), 0);
}

#[tokio::test]
async fn only_the_meshs_own_certificates_open_the_door() {
    let served = served(MeshOptions::default()).await;
    let address = served.sidecar.inbound();
    let foreign = Authority::new();
    let strangers = [
        ("no certificate", Peer::without_certificate()),
        ("self-signed", peer::self_signed(CART)),
        ("foreign authority, same identity", foreign.leaf(&[CART], |_| {})),
    ];
    for (name, stranger) in &strangers {
        for alpn in [H1, H2, TCP] {
            asks_in_vain(stranger.connect(address, &[alpn]).await).await;
            assert_eq!(served.app.connections(), 0, "{name} {alpn}");
        }
    }
    // A leaf of the mesh cannot sign another one.
    let mut posing = Peer::issue(&served.mesh, "shop", "cart", "cart-1").await;
    let key = rcgen::KeyPair::from_der_and_sign_algo(&posing.private_key(), &rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(&posing.chain[0], key).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(CART.try_into().unwrap())];
    let forged = rcgen::KeyPair::generate().unwrap();
    posing.chain.insert(0, params.signed_by(&forged, &issuer).unwrap().der().clone());
    posing.key = forged;
    asks_in_vain(posing.connect(address, &[H1]).await).await;
    assert_eq!(served.app.connections(), 0, "a leaf signed by a leaf");
    let counted = served.sidecar.metrics().await;
    let reasons = counted.values("outrigger_tcp_connections_closed_total", "reason");
    assert!(reasons.iter().any(|reason| reason == "peer_certificate"), "{reasons:?}");

    let known = Peer::issue(&served.mesh, "shop", "cart", "cart-1").await;
    let answer = known.connect(address, &[H1]).await.unwrap().ask(REQUEST).await;
    assert_eq!(answer.status, 200);
    assert_eq!(served.app.last().all("x-outrigger-identity"), [CART]);
}

#[tokio::test]
async fn a_plaintext_client_cannot_use_up_the_port() {
    let served = served(MeshOptions::default()).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(Connection::open(served.sidecar.inbound()).await);
    }
    let peer = Peer::issue(&served.mesh, "shop", "cart", "cart-1").await;
    let answer = peer.connect(served.sidecar.inbound(), &[H1]).await.unwrap().ask(REQUEST).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn opaque_bytes_do_not_smuggle_http_past_the_parser() {
    let served = served(MeshOptions::default()).await;
    let peer = Peer::issue(&served.mesh, "shop", "cart", "cart-1").await;
    asks_in_vain(peer.connect(served.sidecar.inbound(), &[TCP]).await).await;
    assert_eq!(served.app.count(), 0);
    eventually("counted as a mismatch", async || {
        let samples = served.sidecar.metrics().await;
        let labels = [("reason", "protocol_mismatch"), ("source_principal", CART)];
        (samples.sum("outrigger_tcp_connections_closed_total", &labels) == 1.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn permissive_serves_plaintext_without_a_principal() {
    let served = served(MeshOptions::permissive()).await;
    let mut client = Connection::open(served.sidecar.inbound()).await;
    let answer = client.ask(REQUEST).await;
    assert_eq!(answer.status, 200);
    let seen = served.app.last();
    assert_eq!(seen.all("x-outrigger-identity"), Vec::<&str>::new(), "nobody proved anything");
    assert_eq!(seen.all("x-forwarded-client-cert"), Vec::<&str>::new());
    let plain = [("direction", "inbound"), ("mtls", "false"), ("source_principal", ""), ("source_workload", "unknown")];
    eventually("counted without a principal", async || {
        (served.sidecar.metrics().await.sum("outrigger_http_requests_total", &plain) == 1.0).then_some(())
    })
    .await;
    // Mutual TLS is served beside it; a failed handshake never becomes plaintext.
    let peer = Peer::issue(&served.mesh, "shop", "cart", "cart-1").await;
    assert_eq!(peer.connect(served.sidecar.inbound(), &[H1]).await.unwrap().ask(REQUEST).await.status, 200);
    assert_eq!(served.app.last().all("x-outrigger-identity"), [CART]);
    asks_in_vain(peer::self_signed(CART).connect(served.sidecar.inbound(), &[H1]).await).await;
    assert_eq!(served.app.count(), 2);
}

#[tokio::test]
async fn permissive_passes_the_applications_own_tls_unread() {
    let mesh = Mesh::start(MeshOptions::permissive()).await;
    let backend = Backend::start().await;
    let sidecar = mesh.sidecar("bank-1").inbound(backend.address()).start().await;
    let server = Authority::new().leaf(&["https://bank.test"], |_| {});
    let client = Peer::without_certificate();
    let (dialled, accepted) = tokio::join!(client.connect(sidecar.inbound(), &["h2"]), async {
        server.accept(backend.accept().await, &["h2"]).await
    });
    let (mut client, mut server) = (dialled.unwrap(), accepted.unwrap());
    client.send("ping").await;
    assert_eq!(server.take(4).await, b"ping");
    server.send("pong").await;
    assert_eq!(client.take(4).await, b"pong");
    client.finish().await;
    assert_eq!(server.take_to_end().await, (Vec::new(), End::Closed));
    server.finish().await;
    drop((client, server));
    let labels = [("protocol", "tls"), ("direction", "inbound"), ("mtls", "false"), ("reason", "")];
    eventually("counted as tls", async || {
        (sidecar.metrics().await.sum("outrigger_tcp_connections_closed_total", &labels) == 1.0).then_some(())
    })
    .await;
}
