//! The certificate's copy in `--state`, so that a restart needs neither token nor control plane. Every file is 0600
//! and replaced whole: temporary file, fsync, rename, fsync of the directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use outrigger_api::identity::TrustDomain;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::tls::{Bundle, Credential, CredentialError};

/// Why the copy could not be read or written. What is in memory goes on being used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{}: {error}", .path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: {message}", .path.display())]
    Content { path: PathBuf, message: String },
    #[error("the certificate in {} cannot be used: {error}", .path.display())]
    Credential { path: PathBuf, error: CredentialError },
}

/// The directory, with the names of what `identity` keeps in it.
#[derive(Clone, Debug)]
pub(super) struct State {
    directory: PathBuf,
}

const CHAIN: &str = "identity.pem";
const KEY: &str = "identity.key";
/// A key whose certificate may be on its way. It is written before the certificate and becomes [`KEY`] after it, so
/// that at each moment one of the two fits [`CHAIN`].
const PENDING: &str = "pending.key";
const BUNDLE: &str = "trust-bundle.pem";
/// The roots with which a token was redeemed last.
const BOOTSTRAP: &str = "bootstrap.pem";
const GENERATION: &str = "# generation ";

impl State {
    pub(super) fn new(directory: PathBuf) -> State {
        State { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The credential of an earlier run; None when there was none.
    pub(super) fn load(&self, trust_domain: &TrustDomain) -> Result<Option<Credential>, StateError> {
        let (Some(chain), Some(bundle)) = (read(&self.path(CHAIN))?, read(&self.path(BUNDLE))?) else {
            return Ok(None);
        };
        let bundle = bundle_from_pem(&self.path(BUNDLE), &bundle, trust_domain)?;
        let chain = certificates(&self.path(CHAIN), &chain)?;
        let mut refused = None;
        for name in [KEY, PENDING] {
            let path = self.path(name);
            let Some(key) = read(&path)? else { continue };
            let key = PrivateKeyDer::from_pem_slice(&key)
                .map_err(|error| StateError::Content { path: path.clone(), message: error.to_string() })?;
            match Credential::new(chain.clone(), key, bundle.clone()) {
                Ok(credential) => return Ok(Some(credential)),
                Err(error) => refused = Some(StateError::Credential { path: self.path(CHAIN), error }),
            }
        }
        refused.map_or(Ok(None), Err)
    }

    pub(super) fn pending_key(&self) -> Option<String> {
        String::from_utf8(read(&self.path(PENDING)).ok()??).ok()
    }

    pub(super) fn bootstrap(&self, trust_domain: &TrustDomain) -> Option<Bundle> {
        bundle_from_file(&self.path(BOOTSTRAP), trust_domain).ok()
    }

    pub(super) fn save_bootstrap(&self, roots: &Bundle) -> Result<(), StateError> {
        replace_file(&self.path(BOOTSTRAP), pem(roots.roots()).as_bytes())
    }

    pub(super) fn save_pending_key(&self, pem: &str) -> Result<(), StateError> {
        replace_file(&self.path(PENDING), pem.as_bytes())
    }

    /// Keeps a credential whose key is the pending one.
    pub(super) fn save(&self, credential: &Credential, key_pem: &str) -> Result<(), StateError> {
        self.save_bundle(credential.bundle())?;
        // Again, because writing it before the request may have failed.
        self.save_pending_key(key_pem)?;
        replace_file(&self.path(CHAIN), pem(credential.chain()).as_bytes())?;
        rename(&self.path(PENDING), &self.path(KEY))
    }

    pub(super) fn save_bundle(&self, bundle: &Bundle) -> Result<(), StateError> {
        let text = format!("{GENERATION}{}\n{}", bundle.generation(), pem(bundle.roots()));
        replace_file(&self.path(BUNDLE), text.as_bytes())
    }
}

/// Reads a trust bundle in PEM: one root or more. The generation is 0 unless the file is a copy of ours.
pub(super) fn bundle_from_file(path: &Path, trust_domain: &TrustDomain) -> Result<Bundle, StateError> {
    let text = fs::read(path).map_err(|error| StateError::Io { path: path.to_owned(), error })?;
    bundle_from_pem(path, &text, trust_domain)
}

fn bundle_from_pem(path: &Path, text: &[u8], trust_domain: &TrustDomain) -> Result<Bundle, StateError> {
    let line = text.split(|b| *b == b'\n').next().unwrap_or_default();
    let generation = std::str::from_utf8(line).ok().and_then(|line| line.strip_prefix(GENERATION)?.parse().ok());
    Bundle::new(trust_domain.clone(), certificates(path, text)?, generation.unwrap_or(0))
        .map_err(|error| StateError::Content { path: path.to_owned(), message: error.to_string() })
}

fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, StateError> {
    let wrong = |message: String| StateError::Content { path: path.to_owned(), message };
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|error| wrong(error.to_string()))?;
    if found.is_empty() { Err(wrong("there is no PEM certificate in it".to_owned())) } else { Ok(found) }
}

pub(super) fn pem(certificates: &[CertificateDer<'_>]) -> String {
    let mut text = String::new();
    for certificate in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = STANDARD.encode(certificate);
        for line in encoded.as_bytes().chunks(64) {
            text.extend(line.iter().map(|b| char::from(*b)));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, StateError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StateError::Io { path: path.to_owned(), error }),
    }
}

/// Replaces a file as a whole or not at all, readable by this user only. Makes the directory when it is missing.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    let failed = |error| StateError::Io { path: path.to_owned(), error };
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    // One left behind by a crash may have another mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if let Err(error) = written {
        let _ = fs::remove_file(&temporary);
        return Err(failed(error));
    }
    rename(&temporary, path)
}

fn rename(from: &Path, to: &Path) -> Result<(), StateError> {
    let failed = |error| StateError::Io { path: to.to_owned(), error };
    fs::rename(from, to).map_err(failed)?;
    match to.parent() {
        Some(directory) => File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed),
        None => Ok(()),
    }
}
