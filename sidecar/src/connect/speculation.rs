//! What one worker remembers of clients that say nothing on ports whose protocol nobody declared: how many of them wait,
//! for which destinations an upstream is open on suspicion, and who was found to speak first there.
//!
//! An upstream is opened on suspicion for one client of a destination and for few destinations at once; the destination's
//! other silent clients wait in line and hear what comes of it. When that takes long, because the server takes its time
//! before it speaks, they do not wait for one another: each opens its own, up to a bound. Who holds one of the few places gives it up when another
//! destination wants it and nobody has spoken for a while. `protocol/silence.rs` is who calls; nothing here does I/O.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::time::Duration;

use outrigger_api::snapshot::Key;
use tokio::sync::{Notify, Semaphore, SemaphorePermit, watch};
use tokio::time::Instant;

use crate::config::limits::Limits;
use crate::outcome::Error;

/// Destinations remembered at once. What comes on top is detected without memory.
const MOST_DESTINATIONS: usize = 4096;

/// Who speaks first on a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpeaksFirst {
    Client,
    Server,
}

/// One worker's silent clients.
pub struct Speculation {
    destinations: RefCell<HashMap<Key, Rc<Suspect>>>,
    memory: Duration,
    places: Semaphore,
    most_places: usize,
    /// Who waits for a place, and how many were already told to give one up for them.
    wanted: Cell<usize>,
    promised: Cell<usize>,
    want: Notify,
    /// Upstreams opened beside the first one of a destination.
    beside: Semaphore,
    beside_after: Duration,
    most_beside: usize,
    /// By the age of their connections.
    undecided: RefCell<BTreeMap<u64, Rc<Notify>>>,
    most_undecided: usize,
}

/// One destination of silent clients.
pub struct Suspect {
    learned: Cell<Option<(SpeaksFirst, Instant)>>,
    turn: Semaphore,
    /// Since when the upstream of the one ahead is open.
    silent_since: Cell<Option<Instant>>,
    beside: Semaphore,
    waiting: Cell<usize>,
    news: watch::Sender<News>,
}

/// What a destination's waiting clients hear from the one that went ahead.
#[derive(Clone, Debug)]
pub enum News {
    Nothing,
    ServerSpoke,
    /// The upstream could not be opened.
    Failed(Error),
}

/// The right to open one upstream on suspicion; given back when dropped.
pub struct Place<'a> {
    _turn: SemaphorePermit<'a>,
    _place: SemaphorePermit<'a>,
}

impl Speculation {
    pub fn new(limits: &Limits) -> Speculation {
        Speculation {
            destinations: RefCell::default(),
            memory: limits.detect_memory,
            places: Semaphore::new(limits.speculative_connects),
            most_places: limits.speculative_connects,
            wanted: Cell::new(0),
            promised: Cell::new(0),
            want: Notify::new(),
            beside: Semaphore::new(limits.speculative_beside_all),
            beside_after: limits.speculation_widens,
            most_beside: limits.speculative_beside,
            undecided: RefCell::default(),
            most_undecided: limits.detections_in_flight.max(1),
        }
    }

    /// What is shared by the silent clients of a destination.
    pub fn suspect(&self, key: &Key) -> Rc<Suspect> {
        let mut destinations = self.destinations.borrow_mut();
        if let Some(suspect) = destinations.get(key) {
            return suspect.clone();
        }
        let suspect = Rc::new(Suspect::new(self.most_beside));
        if destinations.len() < MOST_DESTINATIONS {
            destinations.insert(key.clone(), suspect.clone());
        }
        suspect
    }

    /// Who speaks first there, if that was found out lately.
    pub fn speaks_first(&self, suspect: &Suspect) -> Option<SpeaksFirst> {
        suspect.learned.get().filter(|(_, at)| at.elapsed() < self.memory).map(|(who, _)| who)
    }

    /// What a server said is believed. A client may only seem to speak first, where its server is slow, so that this never
    /// replaces what the server showed.
    pub fn learn(&self, suspect: &Suspect, who: SpeaksFirst) {
        if who == SpeaksFirst::Client && self.speaks_first(suspect).is_some() {
            return;
        }
        suspect.learned.set(Some((who, Instant::now())));
        if who == SpeaksFirst::Server {
            suspect.news.send_replace(News::ServerSpoke);
        }
    }

    /// Waits for this destination's turn, and then for one of the worker's places.
    pub async fn place<'a>(&'a self, suspect: &'a Suspect) -> Option<Place<'a>> {
        // Neither is ever closed.
        let turn = suspect.turn.acquire().await.ok()?;
        if let Ok(place) = self.places.try_acquire() {
            return Some(Place { _turn: turn, _place: place });
        }
        let _wanting = Wanting::new(self);
        Some(Place { _turn: turn, _place: self.places.acquire().await.ok()? })
    }

