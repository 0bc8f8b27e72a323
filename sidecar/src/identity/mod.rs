//! Obtains this sidecar's certificate and renews it for as long as the process lives: one task on the control thread.
//! The key is made here and never leaves. Whatever goes wrong is a status and a back-off, never the end of the process.

mod channel;
mod obtain;
mod request;
mod schedule;
mod state;
mod trouble;

#[cfg(test)]
pub(crate) mod test_control_plane;

pub use channel::{DialError, Dialled, answered, dial};
pub use state::{StateError, replace_file};

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_api::identity::TrustDomain;
use outrigger_api::snapshot::KeyAlgorithm;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};

use crate::tls::clock::show;
use crate::tls::{Material, Tls};
use obtain::Obtainer;
use schedule::{Standing, renew_at, retry_after};
use trouble::Kind;

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
    /// SO_MARK of connections to the control plane, by which redirect rules leave them alone.
    pub mark: Option<u32>,
    /// What kind of key the next certificate gets; follows the mesh's settings.
    pub key_algorithm: watch::Receiver<KeyAlgorithm>,
}

impl IdentitySettings {
    fn algorithm(&self) -> KeyAlgorithm {
        *self.key_algorithm.borrow()
    }
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

/// Runs until it is dropped. `renew.notify_one()` asks for a new certificate now (`POST /certs/renew`, SIGHUP).
pub async fn run(settings: IdentitySettings, tls: Tls, renew: Arc<Notify>, status: watch::Sender<IdentityStatus>) {
    let mut obtainer = Obtainer::new(settings, tls.clone());
    if let Err(error) = obtainer.restore().await {
        tracing::warn!(%error, "the certificate kept in --state is not used");
    }
    let mut changes = tls.subscribe();
    let mut report = Report { tls: tls.clone(), status, expiry_told: false };
    let mut failures = 0_u32;
    let mut due = first_try(&tls, &report);
    loop {
        wait(&due, &tls, &renew, &mut changes, &mut obtainer, &mut report).await;
        match obtainer.obtain().await {
            Ok(()) => {
                failures = 0;
                due = first_try(&tls, &report);
            }
            Err((error, trouble)) => {
                failures = failures.saturating_add(1);
                let wait = retry_after(failures, standing(&tls, trouble::kind(&error)), fastrand::f64());
                due = Due::Retry(Instant::now() + wait);
                report.trouble(trouble, wait);
            }
        }
    }
}

/// When to ask for a certificate next. A renewal is due by the wall clock and moves with it when it is set; a retry
/// is a length of time.
enum Due {
    Renewal(SystemTime),
    Retry(Instant),
}

impl Due {
    fn remaining(&self, tls: &Tls) -> Duration {
        match self {
            Due::Renewal(at) => at.duration_since(tls.clock().now()).unwrap_or_default(),
            Due::Retry(at) => at.saturating_duration_since(Instant::now()),
        }
    }
}

/// A certificate that is valid is renewed at its time, anything else at once. A second at least lies between two, even
/// when the control plane hands out one that is nearly over.
fn first_try(tls: &Tls, report: &Report) -> Due {
    let now = tls.clock().now();
    let Some(material) = tls.current().filter(|material| material.credential().check_time(now).is_ok()) else {
        return Due::Retry(Instant::now());
    };
    let at = renew_at(material.credential(), fastrand::f64()).max(now + Duration::from_secs(1));
    report.well(at);
    Due::Renewal(at)
}

fn standing(tls: &Tls, kind: Kind) -> Standing {
    let now = tls.clock().now();
    match (tls.current().filter(|material| material.credential().check_time(now).is_ok()), kind) {
        (Some(material), _) => Standing::Certified(material.credential().lifetime()),
        (None, Kind::Passing) => Standing::Unheard,
        (None, Kind::Refused | Kind::OtherAuthority) => Standing::Refused,
    }
}

/// Returns when it is time to ask: the hour has come, somebody wants it now, a file that we failed with has
/// changed, or the bundle in force no longer verifies our own certificate.
async fn wait(
    due: &Due,
    tls: &Tls,
    renew: &Notify,
    changes: &mut watch::Receiver<Option<Arc<Material>>>,
    obtainer: &mut Obtainer,
    report: &mut Report,
) {
    // Long sleeps are cut up, because the wall clock may be set meanwhile, and the files be corrected.
    let step = if matches!(due, Due::Retry(_)) { Duration::from_secs(1) } else { Duration::from_secs(10) };
    loop {
        report.tell_expiry();
        let remaining = due.remaining(tls);
        if remaining.is_zero() {
            return;
        }
        tokio::select! {
            () = renew.notified() => return,
            Ok(()) = changes.changed() => {
                let material = changes.borrow_and_update().clone();
                if obtainer.keep_bundle(material.as_deref()).await {
                    return;
                }
            }
            () = sleep(remaining.min(step)) => {}
        }
        if matches!(due, Due::Retry(_)) && obtainer.files_changed() {
            return;
        }
    }
}

/// Tells the status and, once per change, stderr.
struct Report {
    tls: Tls,
    status: watch::Sender<IdentityStatus>,
    expiry_told: bool,
}

impl Report {
    fn well(&self, renew_at: SystemTime) {
        let new = IdentityStatus { not_after: self.tls.expiry(), renew_at: Some(renew_at), trouble: None };
        let old = self.status.send_replace(new);
        if let Some(trouble) = old.trouble {
            tracing::info!(was = trouble.reason, "the certificate is in order again");
        }
    }

    fn trouble(&self, trouble: Trouble, retry_in: Duration) {
        let not_after = self.tls.expiry();
        let new = IdentityStatus { not_after, renew_at: None, trouble: Some(trouble.clone()) };
        let old = self.status.send_replace(new);
        if old.trouble.is_none_or(|old| old.reason != trouble.reason) {
            let serves_until = not_after.map(show);
            tracing::warn!(reason = trouble.reason, hint = trouble.hint, serves_until, ?retry_in, "no new certificate");
        }
    }

    /// From that moment every handshake is refused, by peers and by ourselves.
    fn tell_expiry(&mut self) {
        let Some(not_after) = self.tls.expiry() else { return };
        let expired = self.tls.clock().now() > not_after;
        if expired && !self.expiry_told {
            tracing::error!(
                not_after = show(not_after),
                "the certificate has expired: no new mTLS connection until it is renewed"
            );
        }
        self.expiry_told = expired;
    }
}

#[cfg(test)]
mod tests;
