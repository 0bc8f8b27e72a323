//! What one data thread has: the shared parts that it reads, and its own pools. Everything in here is used on that
//! thread only; what is shared between threads is shared by the parts themselves.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use outrigger_api::identity::SpiffeId;
use outrigger_api::snapshot::{Endpoint, EndpointTls, Key, OutboundMode, Workload};
use outrigger_runtime::memory::Budget;

use super::backend::Backend;
use super::dial::{Dialer, Target, WayBack};
use super::lane::{Framing, Lane};
use super::own_dials::OwnDials;
use super::speculation::Speculation;
use crate::balance::{Loads, Nanos};
use crate::config::limits::Limits;
use crate::connection::{IdleLimits, Table};
use crate::discovery::Directory;
use crate::key_sets::KeySets;
use crate::net;
use crate::outcome::Reason;
use crate::policy::{self, Call, Judgement};
use crate::telemetry::Telemetry;
use crate::tls::{Purpose, Tls};

/// Who this sidecar stands for.
#[derive(Clone, Debug)]
pub struct Own {
    pub instance: String,
    pub workload: String,
    pub namespace: String,
    pub principal: SpiffeId,
    /// The listeners at which peers dial the application (`--inbound`), each with the application's address.
    pub inbound: Vec<(SocketAddr, SocketAddr)>,
    /// Every port of the addresses of this network namespace leads to the application through this sidecar.
    pub transparent: bool,
}

impl Own {
    /// The application behind a mesh port of this sidecar, by the address at which a peer would dial it.
    pub fn application_behind(&self, address: SocketAddr) -> Option<SocketAddr> {
        let listens = |listener: &SocketAddr| {
            listener.port() == address.port() && (listener.ip().is_unspecified() || listener.ip() == address.ip())
        };
        self.inbound.iter().find(|(listener, _)| listens(listener)).map(|(_, application)| *application)
    }
}

/// What all workers share.
#[derive(Clone)]
pub struct Shared {
    pub own: Arc<Own>,
    pub telemetry: Arc<Telemetry>,
    pub directory: Directory,
    pub key_sets: KeySets,
    pub buckets: policy::Buckets,
    pub tls: Tls,
    pub own_dials: OwnDials,
    pub way_back: WayBack,
    pub loads: Loads,
    pub epoch: Instant,
    pub limits: Limits,
    pub memory: Arc<Budget>,
    pub drain: outrigger_runtime::drain::DrainHandle,
}

pub struct Worker {
    pub own: Arc<Own>,
    pub limits: Rc<Limits>,
    pub table: Arc<Table>,
    pub telemetry: Arc<Telemetry>,
    pub directory: Directory,
    pub key_sets: KeySets,
    buckets: policy::Buckets,
    limited: RefCell<policy::Followed>,
    /// Tokens that were verified on this thread.
    pub tokens: RefCell<policy::Memory>,
    pub tls: Tls,
    pub dialer: Rc<Dialer>,
    pub loads: Loads,
    pub rng: RefCell<fastrand::Rng>,
    pub drain: outrigger_runtime::drain::DrainHandle,
    pub streams: super::streams::Streams,
    pub speculation: Speculation,
    /// Copies of requests that routes have made and that are under way.
    pub mirrors: Cell<usize>,
    epoch: Instant,
    own_workload: RefCell<OwnWorkload>,
    backends: RefCell<HashMap<Key, Rc<Backend>>>,
    /// When room was looked for last.
    looked: Cell<Option<Instant>>,
    application: RefCell<HashMap<ApplicationKey, Rc<Lane>>>,
    /// The own workload by which open connections were judged last. Kept, so that its address means no other one.
    judged_by: RefCell<Option<Arc<Workload>>>,
    /// [`Tls::bundles`] by which they were.
    judged_bundles: Cell<u64>,
    /// Addresses that were found to be of this network namespace since the watchdog's last tick.
    here: RefCell<Vec<IpAddr>>,
}

/// The own workload as this worker knows it: looked up anew only when it was told anew, so that a request pays one load.
struct OwnWorkload {
    told: tokio::sync::watch::Receiver<Option<Arc<Workload>>>,
    known: Option<Arc<Workload>>,
}

/// Connections to the application are shared by requests of one caller only, so that a desync never crosses
/// identities; and of one client's address, where the application sees that.
#[derive(Clone, PartialEq, Eq, Hash)]
struct ApplicationKey {
    address: SocketAddr,
    source: Option<IpAddr>,
    framing: Framing,
    caller: SpiffeId,
}

