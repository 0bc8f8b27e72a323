//! `STATE/ca`: root and intermediate, made at first start or the operator's own. Reads and writes them, and checks
//! that they fit together, so that a mistake is an error at start and not a failed handshake somewhere else.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{Issuer, KeyPair};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::AuthorityError;
use super::certificate::{self, Validity};
use crate::config::State;

const ROOT: &str = "ca/root";
const INTERMEDIATE: &str = "ca/intermediate";
/// Further roots that sidecars believe: `STATE/ca/trust/*.pem`.
const TRUST: &str = "ca/trust";

/// What the files hold, checked.
pub(super) struct Files {
    /// The issuer's own root first.
    pub roots: Vec<CertificateDer<'static>>,
    pub intermediate: Intermediate,
}

pub(super) struct Intermediate {
    /// The issuing certificate first, then those between it and the root.
    pub chain: Vec<CertificateDer<'static>>,
    pub key: KeyPair,
    /// When every certificate from the issuing one to the root is valid.
    pub validity: Validity,
}

/// Reads the authority's files and makes what is missing.
pub(super) fn open(state: &State, trust_domain: &str, now: SystemTime) -> Result<Files, AuthorityError> {
    finish_interrupted(state, ROOT)?;
    finish_interrupted(state, INTERMEDIATE)?;
    let root_key = read_key(state, ROOT)?;
    let root_pem = read_chain(state, ROOT)?;
    let own_roots = match (root_pem, &root_key) {
        (Some(roots), key) => {
            check_root(&roots[0], key.as_ref(), &state.path("ca/root.pem"), now)?;
            roots
        }
        (None, None) if read_chain(state, INTERMEDIATE)?.is_none() => make_root(state, trust_domain, now)?,
        (None, _) => {
            return Err(AuthorityError::Missing {
                path: state.path("ca/root.pem"),
                hint: "put the root's certificate there, or remove STATE/ca to begin with a new authority",
            });
        }
    };
    let intermediate = match read_intermediate(state, &own_roots)? {
        Some(intermediate) => intermediate,
        None => make_intermediate(state, trust_domain, &own_roots[0], now)?,
    };
    Ok(Files { roots: with_trusted(state, own_roots)?, intermediate })
}

/// The roots as the files are now: the authority's own first, then `trust/*.pem` by name, each once.
pub(super) fn read_roots(state: &State) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let own = read_chain(state, ROOT)?.ok_or_else(|| AuthorityError::Missing {
        path: state.path("ca/root.pem"),
        hint: "it was there at start; put it back",
    })?;
    with_trusted(state, own)
}

/// Signs a new intermediate with the root's key; None when that key is kept elsewhere.
pub(super) fn renew_intermediate(
    state: &State,
    trust_domain: &str,
    now: SystemTime,
) -> Result<Option<Intermediate>, AuthorityError> {
    let (Some(_), Some(roots)) = (read_key(state, ROOT)?, read_chain(state, ROOT)?) else { return Ok(None) };
    make_intermediate(state, trust_domain, &roots[0], now).map(Some)
}

fn with_trusted(
    state: &State,
    mut roots: Vec<CertificateDer<'static>>,
) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    for name in state.list(TRUST)?.iter().filter(|name| name.ends_with(".pem")) {
        let path = format!("{TRUST}/{name}");
        let bytes = state.read(&path)?.unwrap_or_default();
        for root in parse_chain(&bytes, state.path(&path))? {
            if !parse(&root, &state.path(&path))?.is_ca() {
                return Err(AuthorityError::NotAuthority { path: state.path(&path) });
            }
            roots.push(root);
        }
    }
    let mut seen = std::collections::HashSet::new();
    roots.retain(|root| seen.insert(root.clone()));
    Ok(roots)
}

fn make_root(
    state: &State,
    trust_domain: &str,
    now: SystemTime,
) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let key = KeyPair::generate().map_err(AuthorityError::Signing)?;
    let root = certificate::root(&key, trust_domain, now)?;
    write_pair(state, ROOT, &root.pem(), &key)?;
    Ok(vec![root.into()])
}

