//! The listener's TLS: 1.3 only, our certificate, and client certificates that are optional (a first `Issue` has
//! none) but never half believed: the chain, the trust domain and the one URI SAN must be right, or the handshake fails.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use outrigger_api::identity::{ROOT_NAMESPACE, SpiffeId, TrustDomain};
use outrigger_api::wire::CONTROL_PLANE_ALPN;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tonic::Status;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::members::Member;
use crate::ca::{Authority, Bundle, ServingCertificate, Subject, key_fingerprint};

/// Who is at the other end of a connection. In the extensions of each request.
#[derive(Clone, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    /// None: it showed no certificate.
    pub certificate: Option<PeerCertificate>,
    pub(super) standing: Option<Arc<Standing>>,
    /// The place of a connection with a certificate.
    pub(super) member: Option<Arc<Member>>,
    /// What both ends of the connection export to bind a late renewal to it; None where nobody can ask for one.
    pub exported: Option<[u8; 32]>,
}

impl Peer {
    /// Whether the certificate of this connection would be let in now: it has not ended, and a root of the bundle in
    /// force signed it. A peer without one has nothing that could end.
    pub(super) fn check(&self, now: SystemTime) -> Result<(), Status> {
        self.standing.as_ref().map_or(Ok(()), |standing| standing.check(now))
    }
}

/// The certificate of a connection that is open, to be judged again: the connection may be older than its end, or than
/// the bundle.
pub(super) struct Standing {
    chain: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
    verifier: Arc<WorkloadVerifier>,
    /// Generation of the bundle that last verified it.
    verified: AtomicU64,
}

impl std::fmt::Debug for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Standing").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl Standing {
    /// Of a chain that the handshake has just verified; it is verified once more at the first check.
    pub(super) fn new(
        chain: Vec<CertificateDer<'static>>,
        not_after: SystemTime,
        verifier: Arc<WorkloadVerifier>,
    ) -> Standing {
        Standing { chain, not_after, verifier, verified: AtomicU64::new(0) }
    }

    fn check(&self, now: SystemTime) -> Result<(), Status> {
        if now >= self.not_after {
            let message = "the client certificate expired; connect again with the renewed one";
            return Err(Status::unauthenticated(message));
        }
        let generation = self.verifier.authority.bundle().generation;
        if self.verified.load(Ordering::Relaxed) == generation {
            return Ok(());
        }
        let [leaf, intermediates @ ..] = &self.chain[..] else {
            return Err(Status::unauthenticated("certificate_required: the connection has no client certificate"));
        };
        let time = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
        self.verifier.verify_client_cert(leaf, intermediates, time).map_err(|error| {
            Status::unauthenticated(format!("the client certificate is no longer believed ({error}); connect again"))
        })?;
        self.verified.store(generation, Ordering::Relaxed);
        Ok(())
    }
}

/// A certificate that was verified in the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    pub identity: SpiffeId,
    /// The subject's common name: which instance.
    pub workload: String,
    pub not_after: SystemTime,
    /// Fingerprint of its key: what its token granted belongs to that.
    pub key: String,
}

impl PeerCertificate {
    pub fn subject(&self) -> Subject {
        Subject {
            key: self.key.clone(),
            namespace: self.identity.namespace().to_owned(),
            service_account: self.identity.account().to_owned(),
        }
    }
}

/// Why a certificate is not one of this mesh's workloads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("the client certificate cannot be read")]
    Malformed,
    #[error("the client certificate has {0} URI names; a workload's has exactly one")]
    Uris(usize),
    #[error("the client certificate's name {0:?} is not a SPIFFE id of this mesh")]
    Identity(String),
    #[error("the client certificate is of trust domain {0}, not of ours")]
    TrustDomain(String),
    #[error("no workload has an identity in {ROOT_NAMESPACE}")]
    Reserved,
}

/// What verifies client certificates, in handshakes and afterwards.
pub(super) fn verifier(authority: Arc<Authority>) -> Arc<WorkloadVerifier> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Arc::new(WorkloadVerifier { authority, provider, current: ArcSwapOption::empty() })
}

