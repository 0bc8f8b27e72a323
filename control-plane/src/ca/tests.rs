use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyUsagePurpose, SanType};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::UnixTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::*;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const LIFETIME: Duration = DAY;

fn domain() -> TrustDomain {
    TrustDomain::new("outrigger.local").unwrap()
}

fn identity() -> SpiffeId {
    SpiffeId::new(&domain(), "shop", "cart").unwrap()
}

/// Whole seconds, as certificates have them.
fn now() -> SystemTime {
    std::time::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn fresh() -> (tempfile::TempDir, State) {
    let directory = tempfile::tempdir().unwrap();
    let state = State::open(directory.path()).unwrap();
    (directory, state)
}

fn csr(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    change(&mut params);
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

fn issue(authority: &Authority, lifetime: Duration, now: SystemTime) -> Result<Issued, AuthorityError> {
    let requested = authority.check(&csr(|_| {}), &identity()).unwrap();
    authority.issue(&requested, &identity(), "cart-1", lifetime, now)
}

/// As a peer does: up to a root of the bundle, at that moment.
fn verifies(issued: &Issued, bundle: &Bundle, now: SystemTime) -> bool {
    let mut roots = RootCertStore::empty();
    for root in &bundle.roots {
        roots.add(root.clone()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(unix_seconds(now)));
    verifier.verify_client_cert(&issued.chain[0], &issued.chain[1..], now).is_ok()
}

#[test]
fn a_leaf_has_what_was_granted_and_nothing_else() {
    let (_directory, state) = fresh();
    let authority = Authority::open(&state, &domain(), now()).unwrap();
    let request = csr(|params| {
        params.distinguished_name.push(DnType::CommonName, "root");
        params.distinguished_name.push(DnType::OrganizationName, "evil");
        params.subject_alt_names = vec![SanType::URI(identity().as_str().try_into().unwrap())];
    });
    let requested = authority.check(&request, &identity()).unwrap();
    let issued = authority.issue(&requested, &identity(), "cart-1", LIFETIME, now()).unwrap();
    assert_eq!(issued.chain.len(), 2, "leaf and intermediate, without the root");
    assert!(verifies(&issued, &authority.bundle(), now()));

    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(leaf.subject().to_string(), "CN=cart-1");
    let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert_eq!(names[..], [GeneralName::URI(identity().as_str())]);
    assert!(!leaf.basic_constraints().unwrap().unwrap().value.ca);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert_eq!(usage.flags, 1, "digitalSignature only");
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any && extended.other.is_empty());
    assert_eq!(leaf.raw_serial().len(), 16);
    assert_eq!(key_fingerprint(leaf.public_key().raw), requested.fingerprint());
    let other = authority.issue(&requested, &identity(), "cart-1", LIFETIME, now()).unwrap();
    assert_ne!(X509Certificate::from_der(&other.chain[0]).unwrap().1.raw_serial(), leaf.raw_serial());
}

#[test]
fn validity_is_bounded_on_both_sides() {
    let (_directory, state) = fresh();
    let authority = Authority::open(&state, &domain(), now()).unwrap();
    let issued = issue(&authority, Duration::from_secs(20), now()).unwrap();
    assert_eq!(issued.validity.not_before, now() - BACKDATE);
    assert_eq!(issued.validity.not_after, now() + Duration::from_secs(20));
    let long = issue(&authority, 3650 * DAY, now()).unwrap();
    assert_eq!(long.validity.not_after, authority.standing(now()).not_after, "never beyond its issuer");
    assert!(verifies(&long, &authority.bundle(), long.validity.not_after));
    assert!(!verifies(&long, &authority.bundle(), long.validity.not_after + Duration::from_secs(1)));
}

#[test]
fn peers_whose_clocks_differ_by_less_than_five_minutes_agree() {
    let (_directory, state) = fresh();
    let authority = Authority::open(&state, &domain(), now()).unwrap();
    let issued = issue(&authority, LIFETIME, now()).unwrap();
    let skew = |seconds: i64| match u64::try_from(seconds) {
        Ok(ahead) => now() + Duration::from_secs(ahead),
        Err(_) => now() - Duration::from_secs(seconds.unsigned_abs()),
    };
    for (seconds, expected) in [(0, true), (-299, true), (-300, true), (-301, false), (86_400, true), (86_401, false)] {
        assert_eq!(verifies(&issued, &authority.bundle(), skew(seconds)), expected, "{seconds} s");
    }
}

#[test]
fn a_clock_that_jumps_harms_nothing() {
    let (_directory, state) = fresh();
    let authority = Authority::open(&state, &domain(), now()).unwrap();
    let serving = ServingCertificate::new(&authority, now()).unwrap();
    for jump in [now() - DAY, now() + DAY, now() + Duration::from_secs(3600), now() - Duration::from_secs(3600)] {
        authority.maintain(jump).unwrap();
        serving.renew_when_due(&authority, jump).unwrap();
        let validity = serving.validity();
        assert!(validity.contains(jump) && jump < validity.half(), "{jump:?}");
        assert!(issue(&authority, LIFETIME, jump).unwrap().validity.contains(jump));
    }
    assert!(authority.standing(now() - DAY).early);
    assert!(!authority.standing(now()).early);
}

#[test]
fn the_intermediate_renews_itself_at_half_life() {
    let (_directory, state) = fresh();
    let authority = Authority::open(&state, &domain(), now()).unwrap();
    let before = issue(&authority, 60 * DAY, now()).unwrap();
    authority.maintain(now() + 44 * DAY).unwrap();
    assert_eq!(issue(&authority, LIFETIME, now() + 44 * DAY).unwrap().chain[1], before.chain[1]);
    let later = now() + 46 * DAY;
    assert!(authority.standing(later).overdue);
    assert!(!authority.maintain(later).unwrap(), "the roots are the same");
    assert!(!authority.standing(later).overdue);
    let after = issue(&authority, LIFETIME, later).unwrap();
    assert_ne!(after.chain[1], before.chain[1]);
    assert!(verifies(&after, &authority.bundle(), later));
    assert!(verifies(&before, &authority.bundle(), later), "what the old one signed stays good");
    // A restart goes on with the new one.
    let again = Authority::open(&state, &domain(), later).unwrap();
    assert_eq!(issue(&again, LIFETIME, later).unwrap().chain[1], after.chain[1]);
}

#[test]
fn a_restart_keeps_the_authority() {
    let (_directory, state) = fresh();
    let first = Authority::open(&state, &domain(), now()).unwrap();
    let issued = issue(&first, LIFETIME, now()).unwrap();
    let second = Authority::open(&state, &domain(), now() + DAY).unwrap();
    assert_eq!(first.bundle(), second.bundle());
    assert_eq!(issue(&second, LIFETIME, now()).unwrap().chain[1], issued.chain[1]);
}

#[test]
fn keys_are_private_and_never_printed() {
    let (_directory, state) = fresh();
    let authority = Authority::open(&state, &domain(), now()).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state.path("ca")), 0o700);
    for name in state.list("ca").unwrap() {
        assert_eq!(mode(&state.path(&format!("ca/{name}"))), 0o600, "{name}");
    }
    assert_eq!(
        state.list("ca").unwrap(),
        ["bundle.json", "intermediate.key", "intermediate.pem", "root.key", "root.pem"]
    );
    let key = String::from_utf8(state.read("ca/intermediate.key").unwrap().unwrap()).unwrap();
    let secret = key.lines().nth(1).unwrap();
    let serving = ServingCertificate::new(&authority, now()).unwrap();
    let printed = format!("{authority:?} {serving:?}");
    assert!(!printed.contains(secret) && !printed.to_lowercase().contains("private"), "{printed}");
    let bundle = String::from_utf8(state.read("trust-bundle.pem").unwrap().unwrap()).unwrap();
    assert!(bundle.starts_with("-----BEGIN CERTIFICATE-----") && !bundle.contains("PRIVATE"));
}