fn make_intermediate(
    state: &State,
    trust_domain: &str,
    root: &CertificateDer<'static>,
    now: SystemTime,
) -> Result<Intermediate, AuthorityError> {
    let path = state.path("ca/root.pem");
    let root_key = read_key(state, ROOT)?.ok_or_else(|| AuthorityError::Missing {
        path: state.path("ca/root.key"),
        hint: "without the root's key give an intermediate: ca/intermediate.pem and ca/intermediate.key",
    })?;
    let parsed = parse(root, &path)?;
    let depth = parsed.basic_constraints().ok().flatten().and_then(|extension| extension.value.path_len_constraint);
    if depth == Some(0) {
        return Err(AuthorityError::Unfit { path, message: "its path length of 0 allows no intermediate".into() });
    }
    let root_validity = validity(&parsed);
    if root_validity.not_after <= now {
        return Err(AuthorityError::Expired { path, not_after: certificate::unix_seconds(root_validity.not_after) });
    }
    let issuer = Issuer::from_ca_cert_der(root, root_key).map_err(AuthorityError::Signing)?;
    let key = KeyPair::generate().map_err(AuthorityError::Signing)?;
    let made = certificate::intermediate(&key, trust_domain, &issuer, root_validity.not_after, now)?;
    write_pair(state, INTERMEDIATE, &made.pem(), &key)?;
    let chain = vec![CertificateDer::from(made)];
    let validity = overlap(&chain, root, &state.path("ca/intermediate.pem"))?;
    Ok(Intermediate { chain, key, validity })
}

fn read_intermediate(state: &State, roots: &[CertificateDer<'static>]) -> Result<Option<Intermediate>, AuthorityError> {
    let path = state.path("ca/intermediate.pem");
    let (chain, key) = match (read_chain(state, INTERMEDIATE)?, read_key(state, INTERMEDIATE)?) {
        (None, None) => return Ok(None),
        (Some(chain), Some(key)) => (chain, key),
        (None, Some(_)) => {
            return Err(AuthorityError::Missing { path, hint: "its key is there: put the certificate beside it" });
        }
        (Some(_), None) => {
            return Err(AuthorityError::Missing {
                path: state.path("ca/intermediate.key"),
                hint: "its certificate is there: put the key beside it",
            });
        }
    };
    let issuing = parse(&chain[0], &path)?;
    if !issuing.is_ca() {
        return Err(AuthorityError::NotAuthority { path });
    }
    if !belongs(&issuing, &key) {
        return Err(AuthorityError::KeyMismatch { path: state.path("ca/intermediate.key") });
    }
    // Each is signed by the next, and the last by one of the roots.
    for pair in chain.windows(2) {
        let (child, parent) = (parse(&pair[0], &path)?, parse(&pair[1], &path)?);
        if child.verify_signature(Some(parent.public_key())).is_err() {
            return Err(AuthorityError::Unfit { path, message: "its certificates are not a chain".into() });
        }
    }
    let last = parse(&chain[chain.len() - 1], &path)?;
    for root in roots {
        if last.verify_signature(Some(parse(root, &path)?.public_key())).is_ok() {
            let validity = overlap(&chain, root, &path)?;
            return Ok(Some(Intermediate { chain, key, validity }));
        }
    }
    Err(AuthorityError::Unfit { path, message: "no certificate in ca/root.pem signed it".into() })
}

/// When the whole chain is valid.
fn overlap(
    chain: &[CertificateDer<'_>],
    root: &CertificateDer<'_>,
    path: &std::path::Path,
) -> Result<Validity, AuthorityError> {
    let mut whole = validity(&parse(root, path)?);
    for certificate in chain {
        let one = validity(&parse(certificate, path)?);
        whole.not_before = whole.not_before.max(one.not_before);
        whole.not_after = whole.not_after.min(one.not_after);
    }
    Ok(whole)
}

fn check_root(
    root: &CertificateDer<'_>,
    key: Option<&KeyPair>,
    path: &std::path::Path,
    now: SystemTime,
) -> Result<(), AuthorityError> {
    let parsed = parse(root, path)?;
    if !parsed.is_ca() {
        return Err(AuthorityError::NotAuthority { path: path.to_owned() });
    }
    let not_after = validity(&parsed).not_after;
    if not_after <= now {
        let not_after = certificate::unix_seconds(not_after);
        return Err(AuthorityError::Expired { path: path.to_owned(), not_after });
    }
    if key.is_some_and(|key| !belongs(&parsed, key)) {
        return Err(AuthorityError::KeyMismatch { path: path.with_extension("key") });
    }
    Ok(())
}

fn belongs(certificate: &X509Certificate<'_>, key: &KeyPair) -> bool {
    *certificate.public_key().subject_public_key.data == *key.public_key_raw()
}

fn validity(certificate: &X509Certificate<'_>) -> Validity {
    let time = |time: &x509_parser::time::ASN1Time| {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
    };
    let validity = certificate.validity();
    Validity { not_before: time(&validity.not_before), not_after: time(&validity.not_after) }
}

fn parse<'a>(der: &'a CertificateDer<'_>, path: &std::path::Path) -> Result<X509Certificate<'a>, AuthorityError> {
    X509Certificate::from_der(der)
        .map(|(_, certificate)| certificate)
        .map_err(|error| AuthorityError::Unfit { path: path.to_owned(), message: error.to_string() })
}

fn read_chain(state: &State, name: &str) -> Result<Option<Vec<CertificateDer<'static>>>, AuthorityError> {
    let name = format!("{name}.pem");
    state.read(&name)?.map(|bytes| parse_chain(&bytes, state.path(&name))).transpose()
}

/// At least one certificate, or an error.
fn parse_chain(bytes: &[u8], path: PathBuf) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
    match chain {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        Ok(_) => Err(AuthorityError::Unfit { path, message: "it holds no certificate in PEM".into() }),
        Err(error) => Err(AuthorityError::Unfit { path, message: error.to_string() }),
    }
}

