//! Keeps the [`Directory`] up to date: one task on the control thread holds the Watch stream and the lease, answers
//! each update, reconnects by itself, and copies what it knows to `--state`. Workers only read the directory.

mod copy;
mod directory;
mod lease;
mod reconnect;
mod session;
mod update;

pub use directory::{Directory, Known, LeaseState, MAX_DESTINATIONS};

use std::collections::BTreeMap;
use std::future::pending;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use outrigger_api::identity::TrustDomain;
use outrigger_api::name::Protocol;
use outrigger_api::wire;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use crate::identity::StateError;
use crate::tls::{Material, Tls};
use directory::Change;
use lease::LeaseEvent;
use reconnect::reconnect_after;
use session::{Event, Session, SessionError};

/// Who is watching, and where the control plane is.
#[derive(Clone, Debug)]
pub struct DiscoverySettings {
    /// `host:port`; the name is resolved at each connect.
    pub control_plane: String,
    pub trust_domain: TrustDomain,
    /// Name of the instance, as in its certificate.
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// `--state`: where the copy of what is known is kept.
    pub state: Option<PathBuf>,
    /// SO_MARK of connections to the control plane, by which redirect rules leave them alone.
    pub mark: Option<u32>,
    /// Build version, for `outrigger status`.
    pub version: String,
    /// [`process_name`]: by it the control plane tells the next connection of this sidecar from another sidecar's.
    pub process: String,
}

/// A random name for this process; empty when the system gives no randomness, and the certificate stands for it.
pub fn process_name() -> String {
    let mut bytes = [0; 16];
    match SystemRandom::new().fill(&mut bytes) {
        Ok(()) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        Err(_) => String::new(),
    }
}

/// What a standalone sidecar registers. The stream on which it is sent is the lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lease {
    pub instance: String,
    /// Name for metrics.
    pub workload: String,
    pub labels: BTreeMap<String, String>,
    /// Where peers reach the mesh ports, the preferred address first; empty: the address that the stream comes from.
    pub ips: Vec<IpAddr>,
    /// Application port, mesh port, declared protocol.
    pub ports: Vec<(u16, u16, Option<Protocol>)>,
    /// Every other port is served too, at its own number.
    pub transparent: bool,
}

/// Changes are collected for this long before they are copied to `--state`.
const COPY_AFTER: Duration = Duration::from_secs(1);
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// How often the control plane is told the golden signals.
const REPORT_EVERY: Duration = Duration::from_secs(3);
/// The same while there is nothing to report but that it is there.
const REPORT_IDLE: Duration = Duration::from_secs(10);

/// Where reports come from.
pub struct ReportSource {
    /// Makes the summary of the time since it was last asked.
    pub make: Box<dyn FnMut() -> wire::ReportRequest + Send>,
    /// Hears which notes about Shadow policies the control plane has taken.
    pub taken: Taken,
}

pub type Taken = Arc<dyn Fn(&[wire::ShadowNote]) + Send + Sync>;

/// Runs until it is dropped. When `withdraw` completes, the lease is taken back; discovery goes on.
pub async fn run(
    settings: DiscoverySettings,
    tls: Tls,
    lease: Option<Lease>,
    directory: Directory,
    mut reports: ReportSource,
    withdraw: impl Future<Output = ()>,
) {
    let Some(mut changes) = directory.take_changes() else {
        tracing::error!("discovery runs already for this directory");
        return;
    };
    let mut watcher = Watcher::new(settings, tls, lease, directory);
    watcher.restore();
    let mut materials = watcher.tls.subscribe();
    watcher.dial_with(materials.borrow_and_update().clone());
    let mut forget = interval(FORGET_EVERY);
    forget.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut report = Box::pin(sleep(REPORT_EVERY));
    let mut withdraw = Box::pin(withdraw);
    let mut withdrawn = false;
    loop {
        tokio::select! {
            event = next_event(&mut watcher.session) => watcher.on_event(event),
            opened = watcher.dialling.next() => watcher.on_opened(opened),
            Some(change) = changes.recv() => watcher.on_changes(change, &mut changes),
            Ok(()) = materials.changed() => watcher.dial_with(materials.borrow_and_update().clone()),
            _ = forget.tick() => watcher.directory.forget_unused(),
            () = &mut report => {
                let mut every = REPORT_EVERY;
                if let Some(session) = &watcher.session {
                    let summary = (reports.make)();
                    if summary.edges.is_empty() && summary.shadow.is_empty() {
                        every = REPORT_IDLE;
                    }
                    session.report(summary, &reports.taken);
                }
                report.as_mut().reset(tokio::time::Instant::now() + every);
            }
            () = &mut withdraw, if !withdrawn => {
                withdrawn = true;
                watcher.withdraw();
            }
            () = watcher.copying.next() => watcher.copying.advance(&watcher.directory),
        }
    }
}

