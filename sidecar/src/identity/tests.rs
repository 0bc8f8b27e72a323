//! The task against a control plane of ours, over real sockets.

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use outrigger_api::identity::TrustDomain;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tonic::Status;

use super::test_control_plane::ControlPlane;
use super::*;
use crate::tls::test_authority::{Authority, LeafSpec};
use crate::tls::{Bundle, Clock, Credential};

struct Fixture {
    directory: TempDir,
    settings: IdentitySettings,
    tls: Tls,
    renew: Arc<Notify>,
    status: watch::Receiver<IdentityStatus>,
    sender: Option<watch::Sender<IdentityStatus>>,
    task: Option<JoinHandle<()>>,
}

impl Fixture {
    fn new(address: impl ToString, root: &rustls_pki_types::CertificateDer<'_>) -> Fixture {
        let directory = TempDir::new().unwrap();
        let settings = IdentitySettings {
            control_plane: address.to_string(),
            trust_bundle: directory.path().join("trust-bundle.pem"),
            token_file: Some(directory.path().join("token")),
            name: "cart-1".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "cart".to_owned(),
            trust_domain: TrustDomain::new("outrigger.local").unwrap(),
            state: None,
            mark: None,
            key_algorithm: watch::channel(KeyAlgorithm::default()).1,
        };
        let (sender, status) = watch::channel(IdentityStatus::default());
        let fixture = Fixture {
            directory,
            settings,
            tls: Tls::new(Clock::system()),
            renew: Arc::default(),
            status,
            sender: Some(sender),
            task: None,
        };
        fixture.write_root(root);
        fixture.write_token("token-1\n");
        fixture
    }

    fn with_state(mut self) -> Fixture {
        self.settings.state = Some(self.directory.path().join("state"));
        self
    }

    fn write_root(&self, root: &rustls_pki_types::CertificateDer<'_>) {
        let text = state::pem(std::slice::from_ref(root));
        std::fs::write(&self.settings.trust_bundle, text).unwrap();
    }

    fn write_token(&self, token: &str) {
        std::fs::write(self.settings.token_file.as_ref().unwrap(), token).unwrap();
    }

    fn start(&mut self) {
        let sender = self.sender.take().unwrap();
        let run = run(self.settings.clone(), self.tls.clone(), Arc::clone(&self.renew), sender);
        self.task = Some(tokio::spawn(run));
    }

    /// The same sidecar in a new process.
    fn restart(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        let (sender, status) = watch::channel(IdentityStatus::default());
        (self.sender, self.status, self.tls) = (Some(sender), status, Tls::new(Clock::system()));
        self.start();
    }

    async fn certificate(&mut self) -> Credential {
        let mut materials = self.tls.subscribe();
        let found = tokio::time::timeout(Duration::from_secs(30), materials.wait_for(Option::is_some)).await;
        found.unwrap().unwrap().as_ref().unwrap().credential().clone()
    }

    async fn trouble(&mut self, reason: &str) -> Trouble {
        let so = |status: &IdentityStatus| status.trouble.as_ref().is_some_and(|trouble| trouble.reason == reason);
        let found = tokio::time::timeout(Duration::from_secs(30), self.status.wait_for(so)).await.is_ok();
        let status = self.status.borrow().clone();
        assert!(found, "not {reason} but {status:?}");
        status.trouble.unwrap()
    }

    async fn no_trouble(&mut self) {
        let so = |status: &IdentityStatus| status.trouble.is_none() && status.not_after.is_some();
        tokio::time::timeout(Duration::from_secs(30), self.status.wait_for(so)).await.unwrap().unwrap();
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

#[tokio::test]
async fn the_first_certificate_comes_by_token_and_the_next_by_certificate() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    for algorithm in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::Ed25519] {
        control_plane.record.issued.lock().unwrap().clear();
        let mut sidecar = Fixture::new(control_plane.address, &root);
        sidecar.settings.key_algorithm = watch::channel(algorithm).1;
        sidecar.start();
        let first = sidecar.certificate().await;
        assert_eq!(first.identity().as_str(), "spiffe://outrigger.local/ns/shop/sa/cart");
        assert_eq!(&**first.workload(), "cart-1");
        sidecar.no_trouble().await;
        sidecar.renew.notify_one();
        control_plane.record.until(|record| record.issued.lock().unwrap().len() == 2).await;
        let issued = control_plane.record.issued.lock().unwrap().clone();
        assert_eq!((issued[0].request.proof.as_str(), issued[0].by_certificate), ("token-1", false));
        assert_eq!((issued[1].request.proof.as_str(), issued[1].by_certificate), ("", true));
        let mut materials = sidecar.tls.subscribe();
        let second = materials.wait_for(|new| new.as_ref().unwrap().credential().chain() != first.chain()).await;
        assert_ne!(second.unwrap().as_ref().unwrap().credential().chain(), first.chain());
    }
}

