//! The open downstream connections of one worker: what each is doing and since when, and on which facts it was let in. A
//! connection enters itself when it is accepted and leaves when it is dropped. The watchdog reads the table once per tick
//! and tells a connection to finish or to stop; `/connections` reads it from the control thread. Nothing here does I/O.

mod facts;
mod holders;
mod places;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant, SystemTime};

use futures_util::task::AtomicWaker;
use http::request::Parts;
use outrigger_api::identity::SpiffeId;
use serde::Serialize;
use tokio::sync::Notify;

use crate::outcome::Reason;

use holders::{Holder, Idle};

pub use facts::{Arrival, Facts, Proof};
pub use places::Places;

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
    /// The same for an HTTP/2 peer that had its time to acknowledge: refuse its new streams, and end when none runs.
    Refuse = 2,
    /// The head took too long: answer 408 and close.
    HeadTimeout = 3,
    /// Close now.
    Close = 4,
}

impl Command {
    fn from_u8(value: u8) -> Command {
        match value {
            1 => Command::Finish,
            2 => Command::Refuse,
            3 => Command::HeadTimeout,
            4 => Command::Close,
            _ => Command::Run,
        }
    }
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
    /// Of an inbound connection, once it was let in.
    facts: Mutex<Option<Facts>>,
    /// Its facts are new: the watchdog judges them at its next tick, because policy may have changed meanwhile.
    unjudged: AtomicBool,
    /// Whose place it has, of an inbound one.
    holder: Mutex<Option<Holder>>,
    /// HTTP/2 runs on it.
    http2: AtomicBool,
    /// It has its place still: the place of an evicted one is given back before its task has ended.
    placed: AtomicBool,
    state: AtomicU8,
    /// Clock of the table, milliseconds: when `state` was entered or bytes last moved.
    since: AtomicU64,
    command: AtomicU8,
    /// Clock of the table, milliseconds: when the connection was first asked to end.
    asked_at: AtomicU64,
    /// Why it is closed by this sidecar.
    closed_for: OnceLock<Reason>,
    waker: AtomicWaker,
    clock: Arc<Clock>,
    /// Its task is woken at each tick.
    ticking: AtomicBool,
    /// HTTP/1: bytes of the answer wait for a client that takes none.
    stalled: AtomicBool,
    /// Milliseconds for which nothing has moved on a tunnel, whose task is to find out whether its peers are alive; 0: none.
    doubted: AtomicU64,
    /// Requests that began on it.
    requests: AtomicU64,
    /// Wall clock, milliseconds since 1970: when the peer's certificate ends.
    retire_at: AtomicU64,
}

/// Milliseconds since the table began, set by the watchdog's tick, so that nobody on the walk reads a clock for it.
#[derive(Debug)]
struct Clock {
    begun: Instant,
    now: AtomicU64,
    /// The watchdog looks seldom, because nothing moves: whoever needs the clock wakes it.
    rests: AtomicBool,
    moved: Notify,
}

impl Clock {
    fn new() -> Arc<Clock> {
        Arc::new(Clock {
            begun: Instant::now(),
            now: AtomicU64::new(0),
            rests: AtomicBool::new(false),
            moved: Notify::new(),
        })
    }

    fn read(&self) -> u64 {
        if self.rests.load(Relaxed) { self.wake() } else { self.now.load(Relaxed) }
    }

    #[cold]
    fn wake(&self) -> u64 {
        self.rests.store(false, Relaxed);
        self.moved.notify_one();
        self.advance()
    }

    fn advance(&self) -> u64 {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.now.store(now, Relaxed);
        now
    }
}

