//! Whether this sidecar can serve: a valid certificate, an own snapshot, and what it offers registered. Says what is
//! missing and what to do about it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::connection::Places;
use crate::discovery::{Directory, LeaseState};
use crate::identity::IdentityStatus;
use crate::tls::Tls;

/// Why `/ready` is 503.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotReady {
    pub reason: String,
    pub hint: String,
}

impl NotReady {
    fn new(reason: &str, hint: impl Into<String>) -> NotReady {
        NotReady { reason: reason.to_owned(), hint: hint.into() }
    }

    /// What the control plane told: a word of its own and a colon may stand before it.
    fn told(reason: &str, text: &str) -> NotReady {
        match text.strip_prefix("instance_exists: ") {
            Some(hint) => NotReady::new("instance_exists", hint),
            None => NotReady::new(reason, text),
        }
    }
}

/// What to do about rules that do not exempt the sidecar.
pub const EXEMPT_HINT: &str =
    "run it as the user of `redirect apply --uid` (1337), or with the same --mark for `run` and `redirect apply`";

/// What to do about rules that do not lead back what the application answers.
pub const WAY_BACK_HINT: &str = "run `redirect apply --keep-source-address`, with the other flags that it was applied with, in this \
                                 network namespace; `redirect check` tells what is absent";

/// What readiness looks at. Every answer is made from what is true now.
#[derive(Clone)]
pub struct Readiness {
    pub tls: Tls,
    pub directory: Directory,
    pub identity: tokio::sync::watch::Receiver<IdentityStatus>,
    pub drain: outrigger_runtime::drain::DrainHandle,
    /// Ports of the application that it registers: peers have to learn of them before this sidecar is of use, and it
    /// has to learn what is declared and demanded on them. None: it registers nothing. A transparent sidecar may register
    /// without naming a port.
    pub offers: Option<Vec<u16>>,
    /// The redirect rules bring this sidecar's own connections back to it: then whatever else is missing is missing for
    /// that, and what the state directory still has does not make up for it: no connection of the application leaves.
    pub comes_back: Arc<AtomicBool>,
    /// Whether answers to a client's address come back; None where the application does not see such addresses.
    pub way_back: Option<Arc<AtomicBool>>,
    /// Whether another connection has room.
    pub places: Arc<Places>,
}

impl Readiness {
    pub fn check(&self) -> Result<(), NotReady> {
        if self.drain.is_draining() {
            return Err(NotReady::new("draining", "this sidecar is shutting down; nothing is to be done"));
        }
        let complete = self.complete().and_then(|()| self.has_way_back()).and_then(|()| self.has_room());
        if !self.comes_back.load(Ordering::Relaxed) {
            return complete;
        }
        let waits = complete.map_or_else(|missing| missing.reason, |()| "the control plane".to_owned());
        let hint = format!(
            "the redirect rules send this sidecar's own connections back to it: {EXEMPT_HINT}. What it waits for: {waits}"
        );
        Err(NotReady::new("redirect_not_exempt", hint))
    }

    fn has_way_back(&self) -> Result<(), NotReady> {
        match &self.way_back {
            Some(holds) if !holds.load(Ordering::Relaxed) => {
                let what = "what the application answers to its clients' addresses does not come back to this sidecar";
                Err(NotReady::new("no_way_back", format!("{what}: {WAY_BACK_HINT}")))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Whether the next connection can be accepted.
    fn has_room(&self) -> Result<(), NotReady> {
        let limit = self.places.limit();
        if self.places.is_starved() {
            let hint = "the kernel gives no descriptor or memory for another connection: raise the hard limit of open files \
                        (`ulimit -Hn`), or of memory";
            return Err(NotReady::new("overloaded", hint));
        }
        if self.places.are_taken() {
            let hint = format!(
                "all {limit} connections that this sidecar may have are open; it has two descriptors for each, and keeps some for \
                 itself: raise the hard limit of open files (`ulimit -Hn`) where that is what bounds them"
            );
            return Err(NotReady::new("overloaded", hint));
        }
        Ok(())
    }

    /// Whether everything is there and the control plane is, too: then nothing comes back that should leave.
    pub fn is_connected(&self) -> bool {
        self.check().is_ok() && *self.directory.connected().borrow()
    }

    /// Whether all is there.
    fn complete(&self) -> Result<(), NotReady> {
        let valid = self.tls.current().is_some_and(|material| {
            let credential = material.credential();
            SystemTime::now() < credential.not_after()
        });
        if !valid {
            return Err(match &self.identity.borrow().trouble {
                Some(trouble) => NotReady::new(&trouble.reason, trouble.hint.clone()),
                None => NotReady::new("certificate_pending", "the control plane has been asked for a certificate"),
            });
        }
        if let Some(told) = &*self.directory.duplicate().borrow() {
            return Err(NotReady::told("instance_exists", told));
        }
        if self.directory.own().borrow().is_none() {
            return Err(NotReady::new(
                "snapshot_pending",
                "the control plane has not told yet what this workload is; `outrigger status` shows who is connected",
            ));
        }
        if self.offers.is_some() && *self.directory.connected().borrow() {
            match &*self.directory.lease().borrow() {
                LeaseState::Accepted { .. } if self.knows_its_ports() => {}
                LeaseState::Accepted { .. } => {
                    return Err(NotReady::new(
                        "snapshot_pending",
                        "the control plane has not told yet what it demands on the ports that this sidecar offers",
                    ));
                }
                LeaseState::Pending => {
                    return Err(NotReady::new(
                        "lease_pending",
                        "the control plane has been told what this sidecar offers",
                    ));
                }
                LeaseState::Refused { reason } => {
                    return Err(NotReady::told("lease_refused", reason));
                }
            }
        }
        Ok(())
    }

    /// The own snapshot is from after the lease.
    fn knows_its_ports(&self) -> bool {
        let own = self.directory.own();
        let own = own.borrow();
        own.as_ref()
            .is_some_and(|own| own.registered && self.offers.iter().flatten().all(|port| own.ports.contains_key(port)))
    }

    fn waits_for_rules(&self) -> bool {
        self.comes_back.load(Ordering::Relaxed) || self.has_way_back().is_err()
    }

    /// Returns when [`Readiness::check`] has been good once.
    pub async fn reached(&self) {
        let mut material = self.tls.subscribe();
        let mut own = self.directory.own();
        let mut connected = self.directory.connected();
        let mut lease = self.directory.lease();
        let mut duplicate = self.directory.duplicate();
        while self.check().is_err() {
            // A sender that is gone cannot change anything any more; the others still may.
            tokio::select! {
                Ok(()) = material.changed() => {}
                Ok(()) = own.changed() => {}
                Ok(()) = connected.changed() => {}
                Ok(()) = lease.changed() => {}
                Ok(()) = duplicate.changed() => {}
                // Nothing tells when the rules fit again.
                () = tokio::time::sleep(Duration::from_secs(1)), if self.waits_for_rules() => {}
                else => std::future::pending().await,
            }
        }
    }
}
