//! The open downstream connections of one worker: what each is doing and since when. A connection enters itself
//! when it is accepted and leaves when it is dropped. The watchdog reads the table once per tick and tells a
//! connection to finish or to stop; `/connections` reads it from the control thread. Nothing here does I/O.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant, SystemTime};

use futures_util::task::AtomicWaker;
use serde::Serialize;

/// Seen from the service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    pub const fn as_str(self) -> &'static str {
        match self {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        }
    }
}

/// What a connection is doing; the watchdog has one limit for each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum State {
    /// Accepted: TLS handshake, detection, lookup. Bounded by timers of their own.
    Opening = 0,
    /// HTTP/1 between requests, or HTTP/2 without a stream.
    Idle = 1,
    /// The first byte of a request head has come, its end has not.
    Head = 2,
    /// At least one request is being served.
    Busy = 3,
    /// Bytes flow unparsed.
    Tunnel = 4,
}

impl State {
    fn from_u8(value: u8) -> State {
        match value {
            1 => State::Idle,
            2 => State::Head,
            3 => State::Busy,
            4 => State::Tunnel,
            _ => State::Opening,
        }
    }
}

/// What the watchdog or the drain asks of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Command {
    Run = 0,
    /// Finish what runs, take nothing new.
    Finish = 1,
    /// The head took too long: answer 408 and close.
    HeadTimeout = 2,
    /// Close now.
    Close = 3,
}

/// What `/connections` tells about one.
#[derive(Clone, Debug, Default, Serialize)]
pub struct About {
    /// The peer's SPIFFE id.
    pub principal: Option<String>,
    pub protocol: &'static str,
    pub destination: String,
    pub mtls: bool,
    /// The server name in an application's own TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sni: Option<String>,
}

/// One open connection. Shared between its task, the watchdog and the admin thread; every field that changes while
/// requests flow is an atomic that only its own worker writes.
#[derive(Debug)]
pub struct Entry {
    pub id: u64,
    pub direction: Direction,
    pub client: SocketAddr,
    pub opened: SystemTime,
    about: Mutex<About>,
    state: AtomicU8,
    /// Clock of the table, milliseconds: when `state` was entered or bytes last moved.
    since: AtomicU64,
    command: AtomicU8,
    waker: AtomicWaker,
    clock: Arc<Clock>,
    /// Its task is woken at each tick.
    ticking: AtomicBool,
    /// Requests that began on it.
    requests: AtomicU64,
    /// Clock of the table, milliseconds: when the peer's proof of who it is ends.
    retire_at: AtomicU64,
}

/// Milliseconds since the table began, set by the watchdog's tick, so that nobody on the walk reads a clock for it.
#[derive(Debug)]
struct Clock {
    begun: Instant,
    now: AtomicU64,
}

impl Entry {
    pub fn state(&self) -> State {
        State::from_u8(self.state.load(Relaxed))
    }

    pub fn enter(&self, state: State) {
        self.state.store(state as u8, Relaxed);
        self.touch();
    }

    /// A request began.
    pub fn begin_request(&self) {
        self.requests.fetch_add(1, Relaxed);
        self.enter(State::Busy);
    }

    /// How many requests began so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// Bytes moved.
    pub fn touch(&self) {
        self.since.store(self.clock.now.load(Relaxed), Relaxed);
    }

    /// Clock of the table, milliseconds: as coarse as the watchdog's ticks.
    pub fn clock(&self) -> u64 {
        self.clock.now.load(Relaxed)
    }

    /// HTTP on this connection is to end, gracefully, after this time.
    pub fn retire_after(&self, left: Duration) {
        let left = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        self.retire_at.store(self.clock.now.load(Relaxed).saturating_add(left), Relaxed);
    }

    /// From now on the watchdog wakes the task that listens at each of its ticks: for what no readiness tells.
    pub fn tick(&self) {
        self.ticking.store(true, Relaxed);
    }