pub(super) fn server_config(
    verifier: Arc<WorkloadVerifier>,
    serving: Arc<ServingCertificate>,
) -> Result<ServerConfig, rustls::Error> {
    let provider = verifier.provider.clone();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(serving);
    config.alpn_protocols = vec![CONTROL_PLANE_ALPN.to_vec()];
    // No resumption: a connection here is rare and long, and each one's certificate is to be looked at anew.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Reads the identity from a certificate whose chain was verified.
pub fn read_certificate(der: &CertificateDer<'_>, trust_domain: &TrustDomain) -> Result<PeerCertificate, PeerError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| PeerError::Malformed)?;
    let names = certificate.subject_alternative_name().map_err(|_| PeerError::Malformed)?;
    let names = names.map_or(&[][..], |extension| &extension.value.general_names);
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris[..] else { return Err(PeerError::Uris(uris.len())) };
    let identity = SpiffeId::parse(uri).map_err(|_| PeerError::Identity(uri.chars().take(200).collect()))?;
    if identity.trust_domain() != trust_domain.as_str() {
        return Err(PeerError::TrustDomain(identity.trust_domain().to_owned()));
    }
    if identity.namespace() == ROOT_NAMESPACE {
        return Err(PeerError::Reserved);
    }
    let workload = certificate
        .subject()
        .iter_common_name()
        .next()
        .and_then(|name| name.as_str().ok())
        .unwrap_or_default()
        .to_owned();
    let not_after = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or_default();
    let key = key_fingerprint(certificate.public_key().raw);
    Ok(PeerCertificate { identity, workload, not_after: UNIX_EPOCH + Duration::from_secs(not_after), key })
}

/// Verifies a chain as it was at the end of its leaf's life, and reads the identity from it.
pub fn verify_ended(authority: &Authority, chain: &[CertificateDer<'_>]) -> Result<PeerCertificate, rustls::Error> {
    let [leaf, intermediates @ ..] = chain else { return Err(Error::NoCertificatesPresented) };
    let unfit = |error: PeerError| Error::from(CertificateError::Other(OtherError(Arc::new(error))));
    let certificate = read_certificate(leaf, authority.trust_domain()).map_err(unfit)?;
    let verifier = chain_verifier(&authority.bundle(), &Arc::new(rustls::crypto::aws_lc_rs::default_provider()))?;
    let end = certificate.not_after.duration_since(UNIX_EPOCH).unwrap_or_default();
    verifier.verify_client_cert(leaf, intermediates, UnixTime::since_unix_epoch(end))?;
    Ok(certificate)
}

fn chain_verifier(bundle: &Bundle, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let mut roots = RootCertStore::empty();
    for root in &bundle.roots {
        roots.add(root.clone())?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| Error::General(error.to_string()))
}

/// Verifies with the bundle that is in force at that moment.
pub(super) struct WorkloadVerifier {
    authority: Arc<Authority>,
    provider: Arc<CryptoProvider>,
    current: ArcSwapOption<Roots>,
}

struct Roots {
    bundle: Arc<Bundle>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl std::fmt::Debug for WorkloadVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WorkloadVerifier")
    }
}

impl WorkloadVerifier {
    fn roots(&self) -> Result<Arc<Roots>, Error> {
        let bundle = self.authority.bundle();
        if let Some(current) = self.current.load_full()
            && current.bundle.generation == bundle.generation
        {
            return Ok(current);
        }
        let verifier = chain_verifier(&bundle, &self.provider)?;
        let current = Arc::new(Roots { bundle, verifier });
        self.current.store(Some(current.clone()));
        Ok(current)
    }
}

impl ClientCertVerifier for WorkloadVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.roots()?.verifier.verify_client_cert(end_entity, intermediates, now)?;
        read_certificate(end_entity, self.authority.trust_domain())
            .map_err(|error| CertificateError::Other(OtherError(Arc::new(error))))?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
