//! Whoever speaks TLS to a sidecar without being one: a peer with a certificate that the control plane issued, or with
//! one that an authority of the test's own made up. Never verifies the sidecar: what a test says about that it looks
//! at itself.

use std::net::SocketAddr;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use outrigger_api::wire::identity_client::IdentityClient;
use outrigger_api::wire::{IssueRequest, IssueResponse, LATE_RENEWAL_LABEL, LateRenewal, late_renewal_message};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SigningKey,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, ServerConfig, SignatureScheme};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

use crate::eventually::soon;
use crate::mesh::Mesh;
use crate::wire::Connection;

pub const H1: &str = "outrigger/h1";
pub const H2: &str = "outrigger/h2";
pub const TCP: &str = "outrigger/tcp";

/// A key and a certificate chain, perhaps an empty one.
pub struct Peer {
    pub key: KeyPair,
    pub chain: Vec<CertificateDer<'static>>,
}

impl Peer {
    /// A certificate from the mesh's own control plane.
    pub async fn issue(mesh: &Mesh, namespace: &str, service_account: &str, name: &str) -> Peer {
        Peer::issue_by(mesh, &mesh.token(namespace, service_account, &[]), name).await
    }

    /// The same for the token.
    pub async fn issue_by(mesh: &Mesh, token: &str, name: &str) -> Peer {
        let mut peer = Peer::without_certificate();
        let issued = peer.ask_for_certificate(mesh, &peer.csr(), token, name).await.unwrap();
        peer.chain = issued.chain_der.into_iter().map(CertificateDer::from).collect();
        peer
    }

    /// A key alone: TLS without a client certificate.
    pub fn without_certificate() -> Peer {
        Peer { key: KeyPair::generate().unwrap(), chain: Vec::new() }
    }

    /// A request for a certificate that asks for nothing but the key.
    pub fn csr(&self) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.serialize_request(&self.key).unwrap().der().to_vec()
    }

    /// `Identity.Issue` with this request and proof, and with the own certificate if there is one.
    pub async fn ask_for_certificate(
        &self,
        mesh: &Mesh,
        csr: &[u8],
        proof: &str,
        name: &str,
    ) -> Result<IssueResponse, tonic::Status> {
        let mut client = IdentityClient::new(self.channel(mesh.control_plane()).await?);
        let (csr_der, proof, workload) = (csr.to_vec(), proof.to_owned(), name.to_owned());
        let request = IssueRequest { csr_der, proof, workload, late: None };
        client.issue(request).await.map(tonic::Response::into_inner)
    }

    /// `Identity.Issue` with the own certificate as one that has ended. `sign` gets what has to be signed, and a connection
    /// of its own without a client certificate carries it.
    pub async fn renew_late(
        &self,
        mesh: &Mesh,
        csr: &[u8],
        name: &str,
        sign: impl FnOnce(&[u8]) -> Vec<u8>,
    ) -> Result<IssueResponse, tonic::Status> {
        let config = Arc::new(Peer::without_certificate().client_config(&["h2"]));
        let address = mesh.control_plane();
        let stream = TcpStream::connect(address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(config);
        let stream = connector.connect(ServerName::IpAddress(address.ip().into()), stream).await.unwrap();
        let exported = stream.get_ref().1.export_keying_material([0; 32], LATE_RENEWAL_LABEL, Some(&[])).unwrap();
        let signature = sign(&late_renewal_message(&exported, csr));
        let mut stream = Some(TokioIo::new(stream));
        let dial = tower::service_fn(move |_| {
            let stream = stream.take().ok_or_else(|| std::io::Error::other("dialled once"));
            async move { stream }
        });
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let channel = soon("the control plane answers", endpoint.connect_with_connector(dial)).await.unwrap();
        let late = LateRenewal { chain_der: self.chain.iter().map(|der| der.to_vec()).collect(), signature };
        let (csr_der, workload) = (csr.to_vec(), name.to_owned());
        let request = IssueRequest { csr_der, proof: String::new(), workload, late: Some(late) };
        IdentityClient::new(channel).issue(request).await.map(tonic::Response::into_inner)
    }

    /// The own key's signature.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.key.sign(message).unwrap()
    }

    /// gRPC to the control plane.
    pub async fn channel(&self, address: SocketAddr) -> Result<Channel, tonic::Status> {
        let config = Arc::new(self.client_config(&["h2"]));
        let dial = tower::service_fn(move |_| {
            let connector = tokio_rustls::TlsConnector::from(config.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::IpAddress(address.ip().into());
                Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
            }
        });
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let connecting = endpoint.connect_with_connector(dial);
        soon("the control plane answers", connecting)
            .await
            .map_err(|error| tonic::Status::unavailable(format!("{error:?}")))
    }

    /// TLS 1.3 with this certificate, offering these ALPN ids; believes any server.
    pub fn client_config(&self, alpn: &[&str]) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(BelieveAll(provider())));
        let mut config = if self.chain.is_empty() {
            builder.with_no_client_auth()
        } else {
            builder.with_client_auth_cert(self.chain.clone(), self.private_key()).unwrap()
        };
        config.alpn_protocols = alpn.iter().map(|id| id.as_bytes().to_vec()).collect();
        config
    }

    /// TLS 1.3 as a server with this certificate, asking no client for one.
    pub fn server_config(&self, alpn: &[&str]) -> ServerConfig {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth();
        let mut config = builder.with_single_cert(self.chain.clone(), self.private_key()).unwrap();
        config.alpn_protocols = alpn.iter().map(|id| id.as_bytes().to_vec()).collect();
        config
    }

    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }

    /// A TLS handshake with a sidecar. TLS 1.3 clients are done before the server has looked at their certificate: a
    /// refusal may only show at the first read.
    pub async fn connect(&self, address: SocketAddr, alpn: &[&str]) -> std::io::Result<Connection> {
        let connector = tokio_rustls::TlsConnector::from(Arc::new(self.client_config(alpn)));
        let stream = soon("connect", TcpStream::connect(address)).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("80.test.shop.outrigger").unwrap();
        let tls = soon("the TLS handshake", connector.connect(name, stream)).await?;
        Ok(tokio_rustls::TlsStream::from(tls).into())
    }

    /// TLS of an application's own, on a connection that is there already.
    pub async fn secure(&self, connection: Connection, name: &str, alpn: &[&str]) -> std::io::Result<Connection> {
        let connector = tokio_rustls::TlsConnector::from(Arc::new(self.client_config(alpn)));
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let tls = soon("the TLS handshake", connector.connect(name, connection.into_tcp())).await?;
        Ok(tokio_rustls::TlsStream::from(tls).into())
    }

    /// The server's side of a handshake on an accepted connection.
    pub async fn accept(&self, connection: Connection, alpn: &[&str]) -> std::io::Result<Connection> {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(self.server_config(alpn)));
        let tls = soon("the TLS handshake", acceptor.accept(connection.into_tcp())).await?;
        Ok(tokio_rustls::TlsStream::from(tls).into())
    }
}

