//! The trust bundle: the roots that sidecars believe, with a generation that grows whenever the set changes and is
//! kept in STATE, so that it grows across restarts too. A new one is at least the clock's seconds: a state that comes from
//! a backup has a generation below what was in force since, and sidecars refuse its set instead of going back to it.

use std::collections::BTreeSet;
use std::time::SystemTime;

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use outrigger_api::identity::TrustDomain;
use outrigger_api::wire;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::AuthorityError;
use super::certificate::unix_seconds;
use crate::config::State;

const RECORD: &str = "ca/bundle.json";
/// What operators give to sidecars as `--trust-bundle`.
pub(super) const PEM: &str = "trust-bundle.pem";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    pub trust_domain: TrustDomain,
    /// At least one; the issuer's own first.
    pub roots: Vec<CertificateDer<'static>>,
    pub generation: u64,
}

#[derive(Serialize, Deserialize)]
struct Record {
    generation: u64,
    /// SHA-256 of each root, hexadecimal.
    roots: BTreeSet<String>,
}

impl Bundle {
    /// Gives the set its generation, and writes STATE/trust-bundle.pem.
    pub(super) fn record(
        state: &State,
        trust_domain: &TrustDomain,
        roots: Vec<CertificateDer<'static>>,
        now: SystemTime,
    ) -> Result<Bundle, AuthorityError> {
        let fingerprints: BTreeSet<String> = roots.iter().map(|root| fingerprint(root)).collect();
        let known: Option<Record> = state.read(RECORD)?.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let generation = match known {
            Some(record) if record.roots == fingerprints => record.generation,
            other => {
                let next = other.map_or(1, |record| record.generation.saturating_add(1));
                let generation = next.max(unix_seconds(now));
                let record = Record { generation, roots: fingerprints };
                let bytes = serde_json::to_vec(&record)
                    .map_err(|error| AuthorityError::Unfit { path: state.path(RECORD), message: error.to_string() })?;
                state.write(RECORD, &bytes)?;
                generation
            }
        };
        let text = pem(&roots);
        // Only when it differs: a restart on a full disk must not fail for a file that is right.
        if state.read(PEM)?.as_deref() != Some(text.as_bytes()) {
            state.write_public(PEM, text.as_bytes())?;
        }
        Ok(Bundle { trust_domain: trust_domain.clone(), roots, generation })
    }

    pub fn to_wire(&self) -> wire::TrustBundle {
        wire::TrustBundle {
            trust_domain: self.trust_domain.to_string(),
            root_der: self.roots.iter().map(|root| root.to_vec()).collect(),
            generation: self.generation,
        }
    }
}

fn fingerprint(der: &[u8]) -> String {
    digest::digest(&digest::SHA256, der).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn pem(certificates: &[CertificateDer<'_>]) -> String {
    let mut text = String::new();
    for certificate in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = STANDARD.encode(certificate);
        for line in encoded.as_bytes().chunks(64) {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}