/// The watchdog rests as long as there is one of these.
struct Resting<'a>(&'a Table);

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.0.clock.rests.store(false, Relaxed);
        self.0.places.wakes();
    }
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
        self.since.store(self.clock.read(), Relaxed);
    }

    /// Clock of the table, milliseconds: as coarse as the watchdog's ticks.
    pub fn clock(&self) -> u64 {
        self.clock.read()
    }

    fn since(&self) -> u64 {
        self.since.load(Relaxed)
    }

    /// The peer's certificate ends then: HTTP on this connection finishes, and what has not ended soon after is closed. By
    /// the wall clock, which also runs while the machine sleeps.
    pub fn retire_at(&self, not_after: SystemTime) {
        self.retire_at.store(unix_millis(not_after), Relaxed);
    }

    /// An inbound connection was let in, or has proved more since: the facts by which it is judged again.
    pub fn let_in(&self, facts: Facts) {
        *self.facts() = Some(facts);
        self.unjudged.store(true, Relaxed);
    }

    /// Its bytes are copied unparsed from here on.
    pub fn is_opaque(&self) {
        if let Some(facts) = self.facts().as_mut() {
            facts.opaque = true;
        }
        self.unjudged.store(true, Relaxed);
    }

    /// The client's own TLS asks for this name.
    pub fn asks_for(&self, sni: Option<String>) {
        if let Some(facts) = self.facts().as_mut() {
            facts.sni = sni;
        }
    }

    /// For which name the client's own TLS asks, where a rule looks at it.
    pub fn asked_for(&self) -> Option<String> {
        self.facts().as_ref().and_then(|facts| facts.sni.clone())
    }

    /// A request was let in with this head, and its connection leaves HTTP: it is judged by that head from here on.
    pub fn leaves_http(&self, head: Option<Parts>) {
        if let Some(facts) = self.facts().as_mut() {
            facts.opaque = head.is_none();
            facts.head = head.map(Box::new);
        }
        self.unjudged.store(true, Relaxed);
    }

    fn facts(&self) -> std::sync::MutexGuard<'_, Option<Facts>> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// HTTP/2 runs on it from now on.
    pub fn speaks_http2(&self) {
        self.http2.store(true, Relaxed);
    }

    pub fn is_http2(&self) -> bool {
        self.http2.load(Relaxed)
    }

    /// False when somebody did so before.
    fn give_place_back(&self, places: &Places) -> bool {
        let had = self.placed.swap(false, Relaxed);
        if had {
            places.give_back(self.direction);
            if let Some(holder) = self.holder().take() {
                places.leave(&holder);
            }
        }
        had
    }

    fn holder(&self) -> std::sync::MutexGuard<'_, Option<Holder>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The peer of an inbound connection proved to be `principal`, whose place it has from now on. False when that one has
    /// too many already.
    fn prove(&self, places: &Places, principal: &SpiffeId) -> bool {
        let principal = Holder::Principal(principal.clone());
        if !places.claim(&principal) {
            return false;
        }
        let mut holder = self.holder();
        // One that has lost its place meanwhile has none to hold.
        let before = holder.take();
        let left = match before {
            Some(stranger) => {
                *holder = Some(principal);
                stranger
            }
            None => principal,
        };
        places.leave(&left);
        true
    }

    /// Whether bytes wait for a client that takes none.
    pub fn stall(&self, stalled: bool) {
        self.stalled.store(stalled, Relaxed);
    }

    /// Asks the task of a tunnel whether its peers are alive: nothing has moved on it for so long.
    fn doubt(&self, idle: Duration) {
        self.doubted.store(u64::try_from(idle.as_millis()).unwrap_or(u64::MAX).max(1), Relaxed);
        self.waker.wake();
    }

    /// For how long nothing has moved, when the watchdog asks whether the peers are alive all the same.
    pub fn take_doubt(&self) -> Option<Duration> {
        let doubted = self.doubted.load(Relaxed);
        if doubted == 0 {
            return None;
        }
        self.doubted.store(0, Relaxed);
        Some(Duration::from_millis(doubted))
    }

    /// From now on the watchdog wakes the task that listens at each of its ticks: for what no readiness tells.
    pub fn tick(&self) {
        self.ticking.store(true, Relaxed);
    }

    pub fn describe(&self, change: impl FnOnce(&mut About)) {
        change(&mut self.about.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub fn command(&self) -> Command {
        Command::from_u8(self.command.load(Relaxed))
    }

    /// Asks the connection's task; a stronger command is never replaced by a weaker one.
    pub fn ask(&self, command: Command) {
        let before = self.command.fetch_max(command as u8, Relaxed);
        if before == Command::Run as u8 {
            self.asked_at.store(self.clock.read(), Relaxed);
        }
        if before < command as u8 {
            self.waker.wake();
        }
    }

    /// Closes it now, for a reason that its records tell. The first reason stays.
    pub fn close(&self, reason: Reason) {
        let _ = self.closed_for.set(reason);
        self.ask(Command::Close);
    }

    /// Why this sidecar closes it, if it does.
    pub fn closed_for(&self) -> Option<Reason> {
        self.closed_for.get().copied()
    }

    /// The connection's task says where to wake it when it is asked something.
    pub fn listen(&self, waker: &Waker) {
        self.waker.register(waker);
    }
}

/// How long an HTTP/2 peer has to acknowledge that no new streams are taken, before they are refused.
const ACKNOWLEDGED: Duration = Duration::from_secs(1);
/// How long a connection on which nothing runs and nothing moves may stay after that.
const ENDED: Duration = Duration::from_secs(2);
/// How long after the end of its peer's certificate an HTTP connection is closed with whatever runs on it: within 5 s, and
/// the watchdog looks once a second.
const RETIRED_MS: u64 = 3_000;

impl Entry {
    /// The end of the peer's certificate is the end of HTTP on its connection.
    fn retire(&self, wall: u64) {
        let end = self.retire_at.load(Relaxed);
        if wall > end.saturating_add(RETIRED_MS) {
            self.close(Reason::PeerCertificate);
        } else if wall > end {
            self.ask(Command::Finish);
        }
    }

    /// A peer that was asked to end the connection need not do so: HTTP/2 takes new streams until the peer has
    /// acknowledged the GOAWAY.
    fn hurry(&self, now: u64, idle: Duration) {
        let asked = Duration::from_millis(now.saturating_sub(self.asked_at.load(Relaxed)));
        match self.command() {
            Command::Finish if asked > ACKNOWLEDGED => self.ask(Command::Refuse),
            Command::Refuse if self.state() == State::Idle && idle.min(asked) > ENDED => self.ask(Command::Close),
            Command::Run | Command::Finish | Command::Refuse | Command::HeadTimeout | Command::Close => {}
        }
    }
}

fn unix_millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
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
        if entry.stalled.load(Relaxed) { self.stream_idle.min(self.stream_stalled) } else { self.stream_idle }
    }
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
        let table = Arc::new(Table { entries: Mutex::default(), clock: Clock::new(), places, next: AtomicU64::new(1) });
        table.places.watch(&table);
        table.places.wakes();
        table
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Entry>>> {
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
        let entry = Arc::new(Entry {
            id: self.next.fetch_add(1, Relaxed),
            direction,
            client,
            opened: SystemTime::now(),
            about: Mutex::default(),
            facts: Mutex::default(),
            unjudged: AtomicBool::new(false),
            holder: Mutex::new(holder),
            http2: AtomicBool::new(false),
            placed: AtomicBool::new(placed),
            state: AtomicU8::new(State::Opening as u8),
            since: AtomicU64::new(self.clock.read()),
            command: AtomicU8::new(Command::Run as u8),
            asked_at: AtomicU64::new(0),
            closed_for: OnceLock::new(),
            waker: AtomicWaker::new(),
            clock: self.clock.clone(),
            ticking: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            doubted: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            retire_at: AtomicU64::new(u64::MAX),
        });
        self.entries().insert(entry.id, entry.clone());
        Registered { entry, table: self.clone() }
    }

    /// Inbound connections on which nothing runs: handshakes and first bytes that have not come, and HTTP connections between
    /// requests.
    fn idle_inbound(&self) -> Vec<Idle<Arc<Entry>>> {
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
                State::Tunnel => !entry.ticking.load(Relaxed),
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
                State::Busy | State::Tunnel if entry.ticking.load(Relaxed) => entry.waker.wake(),
                State::Idle | State::Head | State::Busy | State::Tunnel => {}
            }
        }
        quiet
    }

    /// The watchdog's long pause, while nothing moves: until something does.
    pub async fn rest(&self) {
        self.clock.rests.store(true, Relaxed);
        self.places.rests();
        let resting = Resting(self);
        self.clock.moved.notified().await;
        drop(resting);
        self.places.begins();
    }

    /// Closes each inbound connection for which `verdict` has a reason. Asked of every connection when what it was decided
    /// by has `changed`, else of those that were let in since the last time.
    pub fn judge(&self, changed: bool, mut verdict: impl FnMut(&mut Facts) -> Option<Reason>) -> usize {
        let mut closed = 0;
        for entry in self.entries().values() {
            if !entry.unjudged.swap(false, Relaxed) && !changed {
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
    use super::places::ALWAYS;
    use super::*;

    fn client() -> SocketAddr {
        ([127, 0, 0, 1], 40000).into()
    }

    /// Each at another address: no source has all places.
    fn clients() -> impl Iterator<Item = SocketAddr> {
        (0..=u8::MAX).map(|number| ([10, 0, 0, number], 40000).into())
    }

    fn principal(account: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://outrigger.local/ns/shop/sa/{account}")).unwrap()
    }

    #[test]
    fn places_are_bounded_and_given_back() {
        let table = Table::new(Places::new(1));
        let first = table.enter(Direction::Outbound, client()).unwrap();
        assert!(table.enter(Direction::Outbound, client()).is_none());
        drop(first);
        assert!(table.enter(Direction::Outbound, client()).is_some());
        assert!(table.is_empty());
    }

    fn facts(arrival: Arrival) -> Facts {
        Facts {
            application: client(),
            arrival,
            proof: None,
            caller: None,
            client: client().ip(),
            opaque: false,
            sni: None,
            head: None,
        }
    }

    #[test]
    fn neither_direction_takes_the_places_of_the_other() {
        for (greedy, other) in [(Direction::Inbound, Direction::Outbound), (Direction::Outbound, Direction::Inbound)] {
            let table = Table::new(Places::new(100));
            let fill = |direction| -> Vec<Registered> {
                let entered = clients().map_while(|client| table.enter(direction, client));
                entered.inspect(|entry| entry.enter(State::Busy)).take(200).collect()
            };
            let taken = fill(greedy);
            assert_eq!(taken.len(), 80, "{greedy:?}");
            let others = fill(other);
            assert_eq!(others.len(), 20, "{other:?}");
            assert!(taken.iter().all(|entry| entry.command() == Command::Run), "what runs is not closed for others");
        }
    }

    #[test]
    fn the_longest_idle_strangers_make_room_over_all_workers() {
        let places = Places::new(7);
        let tables = [Table::new(places.clone()), Table::new(places.clone())];
        // The inbound share of 7 is 6. Each case: how it came, what it does.
        let cases = [
            (Some(Arrival::Mutual), State::Idle, false),
            (Some(Arrival::Plaintext), State::Busy, false),
            (Some(Arrival::Plaintext), State::Tunnel, false),
            (Some(Arrival::Plaintext), State::Idle, true),
            (Some(Arrival::Undecided), State::Opening, true),
            (None, State::Opening, true),
        ];
        let open: Vec<_> = cases
            .iter()
            .enumerate()
            .zip(clients())
            .map(|((index, (arrival, state, _)), client)| {
                let entry = tables[index % 2].enter(Direction::Inbound, client).unwrap();
                arrival.iter().for_each(|arrival| entry.let_in(facts(*arrival)));
                if *arrival == Some(Arrival::Mutual) {
                    assert!(entry.prove(&principal("cart")));
                }
                entry.enter(*state);
                entry.since.store(index as u64, Relaxed);
                entry
            })
            .collect();
        let mut later = Vec::new();
        for expected in [3, 4, 5] {
            let entry = tables[0].enter(Direction::Inbound, client()).expect("room was made");
            entry.enter(State::Busy);
            later.push(entry);
            let closed = |entry: &&Registered| entry.closed_for() == Some(Reason::Overloaded);
            let closed: Vec<_> = open.iter().filter(closed).map(|entry| entry.since()).collect();
            assert_eq!(closed, (3..=expected).collect::<Vec<u64>>());
        }
        let entry = tables[0].enter(Direction::Inbound, client()).expect("no stranger is left");
        entry.enter(State::Busy);
        later.push(entry);
        assert_eq!(open[0].closed_for(), Some(Reason::Overloaded));
        assert!(tables[1].enter(Direction::Inbound, client()).is_none(), "nothing idle is left");
        assert_eq!(places.open(), 6);
        drop(open);
        assert_eq!(places.open(), 4, "the place of an evicted connection is given back once");
        // The application's own connections make strangers go as well.
        let stranger = tables[0].enter(Direction::Inbound, client()).unwrap();
        let outbound: Vec<_> = (0..3).map(|_| tables[1].enter(Direction::Outbound, client()).unwrap()).collect();
        assert_eq!((stranger.command(), outbound.len(), later.len()), (Command::Close, 3, 4));
    }

    #[test]
    fn neither_one_identity_nor_one_source_has_all_places() {
        // Of 100 the inbound share is 80, and three quarters of that are 60.
        for proved in [true, false] {
            let table = Table::new(Places::new(100));
            let mut next = clients();
            let mut enter = |state: State| {
                let client = if proved { next.next().unwrap() } else { client() };
                let entry = table.enter(Direction::Inbound, client)?;
                (!proved || entry.prove(&principal("cart"))).then_some(())?;
                entry.enter(state);
                Some(entry)
            };
            let busy: Vec<_> = (0..59).map(|_| enter(State::Busy).unwrap()).collect();
            let idle = enter(State::Idle).unwrap();
            let last = enter(State::Busy).expect("its own idle one makes room");
            assert_eq!(idle.closed_for(), Some(Reason::Overloaded));
            assert!(enter(State::Busy).is_none(), "{proved}");
            // Somebody else, whose identity is another, or none.
            let others: Vec<_> = (1..=20)
                .map(|number| {
                    let entry = table.enter(Direction::Inbound, ([192, 0, 2, number], 1).into()).expect("a place");
                    assert!(number % 2 == 0 || entry.prove(&principal("web")));
                    entry.enter(State::Busy);
                    entry
                })
                .collect();
            assert!(table.enter(Direction::Inbound, ([192, 0, 2, 77], 1).into()).is_none(), "all are taken");
            assert!(busy.iter().chain(&others).all(|entry| entry.command() == Command::Run));
            drop((idle, last, busy, others));
            assert_eq!(table.places().open(), 0);
        }
    }

    #[test]
    fn what_does_not_end_when_its_certificate_does_is_closed() {
        let table = Table::new(Places::new(10));
        let long = Duration::from_secs(3600);
        let limits =
            IdleLimits { head: long, client_idle: long, stream_idle: long, stream_stalled: long, tunnel_idle: long };
        let end = SystemTime::now();
        let states = [State::Idle, State::Head, State::Busy, State::Tunnel];
        let open: Vec<_> = states
            .iter()
            .map(|state| {
                let entry = table.enter(Direction::Inbound, client()).unwrap();
                entry.retire_at(end);
                entry.enter(*state);
                entry
            })
            .collect();
        let commands = |seconds: f64| {
            table.sweep(&limits, end + Duration::from_secs_f64(seconds));
            open.iter().map(|entry| entry.command()).collect::<Vec<_>>()
        };
        use Command::{Close, Finish, Run};
        assert_eq!(commands(0.0), [Run, Run, Run, Run]);
        assert_eq!(commands(0.1), [Finish, Finish, Finish, Run]);
        assert_eq!(commands(3.1), [Close, Close, Close, Run], "opaque bytes live on");
        assert_eq!(open[0].closed_for(), Some(Reason::PeerCertificate));
    }

    #[test]
    fn a_connection_that_does_not_acknowledge_the_end_is_ended() {
        let table = Table::new(Places::new(10));
        let (idle, busy) =
            (table.enter(Direction::Inbound, client()).unwrap(), table.enter(Direction::Inbound, client()).unwrap());
        idle.enter(State::Idle);
        busy.enter(State::Busy);
        table.ask_all(Command::Finish, |_| true);
        let mut now = 0;
        let mut after = |milliseconds: u64| {
            now += milliseconds;
            [&idle, &busy].map(|entry| {
                let idle = Duration::from_millis(now - entry.since());
                entry.hurry(now, idle);
                entry.command()
            })
        };
        assert_eq!(after(1_000), [Command::Finish; 2]);
        assert_eq!(after(1), [Command::Refuse; 2]);
        assert_eq!(after(500), [Command::Refuse; 2]);
        assert_eq!(after(500), [Command::Close, Command::Refuse], "what runs has until the end of the drain");
        busy.enter(State::Idle);
        assert_eq!(after(1)[1], Command::Close, "its last stream has ended");
    }

    #[test]
    fn facts_are_judged_when_they_are_new_and_when_policy_changed() {
        let table = Table::new(Places::new(10));
        let entry = table.enter(Direction::Inbound, client()).unwrap();
        let mut asked = 0;
        let mut judge = |changed, verdict: Option<Reason>| {
            table.judge(changed, |_| {
                asked += 1;
                verdict
            });
            asked
        };
        assert_eq!(judge(true, None), 0, "not let in yet");
        entry.let_in(facts(Arrival::Plaintext));
        assert_eq!(judge(false, None), 1);
        assert_eq!(judge(false, None), 1);
        assert_eq!(judge(true, Some(Reason::MtlsRequired)), 2);
        assert_eq!((entry.command(), entry.closed_for()), (Command::Close, Some(Reason::MtlsRequired)));
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
            stream_stalled: Duration::ZERO,
            tunnel_idle: Duration::ZERO,
        };
        let cases = [
            (State::Opening, Command::Run),
            (State::Idle, Command::Finish),
            (State::Head, Command::HeadTimeout),
            (State::Busy, Command::Close),
            // Its task is asked first.
            (State::Tunnel, Command::Run),
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
        table.sweep(&zero, SystemTime::now());
        for (entry, (state, command)) in entries.iter().zip(cases) {
            assert_eq!(entry.command(), command, "{state:?}");
            assert_eq!(entry.take_doubt().is_some(), state == State::Tunnel, "{state:?}");
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
