//! What is known, shared by all workers: the own workload and every destination that somebody asked for, each on its
//! own `watch`. Written by the discovery task alone; asking for an unknown destination subscribes to it.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use outrigger_api::snapshot::{Destination, Key, Workload};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::tls::Clock;

/// Destinations that are known at once. A client of the forward proxy may name anything, so there is an end.
pub const MAX_DESTINATIONS: usize = 10_000;
/// A destination that nobody holds a receiver of is forgotten after this long.
const UNUSED: Duration = Duration::from_secs(600);
/// How many unused destinations go at once when there are too many: looking for them costs more than removing them.
const EVICTED_AT_ONCE: usize = MAX_DESTINATIONS / 10;

/// What is known of a destination.
#[derive(Clone, PartialEq, Debug)]
pub enum Known {
    /// The control plane has not answered yet.
    Pending,
    /// Nobody registered it. It may be registered later.
    Unregistered,
    /// This sidecar knows too many destinations to ask for one more. It may well be registered, so it must not be
    /// taken for unregistered and dialled in plaintext. To be asked for again.
    Untold,
    Registered(Arc<Destination>),
    /// What the name of a service stands for, best first. Only a [`Key::Name`] is known like this, and it is never known
    /// as `Registered`.
    Named(Arc<[IpAddr]>),
}

/// What became of this sidecar's registration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LeaseState {
    Pending,
    /// Registered; the Services (`name.namespace`) that select this workload.
    Accepted {
        services: Arc<[String]>,
    },
    /// The control plane does not take it, and says why. It is tried again.
    Refused {
        reason: Arc<str>,
    },
}

/// A handle on all of it; cloning shares it.
#[derive(Clone)]
pub struct Directory(Arc<Shared>);

struct Shared {
    own: watch::Sender<Option<Arc<Workload>>>,
    own_version: Mutex<Option<u64>>,
    connected: watch::Sender<bool>,
    lease: watch::Sender<LeaseState>,
    duplicate: watch::Sender<Option<Arc<str>>>,
    destinations: RwLock<HashMap<Key, Entry>>,
    /// What the discovery task has to tell the control plane. Sent while the map is locked for writing, so that the
    /// order is that of the map.
    changes: mpsc::UnboundedSender<Change>,
    /// Taken by the discovery task.
    changes_receiver: Mutex<Option<mpsc::UnboundedReceiver<Change>>>,
    /// Answers for what cannot be known here; never sent to.
    untold: watch::Sender<Known>,
    /// When an attempt to make room was made last and found nothing, in milliseconds since `start`.
    full_since: AtomicU64,
    confirmed: Mutex<Option<SystemTime>>,
    clock: Clock,
    start: Instant,
}

struct Entry {
    known: watch::Sender<Known>,
    version: Option<u64>,
    /// When a receiver was last seen, in milliseconds since `start`.
    used: AtomicU64,
}

/// A change of what this sidecar is interested in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Change {
    Subscribe(Key),
    Unsubscribe(Key),
}

/// What became of an update.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Applied {
    New,
    /// The version that was there already.
    Same,
    /// Older than what is in use, which has this version.
    Older(u64),
    /// Nobody is interested any more.
    Forgotten,
}

impl Directory {
    pub fn new(clock: Clock) -> Directory {
        let (changes, changes_receiver) = mpsc::unbounded_channel();
        Directory(Arc::new(Shared {
            own: watch::Sender::new(None),
            own_version: Mutex::default(),
            connected: watch::Sender::new(false),
            lease: watch::Sender::new(LeaseState::Pending),
            duplicate: watch::Sender::new(None),
            destinations: RwLock::default(),
            changes,
            changes_receiver: Mutex::new(Some(changes_receiver)),
            untold: watch::Sender::new(Known::Untold),
            full_since: AtomicU64::new(0),
            confirmed: Mutex::default(),
            clock,
            start: Instant::now(),
        }))
    }

    /// The own workload: None until the control plane (or the `--state` copy) has told.
    pub fn own(&self) -> watch::Receiver<Option<Arc<Workload>>> {
        self.0.own.subscribe()
    }

