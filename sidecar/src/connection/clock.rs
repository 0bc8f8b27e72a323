//! The clock of a table: as coarse as the watchdog's ticks, and read for nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use tokio::sync::Notify;

/// Milliseconds since the table began, set by the watchdog's tick, so that nobody on the walk reads a clock for it.
#[derive(Debug)]
pub(super) struct Clock {
    pub(super) begun: Instant,
    now: AtomicU64,
    /// The watchdog looks seldom, because nothing moves: whoever needs the clock wakes it.
    rests: AtomicBool,
    moved: Notify,
}

impl Clock {
    pub(super) fn new() -> Arc<Clock> {
        Arc::new(Clock {
            begun: Instant::now(),
            now: AtomicU64::new(0),
            rests: AtomicBool::new(false),
            moved: Notify::new(),
        })
    }

    pub(super) fn read(&self) -> u64 {
        if self.rests.load(Relaxed) { self.wake() } else { self.now.load(Relaxed) }
    }

    #[cold]
    fn wake(&self) -> u64 {
        self.rests.store(false, Relaxed);
        self.moved.notify_one();
        self.advance()
    }

    pub(super) fn advance(&self) -> u64 {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.now.store(now, Relaxed);
        now
    }

    /// As of the last tick.
    pub(super) fn last(&self) -> u64 {
        self.now.load(Relaxed)
    }

    /// The watchdog looks seldom from now on.
    pub(super) fn rest(&self) {
        self.rests.store(true, Relaxed);
    }

    /// It looks at each tick again.
    pub(super) fn rest_is_over(&self) {
        self.rests.store(false, Relaxed);
    }

    /// Somebody needs the clock while the watchdog rests.
    pub(super) async fn moved(&self) {
        self.moved.notified().await;
    }
}
