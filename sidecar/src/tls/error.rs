//! Why a handshake failed, and the reason of the one table that each failure has. Knows how to find our own words
//! again inside the errors that rustls and tokio hand back.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use outrigger_api::identity::{IdentityError, SpiffeId, TrustDomain};
use rustls::{AlertDescription, CertificateError, InvalidMessage, OtherError};

use super::clock::{from_unix_seconds, show, unix_time};
use crate::outcome::Reason;

/// What is wrong with the certificate that a peer presented.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PeerFault {
    #[error("the certificate cannot be read: {0}")]
    Malformed(String),
    #[error("the certificate is not signed by a root that this side believes")]
    Untrusted,
    #[error("the certificate ended at {}, it is {} now", show(*.not_after), show(*.now))]
    Expired { not_after: SystemTime, now: SystemTime },
    #[error("the certificate begins at {}, it is {} now", show(*.not_before), show(*.now))]
    NotYetValid { not_before: SystemTime, now: SystemTime },
    #[error("the certificate is not meant for this use (extended key usage)")]
    Purpose,
    #[error("the certificate is one of an authority, or may not sign a handshake")]
    Authority,
    #[error("the certificate has {0} URI names, exactly one SPIFFE id is expected")]
    UriNames(usize),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the identity {found} is not of the trust domain {expected}")]
    TrustDomain { found: SpiffeId, expected: TrustDomain },
    #[error("the peer proved to be {found}, expected was {expected}")]
    Unexpected { found: SpiffeId, expected: SpiffeId },
    #[error("the certificate chain is refused: {0}")]
    Chain(String),
}

impl PeerFault {
    /// As rustls wants it, so that the peer is sent the alert that fits.
    pub(super) fn into_rustls(self) -> rustls::Error {
        let error = match self {
            PeerFault::Untrusted => CertificateError::UnknownIssuer,
            PeerFault::Purpose => CertificateError::InvalidPurpose,
            PeerFault::Expired { not_after, now } => {
                CertificateError::ExpiredContext { time: unix_time(now), not_after: unix_time(not_after) }
            }
            PeerFault::NotYetValid { not_before, now } => {
                CertificateError::NotValidYetContext { time: unix_time(now), not_before: unix_time(not_before) }
            }
            other => CertificateError::Other(OtherError(Arc::new(other))),
        };
        rustls::Error::InvalidCertificate(error)
    }

    fn from_rustls(error: &CertificateError) -> PeerFault {
        match error {
            CertificateError::UnknownIssuer => PeerFault::Untrusted,
            CertificateError::InvalidPurpose => PeerFault::Purpose,
            CertificateError::ExpiredContext { time, not_after } => PeerFault::Expired {
                not_after: from_unix_seconds(not_after.as_secs()),
                now: from_unix_seconds(time.as_secs()),
            },
            CertificateError::NotValidYetContext { time, not_before } => PeerFault::NotYetValid {
                not_before: from_unix_seconds(not_before.as_secs()),
                now: from_unix_seconds(time.as_secs()),
            },
            CertificateError::Other(OtherError(inner)) => match inner.downcast_ref::<PeerFault>() {
                Some(fault) => fault.clone(),
                None => PeerFault::Chain(inner.to_string()),
            },
            other => PeerFault::Chain(format!("{other:?}")),
        }
    }
}

/// Why there is no mutual TLS with a peer. Nothing of the application was sent or delivered.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the peer agreed on no protocol of the mesh (ALPN)")]
    NotMesh,
    #[error("the peer presented no certificate")]
    NoCertificate,
    #[error("{0}")]
    Peer(#[from] PeerFault),
    #[error("this sidecar's own certificate ended at {}; see /ready", show(*.0))]
    OwnExpired(SystemTime),
    #[error("the peer ended the handshake with the alert {0:?}")]
    Alert(AlertDescription),
    #[error("the peer answered in plaintext")]
    Plaintext,
    #[error("the handshake did not end within {0:?}")]
    Timeout(std::time::Duration),
    #[error("the handshake broke off: {0}")]
    Io(io::Error),
    #[error("the handshake failed: {0}")]
    Protocol(rustls::Error),
    #[error("the certificate and key cannot be used: {0}")]
    Material(rustls::Error),
    // Short enough to be shown whole by `outrigger status`.
    #[error(
        "trust bundle {found} is not newer than {in_force}, in force, and has other roots: a --state from a backup? If it \
         is right, remove the control plane's STATE/ca/bundle.json and start it again"
    )]
    OlderBundle { found: u64, in_force: u64 },
}

impl TlsError {
    /// The word of the table of outcomes.
    pub fn reason(&self) -> Reason {
        match self {
            TlsError::NotMesh | TlsError::NoCertificate => Reason::MtlsRequired,
            TlsError::Peer(PeerFault::Unexpected { .. }) => Reason::IdentityMismatch,
            TlsError::Peer(_) => Reason::PeerCertificate,
            TlsError::OwnExpired(_) => Reason::NotReady,
            TlsError::Alert(_)
            | TlsError::Plaintext
            | TlsError::Timeout(_)
            | TlsError::Io(_)
            | TlsError::Protocol(_) => Reason::TlsHandshake,
            TlsError::Material(_) | TlsError::OlderBundle { .. } => Reason::Internal,
        }
    }

    pub(super) fn from_rustls(error: rustls::Error) -> TlsError {
        match error {
            rustls::Error::InvalidCertificate(error) => TlsError::Peer(PeerFault::from_rustls(&error)),
            rustls::Error::NoCertificatesPresented => TlsError::NoCertificate,
            rustls::Error::NoApplicationProtocol => TlsError::NotMesh,
            rustls::Error::AlertReceived(alert) => TlsError::Alert(alert),
            // No record of TLS begins so.
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => TlsError::Plaintext,
            other => TlsError::Protocol(other),
        }
    }

    /// tokio-rustls wraps what rustls says into an I/O error. Callers that read from a client stream find there the
    /// server's refusal of their certificate too, because TLS 1.3 reports it only after the client's side is done.
    pub fn from_io(error: io::Error) -> TlsError {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(inner) => TlsError::from_rustls(inner.clone()),
            None => TlsError::Io(error),
        }
    }
}
