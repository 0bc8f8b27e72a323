//! The roots that this sidecar believes and the certificate that it presents. Made by `identity` from what the
//! control plane issued or from `--state`; a value of either type has been checked and is never half valid.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_api::identity::{SpiffeId, TrustDomain};
use outrigger_api::wire;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor};

use super::error::{PeerFault, TlsError};
use super::leaf::{self, Leaf, Purpose};
use super::material::provider;

/// The control plane dates leaves back by this much, for clocks that are a little behind.
const BACK_DATED: Duration = Duration::from_secs(5 * 60);

/// Why something is not a bundle or a credential.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CredentialError {
    #[error("the trust bundle has no root certificate")]
    NoRoots,
    #[error("root {index} of the trust bundle cannot be read: {message}")]
    Root { index: usize, message: String },
    #[error("the trust bundle is of the trust domain {found}, expected was {expected}")]
    TrustDomain { found: String, expected: TrustDomain },
    #[error("the certificate chain is empty")]
    NoChain,
    #[error("the certificate cannot be used: {0}")]
    Leaf(#[from] PeerFault),
    #[error("the key cannot be used: {0}")]
    Key(String),
    #[error("the certificate is not of this key")]
    KeyMismatch,
}

/// The roots of one trust domain. Cheap to clone.
#[derive(Clone)]
pub struct Bundle(Arc<Roots>);

struct Roots {
    trust_domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    generation: u64,
}

impl Bundle {
    /// Takes self-signed roots, at least one. Generations only grow; a bundle from a file has generation 0.
    pub fn new(
        trust_domain: TrustDomain,
        roots: Vec<CertificateDer<'static>>,
        generation: u64,
    ) -> Result<Bundle, CredentialError> {
        if roots.is_empty() {
            return Err(CredentialError::NoRoots);
        }
        let mut anchors = Vec::with_capacity(roots.len());
        for (index, root) in roots.iter().enumerate() {
            let anchor = webpki::anchor_from_trusted_cert(root)
                .map_err(|error| CredentialError::Root { index, message: error.to_string() })?;
            anchors.push(anchor.to_owned());
        }
        Ok(Bundle(Arc::new(Roots { trust_domain, roots, anchors, generation })))
    }

    /// Takes the bundle off the wire; one of another trust domain is refused.
    pub fn from_wire(bundle: &wire::TrustBundle, expected: &TrustDomain) -> Result<Bundle, CredentialError> {
        if bundle.trust_domain != expected.as_str() {
            return Err(CredentialError::TrustDomain {
                found: bundle.trust_domain.clone(),
                expected: expected.clone(),
            });
        }
        let roots = bundle.root_der.iter().map(|der| CertificateDer::from(der.clone())).collect();
        Bundle::new(expected.clone(), roots, bundle.generation)
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.0.roots
    }

    pub fn generation(&self) -> u64 {
        self.0.generation
    }

    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.0.anchors
    }

    /// Whether both believe the same roots, in whatever order.
    pub(super) fn same_roots(&self, other: &Bundle) -> bool {
        let within = |one: &Bundle, all: &Bundle| one.roots().iter().all(|root| all.roots().contains(root));
        self.trust_domain() == other.trust_domain() && within(self, other) && within(other, self)
    }

    /// Whether the two have a root in common. Two that have none are of different authorities.
    pub fn shares_root(&self, other: &Bundle) -> bool {
        self.roots().iter().any(|root| other.roots().contains(root))
    }
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Roots { trust_domain, roots, generation, .. } = &*self.0;
        write!(f, "Bundle({trust_domain}, generation {generation}, {} roots)", roots.len())
    }
}

/// A certificate with its key, and the bundle to believe peers by. Cheap to clone; Debug shows no key.
#[derive(Clone)]
pub struct Credential {
    certified: Arc<CertifiedKey>,
    leaf: Leaf,
    bundle: Bundle,
}