    /// What is known of a destination, now and later. The first call subscribes; a later one costs a read lock and a
    /// look-up. Hold the receiver while the destination is of interest and drop it after: it keeps the subscription.
    /// The channel never closes.
    pub fn destination(&self, key: &Key) -> watch::Receiver<Known> {
        let now = self.millis();
        if let Some(entry) = self.0.destinations.read().unwrap_or_else(PoisonError::into_inner).get(key) {
            entry.used.store(now, Ordering::Relaxed);
            return entry.known.subscribe();
        }
        self.subscribe(key, now)
    }

    /// What is known of a destination that was asked for before. Unlike [`Directory::destination`] it never subscribes.
    pub fn remembered(&self, key: &Key) -> Option<Known> {
        let destinations = self.0.destinations.read().unwrap_or_else(PoisonError::into_inner);
        let entry = destinations.get(key)?;
        entry.used.store(self.millis(), Ordering::Relaxed);
        Some(entry.known.borrow().clone())
    }

    fn subscribe(&self, key: &Key, now: u64) -> watch::Receiver<Known> {
        if *key == Key::Own {
            return self.0.untold.subscribe();
        }
        let mut destinations = self.0.destinations.write().unwrap_or_else(PoisonError::into_inner);
        if destinations.len() >= MAX_DESTINATIONS && !destinations.contains_key(key) {
            self.make_room(&mut destinations, now);
        }
        if destinations.len() >= MAX_DESTINATIONS && !destinations.contains_key(key) {
            return self.0.untold.subscribe();
        }
        match destinations.entry(key.clone()) {
            Slot::Occupied(slot) => slot.get().known.subscribe(),
            Slot::Vacant(slot) => {
                self.change(Change::Subscribe(key.clone()));
                let entry = Entry { known: watch::Sender::new(Known::Pending), version: None, used: now.into() };
                slot.insert(entry).known.subscribe()
            }
        }
    }

