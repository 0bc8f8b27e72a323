//! The requests in flight on one worker, so that one on which nothing moves is ended. Its task is woken and ends the
//! stream; where the task cannot, because it waits for a downstream that takes nothing, its task is ended (HTTP/2: the
//! other streams of a shared connection go on) or the downstream connection is closed (HTTP/1).

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use outrigger_runtime::drain::{DrainHandle, Hold};

use crate::connection::{Command, Entry, State};
use crate::telemetry::HttpRecord;

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
    /// Bytes wait for the upstream, or for the downstream, which takes none.
    stalled: Cell<Stalled>,
    waker: RefCell<Option<Waker>>,
    /// The task of an HTTP/2 stream, which can be ended alone.
    task: Cell<Task>,
    /// The downstream broke off its request.
    broken: Cell<bool>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Stalled {
    upstream: bool,
    downstream: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    /// That of the connection.
    Shared,
    Own,
    Ended,
}

thread_local! {
    /// The stream that began while the task that is being polled was polled.
    static BEGUN: Cell<Option<Rc<Activity>>> = const { Cell::new(None) };
}

impl Streams {
    /// A request begins on `entry`; `own_task` when nothing but this request runs on the current task.
    pub fn begin(&self, entry: &Arc<Entry>, own_task: bool) -> Stream {
        let mut live = self.0.borrow_mut();
        let activity = Rc::new(Activity {
            entry: entry.clone(),
            index: Cell::new(live.len()),
            moved: Cell::new(true),
            still_since: Cell::new(None),
            expired: Cell::new(false),
            stalled: Cell::default(),
            waker: RefCell::default(),
            task: Cell::new(Task::Shared),
            broken: Cell::new(false),
        });
        live.push(activity.clone());
        if own_task {
            BEGUN.set(Some(activity.clone()));
        }
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

    /// The watchdog's tick. A stream may be silent for longer than bytes of it may wait for a reader.
    pub fn sweep(&self, silent: Duration, stalled: Duration) {
        let now = Instant::now();
        for activity in self.0.borrow().iter() {
            if activity.moved.take() {
                activity.still_since.set(Some(now));
                activity.expired.set(false);
                continue;
            }
            let still = activity.still_since.get().map_or(Duration::ZERO, |since| now.duration_since(since));
            if !activity.expired.get() {
                let limit = if activity.stalled.get() == Stalled::default() { silent } else { silent.min(stalled) };
                if still > limit {
                    activity.expired.set(true);
                    activity.wake();
                }
            } else if activity.task.get() == Task::Own {
                // It was told a tick ago and is still here: its downstream takes nothing.
                activity.task.set(Task::Ended);
                activity.wake();
            } else {
                activity.entry.ask(Command::Close);
            }
        }
    }
}

impl Activity {
    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn listen(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
    }
}

pin_project_lite::pin_project! {
    /// The task of one HTTP/2 stream (or of a connection, which is never ended from here).
    pub struct StreamTask<F> {
        #[pin]
        future: Option<F>,
        activity: Option<Rc<Activity>>,
    }
}

impl<F> StreamTask<F> {
    pub fn new(future: F) -> StreamTask<F> {
        StreamTask { future: Some(future), activity: None }
    }
}

impl<F: Future> Future for StreamTask<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let ended = this.activity.as_ref().is_some_and(|activity| activity.task.get() == Task::Ended);
        let Some(future) = this.future.as_mut().as_pin_mut().filter(|_| !ended) else {
            // Dropping it resets the stream.
            this.future.set(None);
            return Poll::Ready(());
        };
        let done = future.poll(cx).is_ready();
        if let Some(begun) = BEGUN.take() {
            begun.task.set(Task::Own);
            *this.activity = Some(begun);
        }
        if done {
            return Poll::Ready(());
        }
        if let Some(activity) = this.activity {
            activity.listen(cx);
        }
        Poll::Pending
    }
}

/// Tells of a stream from beside it: held by the request's body.
pub struct Progress(Rc<Activity>);