/// A file of STATE/ca and its text.
type FileText = (&'static str, String);

/// An operator's own root and intermediate, made elsewhere.
struct Operator {
    root: rcgen::Certificate,
    root_key: KeyPair,
    intermediate: rcgen::Certificate,
    intermediate_key: KeyPair,
}

fn operator() -> Operator {
    operator_valid_until(2040)
}

fn operator_valid_until(year: i32) -> Operator {
    let params = |name: &str, depth| {
        let mut params = CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(depth);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    };
    let root_key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let root_params = params("Our root", BasicConstraints::Unconstrained);
    let root = root_params.self_signed(&root_key).unwrap();
    let intermediate_key = KeyPair::generate().unwrap();
    let intermediate = params("Our issuer", BasicConstraints::Constrained(0))
        .signed_by(&intermediate_key, &Issuer::from_params(&root_params, &root_key))
        .unwrap();
    Operator { root, root_key, intermediate, intermediate_key }
}

fn put(state: &State, name: &str, text: &str) {
    state.write(&format!("ca/{name}"), text.as_bytes()).unwrap();
}

#[test]
fn an_operators_own_authority_is_used_as_it_is() {
    let ours = operator();
    let files: [(&str, &[FileText]); 3] = [
        ("root and key", &[("root.pem", ours.root.pem()), ("root.key", ours.root_key.serialize_pem())]),
        (
            "intermediate and key, root without",
            &[
                ("root.pem", ours.root.pem()),
                ("intermediate.pem", ours.intermediate.pem()),
                ("intermediate.key", ours.intermediate_key.serialize_pem()),
            ],
        ),
        (
            "all, with the root behind the intermediate",
            &[
                ("root.pem", ours.root.pem()),
                ("root.key", ours.root_key.serialize_pem()),
                ("intermediate.pem", ours.intermediate.pem() + &ours.root.pem()),
                ("intermediate.key", ours.intermediate_key.serialize_pem()),
            ],
        ),
    ];
    for (name, files) in files {
        let (_directory, state) = fresh();
        for (file, text) in files {
            put(&state, file, text);
        }
        let authority = Authority::open(&state, &domain(), now()).unwrap();
        assert_eq!(authority.bundle().roots, [ours.root.der().clone()], "{name}");
        assert!(verifies(&issue(&authority, LIFETIME, now()).unwrap(), &authority.bundle(), now()), "{name}");
        for (file, text) in files {
            let kept = state.read(&format!("ca/{file}")).unwrap().unwrap();
            assert_eq!(kept, text.as_bytes(), "{name}: {file}");
        }
    }
}

#[test]
fn an_authority_that_does_not_fit_together_is_an_error_that_says_what_to_do() {
    let (ours, theirs, expired) = (operator(), operator(), operator_valid_until(2026));
    let leaf = CertificateParams::default().self_signed(&ours.root_key).unwrap();
    let cases: [(&str, &[FileText], &str); 10] = [
        ("a root without key", &[("root.pem", ours.root.pem())], "root.key is missing"),
        ("a key without root", &[("root.key", ours.root_key.serialize_pem())], "root.pem is missing"),
        (
            "an intermediate without root",
            &[
                ("intermediate.pem", ours.intermediate.pem()),
                ("intermediate.key", ours.intermediate_key.serialize_pem()),
            ],
            "root.pem is missing",
        ),
        (
            "another's key",
            &[("root.pem", ours.root.pem()), ("root.key", theirs.root_key.serialize_pem())],
            "root.key is not the key",
        ),
        (
            "an intermediate without key",
            &[("root.pem", ours.root.pem()), ("intermediate.pem", ours.intermediate.pem())],
            "intermediate.key is missing",
        ),
        (
            "another's intermediate",
            &[
                ("root.pem", ours.root.pem()),
                ("intermediate.pem", theirs.intermediate.pem()),
                ("intermediate.key", theirs.intermediate_key.serialize_pem()),
            ],
            "no certificate in ca/root.pem signed it",
        ),
        (
            "a leaf for a root",
            &[("root.pem", leaf.pem()), ("root.key", ours.root_key.serialize_pem())],
            "no certificate authority",
        ),
        ("no PEM", &[("root.pem", "hello".into())], "no certificate in PEM"),
        (
            "an encrypted key",
            &[
                ("root.pem", ours.root.pem()),
                (
                    "root.key",
                    "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n".into(),
                ),
            ],
            "no private key in PEM",
        ),
        (
            "an expired root",
            &[("root.pem", expired.root.pem()), ("root.key", expired.root_key.serialize_pem())],
            "ended at",
        ),
    ];
    for (name, files, expected) in cases {
        let (_directory, state) = fresh();
        for (file, text) in files {
            put(&state, file, text);
        }
        let error = Authority::open(&state, &domain(), now()).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[test]
fn an_interrupted_renewal_is_finished_or_forgotten() {
    let (_directory, state) = fresh();
    let authority = Authority::open(&state, &domain(), now()).unwrap();
    let read = |name: &str| state.read(name).unwrap().unwrap();
    let (old_pem, old_key) = (read("ca/intermediate.pem"), read("ca/intermediate.key"));
    authority.maintain(now() + 46 * DAY).unwrap();
    let (new_pem, new_key) = (read("ca/intermediate.pem"), read("ca/intermediate.key"));
    assert_ne!(old_key, new_key);
    let issuer = |authority: &Authority| issue(authority, LIFETIME, now()).unwrap().chain[1].clone();
    let expected_new = issuer(&Authority::open(&state, &domain(), now()).unwrap());

    // Interrupted between the two renames: the new key stands beside the old certificate.
    state.write("ca/intermediate.pem", &old_pem).unwrap();
    state.write("ca/intermediate.pem.next", &new_pem).unwrap();
    assert_eq!(issuer(&Authority::open(&state, &domain(), now()).unwrap()), expected_new);

    // Interrupted before them: the old pair is whole.
    state.write("ca/intermediate.pem", &old_pem).unwrap();
    state.write("ca/intermediate.key", &old_key).unwrap();
    state.write("ca/intermediate.pem.next", &new_pem).unwrap();
    state.write("ca/intermediate.key.next", &new_key).unwrap();
    assert_ne!(issuer(&Authority::open(&state, &domain(), now()).unwrap()), expected_new);
}

#[test]
fn an_issuer_at_its_end_issues_nothing() {
    let ours = operator_valid_until(2028);
    let (_directory, state) = fresh();
    put(&state, "root.pem", &ours.root.pem());
    put(&state, "intermediate.pem", &ours.intermediate.pem());
    put(&state, "intermediate.key", &ours.intermediate_key.serialize_pem());
    let authority = Authority::open(&state, &domain(), now()).unwrap();
    assert!(authority.standing(now()).overdue, "half is over, and nobody here can renew it");
    let end = authority.standing(now()).not_after;
    authority.maintain(end - DAY).unwrap();
    assert_eq!(issue(&authority, LIFETIME, end - Duration::from_secs(5)).unwrap().validity.not_after, end);
    let error = issue(&authority, LIFETIME, end).unwrap_err();
    assert!(matches!(error, AuthorityError::IssuerExpired { .. }), "{error}");
}

#[test]
fn the_bundles_generation_grows_with_each_change_of_the_set() {
    let (_directory, state) = fresh();
    let (one, other) = (operator(), operator());
    let authority = Authority::open(&state, &domain(), now()).unwrap();
    let first = authority.bundle().generation;
    assert_eq!((authority.bundle().roots.len(), first), (1, unix_seconds(now())));
    let backup = state.read("ca/bundle.json").unwrap().unwrap();
    put(&state, "trust/b.pem", &(one.root.pem() + &other.root.pem()));
    assert!(authority.maintain(now()).unwrap());
    assert_eq!((authority.bundle().roots.len(), authority.bundle().generation), (3, first + 1));
    assert!(!authority.maintain(now()).unwrap());
    let pem = String::from_utf8(state.read("trust-bundle.pem").unwrap().unwrap()).unwrap();
    assert_eq!(pem.matches("BEGIN CERTIFICATE").count(), 3);
    // The same roots in another file are the same set.
    put(&state, "trust/a.pem", &one.root.pem());
    authority.maintain(now()).unwrap();
    assert_eq!(Authority::open(&state, &domain(), now() + DAY).unwrap().bundle().generation, first + 1);
    for name in ["trust/a.pem", "trust/b.pem"] {
        std::fs::remove_file(state.path(&format!("ca/{name}"))).unwrap();
    }
    // A clock that went back does not take the generation with it.
    assert!(authority.maintain(now() - DAY).unwrap());
    assert_eq!((authority.bundle().roots.len(), authority.bundle().generation), (1, first + 2));
    // A file that is no root is an error, and what was in force stays.
    put(&state, "trust/c.pem", "hello");
    assert!(authority.maintain(now()).is_err());
    assert_eq!(authority.bundle().generation, first + 2);
    assert_eq!(authority.bundle().to_wire().root_der.len(), 1);
    // A state from a backup: what it says next is newer than all that was said since.
    std::fs::remove_file(state.path("ca/trust/c.pem")).unwrap();
    state.write("ca/bundle.json", &backup).unwrap();
    put(&state, "trust/a.pem", &one.root.pem());
    let restored = Authority::open(&state, &domain(), now() + DAY).unwrap();
    assert_eq!(restored.bundle().generation, unix_seconds(now() + DAY));
}
