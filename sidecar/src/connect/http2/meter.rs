//! What the HTTP/2 connections of one worker hold in memory: bytes that were received and have not gone on, and bytes
//! that wait to be written. Each connection has a `Meter`, which its byte stream and its bodies tell; the worker has a
//! `Ledger`, which tells the process's budget. When the budget is nearly used up, who holds much is not read from until
//! `connect/streams.rs` has ended the streams that stand still.
//!
//! A DATA frame costs memory besides its bytes, which one with a single byte is nothing but: frames are counted, too.
//! Counting follows the frames and may run ahead of the truth, since the library drops bytes of streams that are gone
//! without a word. So before a stream is ended the library is asked what each really holds (`Ledger::recount`).

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Waker};

use outrigger_runtime::memory::Budget;

const PREFACE: usize = 24;
const HEAD: usize = 9;
const DATA: u8 = 0;

/// What the library needs for a DATA frame that nobody has taken yet, besides its bytes: a slot that is as large as a
/// request's head.
const FRAME: i64 = 256;

/// The process hears of so many bytes at a time.
const STEP: i64 = 16 * 1024;
/// A connection that holds less is read from whatever the budget says: it is one of many, and honest ones hold little.
const SMALL: i64 = 256 * 1024;
/// What may wait to be written on one connection ...
const QUEUE: i64 = 256 * 1024;
/// ... and when memory is getting short.
const SHORT_QUEUE: i64 = 64 * 1024;

/// One worker's part of the budget.
pub struct Ledger {
    budget: Arc<Budget>,
    held: Cell<i64>,
    /// What of it the process does not know yet.
    untold: Cell<i64>,
    meters: RefCell<Vec<Weak<Meter>>>,
}

impl Ledger {
    pub fn new(budget: Arc<Budget>) -> Rc<Ledger> {
        Rc::new(Ledger { budget, held: Cell::new(0), untold: Cell::new(0), meters: RefCell::default() })
    }

    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// What this worker's connections hold.
    pub fn held(&self) -> i64 {
        self.held.get()
    }

    fn add(&self, bytes: i64) {
        self.held.set(self.held.get() + bytes);
        let untold = self.untold.get() + bytes;
        if untold.abs() < STEP {
            self.untold.set(untold);
        } else {
            self.untold.set(0);
            self.budget.add(untold);
        }
    }

    /// Sets right what each connection holds: `streams` are those that hold something, with how much it really is.
    pub fn recount<'a>(&self, streams: impl Iterator<Item = (&'a Rc<Meter>, usize)>) {
        self.meters.borrow_mut().retain(|meter| meter.strong_count() > 0);
        for meter in self.meters.borrow().iter().filter_map(Weak::upgrade) {
            meter.counted.set(0);
        }
        for (meter, bytes) in streams {
            meter.counted.set(meter.counted.get() + i64::try_from(bytes).unwrap_or(i64::MAX));
        }
        for meter in self.meters.borrow().iter().filter_map(Weak::upgrade) {
            meter.settle();
        }
        self.budget.add(self.untold.take());
    }

    /// Reads again from connections that hold much.
    pub fn resume(&self) {
        for meter in self.meters.borrow().iter().filter_map(Weak::upgrade) {
            if let Some(reader) = meter.reader.take() {
                reader.wake();
            }
        }
    }
}

/// One connection.
pub struct Meter {
    ledger: Rc<Ledger>,
    /// Bodies that come now.
    bodies: Cell<u64>,
    /// Something came since somebody asked.
    heard: Cell<bool>,
    frames: RefCell<Frames>,
    /// DATA that came since somebody asked.
    received: Cell<u64>,
    /// DATA that has gone on since somebody asked.
    went: Cell<u64>,
    /// DATA that came and has not gone on, what its frames cost among it.
    held: Cell<i64>,
    /// These frames.
    waiting: Cell<i64>,
    /// The bytes among it, as the library knows it: used by `recount` alone.
    counted: Cell<i64>,
    /// Given to the library to be written.
    queued: Cell<i64>,
    /// The socket took nothing at the last try.
    blocked: Cell<bool>,
    reader: RefCell<Option<Waker>>,
    writers: RefCell<Vec<Waker>>,
}

