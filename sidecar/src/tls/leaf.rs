//! What a certificate says and whether it may be believed: the rules of an X.509-SVID, in one place for both
//! directions, for resumed sessions and for our own certificate. Pure; time is passed in.

use std::sync::Arc;
use std::time::SystemTime;

use outrigger_api::identity::{SpiffeId, TrustDomain};
use rustls_pki_types::CertificateDer;
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::clock::{from_unix_seconds, unix_time};
use super::credential::Bundle;
use super::error::PeerFault;
use super::material::provider;

/// The facts of a leaf. Reading them proves nothing: see [`verify`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    pub identity: SpiffeId,
    /// The subject's CN; `unknown` when it has none that can be shown.
    pub workload: Arc<str>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

/// The side on which a certificate is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    Client,
    Server,
}

impl Leaf {
    /// Reads a leaf by the rules of SPIFFE X.509-SVID sections 2 and 4: one URI name and that a SPIFFE id of
    /// `trust_domain`, no authority, allowed to sign.
    pub fn read(der: &CertificateDer<'_>, trust_domain: &TrustDomain) -> Result<Leaf, PeerFault> {
        let malformed = |what: &str| PeerFault::Malformed(what.to_owned());
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|e| PeerFault::Malformed(e.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes behind its end"));
        }
        refuse_authority(&certificate)?;
        let identity = identity(&certificate)?;
        if identity.trust_domain() != trust_domain.as_str() {
            return Err(PeerFault::TrustDomain { found: identity, expected: trust_domain.clone() });
        }
        let time = |seconds: i64| from_unix_seconds(u64::try_from(seconds).unwrap_or(0));
        Ok(Leaf {
            identity,
            workload: workload(&certificate),
            not_before: time(certificate.validity().not_before.timestamp()),
            not_after: time(certificate.validity().not_after.timestamp()),
        })
    }

    /// Both ends belong to the time in which a certificate is valid (RFC 5280 section 4.1.2.5).
    pub fn check_time(&self, now: SystemTime) -> Result<(), PeerFault> {
        if now > self.not_after {
            return Err(PeerFault::Expired { not_after: self.not_after, now });
        }
        if now < self.not_before {
            return Err(PeerFault::NotYetValid { not_before: self.not_before, now });
        }
        Ok(())
    }
}

/// Verifies a chain (leaf first) against every root of the bundle and returns the leaf's facts.
pub(super) fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &Bundle,
    purpose: Purpose,
    now: SystemTime,
) -> Result<Leaf, PeerFault> {
    let usage = match purpose {
        Purpose::Client => KeyUsage::client_auth(),
        Purpose::Server => KeyUsage::server_auth(),
    };
    let algorithms = provider().signature_verification_algorithms.all;
    EndEntityCert::try_from(leaf)
        .map_err(fault)?
        .verify_for_usage(algorithms, bundle.anchors(), intermediates, unix_time(now), usage, None, None)
        .map_err(fault)?;
    Leaf::read(leaf, bundle.trust_domain())
}

fn fault(error: webpki::Error) -> PeerFault {
    let time = |time: rustls_pki_types::UnixTime| from_unix_seconds(time.as_secs());
    match error {
        // A root of another authority may well carry the name of ours.
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => PeerFault::Untrusted,
        webpki::Error::CertExpired { time: now, not_after } => {
            PeerFault::Expired { not_after: time(not_after), now: time(now) }
        }
        webpki::Error::CertNotValidYet { time: now, not_before } => {
            PeerFault::NotYetValid { not_before: time(not_before), now: time(now) }
        }
        webpki::Error::RequiredEkuNotFoundContext(_) => PeerFault::Purpose,
        webpki::Error::CaUsedAsEndEntity | webpki::Error::EndEntityUsedAsCa => PeerFault::Authority,
        webpki::Error::BadDer | webpki::Error::BadDerTime | webpki::Error::TrailingData(_) => {
            PeerFault::Malformed(error.to_string())
        }
        other => PeerFault::Chain(other.to_string()),
    }
}

fn refuse_authority(certificate: &X509Certificate<'_>) -> Result<(), PeerFault> {
    let malformed = |error: x509_parser::error::X509Error| PeerFault::Malformed(error.to_string());
    if certificate.basic_constraints().map_err(malformed)?.is_some_and(|basic| basic.value.ca) {
        return Err(PeerFault::Authority);
    }
    if let Some(usage) = certificate.key_usage().map_err(malformed)?
        && (!usage.value.digital_signature() || usage.value.key_cert_sign() || usage.value.crl_sign())
    {
        return Err(PeerFault::Authority);
    }
    Ok(())
}

fn identity(certificate: &X509Certificate<'_>) -> Result<SpiffeId, PeerFault> {
    let names = certificate.subject_alternative_name().map_err(|e| PeerFault::Malformed(e.to_string()))?;
    let mut uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (Some(uri), 0) => Ok(SpiffeId::parse(uri)?),
        (None, _) => Err(PeerFault::UriNames(0)),
        (Some(_), more) => Err(PeerFault::UriNames(1 + more)),
    }
}

/// The name ends up in metric labels and headers, so only a plain one is taken.
fn workload(certificate: &X509Certificate<'_>) -> Arc<str> {
    let plain = |name: &str| {
        (1..=253).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
    };
    let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    name.filter(|name| plain(name)).unwrap_or("unknown").into()
}
