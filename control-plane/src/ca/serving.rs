//! The control plane's own certificate, `/ns/outrigger-system/sa/control-plane`: its key lives in memory only, and
//! the listener asks here at each handshake, so that a renewal needs no restart.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use outrigger_api::identity::{CONTROL_PLANE_ACCOUNT, SpiffeId};
use rcgen::KeyPair;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Authority, AuthorityError, Validity};

const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

pub struct ServingCertificate {
    current: ArcSwap<Current>,
}

struct Current {
    key: Arc<CertifiedKey>,
    validity: Validity,
    /// Of the trust bundle when it was issued: another one may mean another issuer.
    generation: u64,
}

impl std::fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServingCertificate").field("validity", &self.current.load().validity).finish()
    }
}

impl ServingCertificate {
    pub fn new(authority: &Authority, now: SystemTime) -> Result<ServingCertificate, AuthorityError> {
        Ok(ServingCertificate { current: ArcSwap::from_pointee(Current::issue(authority, now)?) })
    }

    /// Takes a new certificate when half of the current one's life is over, when the clock stands before its
    /// beginning, or when the roots changed.
    pub fn renew_when_due(&self, authority: &Authority, now: SystemTime) -> Result<(), AuthorityError> {
        let current = self.current.load();
        let due = now >= current.validity.half()
            || now < current.validity.not_before
            || authority.bundle().generation != current.generation;
        if due {
            self.current.store(Arc::new(Current::issue(authority, now)?));
            tracing::debug!("the control plane's own certificate was renewed");
        }
        Ok(())
    }

    pub fn validity(&self) -> Validity {
        self.current.load().validity
    }
}

impl Current {
    fn issue(authority: &Authority, now: SystemTime) -> Result<Current, AuthorityError> {
        let generation = authority.bundle().generation;
        let key = KeyPair::generate().map_err(AuthorityError::Signing)?;
        let identity = SpiffeId::control_plane(authority.trust_domain());
        let issued = authority.sign(&key, &identity, CONTROL_PLANE_ACCOUNT, LIFETIME, now)?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signing = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der)
            .map_err(|_| AuthorityError::Signing(rcgen::Error::CouldNotParseKeyPair))?;
        let key = Arc::new(CertifiedKey::new(issued.chain, signing));
        Ok(Current { key, validity: issued.validity, generation })
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load().key.clone())
    }
}
