//! The table of one worker's connections, as the watchdog and `/connections` read it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use outrigger_api::identity::SpiffeId;
use serde::Serialize;

use super::clock::Clock;
use super::entry::unix_millis;
use super::holders::{Holder, Idle};
use super::{About, Command, Direction, Entry, Facts, Places, State};
use crate::outcome::Reason;

/// Keeps an entry in the table; its drop takes it out and gives the place back.
#[derive(Debug)]
pub struct Registered {
    entry: Arc<Entry>,
    table: Arc<Table>,
}

impl std::ops::Deref for Registered {
    type Target = Arc<Entry>;

    fn deref(&self) -> &Arc<Entry> {
        &self.entry
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.table.entries().remove(&self.entry.id);
        self.entry.give_place_back(&self.table.places);
    }
}

impl Registered {
    /// The peer proved to be `principal`; false when that one has too many connections already.
    pub fn prove(&self, principal: &SpiffeId) -> bool {
        self.entry.prove(&self.table.places, principal)
    }
}

/// The idle limits that the watchdog holds connections to.
#[derive(Clone, Copy, Debug)]
pub struct IdleLimits {
    pub head: Duration,
    pub client_idle: Duration,
    pub stream_idle: Duration,
    pub stream_stalled: Duration,
    pub tunnel_idle: Duration,
}

impl IdleLimits {
    fn of_stream(&self, entry: &Entry) -> Duration {
        if entry.is_stalled() { self.stream_idle.min(self.stream_stalled) } else { self.stream_idle }
    }
}

/// One worker's connections.
#[derive(Debug)]
pub struct Table {
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    pub(super) clock: Arc<Clock>,
    places: Arc<Places>,
    next: AtomicU64,
}

impl Table {
    pub fn new(places: Arc<Places>) -> Arc<Table> {
        let table = Arc::new(Table { entries: Mutex::default(), clock: Clock::new(), places, next: AtomicU64::new(1) });
        table.places.watch(&table);
        table.places.wakes();
        table
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<u64, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place; `None` when its direction has none left, or the process is at its limit.
    pub fn enter(self: &Arc<Table>, direction: Direction, client: SocketAddr) -> Option<Registered> {
        let holder = match direction {
            Direction::Inbound => Some(Holder::source(client.ip())),
            Direction::Outbound => None,
        };
        self.places.take(direction, holder.as_ref()).then(|| self.register(direction, client, holder, true))
    }

    /// The inbound end of a connection of the workload to itself, whose outbound end has a place already: strangers cannot
    /// keep it out.
    pub fn enter_own(self: &Arc<Table>, client: SocketAddr) -> Registered {
        self.register(Direction::Inbound, client, None, false)
    }

    fn register(
        self: &Arc<Table>,
        direction: Direction,
        client: SocketAddr,
        holder: Option<Holder>,
        placed: bool,
    ) -> Registered {
        let id = self.next.fetch_add(1, Relaxed);
        let entry = Arc::new(Entry::new(id, (direction, client), holder, placed, &self.clock));
        self.entries().insert(entry.id, entry.clone());
        Registered { entry, table: self.clone() }
    }

    /// Inbound connections on which nothing runs: handshakes and first bytes that have not come, and HTTP connections between
    /// requests.
    pub(super) fn idle_inbound(&self) -> Vec<Idle<Arc<Entry>>> {
        let idle = |entry: &Arc<Entry>| {
            if !matches!(entry.state(), State::Opening | State::Idle) {
                return None;
            }
            let holder = entry.holder().clone()?;
            Some(Idle { holder, since: (entry.since(), entry.opened), connection: entry.clone() })
        };
        self.entries().values().filter_map(idle).collect()
    }

    /// The places of the whole process.
    pub fn places(&self) -> &Places {
        &self.places
    }

    pub fn len(&self) -> usize {
        self.entries().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The watchdog's tick: advances the clock and stops what has been in one state for too long. `wall` is the time by
    /// which certificates end. True when nothing moves: all connections are idle.
    pub fn sweep(&self, limits: &IdleLimits, wall: SystemTime) -> bool {
        let now = self.clock.advance();
        let wall = unix_millis(wall);
        let mut quiet = true;
        for entry in self.entries().values() {
            let idle = Duration::from_millis(now.saturating_sub(entry.since()));
            let state = entry.state();
            quiet &= match state {
                State::Idle => entry.command() == Command::Run,
                State::Tunnel => !entry.is_ticking(),
                State::Opening | State::Head | State::Busy => false,
            };
            if matches!(state, State::Idle | State::Head | State::Busy) {
                entry.retire(wall);
                entry.hurry(now, idle);
            }
            match state {
                State::Opening => {}
                State::Idle if idle > limits.client_idle => entry.ask(Command::Finish),
                State::Head if idle > limits.head => entry.ask(Command::HeadTimeout),
                State::Busy if idle > limits.of_stream(entry) => entry.close(Reason::StreamIdleTimeout),
                State::Tunnel if idle > limits.tunnel_idle => entry.doubt(limits.tunnel_idle),
                State::Busy | State::Tunnel if entry.is_ticking() => entry.wake(),
                State::Idle | State::Head | State::Busy | State::Tunnel => {}
            }
        }
        quiet
    }

    /// The watchdog's long pause, while nothing moves: until something does.
    pub async fn rest(&self) {
        self.clock.rest();
        self.places.rests();
        let resting = Resting(self);
        self.clock.moved().await;
        drop(resting);
        self.places.begins();
    }

    /// Closes each inbound connection for which `verdict` has a reason. Asked of every connection when what it was decided
    /// by has `changed`, else of those that were let in since the last time.
    pub fn judge(&self, changed: bool, mut verdict: impl FnMut(&mut Facts) -> Option<Reason>) -> usize {
        let mut closed = 0;
        for entry in self.entries().values() {
            if !entry.take_unjudged() && !changed {
                continue;
            }
            let reason = entry.facts().as_mut().and_then(&mut verdict);
            if let Some(reason) = reason.filter(|_| entry.command() != Command::Close) {
                entry.close(reason);
                closed += 1;
            }
        }
        closed
    }

    /// Asks every connection of which `which` is true.
    pub fn ask_all(&self, command: Command, which: impl Fn(&Entry) -> bool) {
        self.entries().values().filter(|entry| which(entry)).for_each(|entry| entry.ask(command));
    }

    /// What `/connections` shows, oldest first.
    pub fn views(&self) -> Vec<View> {
        let now = self.clock.last();
        let mut views: Vec<View> = self
            .entries()
            .values()
            .map(|entry| View {
                id: entry.id,
                direction: entry.direction,
                client: entry.client,
                state: entry.state(),
                idle_seconds: now.saturating_sub(entry.since()) as f64 / 1000.0,
                age_seconds: entry.opened.elapsed().unwrap_or_default().as_secs_f64(),
                about: entry.about(),
            })
            .collect();
        views.sort_by_key(|view| view.id);
        views
    }
}

/// One line of `/connections`.
#[derive(Debug, Serialize)]
pub struct View {
    pub id: u64,
    pub direction: Direction,
    pub client: SocketAddr,
    pub state: State,
    pub idle_seconds: f64,
    pub age_seconds: f64,
    #[serde(flatten)]
    pub about: About,
}

/// The watchdog rests as long as there is one of these.
struct Resting<'a>(&'a Table);

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.0.clock.rest_is_over();
        self.0.places.wakes();
    }
}
