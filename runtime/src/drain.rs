//! The end of a process, in order. `main` holds the [`Drain`] and advances it after SIGTERM; listeners and connections
//! on every thread hold [`DrainHandle`]s, ask in one atomic load how far it is, or wait for it. Life story:
//!
//! Running -> Draining (not ready; accept, and answer with `Connection: close` and GOAWAY) -> Closing (inbound listeners
//! close, what runs is finished; outbound still accepts) -> Done (everything ends).
//!
//! It never goes back, and it never ends anything itself: it only tells.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// How far the end has come; later states compare greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    Running,
    Draining,
    Closing,
    Done,
}

/// How much time there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// From the signal: how long connections are still accepted, until peers have learnt that it goes.
    pub delay: Duration,
    /// From the signal to the end, delay included.
    pub total: Duration,
}

impl Default for Budget {
    fn default() -> Budget {
        Budget { delay: Duration::from_secs(5), total: Duration::from_secs(30) }
    }
}

#[derive(Default)]
struct Shared {
    state: AtomicU8,
    running: AtomicUsize,
    advanced: Notify,
    idle: Notify,
}

impl Shared {
    fn state(&self) -> State {
        match self.state.load(Ordering::SeqCst) {
            0 => State::Running,
            1 => State::Draining,
            2 => State::Closing,
            _ => State::Done,
        }
    }
}

/// The one that drives.
#[derive(Default)]
pub struct Drain {
    shared: Arc<Shared>,
}

impl Drain {
    pub fn new() -> Drain {
        Drain::default()
    }

    pub fn handle(&self) -> DrainHandle {
        DrainHandle { shared: Arc::clone(&self.shared) }
    }

    /// Goes to `state` at once unless it is past it already.
    pub fn advance(&self, state: State) {
        let before = self.shared.state.fetch_max(state as u8, Ordering::SeqCst);
        if before < state as u8 {
            self.shared.advanced.notify_waiters();
        }
    }

    /// Draining, then Closing after the delay, then Done as soon as nothing runs or the budget is spent. Returns how
    /// many were still running then: 0 means that nothing was lost. Dropping the future leaves the state where it is.
    pub async fn run(&self, budget: Budget) -> usize {
        let began = Instant::now();
        self.advance(State::Draining);
        tokio::time::sleep_until(began + budget.delay.min(budget.total)).await;
        self.advance(State::Closing);
        let _ = tokio::time::timeout_at(began + budget.total, self.idle()).await;
        let left = self.shared.running.load(Ordering::SeqCst);
        self.advance(State::Done);
        left
    }

    /// From Closing on every [`Hold`] that ends as the last one notifies; one that ended before is seen in the count.
    async fn idle(&self) {
        let mut idle = pin!(self.shared.idle.notified());
        loop {
            idle.as_mut().enable();
            if self.shared.running.load(Ordering::SeqCst) == 0 {
                return;
            }
            idle.as_mut().await;
            idle.set(self.shared.idle.notified());
        }
    }
}

/// What everybody else holds; cheap to clone, usable from any runtime.
#[derive(Clone)]
pub struct DrainHandle {
    shared: Arc<Shared>,
}

impl DrainHandle {
    /// A handle of a drain that never begins, for tests.
    pub fn never() -> DrainHandle {
        Drain::new().handle()
    }

    pub fn state(&self) -> State {
        self.shared.state()
    }

    /// True as soon as answers should say that the connection will be closed.
    pub fn is_draining(&self) -> bool {
        self.state() >= State::Draining
    }

    /// Returns when the state is `state` or a later one; at once if it already is. Cancel safe.
    pub async fn reached(&self, state: State) {
        let mut advanced = pin!(self.shared.advanced.notified());
        loop {
            advanced.as_mut().enable();
            if self.state() >= state {
                return;
            }
            advanced.as_mut().await;
            advanced.set(self.shared.advanced.notified());
        }
    }

