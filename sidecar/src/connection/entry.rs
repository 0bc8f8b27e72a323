//! One open connection: what it is doing and since when, what is known of its peer, and what is asked of it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::time::{Duration, SystemTime};

use futures_util::task::AtomicWaker;
use http::request::Parts;
use outrigger_api::identity::SpiffeId;
use serde::Serialize;

use super::clock::Clock;
use super::holders::Holder;
use super::{Command, Direction, Facts, Places, State};
use crate::outcome::Reason;

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
    pub(super) since: AtomicU64,
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

impl Entry {
    /// One that was just accepted. `placed`: it has a place of its direction, which is `holder`'s.
    pub(super) fn new(
        id: u64,
        (direction, client): (Direction, SocketAddr),
        holder: Option<Holder>,
        placed: bool,
        clock: &Arc<Clock>,
    ) -> Entry {
        Entry {
            id,
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
            since: AtomicU64::new(clock.read()),
            command: AtomicU8::new(Command::Run as u8),
            asked_at: AtomicU64::new(0),
            closed_for: OnceLock::new(),
            waker: AtomicWaker::new(),
            clock: clock.clone(),
            ticking: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            doubted: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            retire_at: AtomicU64::new(u64::MAX),
        }
    }

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

    pub(super) fn since(&self) -> u64 {
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

    pub(super) fn facts(&self) -> MutexGuard<'_, Option<Facts>> {
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
    pub(super) fn give_place_back(&self, places: &Places) -> bool {
        let had = self.placed.swap(false, Relaxed);
        if had {
            places.give_back(self.direction);
            if let Some(holder) = self.holder().take() {
                places.leave(&holder);
            }
        }
        had
    }

    pub(super) fn holder(&self) -> MutexGuard<'_, Option<Holder>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The peer of an inbound connection proved to be `principal`, whose place it has from now on. False when that one has
    /// too many already.
    pub(super) fn prove(&self, places: &Places, principal: &SpiffeId) -> bool {
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
    pub(super) fn doubt(&self, idle: Duration) {
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

    pub(super) fn is_ticking(&self) -> bool {
        self.ticking.load(Relaxed)
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.load(Relaxed)
    }

    /// Wakes its task.
    pub(super) fn wake(&self) {
        self.waker.wake();
    }

    /// Whether its facts are new since this was asked last.
    pub(super) fn take_unjudged(&self) -> bool {
        self.unjudged.swap(false, Relaxed)
    }

    pub(super) fn about(&self) -> About {
        self.about.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
    pub(super) fn retire(&self, wall: u64) {
        let end = self.retire_at.load(Relaxed);
        if wall > end.saturating_add(RETIRED_MS) {
            self.close(Reason::PeerCertificate);
        } else if wall > end {
            self.ask(Command::Finish);
        }
    }

    /// A peer that was asked to end the connection need not do so: HTTP/2 takes new streams until the peer has
    /// acknowledged the GOAWAY.
    pub(super) fn hurry(&self, now: u64, idle: Duration) {
        let asked = Duration::from_millis(now.saturating_sub(self.asked_at.load(Relaxed)));
        match self.command() {
            Command::Finish if asked > ACKNOWLEDGED => self.ask(Command::Refuse),
            Command::Refuse if self.state() == State::Idle && idle.min(asked) > ENDED => self.ask(Command::Close),
            Command::Run | Command::Finish | Command::Refuse | Command::HeadTimeout | Command::Close => {}
        }
    }
}

pub(super) fn unix_millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