    /// Ready when an upstream may be opened beside the one ahead: that one was silent for long, so that whoever waits for
    /// its outcome would wait for the server twice. A pool of connections may do so, a crowd may not: nobody's silence is
    /// to be multiplied into connections to an application.
    pub async fn beside<'a>(&'a self, suspect: &'a Suspect) -> Option<Beside<'a>> {
        loop {
            let silent = suspect.silent_since.get().map_or(Duration::ZERO, |since| since.elapsed());
            let left = self.beside_after.saturating_sub(silent);
            if left.is_zero() && suspect.waiting.get() <= self.most_beside {
                break;
            }
            tokio::time::sleep(if left.is_zero() { self.beside_after } else { left }).await;
        }
        // Neither is ever closed.
        let own = suspect.beside.acquire().await.ok()?;
        Some(Beside { _own: own, _all: self.beside.acquire().await.ok()? })
    }

    /// Counts a client among those of a destination that wait.
    pub fn wait<'a>(&self, suspect: &'a Suspect) -> Waiting<'a> {
        suspect.waiting.set(suspect.waiting.get() + 1);
        Waiting(suspect)
    }

    /// Ready when the caller's place is needed by somebody else.
    pub async fn is_wanted(&self) {
        while self.wanted.get() <= self.promised.get() {
            self.want.notified().await;
        }
        self.promised.set(self.promised.get() + 1);
    }

    /// Counts a client as undecided. When there are too many, the one whose connection is the oldest is told to go: it had
    /// the most time to speak. `age` grows from connection to connection: in which order they come here says little, since
    /// they may all have waited for one lookup. Those that hold a place stay: what they find out, everybody waits for.
    pub fn enter(&self, age: u64) -> Undecided<'_> {
        let undecided = Undecided { speculation: self, age, go: Rc::new(Notify::new()) };
        undecided.join();
        undecided
    }

    /// The watchdog's tick: forgets what nobody needs any more.
    pub fn sweep(&self) {
        self.destinations
            .borrow_mut()
            .retain(|_, suspect| Rc::strong_count(suspect) > 1 || self.speaks_first(suspect).is_some());
    }
}

impl Suspect {
    fn new(most_beside: usize) -> Suspect {
        Suspect {
            learned: Cell::new(None),
            turn: Semaphore::new(1),
            silent_since: Cell::new(None),
            beside: Semaphore::new(most_beside),
            waiting: Cell::new(0),
            news: watch::Sender::new(News::Nothing),
        }
    }

    /// The upstream of the one ahead is open; nobody has spoken on it.
    pub fn is_silent(&self) {
        self.silent_since.set(Some(Instant::now()));
    }

    /// What is told from now on.
    pub fn listen(&self) -> watch::Receiver<News> {
        self.news.subscribe()
    }

    /// Those who wait for the same would fail the same way, one after the other.
    pub fn failed(&self, error: &Error) {
        self.news.send_replace(News::Failed(error.clone()));
    }
}

/// The right to open an upstream beside the one ahead; given back when dropped.
pub struct Beside<'a> {
    _own: SemaphorePermit<'a>,
    _all: SemaphorePermit<'a>,
}

/// A silent client of a destination.
pub struct Waiting<'a>(&'a Suspect);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get().saturating_sub(1));
    }
}

/// Somebody waits for a place.
struct Wanting<'a>(&'a Speculation);

impl Wanting<'_> {
    fn new(speculation: &Speculation) -> Wanting<'_> {
        speculation.wanted.set(speculation.wanted.get() + 1);
        speculation.want.notify_one();
        Wanting(speculation)
    }
}

impl Drop for Wanting<'_> {
    fn drop(&mut self) {
        self.0.wanted.set(self.0.wanted.get().saturating_sub(1));
        self.0.promised.set(self.0.promised.get().saturating_sub(1));
    }
}

/// A client of whom nothing is known yet.
pub struct Undecided<'a> {
    speculation: &'a Speculation,
    age: u64,
    go: Rc<Notify>,
}

impl Undecided<'_> {
    /// Is one of those that may be told to go.
    pub fn join(&self) {
        let all = self.speculation;
        let mut undecided = all.undecided.borrow_mut();
        undecided.insert(self.age, self.go.clone());
        let with_places = all.most_places.saturating_sub(all.places.available_permits());
        while undecided.len() + with_places > all.most_undecided {
            let Some((_, oldest)) = undecided.pop_first() else { break };
            oldest.notify_one();
        }
    }

    /// Has a place, and may stay.
    pub fn stay(&self) {
        self.speculation.undecided.borrow_mut().remove(&self.age);
    }

    /// Ready when it must make room.
    pub async fn must_go(&self) {
        self.go.notified().await;
    }
}

