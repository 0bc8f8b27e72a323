//! The requests in flight on one worker, so that one on which nothing moves is ended. Its task is woken and ends the
//! stream; where the task cannot (it waits for a downstream that takes nothing) the downstream connection is closed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use outrigger_runtime::drain::{DrainHandle, Hold};

use crate::connection::{Command, Entry, State};

/// The list itself; cloning shares it.
#[derive(Clone, Default)]
pub struct Streams(Rc<RefCell<Vec<Rc<Activity>>>>);

/// When something last moved on one stream, as the watchdog saw it.
struct Activity {
    entry: Arc<Entry>,
    /// Its place in the list.
    index: Cell<usize>,
    moved: Cell<bool>,
    still_since: Cell<Option<Instant>>,
    expired: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Streams {
    /// A request begins on `entry`.
    pub fn begin(&self, entry: &Arc<Entry>) -> Stream {
        let mut live = self.0.borrow_mut();
        let activity = Rc::new(Activity {
            entry: entry.clone(),
            index: Cell::new(live.len()),
            moved: Cell::new(true),
            still_since: Cell::new(None),
            expired: Cell::new(false),
            waker: RefCell::default(),
        });
        live.push(activity.clone());
        Stream { activity, streams: self.clone() }
    }

    fn end(&self, activity: &Activity) {
        let mut live = self.0.borrow_mut();
        let index = activity.index.get();
        if index < live.len() {
            live.swap_remove(index);
        }
        if let Some(moved) = live.get(index) {
            moved.index.set(index);
        }
    }

    /// The watchdog's tick.
    pub fn sweep(&self, limit: Duration) {
        let now = Instant::now();
        for activity in self.0.borrow().iter() {
            if activity.moved.take() {
                activity.still_since.set(Some(now));
                activity.expired.set(false);
                continue;
            }
            let still = activity.still_since.get().map_or(Duration::ZERO, |since| now.duration_since(since));
            if activity.expired.get() {
                // It was told a tick ago and is still here: its downstream takes nothing. Where others share the
                // connection the peer's own watchdog comes first.
                if still > 2 * limit || !activity.entry.is_shared() {
                    activity.entry.ask(Command::Close);
                }
            } else if still > limit {
                activity.expired.set(true);
                if let Some(waker) = activity.waker.take() {
                    waker.wake();
                }
            }
        }
    }
}

/// Held by the request, then by its answer's body.
pub struct Stream {
    activity: Rc<Activity>,
    streams: Streams,
}

impl Stream {
    pub fn moved(&self) {
        self.activity.moved.set(true);
    }

    pub fn progress(&self) -> Progress {
        Progress(self.activity.clone())
    }

    /// True when the stream is to be ended; else the task is woken when it is.
    pub fn is_expired(&self, cx: &Context<'_>) -> bool {
        if self.activity.expired.get() {
            return true;
        }
        let mut waker = self.activity.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        false
    }
}

/// What moves a stream that somebody else holds: the body of its request.
pub struct Progress(Rc<Activity>);

impl Progress {
    pub fn moved(&self) {
        self.0.moved.set(true);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.streams.end(&self.activity);
    }
}

/// Marks a connection as busy while requests run on it; the drain waits for each.
pub struct Busy {
    entry: Arc<Entry>,
    running: Rc<Cell<usize>>,
    _hold: Hold,
}

impl Busy {
    pub fn begin(entry: &Arc<Entry>, running: &Rc<Cell<usize>>, drain: &DrainHandle) -> Busy {
        running.set(running.get() + 1);
        entry.begin_request();
        Busy { entry: entry.clone(), running: running.clone(), _hold: drain.hold() }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let left = self.running.get().saturating_sub(1);
        self.running.set(left);
        if left == 0 {
            self.entry.enter(State::Idle);
        }
    }
}
