//! What one data thread has: the shared parts that it reads, and its own pools. Everything in here is used on that
//! thread only; what is shared between threads is shared by the parts themselves.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use outrigger_api::identity::SpiffeId;
use outrigger_api::snapshot::{Key, OutboundMode, Workload};

use super::backend::Backend;
use super::dial::{Dialer, Target};
use super::lane::{Framing, Lane};
use crate::balance::{Loads, Nanos};
use crate::config::limits::Limits;
use crate::connection::{IdleLimits, Table};
use crate::discovery::Directory;
use crate::telemetry::Telemetry;
use crate::tls::Tls;

/// Who this sidecar stands for.
#[derive(Clone, Debug)]
pub struct Own {
    pub instance: String,
    pub workload: String,
    pub namespace: String,
    pub principal: SpiffeId,
}

/// What all workers share.
#[derive(Clone)]
pub struct Shared {
    pub own: Arc<Own>,
    pub telemetry: Arc<Telemetry>,
    pub directory: Directory,
    pub tls: Tls,
    pub loads: Loads,
    pub epoch: Instant,
    pub limits: Limits,
    pub drain: outrigger_runtime::drain::DrainHandle,
}

pub struct Worker {
    pub own: Arc<Own>,
    pub limits: Rc<Limits>,
    pub table: Arc<Table>,
    pub telemetry: Arc<Telemetry>,
    pub directory: Directory,
    pub tls: Tls,
    pub dialer: Rc<Dialer>,
    pub loads: Loads,
    pub rng: RefCell<fastrand::Rng>,
    pub drain: outrigger_runtime::drain::DrainHandle,
    pub streams: super::streams::Streams,
    epoch: Instant,
    backends: RefCell<HashMap<Key, Rc<Backend>>>,
    application: RefCell<HashMap<ApplicationKey, Rc<Lane>>>,
}

/// Connections to the application are shared by requests of one caller only, so that a desync never crosses
/// identities.
#[derive(Clone, PartialEq, Eq, Hash)]
struct ApplicationKey {
    address: SocketAddr,
    framing: Framing,
    caller: SpiffeId,
}

/// A destination that was not used for this long is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(600);

impl Worker {
    pub fn new(shared: &Shared, table: Arc<Table>, dialer: Rc<Dialer>) -> Rc<Worker> {
        Rc::new(Worker {
            own: shared.own.clone(),
            limits: Rc::new(shared.limits.clone()),
            table,
            telemetry: shared.telemetry.clone(),
            directory: shared.directory.clone(),
            tls: shared.tls.clone(),
            dialer,
            loads: shared.loads.clone(),
            rng: RefCell::new(fastrand::Rng::new()),
            drain: shared.drain.clone(),
            streams: super::streams::Streams::default(),
            epoch: shared.epoch,
            backends: RefCell::default(),
            application: RefCell::default(),
        })
    }

    pub fn now(&self) -> Nanos {
        Nanos::since(self.epoch, Instant::now())
    }

    /// The own workload as last known.
    pub fn own_workload(&self) -> Option<Arc<Workload>> {
        self.directory.own().borrow().clone()
    }

    /// Whether destinations that nobody registered are refused.
    pub fn registry_only(&self) -> bool {
        self.own_workload().is_none_or(|own| own.mesh.outbound_mode == OutboundMode::RegistryOnly)
    }

    pub fn backend(&self, key: &Key) -> Rc<Backend> {
        if let Some(backend) = self.backends.borrow().get(key) {
            return backend.clone();
        }
        let backend = Rc::new(Backend::new(self, key.clone()));
        self.backends.borrow_mut().insert(key.clone(), backend.clone());
        backend
    }

    /// The lane to the application for one caller. Callers that proved nothing share none: they get a lane of their
    /// own connection.
    pub fn application_lane(&self, address: SocketAddr, framing: Framing, caller: Option<&SpiffeId>) -> Rc<Lane> {
        let new = || {
            Lane::new(
                Target { address, tls: None },
                framing,
                self.dialer.clone(),
                self.limits.clone(),
                self.limits.application_pool_idle,
            )
        };
        let Some(caller) = caller else { return new() };
        let key = ApplicationKey { address, framing, caller: caller.clone() };
        self.application.borrow_mut().entry(key).or_insert_with(new).clone()
    }

    /// The watchdog's tick.
    pub fn sweep(&self) {
        let now = Instant::now();
        let wall = SystemTime::now();
        self.table.sweep(&IdleLimits {
            head: self.limits.head_timeout,
            client_idle: self.limits.client_idle,
            // The streams come first: they can still answer. What is left then is a downstream that takes nothing.
            stream_idle: self.limits.stream_idle + 4 * self.tick(),
            tunnel_idle: self.limits.tunnel_idle,
        });
        self.streams.sweep(self.limits.stream_idle);
        self.backends.borrow_mut().retain(|_, backend| {
            let idle = backend.sweep(now);
            !(idle && Rc::strong_count(backend) == 1 && now.duration_since(backend.last_used()) > FORGET_AFTER)
        });
        self.application.borrow_mut().retain(|_, lane| {
            lane.sweep(now, wall);
            !(lane.is_idle() && Rc::strong_count(lane) == 1)
        });
    }

    /// How often the watchdog looks: often enough for the shortest limit, at most once a second.
    pub fn tick(&self) -> Duration {
        (self.limits.head_timeout / 4).clamp(Duration::from_millis(10), Duration::from_secs(1))
    }
}
