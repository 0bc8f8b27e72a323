//! Renewal of a certificate that has ended: a laptop that slept over the weekend, a control plane that was away. Its key
//! proves itself for this connection, and only what the control plane's own records know is renewed.

use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ED25519, UnparsedPublicKey, VerificationAlgorithm,
};
use outrigger_api::wire::{LateRenewal, late_renewal_message};
use rustls_pki_types::CertificateDer;
use tonic::Code;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::catalog::renew_grace_seconds;
use super::identity::Refusal;
use super::server::Control;
use super::tls::{Peer, PeerCertificate, verify_ended};

/// Leaf and intermediates: far more than any authority has.
const MAX_CHAIN: usize = 8;

/// The certificate that is to be renewed, once everything about it is proved.
pub(super) fn prove(
    control: &Control,
    peer: &Peer,
    late: &LateRenewal,
    csr_der: &[u8],
    now: SystemTime,
) -> Result<PeerCertificate, Refusal> {
    let unproved = |message: &str| Refusal::new(Code::Unauthenticated, "certificate_proof", message);
    let Some(exported) = &peer.exported else {
        return Err(unproved("a connection with a client certificate renews that one; leave `late` out"));
    };
    if late.chain_der.len() > MAX_CHAIN {
        return Err(unproved("the chain is too long"));
    }
    let chain: Vec<CertificateDer<'_>> =
        late.chain_der.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let certificate = verify_ended(&control.authority, &chain)
        .map_err(|error| unproved(&format!("the certificate that ended is none of this control plane's ({error})")))?;
    let message = late_renewal_message(exported, csr_der);
    if !is_signed(&chain[0], &message, &late.signature) {
        return Err(unproved("the request is not signed by the key of the certificate that ended"));
    }
    let grace = Duration::from_secs(renew_grace_seconds(&control.publisher.resources()));
    let ended = now.duration_since(certificate.not_after).unwrap_or_default();
    if ended > grace {
        let message = format!(
            "the certificate ended {} s ago, and the mesh renews within {} s after the end (renewGrace); use a join token",
            ended.as_secs(),
            grace.as_secs()
        );
        return Err(Refusal::new(Code::Unauthenticated, "certificate_expired", message));
    }
    let subject = certificate.subject();
    if control.redemptions.certified(&subject).is_none() {
        let message = "the certificate that ended is not on record here (another --state?); use a join token";
        return Err(Refusal::new(Code::PermissionDenied, "certificate_unknown", message));
    }
    if control.redemptions.is_superseded(&subject) {
        let message = "a later certificate has taken the place of the one that ended; use that one, or a join token";
        return Err(Refusal::new(Code::PermissionDenied, "certificate_unknown", message));
    }
    Ok(certificate)
}

fn is_signed(leaf: &CertificateDer<'_>, message: &[u8], signature: &[u8]) -> bool {
    let Ok((_, leaf)) = X509Certificate::from_der(leaf) else { return false };
    let key = &*leaf.public_key().subject_public_key.data;
    // As in `ca::csr`: these three kinds of key are certified, and their lengths tell them apart.
    let algorithm: &'static dyn VerificationAlgorithm = match key.len() {
        65 => &ECDSA_P256_SHA256_ASN1,
        97 => &ECDSA_P384_SHA384_ASN1,
        32 => &ED25519,
        _ => return false,
    };
    UnparsedPublicKey::new(algorithm, key).verify(message, signature).is_ok()
}
