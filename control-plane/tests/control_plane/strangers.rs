//! Whoever is not of this mesh: refused in the handshake or before anything is said, and nobody else is harmed.

use std::time::Duration;

use outrigger_api::snapshot::Key;
use outrigger_api::wire::ReportRequest;
use outrigger_api::wire::identity_client::IdentityClient;
use outrigger_api::wire::telemetry_client::TelemetryClient;
use outrigger_control_plane::app::ControlPlane;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Code;

use super::mesh::Watch;
use super::support::{Fixture, PATIENCE, Workload};

const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";

/// True when the control plane lets a workload's certificate say something.
async fn is_heard(control_plane: &ControlPlane, workload: &Workload) -> bool {
    let Ok(channel) = workload.connect(control_plane).await else { return false };
    let report = ReportRequest { instance: workload.name.clone(), window_seconds: 5.0, ..Default::default() };
    TelemetryClient::new(channel).report(report).await.is_ok()
}

/// Certificates as nobody should have them, signed with the mesh's own intermediate: what a stolen or mistaken issuer
/// could make is still held to the rules for workloads.
struct Forger {
    issuer: Issuer<'static, KeyPair>,
    intermediate: rustls::pki_types::CertificateDer<'static>,
}

impl Forger {
    fn with_the_key_of(control_plane: &ControlPlane) -> Forger {
        use rustls::pki_types::pem::PemObject;
        let read = |name: &str| std::fs::read_to_string(control_plane.state_path().join("ca").join(name)).unwrap();
        let intermediate =
            rustls::pki_types::CertificateDer::from_pem_slice(read("intermediate.pem").as_bytes()).unwrap();
        let key = KeyPair::from_pem(&read("intermediate.key")).unwrap();
        Forger { issuer: Issuer::from_ca_cert_der(&intermediate, key).unwrap(), intermediate }
    }

