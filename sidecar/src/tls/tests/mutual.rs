//! Two sidecars that prove themselves to each other: what both learn, with which keys, and under which bundle.

use super::*;

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