    /// Whether a stream to the control plane is open and has answered.
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.0.connected.subscribe()
    }

    pub fn lease(&self) -> watch::Receiver<LeaseState> {
        self.0.lease.subscribe()
    }

    /// What the control plane says when another sidecar has the name of this one.
    pub fn duplicate(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.0.duplicate.subscribe()
    }

    /// How long ago the control plane last stood by what is known here: zero while connected, None when it never did.
    pub fn snapshot_age(&self) -> Option<Duration> {
        if *self.0.connected.borrow() {
            return Some(Duration::ZERO);
        }
        let confirmed = (*self.0.confirmed.lock().unwrap_or_else(PoisonError::into_inner))?;
        Some(self.0.clock.now().duration_since(confirmed).unwrap_or_default())
    }

    /// All destinations with what is known of them, for `/config`.
    pub fn known(&self) -> Vec<(Key, Known)> {
        let destinations = self.0.destinations.read().unwrap_or_else(PoisonError::into_inner);
        destinations.iter().map(|(key, entry)| (key.clone(), entry.known.borrow().clone())).collect()
    }

    // What follows is for the discovery task.

    pub(super) fn take_changes(&self) -> Option<mpsc::UnboundedReceiver<Change>> {
        self.0.changes_receiver.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn keys(&self) -> Vec<Key> {
        self.0.destinations.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    pub(super) fn versions(&self) -> (Option<u64>, Vec<(Key, u64, Known)>) {
        let own = *self.0.own_version.lock().unwrap_or_else(PoisonError::into_inner);
        let destinations = self.0.destinations.read().unwrap_or_else(PoisonError::into_inner);
        let known = |(key, entry): (&Key, &Entry)| Some((key.clone(), entry.version?, entry.known.borrow().clone()));
        (own, destinations.iter().filter_map(known).collect())
    }

    pub(super) fn set_own(&self, version: u64, workload: Workload) -> Applied {
        let mut current = self.0.own_version.lock().unwrap_or_else(PoisonError::into_inner);
        let applied = compare(*current, version);
        if applied == Applied::New {
            *current = Some(version);
            self.0.own.send_if_modified(|own| replace(own, Some(Arc::new(workload))));
        }
        applied
    }

    pub(super) fn set_destination(&self, key: &Key, version: u64, known: Known) -> Applied {
        let mut destinations = self.0.destinations.write().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = destinations.get_mut(key) else { return Applied::Forgotten };
        let applied = compare(entry.version, version);
        if applied == Applied::New {
            entry.version = Some(version);
            entry.known.send_if_modified(|current| replace(current, known));
        }
        applied
    }

    /// Puts back what `--state` remembers of a destination; an answer of the control plane is never overwritten.
    pub(super) fn restore(&self, key: Key, version: u64, known: Known) {
        let now = self.millis();
        let mut destinations = self.0.destinations.write().unwrap_or_else(PoisonError::into_inner);
        if destinations.len() < MAX_DESTINATIONS
            && let Slot::Vacant(slot) = destinations.entry(key)
        {
            self.change(Change::Subscribe(slot.key().clone()));
            slot.insert(Entry { known: watch::Sender::new(known), version: Some(version), used: now.into() });
        }
    }

    /// After the control plane was replaced by another one: its versions begin anew.
    pub(super) fn forget_versions(&self) {
        *self.0.own_version.lock().unwrap_or_else(PoisonError::into_inner) = None;
        for entry in self.0.destinations.write().unwrap_or_else(PoisonError::into_inner).values_mut() {
            entry.version = None;
        }
    }

    pub(super) fn set_connected(&self, connected: bool) {
        let before = *self.0.connected.borrow();
        if before || connected {
            self.set_confirmed(self.0.clock.now());
        }
        self.0.connected.send_if_modified(|current| replace(current, connected));
    }

    pub(super) fn set_confirmed(&self, at: SystemTime) {
        *self.0.confirmed.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    pub(super) fn set_duplicate(&self, told: Option<Arc<str>>) {
        self.0.duplicate.send_if_modified(|known| {
            let changed = *known != told;
            *known = told;
            changed
        });
    }

    pub(super) fn set_lease(&self, state: LeaseState) {
        self.0.lease.send_if_modified(|current| replace(current, state));
    }

    /// Unsubscribes from what nobody has held a receiver of for ten minutes.
    pub(super) fn forget_unused(&self) {
        let now = self.millis();
        let unused = u64::try_from(UNUSED.as_millis()).unwrap_or(u64::MAX);
        let mut destinations = self.0.destinations.write().unwrap_or_else(PoisonError::into_inner);
        destinations.retain(|key, entry| {
            if entry.known.receiver_count() > 0 {
                entry.used.store(now, Ordering::Relaxed);
                return true;
            }
            let keep = now.saturating_sub(entry.used.load(Ordering::Relaxed)) < unused;
            if !keep {
                self.change(Change::Unsubscribe(key.clone()));
            }
            keep
        });
    }

    /// Removes the destinations that were unused the longest. Looks for them once a second at most.
    fn make_room(&self, destinations: &mut HashMap<Key, Entry>, now: u64) {
        let full_since = self.0.full_since.load(Ordering::Relaxed);
        if full_since != 0 && now.saturating_sub(full_since) < 1_000 {
            return;
        }
        let mut unused: Vec<(u64, Key)> = destinations
            .iter()
            .filter(|(_, entry)| entry.known.receiver_count() == 0)
            .map(|(key, entry)| (entry.used.load(Ordering::Relaxed), key.clone()))
            .collect();
        self.0.full_since.store(if unused.is_empty() { now.max(1) } else { 0 }, Ordering::Relaxed);
        unused.sort_unstable_by_key(|(used, _)| *used);
        for (_, key) in unused.into_iter().take(EVICTED_AT_ONCE) {
            destinations.remove(&key);
            self.change(Change::Unsubscribe(key));
        }
    }

    /// Nobody listens once the discovery task has ended; then there is nothing to tell either.
    fn change(&self, change: Change) {
        let _ = self.0.changes.send(change);
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.0.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn compare(current: Option<u64>, version: u64) -> Applied {
    match current {
        Some(current) if version < current => Applied::Older(current),
        Some(current) if version == current => Applied::Same,
        _ => Applied::New,
    }
}

/// True when it changed something: receivers are woken only then.
fn replace<T: PartialEq>(current: &mut T, new: T) -> bool {
    let changed = *current != new;
    if changed {
        *current = new;
    }
    changed
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known = self.0.destinations.read().unwrap_or_else(PoisonError::into_inner).len();
        write!(f, "Directory({known} destinations)")
    }
}
