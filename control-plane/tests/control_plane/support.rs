//! A sidecar's side of the protocol, by hand: keys, requests, a TLS client that insists on the control plane's
//! identity. Used by the tests of this crate only.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_api::resource::Labels;
use outrigger_api::wire::identity_client::IdentityClient;
use outrigger_api::wire::{IssueRequest, IssueResponse};
use outrigger_control_plane::app::ControlPlane;
use outrigger_control_plane::ca::Grant;
use outrigger_control_plane::ca::token::{self, Asked};
use outrigger_control_plane::config::{Args, State};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

pub const TRUST_DOMAIN: &str = "outrigger.local";
/// No step of these tests takes anywhere near this long.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A control plane over two temporary directories, which outlive its restarts.
pub struct Fixture {
    pub directory: tempfile::TempDir,
}

impl Fixture {
    pub fn new() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("config")).unwrap();
        Fixture { directory }
    }

    pub fn args(&self) -> Args {
        Args {
            config: self.directory.path().join("config"),
            state: self.directory.path().join("state"),
            listen: ([127, 0, 0, 1], 0).into(),
            admin_listen: ([127, 0, 0, 1], 0).into(),
            trust_domain: None,
        }
    }

    pub fn write(&self, file: &str, text: &str) {
        std::fs::write(self.directory.path().join("config").join(file), text).unwrap();
    }

    pub async fn start(&self) -> ControlPlane {
        ControlPlane::start(&self.args()).await.unwrap()
    }

    pub fn token(&self, account: &str, labels: &[(&str, &str)], uses: u32) -> String {
        let labels: Labels = labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let state = State::open(&self.args().state).unwrap();
        let hour = Duration::from_secs(3600);
        let grant = Grant { labels, addresses: Vec::new() };
        let asked = Asked { namespace: "shop", service_account: account, grant, uses, ttl: hour };
        token::create(&state, &asked, SystemTime::now()).unwrap()
    }
}

/// A key and, once it was issued, its certificate.
pub struct Workload {
    pub name: String,
    pub key: KeyPair,
    pub chain: Vec<CertificateDer<'static>>,
}

impl Workload {
    pub fn new(name: &str) -> Workload {
        Workload { name: name.to_owned(), key: KeyPair::generate().unwrap(), chain: Vec::new() }
    }

    pub fn csr(&self) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.serialize_request(&self.key).unwrap().der().to_vec()
    }

    /// Asks for a certificate: with a token, or with the current certificate when `proof` is empty.
    pub async fn issue(&mut self, control_plane: &ControlPlane, proof: &str) -> Result<IssueResponse, Status> {
        let mut client = IdentityClient::new(self.connect(control_plane).await?);
        let (proof, workload) = (proof.to_owned(), self.name.clone());
        let request = IssueRequest { csr_der: self.csr(), proof, workload, late: None };
        let issued = client.issue(request).await?.into_inner();
        self.chain = issued.chain_der.iter().cloned().map(CertificateDer::from).collect();
        Ok(issued)
    }

    /// A connection with this workload's certificate, if it has one.
    pub async fn connect(&self, control_plane: &ControlPlane) -> Result<Channel, Status> {
        let roots = CertificateDer::pem_file_iter(control_plane.trust_bundle_path()).unwrap();
        let roots: Vec<CertificateDer<'static>> = roots.map(Result::unwrap).collect();
        connect(control_plane, &roots, self).await
    }
}

async fn connect(
    control_plane: &ControlPlane,
    roots: &[CertificateDer<'static>],
    workload: &Workload,
) -> Result<Channel, Status> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).unwrap();
    }
    let verifier = Arc::new(ControlPlaneVerifier { roots: store, provider: provider.clone() });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = if workload.chain.is_empty() {
        builder.with_no_client_auth()
    } else {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(workload.key.serialize_der()));
        builder.with_client_auth_cert(workload.chain.clone(), key).unwrap()
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let address = control_plane.grpc_address();
    let dial = tower::service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            let stream = connector.connect(ServerName::IpAddress(address.ip().into()), stream).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    Endpoint::from_shared(format!("http://{address}"))
        .unwrap()
        .connect_with_connector(dial)
        .await
        .map_err(|error| Status::unavailable(format!("{error:?}")))
}

/// Believes the control plane's identity under the bundle and nothing else, as a sidecar does.
#[derive(Debug)]
struct ControlPlaneVerifier {
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ControlPlaneVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        let expected = SpiffeId::control_plane(&TrustDomain::new(TRUST_DOMAIN).unwrap());
        assert_eq!(names(end_entity), [expected.to_string()]);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Every subject alternative name of a certificate, as text.
pub fn names(der: &[u8]) -> Vec<String> {
    let (_, certificate) = X509Certificate::from_der(der).unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => (*uri).to_owned(),
        other => other.to_string(),
    };
    names.value.general_names.iter().map(text).collect()
}

/// A GET on the admin port; status code and body.
pub async fn admin(control_plane: &ControlPlane, path: &str, host: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(control_plane.admin_address()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}
