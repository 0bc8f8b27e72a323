//! Whether the threads of this process still turn: each worker beats, `/live` asks who has missed it. Beating is one
//! relaxed store; nobody is restarted from here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a worker may be silent before the process counts as dead.
pub const LONGEST_SILENCE: Duration = Duration::from_secs(30);
/// How often a worker beats.
pub const INTERVAL: Duration = Duration::from_secs(10);

struct Worker {
    name: String,
    /// Milliseconds after `began`.
    last: Arc<AtomicU64>,
}

/// All hearts of a process.
pub struct Heartbeats {
    began: Instant,
    workers: Mutex<Vec<Worker>>,
}

impl Default for Heartbeats {
    fn default() -> Heartbeats {
        Heartbeats { began: Instant::now(), workers: Mutex::default() }
    }
}

impl Heartbeats {
    pub fn new() -> Heartbeats {
        Heartbeats::default()
    }

    /// A heart for one thread; it counts as having beaten now, and from now on it has to.
    pub fn register(&self, name: impl Into<String>) -> Heart {
        let heart = Heart { began: self.began, last: Arc::default() };
        heart.beat();
        let worker = Worker { name: name.into(), last: Arc::clone(&heart.last) };
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
        heart
    }

    /// Those who have been silent for longer than [`LONGEST_SILENCE`], with how long; empty is alive.
    pub fn missed(&self) -> Vec<(String, Duration)> {
        let now = since(self.began);
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers
            .iter()
            .map(|worker| {
                let silent = now.saturating_sub(worker.last.load(Ordering::Relaxed));
                (worker.name.clone(), Duration::from_millis(silent))
            })
            .filter(|(_, silent)| *silent > LONGEST_SILENCE)
            .collect()
    }
}

/// One thread's own.
pub struct Heart {
    began: Instant,
    last: Arc<AtomicU64>,
}

impl Heart {
    pub fn beat(&self) {
        self.last.store(since(self.began), Ordering::Relaxed);
    }

    /// Beats for as long as the runtime that polls it turns; to be spawned on the worker's own runtime.
    pub async fn keep_beating(self) {
        loop {
            self.beat();
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

fn since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_silent_one_is_named() {
        let hearts = Heartbeats::new();
        tokio::time::advance(Duration::from_secs(100)).await;
        let beating = tokio::spawn(hearts.register("worker-0").keep_beating());
        let stuck = hearts.register("worker-1");
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(hearts.missed(), []);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(hearts.missed(), [("worker-1".to_owned(), Duration::from_secs(31))]);
        stuck.beat();
        assert_eq!(hearts.missed(), []);
        beating.abort();
    }
}