    fn make(&self, change: impl FnOnce(&mut CertificateParams)) -> Workload {
        let mut workload = Workload::new("cart-1");
        let mut params = CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2090, 1, 1);
        params.distinguished_name.push(DnType::CommonName, "cart-1");
        params.subject_alt_names = vec![uri(CART)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut params);
        let leaf = params.signed_by(&workload.key, &self.issuer).unwrap();
        workload.chain = vec![leaf.into(), self.intermediate.clone()];
        workload
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

#[tokio::test]
async fn certificates_that_are_no_workloads_are_refused() {
    let fixture = Fixture::new();
    let control_plane = fixture.start().await;
    let forger = Forger::with_the_key_of(&control_plane);
    assert!(is_heard(&control_plane, &forger.make(|_| {})).await, "the forger's hand is good");
    type Change = fn(&mut CertificateParams);
    let cases: [(&str, Change); 10] = [
        ("expired", |p| p.not_after = rcgen::date_time_ymd(2021, 1, 1)),
        ("of the future", |p| p.not_before = rcgen::date_time_ymd(2080, 1, 1)),
        ("no URI", |p| p.subject_alt_names.clear()),
        ("a DNS name only", |p| p.subject_alt_names = vec![SanType::DnsName("cart.shop".try_into().unwrap())]),
        ("two URIs", |p| p.subject_alt_names.push(uri("spiffe://outrigger.local/ns/shop/sa/pay"))),
        ("another trust domain", |p| p.subject_alt_names = vec![uri("spiffe://other.test/ns/shop/sa/cart")]),
        ("no SPIFFE id", |p| p.subject_alt_names = vec![uri("https://outrigger.local/ns/shop/sa/cart")]),
        ("dots in the path", |p| p.subject_alt_names = vec![uri("spiffe://outrigger.local/ns/shop/sa/../pay")]),
        ("the mesh's own namespace", |p| {
            p.subject_alt_names = vec![uri("spiffe://outrigger.local/ns/outrigger-system/sa/control-plane")];
        }),
        ("for servers only", |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
    ];
    for (name, change) in cases {
        assert!(!is_heard(&control_plane, &forger.make(change)).await, "{name}");
    }
    control_plane.shutdown().await;
}

#[tokio::test]
async fn certificates_of_other_authorities_are_refused() {
    let (ours, theirs) = (Fixture::new(), Fixture::new());
    let (control_plane, other) = (ours.start().await, theirs.start().await);
    let foreign = Forger::with_the_key_of(&other).make(|_| {});
    assert!(!is_heard(&control_plane, &foreign).await, "another authority with the same names");

    let mut selfmade = Workload::new("cart-1");
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "cart-1");
    params.subject_alt_names = vec![uri(CART)];
    selfmade.chain = vec![params.self_signed(&selfmade.key).unwrap().into()];
    assert!(!is_heard(&control_plane, &selfmade).await, "self-signed");

    // A workload that plays authority: its own leaf as the issuer of another.
    let parent = Forger::with_the_key_of(&control_plane).make(|_| {});
    let issuer = Issuer::from_ca_cert_der(&parent.chain[0], &parent.key).unwrap();
    let mut child = Workload::new("cart-1");
    params.is_ca = IsCa::ExplicitNoCa;
    let leaf = params.signed_by(&child.key, &issuer).unwrap();
    child.chain = vec![leaf.into(), parent.chain[0].clone(), parent.chain[1].clone()];
    assert!(!is_heard(&control_plane, &child).await, "a leaf's leaf");

    // A sidecar that joins the wrong mesh: its token is for another state.
    let mut lost = Workload::new("cart-1");
    let error = lost.issue(&control_plane, &theirs.token("cart", &[], 1)).await.unwrap_err();
    assert!(error.message().starts_with("token_signature: "), "{}", error.message());
    control_plane.shutdown().await;
    other.shutdown().await;
}

#[tokio::test]
async fn requests_that_ask_for_more_get_nothing() {
    let fixture = Fixture::new();
    let control_plane = fixture.start().await;
    let token = fixture.token("cart", &[], 1);
    let workload = Workload::new("cart-1");
    let csr = |change: fn(&mut CertificateParams)| {
        let mut params = CertificateParams::default();
        change(&mut params);
        params.serialize_request(&workload.key).unwrap().der().to_vec()
    };
    let mut flipped = workload.csr();
    *flipped.last_mut().unwrap() ^= 1;
    let cases: [(&str, Vec<u8>, &str, &str); 7] = [
        (
            "csr_identity",
            csr(|p| p.subject_alt_names = vec![uri("spiffe://outrigger.local/ns/shop/sa/pay")]),
            "cart-1",
            "",
        ),
        ("csr_identity", csr(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), "cart-1", ""),
        ("csr_signature", flipped, "cart-1", ""),
        ("csr_malformed", vec![0x30; 20_000], "cart-1", ""),
        ("workload_name", workload.csr(), "Cart One", ""),
        ("token_malformed", workload.csr(), "cart-1", "hello"),
        ("token_missing", workload.csr(), "cart-1", " "),
    ];
    for (word, csr_der, name, proof) in cases {
        let mut client = IdentityClient::new(Workload::new("x").connect(&control_plane).await.unwrap());
        let proof = if proof.is_empty() { token.clone() } else { proof.to_owned() };
        let request = outrigger_api::wire::IssueRequest { csr_der, proof, workload: name.into(), late: None };
        let error = client.issue(request).await.unwrap_err();
        assert!(error.message().starts_with(&format!("{word}: ")), "{word}: {}", error.message());
        assert!(!error.message().contains(&token), "a token is never told again");
    }
    let mut honest = workload;
    honest.issue(&control_plane, &token).await.expect("none of it spent the token");
    control_plane.shutdown().await;
}

#[tokio::test]
async fn garbage_and_silence_harm_nobody() {
    let fixture = Fixture::new();
    let control_plane = fixture.start().await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(control_plane.grpc_address()).await.unwrap());
    }
    for garbage in
        [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0xff; 4096], b"\x16\x03\x01"]
    {
        let mut stream = TcpStream::connect(control_plane.grpc_address()).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // An alert or a reset: closed either way, well before the handshake's time is over.
        let _ = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.expect("closed at once");
        assert!(answer.len() < 64, "{answer:?}");
    }
    let mut workload = Workload::new("cart-1");
    let issued = timeout(PATIENCE, workload.issue(&control_plane, &fixture.token("cart", &[], 1))).await;
    issued.expect("served beside them").unwrap();
    drop(silent);
    control_plane.shutdown().await;
}

#[tokio::test]
async fn streams_end_with_the_certificate_that_opened_them() {
    let fixture = Fixture::new();
    let control_plane = fixture.start().await;
    let soon = std::time::SystemTime::now() + Duration::from_secs(2);
    let end = soon.duration_since(std::time::UNIX_EPOCH).unwrap();
    let workload = Forger::with_the_key_of(&control_plane)
        .make(|params| params.not_after = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(end.as_secs()));
    let mut watch = Watch::open(&control_plane, &workload).await.unwrap();
    watch.subscribe(&Key::Own).await;
    watch.next().await.unwrap();
    let ended = watch.next().await.unwrap_err();
    assert_eq!(ended.code(), Code::Unauthenticated, "{ended:?}");
    assert!(ended.message().contains("expired"), "{ended:?}");
    assert!(std::time::SystemTime::now() >= soon - Duration::from_secs(1));
    control_plane.shutdown().await;
}