    /// [`DrainHandle::reached`] for a task that outlives this handle.
    pub fn when(&self, state: State) -> impl Future<Output = ()> + Send + 'static {
        let handle = self.clone();
        async move { handle.reached(state).await }
    }

    /// Counts something that should be finished before the end, until the hold is dropped. Hold one per request or
    /// opaque connection, not per idle keep-alive connection: those are closed and not waited for.
    pub fn hold(&self) -> Hold {
        self.shared.running.fetch_add(1, Ordering::SeqCst);
        Hold { shared: Arc::clone(&self.shared) }
    }

    /// How many holds there are.
    pub fn running(&self) -> usize {
        self.shared.running.load(Ordering::SeqCst)
    }
}

/// Something that runs; see [`DrainHandle::hold`].
#[must_use = "it counts only while it is held"]
pub struct Hold {
    shared: Arc<Shared>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let before = self.shared.running.fetch_sub(1, Ordering::SeqCst);
        // Not while running: that would take a lock whenever the last request of a quiet moment ends.
        if before == 1 && self.shared.state() >= State::Closing {
            self.shared.idle.notify_waiters();
        }
    }
}

impl fmt::Debug for DrainHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainHandle").field("state", &self.state()).field("running", &self.running()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn states_come_in_order_and_the_end_waits_for_what_runs() {
        let drain = Drain::new();
        let handle = drain.handle();
        let hold = handle.hold();
        let began = Instant::now();
        let work = tokio::spawn({
            let handle = handle.clone();
            async move {
                handle.reached(State::Draining).await;
                let draining = began.elapsed();
                handle.reached(State::Closing).await;
                let closing = began.elapsed();
                tokio::time::sleep(Duration::from_secs(7)).await;
                drop(hold);
                handle.reached(State::Done).await;
                (draining, closing, began.elapsed())
            }
        });
        tokio::task::yield_now().await;
        assert!(!handle.is_draining());
        assert_eq!(drain.run(Budget::default()).await, 0);
        let seconds = Duration::from_secs;
        assert_eq!(work.await.unwrap(), (seconds(0), seconds(5), seconds(12)));
        assert_eq!(handle.state(), State::Done);
    }

    #[tokio::test(start_paused = true)]
    async fn the_budget_ends_what_does_not_end() {
        let drain = Drain::new();
        let hold = drain.handle().hold();
        let began = Instant::now();
        assert_eq!(drain.run(Budget::default()).await, 1);
        assert_eq!(began.elapsed(), Duration::from_secs(30));
        drop(hold);
        assert_eq!(drain.handle().running(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_running_ends_after_the_delay_and_a_delay_beyond_the_total_is_cut() {
        let began = Instant::now();
        assert_eq!(Drain::new().run(Budget::default()).await, 0);
        assert_eq!(began.elapsed(), Duration::from_secs(5));
        let budget = Budget { delay: Duration::from_secs(60), total: Duration::from_secs(2) };
        let began = Instant::now();
        assert_eq!(Drain::new().run(budget).await, 0);
        assert_eq!(began.elapsed(), Duration::from_secs(2));
    }

    #[tokio::test]
    async fn it_never_goes_back_and_late_waiters_return_at_once() {
        let drain = Drain::new();
        drain.advance(State::Done);
        drain.advance(State::Draining);
        assert_eq!(drain.handle().state(), State::Done);
        drain.handle().when(State::Closing).await;
    }

    #[test]
    fn other_threads_and_their_runtimes_are_told() {
        let drain = Drain::new();
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let handle = drain.handle();
                let hold = handle.hold();
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    runtime.block_on(handle.reached(State::Closing));
                    drop(hold);
                })
            })
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let budget = Budget { delay: Duration::ZERO, total: Duration::from_secs(60) };
        assert_eq!(runtime.block_on(drain.run(budget)), 0);
        for worker in workers {
            worker.join().unwrap();
        }
    }
}