#[tokio::test]
async fn short_leaves_are_renewed_in_time_and_by_themselves() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    control_plane.script.lock().unwrap().leaf_life = 4;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    let mut sidecar = Fixture::new(control_plane.address, &root);
    sidecar.start();
    let first = sidecar.certificate().await;
    control_plane.record.until(|record| record.issued.lock().unwrap().len() >= 3).await;
    assert!(control_plane.record.issued.lock().unwrap()[1..].iter().all(|issued| issued.by_certificate));
    assert!(sidecar.tls.expiry().unwrap() > first.not_after());
}

#[tokio::test]
async fn each_trouble_has_a_word_and_passes() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    let refusals = [
        ("token_expired", Status::unauthenticated("token_expired: it ended an hour ago")),
        ("token_replayed", Status::permission_denied("token_replayed: it was redeemed for cart-0")),
        ("token_namespace", Status::permission_denied("token_namespace: it is for shop/pay")),
        ("token_signature", Status::unauthenticated("token_signature: it is of another control plane")),
        ("issue_refused", Status::permission_denied("no")),
        ("control_plane_unreachable", Status::unavailable("come back later")),
        ("state_write", Status::unavailable("state_write: disk full")),
    ];
    for (reason, refusal) in refusals {
        control_plane.script.lock().unwrap().refusal = Some(refusal);
        let mut sidecar = Fixture::new(control_plane.address, &root);
        sidecar.start();
        let trouble = sidecar.trouble(reason).await;
        assert!(trouble.hint.len() > 20, "{trouble:?}");
        assert!(!trouble.hint.contains("token-1"), "{trouble:?}");
        control_plane.script.lock().unwrap().refusal = None;
        // A new token is seen without waiting for the back-off.
        sidecar.write_token("token-2-longer\n");
        sidecar.certificate().await;
        sidecar.no_trouble().await;
    }
}

#[tokio::test]
async fn files_that_are_missing_or_wrong_are_read_again() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    let other = Authority::new("outrigger.local");

    let mut sidecar = Fixture::new(control_plane.address, &other.root);
    sidecar.start();
    let trouble = sidecar.trouble("control_plane_untrusted").await;
    assert!(trouble.hint.contains("trust-bundle.pem"), "{trouble:?}");
    std::fs::write(&sidecar.settings.trust_bundle, "not PEM").unwrap();
    sidecar.trouble("trust_bundle").await;
    std::fs::remove_file(&sidecar.settings.trust_bundle).unwrap();
    sidecar.trouble("trust_bundle").await;
    sidecar.write_root(&root);
    sidecar.certificate().await;

    let mut sidecar = Fixture::new(control_plane.address, &root);
    sidecar.write_token(" \n");
    sidecar.start();
    let trouble = sidecar.trouble("token_missing").await;
    assert!(trouble.hint.contains("is empty"), "{trouble:?}");
    sidecar.write_token("token");
    sidecar.certificate().await;
}

#[tokio::test]
async fn only_the_control_planes_own_identity_is_believed() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    control_plane.script.lock().unwrap().account = "someone-else".to_owned();
    let mut sidecar = Fixture::new(control_plane.address, &root);
    sidecar.start();
    sidecar.trouble("control_plane_identity").await;
    assert!(control_plane.record.issued.lock().unwrap().is_empty(), "the token was not shown to it");
}

#[tokio::test]
async fn a_clock_that_is_off_is_named() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    for ahead in [86_400, -86_400] {
        control_plane.script.lock().unwrap().clock_ahead = ahead;
        let mut sidecar = Fixture::new(control_plane.address, &root);
        sidecar.start();
        let trouble = sidecar.trouble("clock_skew").await;
        assert!(trouble.hint.contains("clock says"), "{trouble:?}");
    }
}

#[tokio::test]
async fn an_absent_control_plane_is_waited_for() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    control_plane.stop();
    let mut sidecar = Fixture::new(control_plane.address, &root);
    sidecar.start();
    let trouble = sidecar.trouble("control_plane_unreachable").await;
    assert!(trouble.hint.contains(&control_plane.address.to_string()), "{trouble:?}");
    control_plane.restart().await;
    sidecar.certificate().await;
    let mut sidecar = Fixture::new("no-such-host.invalid:15012", &root);
    sidecar.start();
    sidecar.trouble("control_plane_unreachable").await;
}

