//! The certificate authority: root and intermediate in STATE/ca, leaves for whoever proved an identity, the bundle
//! of roots that sidecars believe, and join tokens. Called by `distribute`; time is passed in. No private key ever
//! leaves this module but to a file of mode 0600, and none is printed.

mod bundle;
mod certificate;
mod csr;
mod files;
mod redemption;
mod serving;
pub mod token;

pub use bundle::Bundle;
pub use certificate::{BACKDATE, Validity, unix_seconds};
pub use csr::{CsrError, MAX_CSR, RequestedKey, key_fingerprint};
pub use redemption::{Certified, Grant, RedeemError, Redemptions, Subject};
pub use serving::ServingCertificate;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use outrigger_api::identity::{SpiffeId, TrustDomain};
use rcgen::{Issuer, KeyPair};
use rustls_pki_types::CertificateDer;

use crate::config::{State, StateError};

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{path} is missing; {hint}")]
    Missing { path: PathBuf, hint: &'static str },
    #[error("{path} cannot be used: {message}")]
    Unfit { path: PathBuf, message: String },
    #[error("{path} is no certificate authority: it lacks the basic constraint CA:TRUE")]
    NotAuthority { path: PathBuf },
    #[error("{path} is not the key of the certificate beside it")]
    KeyMismatch { path: PathBuf },
    #[error("{path} ended at {not_after} (Unix seconds); check the clock, or replace it and its key")]
    Expired { path: PathBuf, not_after: u64 },
    #[error("the issuing certificate ended at {not_after} (Unix seconds); check the clock, or replace ca/intermediate")]
    IssuerExpired { not_after: u64 },
    #[error("cannot sign: {0}")]
    Signing(rcgen::Error),
    #[error("the system's source of randomness failed")]
    Random,
}

/// A certificate that was issued.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    pub validity: Validity,
}

/// Where an authority's two certificates stand.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// The end of the issuing chain: of the intermediate or of the root, whichever is first.
    pub not_after: SystemTime,
    /// Half of the intermediate's life is over, and the root's key is not here to sign another.
    pub overdue: bool,
    /// The clock stands before the beginning of the issuing chain: nobody will verify what is issued.
    pub early: bool,
}

pub struct Authority {
    state: State,
    trust_domain: TrustDomain,
    issuing: ArcSwap<Issuing>,
    bundle: ArcSwap<Bundle>,
    /// One renewal at a time.
    maintenance: Mutex<()>,
}

struct Issuing {
    issuer: Issuer<'static, KeyPair>,
    chain: Vec<CertificateDer<'static>>,
    validity: Validity,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

impl Authority {
    /// Reads STATE/ca and makes what is missing. Afterwards STATE/trust-bundle.pem holds the roots.
    pub fn open(state: &State, trust_domain: &TrustDomain, now: SystemTime) -> Result<Authority, AuthorityError> {
        let files = files::open(state, trust_domain.as_str(), now)?;
        let bundle = Bundle::record(state, trust_domain, files.roots, now)?;
        let authority = Authority {
            state: state.clone(),
            trust_domain: trust_domain.clone(),
            issuing: ArcSwap::from_pointee(Issuing::new(files.intermediate)?),
            bundle: ArcSwap::from_pointee(bundle),
            maintenance: Mutex::new(()),
        };
        authority.maintain(now)?;
        Ok(authority)
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub fn bundle(&self) -> Arc<Bundle> {
        self.bundle.load_full()
    }

    /// Checks a request against the identity that was proved for it.
    pub fn check(&self, csr_der: &[u8], identity: &SpiffeId) -> Result<RequestedKey, CsrError> {
        csr::check(csr_der, identity)
    }

    /// Issues a leaf for a key that [`Authority::check`] let through. Its life is `lifetime` from now, or what is
    /// left of the issuing chain's when that is less.
    pub fn issue(
        &self,
        requested: &RequestedKey,
        identity: &SpiffeId,
        workload: &str,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, AuthorityError> {
        self.sign(&requested.key, identity, workload, lifetime, now)
    }

    fn sign(
        &self,
        key: &impl rcgen::PublicKeyData,
        identity: &SpiffeId,
        workload: &str,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, AuthorityError> {
        let issuing = self.issuing.load();
        let end = issuing.validity.not_after;
        if end <= now {
            return Err(AuthorityError::IssuerExpired { not_after: unix_seconds(end) });
        }
        let validity = Validity { not_before: now - BACKDATE, not_after: (now + lifetime).min(end) };
        let leaf = certificate::leaf(key, identity, workload, validity, &issuing.issuer)?;
        let chain = std::iter::once(leaf.into()).chain(issuing.chain.iter().cloned()).collect();
        Ok(Issued { chain, validity })
    }

    /// Renews the intermediate when half of its life is over, and reads the roots again. To be called every minute
    /// or so, and on SIGHUP. True when the bundle changed.
    pub fn maintain(&self, now: SystemTime) -> Result<bool, AuthorityError> {
        let _one = self.maintenance.lock().unwrap_or_else(PoisonError::into_inner);
        if now >= self.issuing.load().validity.half()
            && let Some(renewed) = files::renew_intermediate(&self.state, self.trust_domain.as_str(), now)?
        {
            let renewed = Issuing::new(renewed)?;
            let not_after = unix_seconds(renewed.validity.not_after);
            tracing::info!(not_after, "the intermediate certificate was renewed");
            self.issuing.store(Arc::new(renewed));
        }
        let roots = files::read_roots(&self.state)?;
        if roots == self.bundle.load().roots {
            return Ok(false);
        }
        let bundle = Bundle::record(&self.state, &self.trust_domain, roots, now)?;
        tracing::info!(roots = bundle.roots.len(), generation = bundle.generation, "the trust bundle changed");
        self.bundle.store(Arc::new(bundle));
        Ok(true)
    }

    pub fn standing(&self, now: SystemTime) -> Standing {
        let validity = self.issuing.load().validity;
        Standing { not_after: validity.not_after, overdue: now >= validity.half(), early: now < validity.not_before }
    }
}

impl Issuing {
    fn new(intermediate: files::Intermediate) -> Result<Issuing, AuthorityError> {
        let files::Intermediate { chain, key, validity } = intermediate;
        let issuer = Issuer::from_ca_cert_der(&chain[0], key).map_err(AuthorityError::Signing)?;
        Ok(Issuing { issuer, chain, validity })
    }
}

#[cfg(test)]
mod tests;