impl Credential {
    /// Takes a chain (leaf first, without the root) and its key. The chain must verify against the bundle for both
    /// directions; whether it is valid now is the caller's to ask ([`Credential::check_time`]).
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        bundle: Bundle,
    ) -> Result<Credential, CredentialError> {
        let leaf = Leaf::read(chain.first().ok_or(CredentialError::NoChain)?, bundle.trust_domain())?;
        let key =
            provider().key_provider.load_private_key(key).map_err(|error| CredentialError::Key(error.to_string()))?;
        let certified = CertifiedKey::new(chain, key);
        certified.keys_match().map_err(|_| CredentialError::KeyMismatch)?;
        let credential = Credential { certified: Arc::new(certified), leaf, bundle };
        credential.check_chain()?;
        Ok(credential)
    }

    /// Whether the chain is whole, whatever the time: at some moment of the leaf's life it must verify. Not at each:
    /// a back-dated leaf begins before an intermediate that is new, and may outlive one that is old.
    fn check_chain(&self) -> Result<(), PeerFault> {
        let (end, life) = (self.leaf.not_after, self.lifetime());
        let at = |before_end| end.checked_sub(before_end).unwrap_or(end);
        let both = |moment| {
            self.verify_with(&self.bundle, Purpose::Client, moment)?;
            self.verify_with(&self.bundle, Purpose::Server, moment)
        };
        both(end).or_else(|_| both(at(life / 2))).or_else(|_| both(at(life)))
    }

    fn verify_with(&self, bundle: &Bundle, purpose: Purpose, at: SystemTime) -> Result<(), PeerFault> {
        match self.chain() {
            [leaf, intermediates @ ..] => leaf::verify(leaf, intermediates, bundle, purpose, at).map(drop),
            [] => Err(PeerFault::Untrusted),
        }
    }

    /// The same certificate with other roots. The own chain need not verify against them: a rotation brings the new
    /// certificate a moment later.
    pub(super) fn with_bundle(&self, bundle: Bundle) -> Result<Credential, TlsError> {
        if bundle.trust_domain() != self.bundle.trust_domain() {
            let found = self.leaf.identity.clone();
            return Err(PeerFault::TrustDomain { found, expected: bundle.trust_domain().clone() }.into());
        }
        Ok(Credential { bundle, ..self.clone() })
    }

    /// Whether the bundle in force verifies this certificate, as peers with the same bundle will.
    pub fn verifies(&self) -> bool {
        self.check_chain().is_ok()
    }

    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    pub(crate) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.leaf.identity
    }

    pub fn workload(&self) -> &Arc<str> {
        &self.leaf.workload
    }

    /// The leaf's serial number, in hexadecimal.
    pub fn serial(&self) -> String {
        use x509_parser::prelude::{FromDer as _, X509Certificate};
        let leaf = self.chain().first().map(|der| X509Certificate::from_der(der));
        leaf.and_then(Result::ok).map(|(_, leaf)| leaf.raw_serial_as_string()).unwrap_or_default()
    }

    pub fn not_before(&self) -> SystemTime {
        self.leaf.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.leaf.not_after
    }

    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    pub fn check_time(&self, now: SystemTime) -> Result<(), PeerFault> {
        self.leaf.check_time(now)
    }

    /// How long the leaf was meant to live: its validity without the back-dating.
    pub fn lifetime(&self) -> Duration {
        let whole = self.leaf.not_after.duration_since(self.leaf.not_before).unwrap_or_default();
        whole.checked_sub(BACK_DATED).filter(|life| !life.is_zero()).unwrap_or(whole)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Credential { leaf, bundle, .. } = self;
        f.debug_struct("Credential").field("leaf", leaf).field("bundle", bundle).finish_non_exhaustive()
    }
}

/// The credential to install when `in_force` may be a later bundle than the one it was issued with: discovery can be
/// faster than an answer to Issue. Roots that do not believe the new chain are never kept for it.
pub(super) fn newer_of(in_force: &Bundle, issued: Credential, now: SystemTime) -> Credential {
    let keeps = in_force.generation() > issued.bundle.generation()
        && in_force.trust_domain() == issued.bundle.trust_domain()
        && issued.verify_with(in_force, Purpose::Client, now.min(issued.not_after())).is_ok();
    if keeps { Credential { bundle: in_force.clone(), ..issued } } else { issued }
}