impl Meter {
    /// Of a connection on which the peer begins with the preface of a client, or not.
    pub fn new(ledger: &Rc<Ledger>, preface: bool) -> Rc<Meter> {
        let meter = Rc::new(Meter {
            ledger: ledger.clone(),
            bodies: Cell::new(0),
            heard: Cell::new(false),
            frames: RefCell::new(Frames::new(preface)),
            received: Cell::new(0),
            went: Cell::new(0),
            held: Cell::new(0),
            waiting: Cell::new(0),
            counted: Cell::new(0),
            queued: Cell::new(0),
            blocked: Cell::new(false),
            reader: RefCell::default(),
            writers: RefCell::default(),
        });
        let mut meters = ledger.meters.borrow_mut();
        if meters.len() == meters.capacity() {
            meters.retain(|meter| meter.strong_count() > 0);
        }
        meters.push(Rc::downgrade(&meter));
        meter
    }

    /// Memory is getting short: windows are small, and nothing is kept in case it is needed again.
    pub fn is_tight(&self) -> bool {
        self.ledger.budget.is_tight()
    }

    /// Whether windows may grow.
    pub fn may_grow(&self) -> bool {
        self.ledger.budget.may_grow()
    }

    /// How large the window of each stream may be with as many bodies as come now: all of them together stay within `most`
    /// bytes and a quarter of the budget.
    pub fn window_share(&self, most: u32) -> u32 {
        let share = self.ledger.budget.quarter().min(most.into()) / self.bodies.get().max(1);
        u32::try_from(share).unwrap_or(most)
    }

    /// What the connection holds.
    pub fn held(&self) -> u32 {
        u32::try_from(self.held.get()).unwrap_or(0)
    }

    /// A body begins to come.
    pub fn begin_body(&self) {
        self.bodies.set(self.bodies.get() + 1);
    }

    pub fn end_body(&self) {
        self.bodies.set(self.bodies.get().saturating_sub(1));
        if self.bodies.get() == 0 {
            self.take_frames(self.waiting.get());
        }
    }

    /// Whether something came since the last call.
    pub fn take_heard(&self) -> bool {
        self.heard.take()
    }

    /// Bytes of DATA that came since the last call.
    pub fn take_received(&self) -> u64 {
        self.received.take()
    }

    /// Bytes of DATA that have gone on since the last call.
    pub fn take_went(&self) -> u64 {
        self.went.take()
    }

    /// These bytes came.
    pub fn read(&self, bytes: &[u8]) {
        self.heard.set(true);
        let (data, frames) = self.frames.borrow_mut().feed(bytes);
        if data > 0 {
            self.received.set(self.received.get() + data);
            self.hold(usize::try_from(data).unwrap_or(usize::MAX));
        }
        if frames > 0 {
            self.waiting.set(self.waiting.get() + frames);
            self.add(frames * FRAME);
        }
    }

    /// Whether to read nothing now; then the task is woken when it may read again.
    pub fn must_rest(&self, cx: &Context<'_>) -> bool {
        if self.held.get() < SMALL || !self.ledger.budget.is_full() {
            return false;
        }
        *self.reader.borrow_mut() = Some(cx.waker().clone());
        true
    }

