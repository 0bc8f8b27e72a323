//! What comes before a handshake can succeed: a ClientHello of the mesh, a foreign one, an old one, garbage, silence.

use rustls::ClientConfig;

use super::*;

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
