//! The requests in flight on one worker, so that one on which nothing moves is ended. Its task is woken and ends the
//! stream; where the task cannot, because it waits for a downstream that takes nothing, its task is ended (HTTP/2: the
//! other streams of a shared connection go on) or the downstream connection is closed (HTTP/1). When memory is short,
//! HTTP/2 streams that stand still and hold bytes are ended the same way (`relieve`), and when policy moves, streams that it
//! turns against (`judge`).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use h2::FlowControl;
use http::request::Parts;
use outrigger_api::identity::SpiffeId;
use outrigger_api::snapshot::Workload;
use outrigger_runtime::drain::{DrainHandle, Hold};

use super::http2::{Ledger, Meter};
use crate::connection::{Command, Entry, State};
use crate::outcome::Reason;
use crate::telemetry::HttpRecord;

/// A stream on which nothing moved for so long stands still.
const STANDS: Duration = Duration::from_secs(1);

/// The list itself; cloning shares it.
#[derive(Clone)]
pub struct Streams {
    live: Rc<RefCell<Vec<Rc<Activity>>>>,
    /// Which policy was in force when the watchdog looked last: a number that grows when it moves.
    policy: Rc<Cell<u64>>,
    ledger: Rc<Ledger>,
}

/// When something last moved on one stream, as the watchdog saw it.
struct Activity {
    entry: Arc<Entry>,
    /// Its place in the list.
    index: Cell<usize>,
    moved: Cell<bool>,
    still_since: Cell<Option<Instant>>,
    /// Why the stream is to be ended.
    expired: Cell<Option<Reason>>,
    /// Bytes wait for the upstream, or for the downstream, which takes none.
    stalled: Cell<Stalled>,
    waker: RefCell<Option<Waker>>,
    /// The task of an HTTP/2 stream, which can be ended alone.
    task: Cell<Task>,
    /// The downstream broke off its request.
    broken: Cell<bool>,
    /// Its bodies, as far as they come over HTTP/2: that of the request and that of the answer.
    bodies: [RefCell<Option<Held>>; 2],
    /// Bytes of the request that have gone on and are kept in case the upstream refuses it.
    kept: Cell<usize>,
    /// Who says whether policy would still let it in; None on the way out.
    judge: RefCell<Option<Rc<dyn Judge>>>,
    /// The number of the policy that judged it last.
    judged: Cell<u64>,
    /// Ticks that it has seen.
    ticks: Cell<u8>,
    head: RefCell<Head>,
    /// Why policy has turned against it.
    refused: Cell<Option<Reason>>,
}

/// The request's head, which the lane takes with it.
#[derive(Default)]
#[expect(clippy::large_enum_variant, reason = "a box would be one more allocation for each request")]
enum Head {
    #[default]
    Gone,
    /// The watchdog wants to see it.
    Wanted,
    Here(Parts),
    /// It is too long to be kept for as long as the stream runs.
    Long,
}

/// Decides again about a request that runs.
pub trait Judge {
    /// Why policy refuses it now. Without a head it is only known who calls: it is judged as bytes that nobody parses.
    fn refuses(&self, own: &Workload, entry: &Entry, head: Option<&Parts>) -> Option<Reason>;

    /// Who calls which port of the application.
    fn call(&self) -> Call;
}

/// Who calls, if that is proved, and the application's address.
pub type Call = (Option<SpiffeId>, SocketAddr);

/// Bytes of a head that are kept for a stream that runs on.
const KEPT_HEAD: usize = 16 * 1024;
/// Ticks after which a stream has run for more than a second.
const LONG: u8 = 2;

/// Which of a stream's bodies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Request,
    Answer,
}

/// A body of which something may wait, and the connection that it comes on.
struct Held {
    flow: FlowControl,
    meter: Rc<Meter>,
}