#[tokio::test]
async fn when_renewal_fails_the_old_certificate_serves_on() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    let mut sidecar = Fixture::new(control_plane.address, &root);
    sidecar.start();
    let first = sidecar.certificate().await;
    control_plane.stop();
    sidecar.renew.notify_one();
    sidecar.trouble("control_plane_unreachable").await;
    assert!(sidecar.status.borrow().usable(SystemTime::now()));
    assert_eq!(sidecar.certificate().await.chain(), first.chain());
    control_plane.restart().await;
    sidecar.renew.notify_one();
    sidecar.no_trouble().await;
    assert_ne!(sidecar.certificate().await.chain(), first.chain());
}

#[tokio::test]
async fn a_restart_needs_neither_token_nor_control_plane() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    let mut sidecar = Fixture::new(control_plane.address, &root).with_state();
    sidecar.start();
    sidecar.certificate().await;
    sidecar.renew.notify_one();
    control_plane.record.until(|record| record.issued.lock().unwrap().len() == 2).await;
    let kept = sidecar.settings.state.clone().unwrap();
    let files = || std::fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let mut materials = sidecar.tls.subscribe();
    materials.mark_unchanged();
    // The copy is complete when the key of the second certificate has its final name.
    tokio::time::timeout(Duration::from_secs(10), async {
        while kept.join("pending.key").exists() || control_plane.record.issued.lock().unwrap().len() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    for file in files() {
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{}", file.display());
    }
    let before = sidecar.certificate().await;
    control_plane.stop();
    std::fs::remove_file(sidecar.settings.token_file.as_ref().unwrap()).unwrap();
    sidecar.restart();
    let after = sidecar.certificate().await;
    assert_eq!(before.chain(), after.chain());
    assert_eq!(after.bundle().generation(), 1);
    assert!(sidecar.status.borrow().usable(SystemTime::now()) || sidecar.status.changed().await.is_ok());
}

#[tokio::test]
async fn what_is_kept_for_somebody_else_or_broken_is_not_used() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    let mut sidecar = Fixture::new(control_plane.address, &root).with_state();
    sidecar.start();
    let first = sidecar.certificate().await;
    let kept = sidecar.settings.state.clone().unwrap();
    tokio::time::timeout(Duration::from_secs(10), async {
        while !kept.join("identity.key").exists() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    for broken in ["identity.pem", "identity.key", "trust-bundle.pem"] {
        let good = std::fs::read(kept.join(broken)).unwrap();
        std::fs::write(kept.join(broken), "broken").unwrap();
        sidecar.restart();
        let next = sidecar.certificate().await;
        assert_ne!(next.chain(), first.chain(), "{broken}");
        std::fs::write(kept.join(broken), good).unwrap();
    }
    sidecar.settings.name = "cart-2".to_owned();
    sidecar.restart();
    assert_eq!(&**sidecar.certificate().await.workload(), "cart-2");
}

/// A lost answer does not cost the token: the same key asks again, also after a restart.
#[tokio::test]
async fn the_same_key_asks_until_it_is_answered() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    control_plane.script.lock().unwrap().refusal = Some(Status::unavailable("lost"));
    let mut sidecar = Fixture::new(control_plane.address, &root).with_state();
    sidecar.start();
    control_plane.record.until(|record| record.issued.lock().unwrap().len() >= 2).await;
    sidecar.restart();
    let so_far = control_plane.record.issued.lock().unwrap().len();
    control_plane.record.until(|record| record.issued.lock().unwrap().len() > so_far).await;
    control_plane.script.lock().unwrap().refusal = None;
    sidecar.certificate().await;
    let public_key = |der: &[u8]| {
        let csr = rcgen::CertificateSigningRequestParams::from_der(&der.into()).unwrap();
        rcgen::PublicKeyData::der_bytes(&csr.public_key).to_vec()
    };
    let issued = control_plane.record.issued.lock().unwrap().clone();
    let keys: std::collections::BTreeSet<_> = issued.iter().map(|issued| public_key(&issued.request.csr_der)).collect();
    assert_eq!(keys.len(), 1, "of {} requests", issued.len());
}

/// The operator threw the control plane's state away and wrote the new roots and a new token.
#[tokio::test]
async fn a_replaced_authority_is_followed_when_the_file_was_replaced_too() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    let mut sidecar = Fixture::new(control_plane.address, &root);
    sidecar.start();
    let first = sidecar.certificate().await;
    let other = Authority::new("outrigger.local");
    let other_root = other.root.clone();
    control_plane.script.lock().unwrap().authority = Arc::new(other);
    control_plane.cut();
    sidecar.renew.notify_one();
    sidecar.trouble("control_plane_untrusted").await;
    assert_eq!(sidecar.certificate().await.chain(), first.chain(), "the old one serves on");
    sidecar.write_root(&other_root);
    sidecar.write_token("token-of-the-new-one");
    sidecar.no_trouble().await;
    let second = sidecar.certificate().await;
    assert_eq!(second.bundle().roots(), [other_root]);
    let issued = control_plane.record.issued.lock().unwrap().clone();
    assert_eq!(issued.last().unwrap().request.proof, "token-of-the-new-one");
}

