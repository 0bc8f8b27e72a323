//! One certificate: a key that is made here, a CSR with that key and the identity that is expected, one call of Issue, and
//! the checks that turn its answer into a credential.

use std::time::Duration;

use outrigger_api::identity::SpiffeId;
use outrigger_api::snapshot::KeyAlgorithm;
use outrigger_api::wire::identity_client::IdentityClient;
use outrigger_api::wire::{IssueRequest, IssueResponse, LateRenewal, late_renewal_message};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::{AlertDescription, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::timeout;

use super::IdentitySettings;
use super::channel::{DialError, Dialled};
use crate::tls::{Bundle, Clock, Credential, CredentialError, PeerFault};

const ANSWER: Duration = Duration::from_secs(15);
const MAX_ANSWER: usize = 1024 * 1024;

/// Why there is no new certificate. [`super::trouble`] says what to do about it.
#[derive(Debug, thiserror::Error)]
pub(super) enum IssueError {
    #[error("{message}")]
    TrustBundle { message: String },
    #[error("{message}")]
    Token { message: String },
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the control plane did not answer within {0:?}")]
    Late(Duration),
    #[error("{}", super::answered(.0))]
    Refused(Box<tonic::Status>),
    #[error("the control plane does not take this sidecar's certificate (TLS alert {0:?})")]
    CertificateRefused(AlertDescription),
    #[error("the control plane's answer cannot be used: {0}")]
    Answer(String),
    #[error("the new certificate is not valid by this machine's clock: {0}")]
    Clock(PeerFault),
    #[error("no key could be made: {0}")]
    Key(#[from] rcgen::Error),
}

/// A key that asks for a certificate. Debug is not implemented: it holds the private key.
pub(super) struct Request {
    key: KeyPair,
}

impl Request {
    pub(super) fn new(algorithm: KeyAlgorithm) -> Result<Request, IssueError> {
        Ok(Request { key: KeyPair::generate_for(rcgen_algorithm(algorithm))? })
    }

    /// A key that asked before, when it is of the right kind: the control plane answers the same key again, so that
    /// a lost answer does not cost the token.
    pub(super) fn from_pem(pem: &str, algorithm: KeyAlgorithm) -> Option<Request> {
        let key = KeyPair::from_pem(pem).ok()?;
        key.is_compatible(rcgen_algorithm(algorithm)).then_some(Request { key })
    }

    pub(super) fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// The key and the identity that this sidecar is told to have: when the token is for another one, the control plane
    /// refuses before it spends the token.
    fn csr(&self, settings: &IdentitySettings) -> Result<Vec<u8>, IssueError> {
        let identity = expected(settings).map_err(IssueError::Answer)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        Ok(params.serialize_request(&self.key)?.der().to_vec())
    }

    /// Asks once.
    pub(super) async fn issue(
        &self,
        dialled: Dialled,
        proof: Proof<'_>,
        settings: &IdentitySettings,
        clock: &Clock,
    ) -> Result<Credential, IssueError> {
        let mut client = IdentityClient::new(dialled.channel.clone()).max_decoding_message_size(MAX_ANSWER);
        let csr_der = self.csr(settings)?;
        let (proof, late) = match proof {
            Proof::Token(token) => (token, None),
            Proof::Certificate => (String::new(), None),
            Proof::Ended(credential) => (String::new(), Some(late_renewal(credential, &dialled, &csr_der)?)),
        };
        let request = IssueRequest { csr_der, proof, workload: settings.name.clone(), late };
        let answer = timeout(ANSWER, client.issue(request)).await.map_err(|_| IssueError::Late(ANSWER))?;
        let answer = answer.map_err(|status| match dialled.alert() {
            Some(alert) => IssueError::CertificateRefused(alert),
            None => IssueError::Refused(Box::new(status)),
        });
        let answer = answer?.into_inner();
        let credential = self.credential(answer, settings)?;
        credential.check_time(clock.now()).map_err(IssueError::Clock)?;
        Ok(credential)
    }

    fn credential(&self, answer: IssueResponse, settings: &IdentitySettings) -> Result<Credential, IssueError> {
        let unusable = |error: CredentialError| IssueError::Answer(error.to_string());
        let wire = answer.trust_bundle.ok_or_else(|| IssueError::Answer("it has no trust bundle".to_owned()))?;
        let bundle = Bundle::from_wire(&wire, &settings.trust_domain).map_err(unusable)?;
        let chain = answer.chain_der.into_iter().map(CertificateDer::from).collect();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let credential = Credential::new(chain, key, bundle).map_err(unusable)?;
        check_is_ours(&credential, settings).map_err(IssueError::Answer)?;
        Ok(credential)
    }
}

/// What shows the control plane who asks.
pub(super) enum Proof<'a> {
    /// A join token.
    Token(String),
    /// The certificate with which the channel was dialled.
    Certificate,
    /// A certificate that has ended, on a channel without one.
    Ended(&'a Credential),
}

/// The chain that ended, and a signature by its key that is good for this connection and this request alone.
fn late_renewal(ended: &Credential, dialled: &Dialled, csr_der: &[u8]) -> Result<LateRenewal, IssueError> {
    const SCHEMES: [SignatureScheme; 3] =
        [SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519, SignatureScheme::ECDSA_NISTP384_SHA384];
    let message = late_renewal_message(&dialled.exported, csr_der);
    let signer = ended.certified().key.choose_scheme(&SCHEMES);
    let signature = signer.map(|signer| signer.sign(&message)).transpose();
    let signature = signature.ok().flatten().ok_or_else(|| IssueError::Key(rcgen::Error::RemoteKeyError))?;
    Ok(LateRenewal { chain_der: ended.chain().iter().map(|der| der.to_vec()).collect(), signature })
}

fn expected(settings: &IdentitySettings) -> Result<SpiffeId, String> {
    let IdentitySettings { trust_domain, namespace, service_account, .. } = settings;
    SpiffeId::new(trust_domain, namespace, service_account).map_err(|error| error.to_string())
}

/// A certificate for somebody else is of no use, even when the control plane signed it.
pub(super) fn check_is_ours(credential: &Credential, settings: &IdentitySettings) -> Result<(), String> {
    let (expected, name) = (expected(settings)?, &settings.name);
    if *credential.identity() != expected {
        return Err(format!("the certificate is for {}, this sidecar is {expected}", credential.identity()));
    }
    if **credential.workload() != **name {
        return Err(format!("the certificate is for the workload {}, this one is {name}", credential.workload()));
    }
    Ok(())
}

fn rcgen_algorithm(algorithm: KeyAlgorithm) -> &'static rcgen::SignatureAlgorithm {
    match algorithm {
        KeyAlgorithm::EcdsaP256 => &rcgen::PKCS_ECDSA_P256_SHA256,
        KeyAlgorithm::Ed25519 => &rcgen::PKCS_ED25519,
    }
}