/// Held by a body while it can be watched. It has to be dropped before the body's stream is: the library takes a stream
/// for wanted while anybody refers to it.
pub struct Watch {
    activity: Rc<Activity>,
    part: Part,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let held = self.activity.bodies[self.part as usize].take();
        drop(held);
    }
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
    pub fn new(ledger: &Rc<Ledger>) -> Streams {
        Streams { live: Rc::default(), policy: Rc::default(), ledger: ledger.clone() }
    }

    /// What this worker's connections hold.
    pub fn ledger(&self) -> &Rc<Ledger> {
        &self.ledger
    }

    /// A request begins on `entry`; `own_task` when nothing but this request runs on the current task.
    pub fn begin(&self, entry: &Arc<Entry>, own_task: bool) -> Stream {
        let mut live = self.live.borrow_mut();
        let activity = Rc::new(Activity {
            entry: entry.clone(),
            index: Cell::new(live.len()),
            moved: Cell::new(true),
            still_since: Cell::new(None),
            expired: Cell::new(None),
            stalled: Cell::default(),
            waker: RefCell::default(),
            task: Cell::new(Task::Shared),
            broken: Cell::new(false),
            bodies: [RefCell::default(), RefCell::default()],
            kept: Cell::new(0),
            judge: RefCell::default(),
            judged: Cell::new(self.policy.get()),
            ticks: Cell::new(0),
            head: RefCell::default(),
            refused: Cell::new(None),
        });
        live.push(activity.clone());
        if own_task {
            BEGUN.set(Some(activity.clone()));
        }
        Stream { activity, streams: self.clone() }
    }

    fn end(&self, activity: &Activity) {
        let mut live = self.live.borrow_mut();
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
        for activity in self.live.borrow().iter() {
            if activity.moved.take() {
                activity.still_since.set(Some(now));
                activity.expired.set(None);
                continue;
            }
            let still = activity.still_since.get().map_or(Duration::ZERO, |since| now.duration_since(since));
            if activity.expired.get().is_none() {
                let limit = if activity.stalled.get() == Stalled::default() { silent } else { silent.min(stalled) };
                if still > limit {
                    activity.expired.set(Some(Reason::StreamIdleTimeout));
                    activity.wake();
                }
            } else {
                activity.end();
            }
        }
    }

    /// The watchdog's tick, for those that came in: when policy has `moved`, streams of more than a second are judged again,
    /// and ended where it has turned against them. Says how many it was now.
    pub fn judge(&self, own: &Workload, moved: bool) -> usize {
        if moved {
            self.policy.set(self.policy.get() + 1);
        }
        let mut refused = 0;
        for activity in self.live.borrow().iter() {
            activity.ticks.set(activity.ticks.get().saturating_add(1));
            if activity.refused.get().is_some() {
                activity.end();
            } else if activity.ticks.get() >= LONG && activity.judged.get() != self.policy.get() {
                refused += usize::from(activity.judge_again(own, self.policy.get()));
            } else if activity.ticks.get() == LONG {
                activity.shorten_head();
            }
        }
        refused
    }

    /// Ends streams that stand still while memory is short, as many as this worker's part of the excess takes; says whether
    /// to call again, a moment later. What has moved within a second is left alone. First come the streams of the
    /// connections that hold most for longest (bytes x seconds): who rests for a minute with one window full is not whom
    /// memory is short of, and a connection with a thousand full windows is.
    pub fn relieve(&self) -> bool {
        let now = Instant::now();
        let budget = self.ledger.budget();
        let live = self.live.borrow();
        // The library is asked, because counting runs ahead of it.
        let held: Vec<_> = live.iter().map(|activity| activity.held()).collect();
        self.ledger.recount(held.iter().flatten().flatten().map(|(meter, bytes)| (meter, *bytes)));
        // Who still holds much comes to rest again.
        self.ledger.resume();
        if !budget.is_short() {
            return false;
        }
        let mut still: Vec<(&Rc<Activity>, usize, Duration)> = Vec::new();
        let mut connections: HashMap<u64, f64> = HashMap::new();
        for (activity, held) in live.iter().zip(&held) {
            let bytes: usize = held.iter().flatten().map(|(meter, bytes)| meter.cost(*bytes)).sum();
            if activity.moved.take() {
                activity.still_since.set(Some(now));
                activity.expired.set(None);
                continue;
            }
            if bytes == 0 || activity.task.get() != Task::Own {
                continue;
            }
            if activity.expired.get().is_some() {
                // It was woken a moment ago and has not ended, so its client is not reading.
                activity.task.set(Task::Ended);
                activity.wake();
                continue;
            }
            let stands = activity.still_since.get().map_or(Duration::ZERO, |since| now.duration_since(since));
            if stands < STANDS {
                continue;
            }
            *connections.entry(activity.entry.id).or_default() += bytes as f64 * stands.as_secs_f64();
            still.push((activity, bytes, stands));
        }
        let weight = |activity: &Activity| connections.get(&activity.entry.id).copied().unwrap_or_default();
        still.sort_by(|(one, one_bytes, one_stands), (other, bytes, stands)| {
            weight(other).total_cmp(&weight(one)).then(stands.cmp(one_stands)).then(bytes.cmp(one_bytes))
        });
        let mut excess = budget.excess();
        let (own, all) = (self.ledger.held().max(0), budget.held().max(1));
        excess = i64::try_from(i128::from(excess) * i128::from(own) / i128::from(all)).unwrap_or(i64::MAX);
        let mut ended = 0_usize;
        for (activity, bytes, _) in still {
            if excess <= 0 {
                break;
            }
            excess -= i64::try_from(bytes).unwrap_or(i64::MAX);
            activity.expired.set(Some(Reason::Overloaded));
            activity.wake();
            ended += 1;
        }
        if ended > 0 {
            tracing::warn!(
                streams = ended,
                "memory is short: HTTP/2 streams that stood still with bytes waiting are ended (overloaded). Raise the memory \
                 limit of this container or control group"
            );
        }
        true
    }
}