async fn next_event(session: &mut Option<Session>) -> Event {
    match session {
        Some(session) => session.next().await,
        None => pending().await,
    }
}

/// The life of the connection: `dialling` makes a session, which lives until it ends or the next one, dialled with a
/// renewed certificate, takes its place.
struct Watcher {
    settings: DiscoverySettings,
    tls: Tls,
    /// None: there is none, or not any more.
    lease: Option<Lease>,
    withdraw: bool,
    directory: Directory,
    session: Option<Session>,
    dialling: Dialling,
    /// What the sessions so far were dialled with.
    material: Option<Arc<Material>>,
    failures: u32,
    copying: Copying,
}

/// On the way to the next session.
enum Dialling {
    Off,
    Waiting(Pin<Box<dyn Future<Output = ()> + Send>>),
    Opening(Pin<Box<dyn Future<Output = Result<Session, SessionError>> + Send>>),
}

impl Dialling {
    /// None: the wait is over, dial now. May be dropped at any await.
    async fn next(&mut self) -> Option<Result<Session, SessionError>> {
        match self {
            Dialling::Off => pending().await,
            Dialling::Waiting(wait) => {
                wait.await;
                None
            }
            Dialling::Opening(opening) => Some(opening.await),
        }
    }
}

impl Watcher {
    fn new(settings: DiscoverySettings, tls: Tls, lease: Option<Lease>, directory: Directory) -> Watcher {
        let copying = Copying { state: settings.state.clone(), due: None, writing: None, failed: false };
        Watcher {
            settings,
            tls,
            lease,
            withdraw: false,
            directory,
            session: None,
            dialling: Dialling::Off,
            material: None,
            failures: 0,
            copying,
        }
    }

    fn restore(&self) {
        let Some(state) = &self.settings.state else { return };
        if let Some(count) = copy::load(&self.directory, state, &self.settings) {
            tracing::info!(count, "started from the snapshot kept in --state");
        }
    }

    /// A new credential replaces the connection; the old one serves until the new one is open. A new bundle alone
    /// changes nothing about a connection that stands.
    fn dial_with(&mut self, material: Option<Arc<Material>>) {
        let Some(material) = material else { return };
        let old = self.material.replace(Arc::clone(&material));
        let old = old.as_deref().map(Material::credential);
        let new = material.credential();
        if old.is_some_and(|old| !old.bundle().shares_root(new.bundle())) {
            self.directory.forget_versions();
        }
        let same_leaf = old.is_some_and(|old| old.chain() == new.chain());
        if !(same_leaf && self.session.is_some()) {
            self.dial();
        }
    }

    fn dial(&mut self) {
        let Some(material) = &self.material else { return };
        let (settings, lease) = (self.settings.clone(), self.lease.clone());
        let (credential, clock) = (material.credential().clone(), self.tls.clock().clone());
        self.dialling = Dialling::Opening(Box::pin(Session::open(settings, credential, lease, self.withdraw, clock)));
    }

    fn on_opened(&mut self, opened: Option<Result<Session, SessionError>>) {
        self.dialling = Dialling::Off;
        match opened {
            None => self.dial(),
            Some(Ok(mut session)) => {
                for key in self.directory.keys() {
                    session.subscribe(&key);
                }
                // The one before ends here, and with it its lease, which the new one has taken over.
                self.session = Some(session);
            }
            Some(Err(error)) => self.on_failure(&error),
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Update(response) => {
                if !*self.directory.connected().borrow() {
                    tracing::info!(control_plane = self.settings.control_plane, "discovery is connected");
                }
                self.failures = 0;
                self.directory.set_connected(true);
                self.directory.set_duplicate(None);
                let outcome = update::apply(*response, &self.directory, &self.tls, &self.settings);
                if outcome.changed {
                    self.copying.later();
                }
                if let Some(session) = &mut self.session {
                    session.answer(outcome.ack);
                }
            }
            Event::Lease(event) => self.on_lease(event),
            Event::Over(error) => {
                self.session = None;
                self.directory.set_connected(false);
                // One that is being dialled already will do.
                if matches!(self.dialling, Dialling::Off) {
                    self.on_failure(&error);
                }
            }
        }
    }