impl Progress {
    pub fn moved(&self) {
        self.0.moved.set(true);
    }

    /// Whether bytes wait for an upstream that takes none.
    pub fn stalled(&self, upstream: bool) {
        self.0.stalled.set(Stalled { upstream, ..self.0.stalled.get() });
    }

    /// The downstream broke off its request.
    pub fn broke_off(&self) {
        self.0.broken.set(true);
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

    /// Whether bytes wait for a downstream that takes none.
    pub fn stalled(&self, downstream: bool) {
        self.activity.stalled.set(Stalled { downstream, ..self.activity.stalled.get() });
    }

    pub fn progress(&self) -> Progress {
        Progress(self.activity.clone())
    }

    /// True when the stream is to be ended; else the task is woken when it is.
    pub fn is_expired(&self, cx: &Context<'_>) -> bool {
        if self.activity.expired.get() {
            return true;
        }
        self.activity.listen(cx);
        false
    }

    /// Nothing moved for too long.
    pub fn has_expired(&self) -> bool {
        self.activity.expired.get()
    }

    /// The downstream broke off its request.
    pub fn is_broken_off(&self) -> bool {
        self.activity.broken.get()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.streams.end(&self.activity);
    }
}

/// Marks a connection as busy while requests run on it; the drain waits for each. A request that ends because its
/// connection is closed by this sidecar has the reason of that.
pub struct Busy {
    entry: Arc<Entry>,
    record: Option<Rc<HttpRecord>>,
    running: Rc<Cell<usize>>,
    _hold: Hold,
}

impl Busy {
    pub fn begin(entry: &Arc<Entry>, record: &Rc<HttpRecord>, running: &Rc<Cell<usize>>, drain: &DrainHandle) -> Busy {
        running.set(running.get() + 1);
        entry.begin_request();
        Busy { entry: entry.clone(), record: Some(record.clone()), running: running.clone(), _hold: drain.hold() }
    }
}

impl Busy {
    /// The record has ended; the connection is busy a little longer.
    pub fn recorded(self) -> Busy {
        let mut busy = self;
        busy.record = None;
        busy
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let (Some(record), Some(reason)) = (&self.record, self.entry.closed_for()) {
            record.cut(reason);
        }
        let left = self.running.get().saturating_sub(1);
        self.running.set(left);
        if left == 0 {
            self.entry.enter(State::Idle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{Direction, Places, Table};

    /// Whether a stream expires at once when its limit for silence, or for a stall, is zero.
    #[test]
    fn silence_has_another_limit_than_a_stall() {
        let entry = Table::new(Places::new(1)).enter(Direction::Outbound, ([127, 0, 0, 1], 1).into()).unwrap();
        let (zero, long) = (Duration::ZERO, Duration::from_secs(3600));
        let none: fn(&Stream) = |_| {};
        let cases = [
            ("silent", none, zero, long, true),
            ("silent", none, long, zero, false),
            ("a reader", |stream: &Stream| stream.stalled(true), long, zero, true),
            ("an upstream", |stream: &Stream| stream.progress().stalled(true), long, zero, true),
            (
                "no longer",
                |stream: &Stream| [true, false].into_iter().for_each(|on| stream.stalled(on)),
                long,
                zero,
                false,
            ),
            (
                "the other side still does",
                |stream: &Stream| {
                    stream.progress().stalled(true);
                    stream.stalled(false);
                },
                long,
                zero,
                true,
            ),
            ("a stall is no longer than silence", |stream: &Stream| stream.stalled(true), zero, long, true),
        ];
        for (what, happens, silent, stalled, expires) in cases {
            let streams = Streams::default();
            let stream = streams.begin(&entry, false);
            happens(&stream);
            streams.sweep(silent, stalled);
            let swept = Instant::now();
            while swept.elapsed().is_zero() {
                std::hint::spin_loop();
            }
            streams.sweep(silent, stalled);
            assert_eq!(stream.has_expired(), expires, "{what}");
        }
    }
}