/// A destination that was not used for this long is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// Destinations that one worker remembers: a client of the forward proxy may name anything. Fewer than the process
/// knows, so that some of those are always free to be forgotten.
const MAX_BACKENDS: usize = crate::discovery::MAX_DESTINATIONS / 4;
/// How often streams that stand still are looked for while memory is short.
const RELIEF: Duration = Duration::from_millis(50);
/// How long it lasts when there was nothing to forget.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Worker {
    pub fn new(shared: &Shared, table: Arc<Table>, dialer: Rc<Dialer>) -> Rc<Worker> {
        Rc::new(Worker {
            own: shared.own.clone(),
            limits: Rc::new(shared.limits.clone()),
            table,
            telemetry: shared.telemetry.clone(),
            directory: shared.directory.clone(),
            key_sets: shared.key_sets.clone(),
            buckets: shared.buckets.clone(),
            limited: RefCell::default(),
            tokens: RefCell::default(),
            tls: shared.tls.clone(),
            loads: shared.loads.clone(),
            rng: RefCell::new(fastrand::Rng::new()),
            drain: shared.drain.clone(),
            streams: super::streams::Streams::new(dialer.ledger()),
            speculation: Speculation::new(&shared.limits),
            mirrors: Cell::new(0),
            epoch: shared.epoch,
            own_workload: RefCell::new(OwnWorkload { told: shared.directory.own(), known: None }),
            backends: RefCell::default(),
            looked: Cell::new(None),
            application: RefCell::default(),
            judged_by: RefCell::default(),
            judged_bundles: Cell::new(0),
            here: RefCell::default(),
            dialer,
        })
    }

    pub fn now(&self) -> Nanos {
        self.nanos(Instant::now())
    }

    /// An instant as balancing counts time.
    pub fn nanos(&self, at: Instant) -> Nanos {
        Nanos::since(self.epoch, at)
    }

    /// The own workload as last known.
    pub fn own_workload(&self) -> Option<Arc<Workload>> {
        let OwnWorkload { told, known } = &mut *self.own_workload.borrow_mut();
        if known.is_none() || told.has_changed().unwrap_or(true) {
            known.clone_from(&told.borrow_and_update());
        }
        known.clone()
    }

    /// The buckets of the own workload's rate limits, and the time by which they fill.
    pub fn limits(&self, own: &Workload) -> (std::cell::Ref<'_, policy::Followed>, u64) {
        self.limited.borrow_mut().follow(&own.rate_limits, &self.buckets);
        let since = Instant::now().saturating_duration_since(self.epoch);
        (self.limited.borrow(), u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
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
        let mut backends = self.backends.borrow_mut();
        if backends.len() >= MAX_BACKENDS {
            self.make_room(&mut backends);
        }
        // Else it lives as long as the one who asked uses it.
        if backends.len() < MAX_BACKENDS {
            backends.insert(key.clone(), backend.clone());
        }
        backend
    }

    /// Forgets the tenth of the destinations that was unused for the longest.
    fn make_room(&self, backends: &mut HashMap<Key, Rc<Backend>>) {
        let now = Instant::now();
        if self.looked.get().is_some_and(|looked| now.duration_since(looked) < LOOK_AGAIN) {
            return;
        }
        let unused = |backend: &Rc<Backend>| Rc::strong_count(backend) == 1 && backend.is_idle();
        let mut unused: Vec<(Instant, Key)> = backends
            .iter()
            .filter(|(_, backend)| unused(backend))
            .map(|(key, backend)| (backend.last_used(), key.clone()))
            .collect();
        self.looked.set(unused.is_empty().then_some(now));
        unused.sort_unstable_by_key(|(used, _)| *used);
        for (_, key) in unused.into_iter().take(MAX_BACKENDS / 10) {
            backends.remove(&key);
        }
    }

    /// The lane to the application for one caller. Callers that proved nothing share none: they get a lane of their
    /// own connection.
    pub fn application_lane(
        &self,
        address: SocketAddr,
        source: Option<IpAddr>,
        framing: Framing,
        caller: Option<&SpiffeId>,
    ) -> Rc<Lane> {
        let new = || {
            Lane::new(
                Target::application(address, source),
                framing,
                self.dialer.clone(),
                self.limits.clone(),
                self.limits.application_pool_idle,
            )
        };
        let Some(caller) = caller else { return new() };
        let key = ApplicationKey { address, source, framing, caller: caller.clone() };
        self.application.borrow_mut().entry(key).or_insert_with(new).clone()
    }

    /// The address from which a connection to `application` is made on behalf of `client`; none: from this machine's own.
    /// Neither loopback's addresses nor those of one link alone can stand on both sides.
    pub fn source(&self, client: IpAddr, application: SocketAddr) -> Option<IpAddr> {
        if !self.dialer.keeps_source() {
            return None;
        }
        let client = client.to_canonical();
        let is_of_a_link = match client {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        let fits = client.is_ipv4() == application.is_ipv4();
        let is_bound = client.is_loopback() || application.ip().is_loopback() || is_of_a_link;
        (fits && !is_bound).then_some(client)
    }

    /// Whether peers reach this workload at that address: it is of this network namespace, and not loopback. Asked of the
    /// kernel once per address and tick.
    pub fn is_reached_at(&self, ip: IpAddr) -> bool {
        if self.here.borrow().contains(&ip) {
            return true;
        }
        let here = !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast()) && net::is_local(ip);
        if here {
            self.here.borrow_mut().push(ip);
        }
        here
    }

    /// The application behind an endpoint that is this workload itself.
    pub fn own_application(&self, endpoint: &Endpoint) -> Option<SocketAddr> {
        let own = &self.own;
        let address = endpoint.address;
        let is_own = endpoint.instance == own.instance
            && endpoint.namespace == own.namespace
            && match &endpoint.tls {
                EndpointTls::Mutual(identity) => *identity == own.principal,
                // Then the name alone says so: another account may have an instance of the same one.
                EndpointTls::Plaintext => net::is_local(address.ip()),
            };
        if !is_own {
            return None;
        }
        let explicit = own.inbound.iter().find(|(listener, _)| listener.port() == address.port());
        let transparent = || own.transparent && self.is_reached_at(address.ip());
        explicit
            .map(|(_, application)| *application)
            .or_else(|| transparent().then(|| SocketAddr::new(address.ip(), endpoint.application_port)))
    }

    /// The watchdog's tick. True when nothing moves on this worker.
    pub fn sweep(&self) -> bool {
        self.here.borrow_mut().clear();
        net::give_up_silent_peers(self.limits.no_ack_timeout);
        let now = Instant::now();
        let wall = SystemTime::now();
        let limits = IdleLimits {
            head: self.limits.head_timeout,
            client_idle: self.limits.client_idle,
            // The streams come first: they can still answer. What is left then is a downstream that takes nothing.
            stream_idle: self.limits.stream_idle + 4 * self.tick(),
            stream_stalled: self.limits.stream_stalled + 4 * self.tick(),
            tunnel_idle: self.limits.tunnel_idle,
        };
        let quiet = self.table.sweep(&limits, self.tls.clock().now());
        self.streams.sweep(self.limits.stream_idle, self.limits.stream_stalled);
        self.speculation.sweep();
        self.judge();
        self.backends.borrow_mut().retain(|_, backend| {
            let idle = backend.sweep(now);
            !(idle && Rc::strong_count(backend) == 1 && now.duration_since(backend.last_used()) > FORGET_AFTER)
        });
        self.application.borrow_mut().retain(|_, lane| {
            lane.sweep(now, wall);
            !(lane.is_idle() && Rc::strong_count(lane) == 1)
        });
        quiet
    }

    /// Neither connections nor anything pooled.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
            && self.application.borrow().is_empty()
            && self.backends.borrow().values().all(|backend| backend.is_idle())
    }

    /// Ends streams that stand still whenever memory is short. Never ends.
    pub async fn relieve(&self) {
        let budget = self.streams.ledger().budget();
        loop {
            let news = budget.news();
            if !budget.is_short() {
                news.await;
            }
            while self.streams.relieve() {
                tokio::time::sleep(RELIEF).await;
            }
        }
    }

    /// Judges open connections again, by the facts on which they were let in: all of them when policy or the trust bundle
    /// has moved, else those that are new since the last tick.
    fn judge(&self) {
        let bundles = self.tls.bundles();
        let other_roots = self.judged_bundles.replace(bundles) != bundles;
        if other_roots {
            let cut = self.dialer.judge(bundles);
            if cut > 0 {
                tracing::warn!(connections = cut, "closed connections to peers whose root left the trust bundle");
            }
        }
        let Some(own) = self.own_workload() else { return };
        let before = self.judged_by.replace(Some(own.clone()));
        let moved = !before.is_some_and(|before| Arc::ptr_eq(&before, &own));
        let changed = other_roots || moved;
        let ended = self.streams.judge(&own, moved);
        if ended > 0 {
            tracing::warn!(streams = ended, "ended requests that ran and that policy no longer allows");
        }
        // Connections of one peer share its chain.
        let mut verdicts: HashMap<*const u8, bool> = HashMap::new();
        let closed = self.table.judge(changed, |facts| {
            if let Err(error) = policy::admit(own.mtls_mode(facts.application.port()), facts.arrival) {
                return Some(error.reason);
            }
            let (identity, sni) = (facts.caller.as_ref(), facts.sni.as_deref());
            let call = Call { identity, client: facts.client, application: facts.application, sni };
            let judgement = match &facts.head {
                Some(head) => policy::judge_running(&own, &call, head),
                None if facts.opaque => policy::judge_opaque(&own, &call),
                None => Judgement::default(),
            };
            if let Some(error) = judgement.refused {
                return Some(error.reason);
            }
            let proof = facts.proof.as_mut().filter(|proof| proof.bundle != bundles)?;
            let leaf = proof.chain.as_ptr().cast::<u8>();
            if *verdicts.entry(leaf).or_insert_with(|| self.tls.believes(proof, Purpose::Client)) {
                proof.bundle = bundles;
                return None;
            }
            Some(Reason::PeerCertificate)
        });
        if closed > 0 {
            tracing::warn!(
                connections = closed,
                "closed inbound connections that policy or the trust bundle no longer allows"
            );
        }
    }

    /// How often the watchdog looks: often enough for the shortest limit, at most once a second.
    pub fn tick(&self) -> Duration {
        (self.limits.head_timeout / 4).clamp(Duration::from_millis(10), Duration::from_secs(1))
    }
}