    /// Tells the first failure in a row and dials again in a while.
    fn on_failure(&mut self, error: &SessionError) {
        self.failures = self.failures.saturating_add(1);
        let duplicate = error.duplicate();
        if let Some(told) = duplicate {
            if self.directory.duplicate().borrow().is_none() {
                tracing::error!("{told}");
            }
            self.directory.set_duplicate(Some(told.into()));
        }
        if self.failures == 1 {
            tracing::warn!(%error, "discovery is not connected; what is known stays in use");
        } else {
            tracing::debug!(%error, failures = self.failures, "discovery is still not connected");
        }
        // Another sidecar's name is free as soon as that one is gone.
        let failures = if duplicate.is_some() { 1 } else { self.failures };
        let wait = reconnect_after(failures, fastrand::f64());
        self.dialling = Dialling::Waiting(Box::pin(sleep(wait)));
    }

    fn on_lease(&mut self, event: LeaseEvent) {
        match event {
            LeaseEvent::Accepted { services } => {
                tracing::debug!(?services, "the lease stands");
                self.directory.set_lease(LeaseState::Accepted { services: services.into() });
            }
            LeaseEvent::Refused { reason } => {
                let state = LeaseState::Refused { reason: reason.as_str().into() };
                if *self.directory.lease().borrow() != state {
                    tracing::warn!(reason, "the control plane does not register this workload: no peer will find it");
                }
                self.directory.set_lease(state);
            }
            LeaseEvent::Lost { reason } => tracing::debug!(reason, "the lease's stream broke; it is opened again"),
            LeaseEvent::Withdrawn => {
                self.lease = None;
                tracing::info!("the lease is withdrawn");
            }
        }
    }

    /// Several at once, as after a start: one pass for all that wait.
    fn on_changes(&mut self, first: Change, more: &mut mpsc::UnboundedReceiver<Change>) {
        let mut next = Some(first);
        while let Some(change) = next {
            // Without a session there is nobody to tell; the next one begins with all keys.
            if let Some(session) = &mut self.session {
                match &change {
                    Change::Subscribe(key) => session.subscribe(key),
                    Change::Unsubscribe(key) => session.unsubscribe(key),
                }
            }
            next = more.try_recv().ok();
        }
    }

    /// Until the control plane has read it, each new connection says it again.
    fn withdraw(&mut self) {
        self.withdraw = true;
        if let Some(session) = &mut self.session {
            session.withdraw();
        }
        // One on the way would register again.
        if matches!(self.dialling, Dialling::Opening(_)) {
            self.dial();
        }
    }
}

/// Copies to `--state`, a while after a change and one at a time.
struct Copying {
    state: Option<PathBuf>,
    due: Option<Instant>,
    writing: Option<JoinHandle<Result<(), StateError>>>,
    failed: bool,
}

impl Copying {
    fn later(&mut self) {
        if self.state.is_some() && self.due.is_none() {
            self.due = Some(Instant::now() + COPY_AFTER);
        }
    }

    /// Completes when there is something to do. May be dropped at any await.
    async fn next(&mut self) {
        match (&mut self.writing, self.due) {
            (Some(writing), _) => {
                let failed = !matches!(writing.await, Ok(Ok(())));
                self.writing = None;
                if failed && !self.failed {
                    tracing::warn!("--state cannot be written: the kept snapshot is out of date");
                }
                self.failed = failed;
            }
            (None, Some(due)) => sleep_until(due).await,
            (None, None) => pending().await,
        }
    }

    fn advance(&mut self, directory: &Directory) {
        let due = self.due.is_some_and(|due| due <= Instant::now());
        if let (true, None, Some(state)) = (due, &self.writing, self.state.clone()) {
            self.due = None;
            let bytes = copy::encode(directory);
            self.writing = Some(tokio::task::spawn_blocking(move || copy::save(&state, &bytes)));
        }
    }
}

#[cfg(test)]
mod tests;