fn read_key(state: &State, name: &str) -> Result<Option<KeyPair>, AuthorityError> {
    let name = format!("{name}.key");
    let Some(bytes) = state.read(&name)? else { return Ok(None) };
    let unfit = |message: String| AuthorityError::Unfit { path: state.path(&name), message };
    let der = PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| unfit("it holds no private key in PEM".into()))?;
    KeyPair::try_from(&der).map(Some).map_err(|_| unfit("not an unencrypted P-256, P-384, Ed25519 or RSA key".into()))
}

/// Writes both files aside and then renames, key first: whatever interrupts it, [`finish_interrupted`] can tell
/// which of the two pairs is whole.
fn write_pair(state: &State, name: &str, pem: &str, key: &KeyPair) -> Result<(), AuthorityError> {
    let next = |extension: &str| format!("{name}.{extension}.next");
    state.write(&next("pem"), pem.as_bytes())?;
    state.write(&next("key"), key.serialize_pem().as_bytes())?;
    state.rename(&next("key"), &format!("{name}.key"))?;
    state.rename(&next("pem"), &format!("{name}.pem"))?;
    Ok(())
}

/// Completes a [`write_pair`] that ended between its two renames.
fn finish_interrupted(state: &State, name: &str) -> Result<(), AuthorityError> {
    let next = format!("{name}.pem.next");
    let Some(bytes) = state.read(&next)? else { return Ok(()) };
    let Some(key) = read_key(state, name)? else { return Ok(()) };
    let Ok(chain) = parse_chain(&bytes, state.path(&next)) else { return Ok(()) };
    if belongs(&parse(&chain[0], &state.path(&next))?, &key) {
        state.rename(&next, &format!("{name}.pem"))?;
    }
    Ok(())
}