impl Activity {
    /// What waits in its bodies or is kept of them, by connection.
    fn held(&self) -> [Option<(Rc<Meter>, usize)>; 2] {
        let kept = [self.kept.get(), 0];
        std::array::from_fn(|part| {
            let mut body = self.bodies[part].borrow_mut();
            body.as_mut().map(|Held { flow, meter }| (meter.clone(), flow.used_capacity() + kept[part]))
        })
    }

    /// It was told a tick ago and is still here: its downstream takes nothing.
    fn end(&self) {
        if self.task.get() == Task::Own {
            self.task.set(Task::Ended);
            self.wake();
        } else {
            self.entry.ask(Command::Close);
        }
    }

    /// Whether policy refuses it now. Where its head is still on the way, the lane is asked for it, and the next tick
    /// decides.
    fn judge_again(&self, own: &Workload, policy: u64) -> bool {
        let judge = self.judge.borrow();
        let Some(judge) = judge.as_ref() else {
            self.judged.set(policy);
            return false;
        };
        self.shorten_head();
        let mut head = self.head.borrow_mut();
        let head = match &*head {
            Head::Here(parts) => Some(parts),
            Head::Long => None,
            Head::Gone | Head::Wanted => {
                *head = Head::Wanted;
                drop(head);
                self.wake();
                return false;
            }
        };
        self.judged.set(policy);
        let reason = judge.refuses(own, &self.entry, head);
        self.refused.set(reason);
        if reason.is_some() {
            self.wake();
        }
        reason.is_some()
    }

    fn shorten_head(&self) {
        let mut head = self.head.borrow_mut();
        if let Head::Here(parts) = &*head {
            let fields = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 64);
            let target = parts.uri.path_and_query().map_or(0, |target| target.as_str().len());
            if fields.sum::<usize>() + target > KEPT_HEAD {
                *head = Head::Long;
            }
        }
    }

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
#[derive(Clone)]
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

    /// Whether the watchdog wants to see the request's head.
    pub fn wants_head(&self) -> bool {
        matches!(*self.0.head.borrow(), Head::Wanted)
    }

    /// The lane needs the request's head no more, or was asked for it.
    pub fn take_head(&self, head: Parts) {
        if self.0.judge.borrow().is_some() {
            *self.0.head.borrow_mut() = Head::Here(head);
        }
    }

    /// The request failed, and its head may tell why.
    pub fn leave_head(&self, head: Parts) {
        *self.0.head.borrow_mut() = Head::Here(head);
    }

    /// So much of the request is kept.
    pub fn keeps(&self, bytes: usize) {
        self.0.kept.set(bytes);
    }

    /// From now on it is known how much waits in a body.
    pub fn watch(&self, part: Part, flow: FlowControl, meter: Rc<Meter>) -> Watch {
        *self.0.bodies[part as usize].borrow_mut() = Some(Held { flow, meter });
        Watch { activity: self.0.clone(), part }
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

    /// Who decides about the request, and is asked again when policy moves.
    pub fn judged_by(&self, judge: Rc<dyn Judge>) {
        *self.activity.judge.borrow_mut() = Some(judge);
    }

    /// Policy has turned against it.
    pub fn refused(&self) -> Option<Reason> {
        self.activity.refused.get()
    }

    /// The head of a request that ends here, if it is known still, and who called.
    pub fn lost(&self) -> Option<(Parts, Option<Call>)> {
        let Head::Here(head) = self.activity.head.take() else { return None };
        Some((head, self.activity.judge.borrow().as_ref().map(|judge| judge.call())))
    }

    /// The head of a request whose connection leaves HTTP, as far as it is kept; None when nobody judges it.
    pub fn into_head(self) -> Option<Option<Parts>> {
        self.activity.shorten_head();
        self.activity.judge.take()?;
        Some(match self.activity.head.take() {
            Head::Here(parts) => Some(parts),
            Head::Gone | Head::Wanted | Head::Long => None,
        })
    }

    /// Why the stream is to be ended; else the task is woken when it is.
    pub fn poll_expired(&self, cx: &Context<'_>) -> Option<Reason> {
        let expired = self.expired();
        if expired.is_none() {
            self.activity.listen(cx);
        }
        expired
    }

    /// Why the stream is to be ended: policy, or nothing moved on it for too long, or while memory is short.
    pub fn expired(&self) -> Option<Reason> {
        self.activity.refused.get().or(self.activity.expired.get())
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
    use outrigger_runtime::memory::Budget;

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
            let streams = Streams::new(&Ledger::new(Budget::new(1 << 20)));
            let stream = streams.begin(&entry, false);
            happens(&stream);
            streams.sweep(silent, stalled);
            let swept = Instant::now();
            while swept.elapsed().is_zero() {
                std::hint::spin_loop();
            }
            streams.sweep(silent, stalled);
            assert_eq!(stream.expired().is_some(), expires, "{what}");
        }
    }
}