    pub fn describe(&self, change: impl FnOnce(&mut About)) {
        change(&mut self.about.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub fn command(&self) -> Command {
        match self.command.load(Relaxed) {
            1 => Command::Finish,
            2 => Command::HeadTimeout,
            3 => Command::Close,
            _ => Command::Run,
        }
    }

    /// Asks the connection's task; a stronger command is never replaced by a weaker one.
    pub fn ask(&self, command: Command) {
        if self.command.fetch_max(command as u8, Relaxed) < command as u8 {
            self.waker.wake();
        }
    }

    /// The connection's task says where to wake it when it is asked something.
    pub fn listen(&self, waker: &Waker) {
        self.waker.register(waker);
    }
}

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
        self.table.places.open.fetch_sub(1, Relaxed);
    }
}

/// The places of the whole process: a bound over all workers.
#[derive(Debug)]
pub struct Places {
    limit: usize,
    open: AtomicUsize,
    /// Memory is short.
    refused: AtomicBool,
}

/// So many connections are let in even when memory is short: it is not they who take it, and an allocator that gives
/// nothing back must not close a sidecar for ever.
const ALWAYS: usize = 16;

impl Places {
    pub fn new(limit: usize) -> Arc<Places> {
        Arc::new(Places { limit, open: AtomicUsize::new(0), refused: AtomicBool::new(false) })
    }

    pub fn open(&self) -> usize {
        self.open.load(Relaxed)
    }

    /// Whether connections are refused beyond a few; what is open goes on.
    pub fn refuse(&self, refused: bool) {
        self.refused.store(refused, Relaxed);
    }

    fn limit(&self) -> usize {
        if self.refused.load(Relaxed) { self.limit.min(ALWAYS) } else { self.limit }
    }
}

/// The idle limits that the watchdog holds connections to.
#[derive(Clone, Copy, Debug)]
pub struct IdleLimits {
    pub head: Duration,
    pub client_idle: Duration,
    pub stream_idle: Duration,
    pub tunnel_idle: Duration,
}

/// One worker's connections.
#[derive(Debug)]
pub struct Table {
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    clock: Arc<Clock>,
    places: Arc<Places>,
    next: AtomicU64,
}