    /// So many bytes more are held.
    pub fn hold(&self, bytes: usize) {
        self.add(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    fn add(&self, bytes: i64) {
        self.held.set(self.held.get() + bytes);
        self.ledger.add(bytes);
    }

    /// A frame of DATA has gone on.
    pub fn went(&self, bytes: usize) {
        self.went.set(self.went.get() + bytes as u64);
        self.take_frames(1);
        self.release(bytes);
    }

    /// Nobody will take the bytes of a stream that wait.
    pub fn give_up(&self, bytes: usize) {
        self.take_frames(self.frames_of(bytes));
        self.release(bytes);
    }

    /// What it costs to hold so many bytes of a stream.
    pub fn cost(&self, bytes: usize) -> usize {
        bytes.saturating_add(usize::try_from(self.frames_of(bytes) * FRAME).unwrap_or(0))
    }

    /// About as many of the frames that wait as have these bytes.
    fn frames_of(&self, bytes: usize) -> i64 {
        let waiting = self.waiting.get();
        let all = self.held.get() - waiting * FRAME;
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX).min(all);
        if bytes <= 0 { 0 } else { waiting.saturating_mul(bytes) / all }
    }

    fn take_frames(&self, frames: i64) {
        let frames = frames.min(self.waiting.get());
        self.waiting.set(self.waiting.get() - frames);
        self.add(-(frames * FRAME).min(self.held.get()));
    }

    /// The library has said what is held: what was counted beyond that it has dropped, and the frames with it.
    fn settle(&self) {
        let (counted, waiting) = (self.counted.get(), self.waiting.get());
        let before = self.held.get() - waiting * FRAME;
        if counted < before {
            self.waiting.set(waiting.saturating_mul(counted) / before);
        }
        self.add(counted + self.waiting.get() * FRAME - self.held.get());
    }

    /// So many bytes have gone on, or were given up.
    pub fn release(&self, bytes: usize) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX).min(self.held.get());
        self.held.set(self.held.get() - bytes);
        self.ledger.add(-bytes);
    }

    /// Whether anything is held.
    pub fn holds(&self) -> bool {
        self.held.get() > 0
    }

    /// Whether more may be given to the library to be written; else the task is woken when it may.
    pub fn may_queue(&self, cx: &Context<'_>) -> bool {
        let queued = self.queued.get();
        if queued < SHORT_QUEUE || queued < QUEUE && !self.is_tight() {
            return true;
        }
        let mut writers = self.writers.borrow_mut();
        if !writers.iter().any(|writer| writer.will_wake(cx.waker())) {
            writers.push(cx.waker().clone());
        }
        false
    }

    /// So many bytes were given to the library.
    pub fn queue(&self, bytes: usize) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.queued.set(self.queued.get() + bytes);
        self.ledger.add(bytes);
    }

    /// The socket took so many bytes, heads of frames among them.
    pub fn wrote(&self, bytes: usize) {
        self.blocked.set(false);
        self.written(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// The socket takes nothing now.
    pub fn is_blocked(&self) {
        self.blocked.set(true);
    }

    /// The library has nothing more to do: when the socket does not stop it, all is written. What was queued on streams that
    /// have been reset since then was dropped, which nobody else tells.
    pub fn rests(&self) {
        if !self.blocked.get() && self.queued.get() > 0 {
            self.written(i64::MAX);
        }
    }

    fn written(&self, bytes: i64) {
        let bytes = bytes.min(self.queued.get());
        self.queued.set(self.queued.get() - bytes);
        self.ledger.add(-bytes);
        if self.queued.get() < SHORT_QUEUE {
            self.wake_writers();
        }
    }

    /// The connection has ended, which its streams find out when they are polled.
    pub fn wake_writers(&self) {
        for writer in self.writers.take() {
            writer.wake();
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.ledger.add(-self.held.get() - self.queued.get());
    }
}

/// Reads heads of frames, and finds the DATA among them.
struct Frames {
    head: [u8; HEAD],
    head_read: usize,
    /// Bytes of the preface or of the current frame that are still to come.
    left: usize,
}

impl Frames {
    fn new(preface: bool) -> Frames {
        Frames { head: [0; HEAD], head_read: 0, left: if preface { PREFACE } else { 0 } }
    }

    /// How many bytes of DATA begin here, by what the heads say, and how many frames with any.
    fn feed(&mut self, mut bytes: &[u8]) -> (u64, i64) {
        let (mut data, mut frames) = (0, 0);
        while !bytes.is_empty() {
            if self.left > 0 {
                let count = self.left.min(bytes.len());
                self.left -= count;
                bytes = &bytes[count..];
                continue;
            }
            let count = (HEAD - self.head_read).min(bytes.len());
            self.head[self.head_read..self.head_read + count].copy_from_slice(&bytes[..count]);
            self.head_read += count;
            bytes = &bytes[count..];
            if self.head_read == HEAD {
                self.head_read = 0;
                let [a, b, c, kind, ..] = self.head;
                self.left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                if kind == DATA && self.left > 0 {
                    data += self.left as u64;
                    frames += 1;
                }
            }
        }
        (data, frames)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::task::Wake;

    use super::*;

    const MIB: usize = 1 << 20;

    fn data(length: usize) -> Vec<u8> {
        let mut frame = u32::try_from(length).unwrap().to_be_bytes()[1..].to_vec();
        frame.extend([DATA, 0, 0, 0, 0, 1]);
        frame.resize(HEAD + length, 0);
        frame
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn data_is_counted_wherever_the_pieces_end() {
        let frames =
            [vec![7; PREFACE], data(1_000), vec![0, 0, 4, 3, 0, 0, 0, 0, 1, 9, 9, 9, 9], data(0), data(17)].concat();
        for piece in [1, 5, 9, 1_000, frames.len()] {
            let ledger = Ledger::new(Budget::new(MIB as u64));
            let meter = Meter::new(&ledger, true);
            for bytes in frames.chunks(piece) {
                meter.read(bytes);
            }
            assert_eq!((meter.take_received(), ledger.held()), (1_017, 1_017 + 2 * FRAME), "{piece}");
            assert!(meter.take_heard() && !meter.take_heard());
        }
    }

    #[test]
    fn what_a_connection_held_is_given_back_with_it() {
        let ledger = Ledger::new(Budget::new(10 * MIB as u64));
        let (one, other) = (Meter::new(&ledger, false), Meter::new(&ledger, false));
        one.read(&data(100_000));
        other.hold(50_000);
        other.queue(30_000);
        other.wrote(10_000);
        assert_eq!(ledger.held(), 170_000 + FRAME);
        one.went(100_000);
        assert_eq!(ledger.held(), 70_000);
        one.release(200_000);
        assert_eq!(ledger.held(), 70_000, "never more than it held");
        drop(other);
        assert_eq!(ledger.held(), 0);
        drop(one);
        assert!(ledger.budget().held().unsigned_abs() < STEP.unsigned_abs());
    }

    #[test]
    fn small_frames_cost_more_than_their_bytes() {
        let ledger = Ledger::new(Budget::new(10 * MIB as u64));
        let meter = Meter::new(&ledger, false);
        let read = |count: usize| meter.read(&data(1).repeat(count));
        let all = |frames: i64| frames * (FRAME + 1);
        meter.begin_body();
        meter.begin_body();
        read(1_000);
        assert_eq!((ledger.held(), meter.cost(100)), (all(1_000), 100 * 257));
        meter.went(1);
        assert_eq!(ledger.held(), all(999));
        // One of several streams is given up.
        meter.give_up(99);
        assert_eq!(ledger.held(), all(900));
        // The library has dropped half of it.
        ledger.recount([(&meter, 450)].into_iter());
        assert_eq!(ledger.held(), all(450));
        ledger.recount([(&meter, 450)].into_iter());
        assert_eq!(ledger.held(), all(450));
        meter.end_body();
        meter.end_body();
        assert_eq!(ledger.held(), 450, "without a body there is no frame");
    }

    #[test]
    fn counting_is_set_right_by_the_library() {
        let ledger = Ledger::new(Budget::new(10 * MIB as u64));
        let (one, other) = (Meter::new(&ledger, false), Meter::new(&ledger, false));
        one.hold(MIB);
        other.hold(2 * MIB);
        ledger.recount([(&one, 1_000), (&one, 500)].into_iter());
        assert_eq!((one.held.get(), other.held.get(), ledger.held()), (1_500, 0, 1_500));
        assert_eq!(ledger.budget().held(), 1_500);
    }

    #[test]
    fn who_holds_much_is_not_read_from_while_the_budget_is_used_up() {
        let ledger = Ledger::new(Budget::new(4 * MIB as u64));
        let (much, little) = (Meter::new(&ledger, false), Meter::new(&ledger, false));
        let woken = Arc::<Woken>::default();
        let waker = woken.clone().into();
        let cx = Context::from_waker(&waker);
        little.hold(10_000);
        much.hold(3 * MIB);
        assert!(!much.must_rest(&cx), "not yet");
        much.hold(MIB);
        assert!(much.must_rest(&cx) && !little.must_rest(&cx));
        ledger.resume();
        assert_eq!(woken.0.load(Relaxed), 1);
        much.release(4 * MIB);
        assert!(!much.must_rest(&cx));
    }

    #[test]
    fn little_waits_to_be_written() {
        let ledger = Ledger::new(Budget::new(100 * MIB as u64));
        let meter = Meter::new(&ledger, false);
        let woken = Arc::<Woken>::default();
        let waker = woken.clone().into();
        let cx = Context::from_waker(&waker);
        assert!(meter.may_queue(&cx));
        meter.queue(300_000);
        assert!(!meter.may_queue(&cx) && !meter.may_queue(&cx));
        meter.is_blocked();
        meter.rests();
        assert!(!meter.may_queue(&cx), "the socket is full");
        meter.wrote(1_000);
        meter.rests();
        assert_eq!((meter.may_queue(&cx), woken.0.load(Relaxed), ledger.held()), (true, 1, 0));
        let elsewhere = Meter::new(&ledger, false);
        elsewhere.hold(70 * MIB);
        meter.queue(70_000);
        assert!(!meter.may_queue(&cx), "less when memory is getting short");
    }
}