/// The control plane does not take our certificate any more, and says so in a TLS alert after the handshake.
#[tokio::test]
async fn a_certificate_that_is_refused_is_replaced_by_token() {
    let (old, new) = (Authority::new("outrigger.local"), Authority::new("outrigger.local"));
    let both = Bundle::new(old.trust_domain.clone(), vec![old.root.clone(), new.root.clone()], 1).unwrap();
    let (chain, key) = old.leaf(&LeafSpec::valid("shop", "cart"));
    let (old_root, new_root) = (old.root.clone(), new.root.clone());
    let control_plane = ControlPlane::start(new).await;
    let mut sidecar = Fixture::new(control_plane.address, &old_root);
    sidecar.tls.install(Credential::new(chain, key, both).unwrap()).unwrap();
    std::fs::remove_file(sidecar.settings.token_file.as_ref().unwrap()).unwrap();
    sidecar.start();
    sidecar.renew.notify_one();
    let trouble = sidecar.trouble("certificate_refused").await;
    assert!(trouble.hint.contains("TLS alert"), "{trouble:?}");
    sidecar.write_token("token-2");
    sidecar.no_trouble().await;
    assert_eq!(sidecar.certificate().await.bundle().roots(), [new_root]);
    let issued = control_plane.record.issued.lock().unwrap().clone();
    assert_eq!((issued[0].request.proof.as_str(), issued[0].by_certificate), ("token-2", false));
}

/// An expired certificate is replaced by token, and until then nothing is served with it.
#[tokio::test]
async fn an_expired_certificate_falls_back_to_the_token() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let authority = Arc::clone(&control_plane.script.lock().unwrap().authority);
    let mut sidecar = Fixture::new(control_plane.address, &authority.root);
    let mut spec = LeafSpec::valid("shop", "cart").times(SystemTime::now(), 600, 0);
    spec.not_after -= Duration::from_secs(5);
    sidecar.tls.install(authority.credential(&spec)).unwrap();
    assert!(!IdentityStatus { not_after: sidecar.tls.expiry(), ..Default::default() }.usable(SystemTime::now()));
    sidecar.start();
    sidecar.no_trouble().await;
    let issued = control_plane.record.issued.lock().unwrap().clone();
    assert!(!issued[0].by_certificate);
    assert_eq!(issued[0].request.proof, "token-1");
}

/// A laptop that slept for days, with a token that it has spent long ago.
#[tokio::test]
async fn a_clock_that_jumps_beyond_the_certificates_end_needs_no_token() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    control_plane.script.lock().unwrap().renews_late = true;
    let mut sidecar = Fixture::new(control_plane.address, &root);
    let ahead = Arc::new(AtomicU64::new(0));
    let seconds = Arc::clone(&ahead);
    let clock = Clock::new(move || SystemTime::now() + Duration::from_secs(seconds.load(Ordering::Relaxed)));
    sidecar.tls = Tls::new(clock);
    sidecar.start();
    let first = sidecar.certificate().await;
    std::fs::remove_file(sidecar.settings.token_file.as_ref().unwrap()).unwrap();
    let days = 3 * 86_400;
    control_plane.script.lock().unwrap().clock_ahead = days;
    ahead.store(days.unsigned_abs(), Ordering::Relaxed);
    let mut materials = sidecar.tls.subscribe();
    let renewed = |material: &Option<Arc<Material>>| {
        material.as_ref().is_some_and(|material| material.credential().not_after() > first.not_after())
    };
    let found = tokio::time::timeout(Duration::from_secs(60), materials.wait_for(renewed)).await;
    let second = found.unwrap().unwrap().as_ref().unwrap().credential().clone();
    assert!(second.not_after() > SystemTime::now() + Duration::from_secs(days.unsigned_abs()));
    let issued = control_plane.record.issued.lock().unwrap().clone();
    let last = issued.last().unwrap();
    assert!(!last.by_certificate && last.request.proof.is_empty());
    assert_eq!(last.request.late.as_ref().unwrap().chain_der[0], first.chain()[0].to_vec());
    sidecar.no_trouble().await;
}

#[tokio::test]
async fn a_read_only_state_directory_does_no_harm_now() {
    let control_plane = ControlPlane::start(Authority::new("outrigger.local")).await;
    let root = control_plane.script.lock().unwrap().authority.root.clone();
    let mut sidecar = Fixture::new(control_plane.address, &root);
    let file = sidecar.directory.path().join("a-file");
    std::fs::write(&file, "").unwrap();
    sidecar.settings.state = Some(file.join("state"));
    sidecar.start();
    sidecar.certificate().await;
    sidecar.no_trouble().await;
}