impl Table {
    pub fn new(places: Arc<Places>) -> Arc<Table> {
        Arc::new(Table {
            entries: Mutex::default(),
            clock: Arc::new(Clock { begun: Instant::now(), now: AtomicU64::new(0) }),
            places,
            next: AtomicU64::new(1),
        })
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place; `None` when the process is at its limit.
    pub fn enter(self: &Arc<Table>, direction: Direction, client: SocketAddr) -> Option<Registered> {
        if self.places.open.fetch_add(1, Relaxed) >= self.places.limit() {
            self.places.open.fetch_sub(1, Relaxed);
            return None;
        }
        let entry = Arc::new(Entry {
            id: self.next.fetch_add(1, Relaxed),
            direction,
            client,
            opened: SystemTime::now(),
            about: Mutex::default(),
            state: AtomicU8::new(State::Opening as u8),
            since: AtomicU64::new(self.clock.now.load(Relaxed)),
            command: AtomicU8::new(Command::Run as u8),
            waker: AtomicWaker::new(),
            clock: self.clock.clone(),
            ticking: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            retire_at: AtomicU64::new(u64::MAX),
        });
        self.entries().insert(entry.id, entry.clone());
        Some(Registered { entry, table: self.clone() })
    }

    pub fn len(&self) -> usize {
        self.entries().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The watchdog's tick: advances the clock and stops what has been in one state for too long.
    pub fn sweep(&self, limits: &IdleLimits) {
        let now = u64::try_from(self.clock.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.clock.now.store(now, Relaxed);
        for entry in self.entries().values() {
            let idle = Duration::from_millis(now.saturating_sub(entry.since.load(Relaxed)));
            match entry.state() {
                State::Opening => {}
                // The watchdog goes on, for what does not finish.
                State::Idle | State::Head | State::Busy
                    if now > entry.retire_at.load(Relaxed) && entry.command() == Command::Run =>
                {
                    entry.ask(Command::Finish);
                }
                State::Idle if idle > limits.client_idle => entry.ask(Command::Finish),
                State::Head if idle > limits.head => entry.ask(Command::HeadTimeout),
                State::Busy if idle > limits.stream_idle => entry.ask(Command::Close),
                State::Tunnel if idle > limits.tunnel_idle => entry.ask(Command::Close),
                State::Tunnel if entry.ticking.load(Relaxed) => entry.waker.wake(),
                State::Idle | State::Head | State::Busy | State::Tunnel => {}
            }
        }
    }

    /// Asks every connection of which `which` is true.
    pub fn ask_all(&self, command: Command, which: impl Fn(&Entry, &About) -> bool) {
        for entry in self.entries().values() {
            if which(entry, &entry.about.lock().unwrap_or_else(PoisonError::into_inner)) {
                entry.ask(command);
            }
        }
    }

    /// What `/connections` shows, oldest first.
    pub fn views(&self) -> Vec<View> {
        let now = self.clock.now.load(Relaxed);
        let mut views: Vec<View> = self
            .entries()
            .values()
            .map(|entry| View {
                id: entry.id,
                direction: entry.direction,
                client: entry.client,
                state: entry.state(),
                idle_seconds: now.saturating_sub(entry.since.load(Relaxed)) as f64 / 1000.0,
                age_seconds: entry.opened.elapsed().unwrap_or_default().as_secs_f64(),
                about: entry.about.lock().unwrap_or_else(PoisonError::into_inner).clone(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> SocketAddr {
        ([127, 0, 0, 1], 40000).into()
    }

    #[test]
    fn places_are_bounded_and_given_back() {
        let table = Table::new(Places::new(1));
        let first = table.enter(Direction::Inbound, client()).unwrap();
        assert!(table.enter(Direction::Inbound, client()).is_none());
        drop(first);
        assert!(table.enter(Direction::Inbound, client()).is_some());
        assert!(table.is_empty());
    }

    #[test]
    fn while_memory_is_short_few_come_in_and_none_has_to_go() {
        let places = Places::new(100);
        let table = Table::new(places.clone());
        let enter = || table.enter(Direction::Outbound, client());
        let mut open: Vec<_> = (0..50).map(|_| enter().unwrap()).collect();
        places.refuse(true);
        assert!(enter().is_none());
        assert_eq!(places.open(), 50, "what is open goes on");
        open.truncate(ALWAYS - 1);
        let last = enter().expect("a few are always let in");
        assert!(enter().is_none());
        places.refuse(false);
        assert!(enter().is_some());
        drop(last);
    }

    #[test]
    fn the_watchdog_knows_a_limit_for_each_state() {
        let table = Table::new(Places::new(10));
        let zero = IdleLimits {
            head: Duration::ZERO,
            client_idle: Duration::ZERO,
            stream_idle: Duration::ZERO,
            tunnel_idle: Duration::ZERO,
        };
        let cases = [
            (State::Opening, Command::Run),
            (State::Idle, Command::Finish),
            (State::Head, Command::HeadTimeout),
            (State::Busy, Command::Close),
            (State::Tunnel, Command::Close),
        ];
        let entries: Vec<_> = cases
            .iter()
            .map(|(state, _)| {
                let entry = table.enter(Direction::Inbound, client()).unwrap();
                entry.enter(*state);
                entry
            })
            .collect();
        while table.clock.begun.elapsed() < Duration::from_millis(2) {
            std::hint::spin_loop();
        }
        table.sweep(&zero);
        for (entry, (state, command)) in entries.iter().zip(cases) {
            assert_eq!(entry.command(), command, "{state:?}");
        }
    }

    #[test]
    fn a_weaker_command_does_not_replace_a_stronger() {
        let table = Table::new(Places::new(1));
        let entry = table.enter(Direction::Inbound, client()).unwrap();
        entry.ask(Command::Close);
        entry.ask(Command::Finish);
        assert_eq!(entry.command(), Command::Close);
    }
}