impl Drop for Undecided<'_> {
    fn drop(&mut self) {
        self.stay();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::outcome::{Reason, Retry, Stage};

    fn key(port: u16) -> Key {
        Key::Address(([127, 0, 0, 1], port).into())
    }

    fn speculation(places: usize, undecided: usize) -> Speculation {
        let limits = Limits { speculative_connects: places, detections_in_flight: undecided, ..Limits::default() };
        Speculation::new(&limits)
    }

    #[tokio::test(start_paused = true)]
    async fn one_place_per_destination_and_a_few_for_all() {
        let all = speculation(2, 10);
        let suspects = [1, 2, 3].map(|port| all.suspect(&key(port)));
        let first = all.place(&suspects[0]).now_or_never().unwrap();
        assert!(all.place(&suspects[0]).now_or_never().is_none(), "one per destination");
        let _second = all.place(&suspects[1]).now_or_never().unwrap();
        let mut third = std::pin::pin!(all.place(&suspects[2]));
        assert!(third.as_mut().now_or_never().is_none(), "two in all");
        drop(first);
        assert!(third.now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_asked_back_as_often_as_somebody_wants_one() {
        let all = speculation(2, 10);
        let suspects = [1, 2, 3].map(|port| all.suspect(&key(port)));
        let _held = (all.place(&suspects[0]).await, all.place(&suspects[1]).await);
        assert!(all.is_wanted().now_or_never().is_none());
        let mut third = Box::pin(all.place(&suspects[2]));
        assert!(third.as_mut().now_or_never().is_none());
        assert!(all.is_wanted().now_or_never().is_some(), "one gives up");
        assert!(all.is_wanted().now_or_never().is_none(), "and one only");
        drop(third);
        assert!(all.is_wanted().now_or_never().is_none(), "nobody wants one any more");
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_of_too_many_is_told_to_go() {
        let all = speculation(1, 2);
        let (first, second) = (all.enter(1), all.enter(2));
        assert!(first.must_go().now_or_never().is_none());
        let third = all.enter(3);
        assert!(first.must_go().now_or_never().is_some());
        drop(first);
        assert!(second.must_go().now_or_never().is_none());
        let suspect = all.suspect(&key(1));
        let _place = all.place(&suspect).await;
        second.stay();
        let fourth = all.enter(4);
        assert!(second.must_go().now_or_never().is_none(), "who has a place stays");
        assert!(third.must_go().now_or_never().is_some());
        drop(third);
        let late = all.enter(0);
        assert!(fourth.must_go().now_or_never().is_none(), "it is the age of the connection that counts");
        assert!(late.must_go().now_or_never().is_some());
        drop((second, fourth, late));
        assert!(all.undecided.borrow().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pool_need_not_wait_for_the_one_ahead_and_a_crowd_must() {
        let limits = Limits { speculative_beside: 3, speculative_beside_all: 2, ..Limits::default() };
        let all = Speculation::new(&limits);
        let suspect = all.suspect(&key(1));
        let pool: Vec<_> = (0..3).map(|_| all.wait(&suspect)).collect();
        let short = limits.speculation_widens / 2;
        let mut beside = Box::pin(all.beside(&suspect));
        assert!(tokio::time::timeout(10 * short, &mut beside).await.is_err(), "nobody is ahead");
        suspect.is_silent();
        assert!(tokio::time::timeout(short, &mut beside).await.is_err(), "not for long");
        let crowd = all.wait(&suspect);
        assert!(tokio::time::timeout(10 * short, &mut beside).await.is_err(), "a crowd");
        drop(crowd);
        let first = beside.await;
        let second = all.beside(&suspect).await;
        assert!(tokio::time::timeout(10 * short, all.beside(&suspect)).await.is_err(), "two of this worker");
        drop((first, second, pool));
        assert!(tokio::time::timeout(short, all.beside(&suspect)).await.is_ok());
        assert_eq!(suspect.waiting.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_learned_is_forgotten_after_a_while() {
        let all = speculation(1, 1);
        let suspect = all.suspect(&key(1));
        let news = suspect.listen();
        all.learn(&suspect, SpeaksFirst::Client);
        assert_eq!(all.speaks_first(&suspect), Some(SpeaksFirst::Client));
        assert!(!news.has_changed().unwrap(), "those who wait go on waiting");
        all.learn(&suspect, SpeaksFirst::Server);
        all.learn(&suspect, SpeaksFirst::Client);
        assert_eq!(all.speaks_first(&suspect), Some(SpeaksFirst::Server), "the server's word counts more");
        assert!(news.has_changed().unwrap());
        drop((suspect, news));
        all.sweep();
        assert_eq!(all.destinations.borrow().len(), 1);
        tokio::time::advance(Limits::default().detect_memory).await;
        assert_eq!(all.speaks_first(&all.suspect(&key(1))), None);
        all.sweep();
        assert!(all.destinations.borrow().is_empty());
    }

    #[test]
    fn a_failure_is_told_to_those_who_wait() {
        let all = speculation(1, 1);
        let suspect = all.suspect(&key(1));
        let news = suspect.listen();
        suspect.failed(&Error::upstream(Stage::Connect, Reason::ConnectionRefused, Retry::Safe, "x"));
        assert!(matches!(&*news.borrow(), News::Failed(error) if error.reason == Reason::ConnectionRefused));
        assert!(!suspect.listen().has_changed().unwrap(), "who comes later tries for himself");
    }
}