/// A certificate authority that nobody in the mesh believes.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    /// The certificate as a file: in `STATE/ca/trust` it is one more root of the mesh.
    pub pem: String,
}

impl Authority {
    pub fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap();
        let (pem, certificate) = (certificate.pem(), certificate.der().clone());
        Authority { issuer: Issuer::new(params, key), certificate, pem }
    }

    /// The mesh's own, with the keys of its state directory: for certificates that it would never make.
    pub fn of(mesh: &Mesh) -> Authority {
        let read = |name: &str| std::fs::read_to_string(mesh.path("control-plane/ca").join(name)).unwrap();
        let key = KeyPair::from_pem(&read("intermediate.key")).unwrap();
        let pem = read("intermediate.pem");
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        Authority { issuer: Issuer::from_ca_cert_der(&certificate, key).unwrap(), certificate, pem }
    }

    /// A leaf as the mesh's own look, for these URIs; `change` may make it another.
    pub fn leaf(&self, uris: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Peer {
        let key = KeyPair::generate().unwrap();
        let params = leaf_params(uris, change);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Peer { key, chain: vec![certificate.der().clone(), self.certificate.clone()] }
    }
}

impl Default for Authority {
    fn default() -> Authority {
        Authority::new()
    }
}

/// A leaf that signs itself.
pub fn self_signed(uri: &str) -> Peer {
    let key = KeyPair::generate().unwrap();
    let certificate = leaf_params(&[uri], |_| {}).self_signed(&key).unwrap();
    Peer { key, chain: vec![certificate.der().clone()] }
}

fn leaf_params(uris: &[&str], change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "peer-1");
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    change(&mut params);
    params
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

#[derive(Debug)]
struct BelieveAll(Arc<CryptoProvider>);

impl ServerCertVerifier for BelieveAll {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
