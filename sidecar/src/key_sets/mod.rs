//! The key sets behind the URLs (`jwksUri`) of RequestAuthentications: fetched on the control thread as long as a policy
//! names them, ahead of time, and kept for a day when their server is away, also over a restart. Workers read what is known
//! and, when a token names a key that is not in it, ask for a fresh one, which is fetched at most every 10 s.

mod fetch;
mod keep;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use outrigger_api::policy::jwt::{KeySet, KeySetUrl, RemoteKeys};
use outrigger_api::snapshot::Workload;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::config::Limits;
use fetch::{Failure, Fetcher};

/// After a failure, whatever the limits say.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);

/// What is known, shared by all threads. Cloning shares it.
#[derive(Clone)]
pub struct KeySets(Arc<Shared>);

struct Shared {
    known: ArcSwap<BTreeMap<KeySetUrl, Known>>,
    version: AtomicU64,
    lifetime: Duration,
    again: Duration,
    tries: Mutex<BTreeMap<KeySetUrl, Try>>,
    /// Told when a URL is asked for out of its turn.
    asked: Notify,
    /// Counts the fetches that have ended.
    ended: watch::Sender<u64>,
}

#[derive(Clone)]
struct Known {
    set: Arc<KeySet>,
    fetched: SystemTime,
}

/// How often a URL was fetched, and whether it is to be fetched now.
#[derive(Default)]
struct Try {
    begun: Option<Instant>,
    running: bool,
    asked: bool,
    ended: u64,
}

/// What the control thread needs to fetch.
pub struct Settings {
    pub state: Option<PathBuf>,
    pub mark: Option<u32>,
    /// PEM with the roots by which servers are known; None: the system's.
    pub roots: Option<PathBuf>,
    pub limits: Limits,
}

impl KeySets {
    pub fn new(limits: &Limits) -> KeySets {
        KeySets(Arc::new(Shared {
            known: ArcSwap::default(),
            version: AtomicU64::new(0),
            lifetime: limits.key_set_lifetime,
            again: limits.key_set_again,
            tries: Mutex::default(),
            asked: Notify::new(),
            ended: watch::Sender::new(0),
        }))
    }

    fn tries(&self) -> MutexGuard<'_, BTreeMap<KeySetUrl, Try>> {
        self.0.tries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whenever a key set does: what was verified before may have been by a key that is gone.
    pub fn version(&self) -> u64 {
        self.0.version.load(Ordering::Acquire)
    }

    /// Waits for a fetch of `url`: one that runs, or a new one when the last began more than 10 s ago. False when there is
    /// nothing to wait for. The caller bounds the time: a URL that no policy names any more is not fetched.
    pub async fn refreshed(&self, url: &KeySetUrl) -> bool {
        let mut ended = self.0.ended.subscribe();
        let before = {
            let mut tries = self.tries();
            // Before the control thread has heard of the policy there is nothing, and there will be.
            let one = tries.entry(url.clone()).or_default();
            let due = one.begun.is_none_or(|begun| begun.elapsed() >= self.0.again);
            if !one.running && !due {
                return false;
            }
            if !one.running {
                one.asked = true;
                self.0.asked.notify_one();
            }
            one.ended
        };
        loop {
            if self.tries().get(url).is_some_and(|one| one.ended > before) {
                return true;
            }
            if ended.changed().await.is_err() {
                return false;
            }
        }
    }

    fn put(&self, url: &KeySetUrl, set: KeySet, fetched: SystemTime) {
        let mut known = BTreeMap::clone(&self.0.known.load());
        if let Some(before) = known.get_mut(url)
            && *before.set == set
        {
            // The same keys: nothing that was verified is to be verified again.
            before.fetched = fetched;
        } else {
            known.insert(url.clone(), Known { set: Arc::new(set), fetched });
            self.0.known.store(Arc::new(known));
            self.0.version.fetch_add(1, Ordering::Release);
            return;
        }
        self.0.known.store(Arc::new(known));
    }

    fn forget_others(&self, wanted: &BTreeMap<KeySetUrl, Duration>) {
        let known = self.0.known.load();
        if known.keys().any(|url| !wanted.contains_key(url)) {
            let kept = known.iter().filter(|(url, _)| wanted.contains_key(*url));
            self.0.known.store(Arc::new(kept.map(|(url, known)| (url.clone(), known.clone())).collect()));
        }
        self.tries().retain(|url, one| wanted.contains_key(url) || one.running);
    }
}

impl RemoteKeys for KeySets {
    fn of(&self, url: &KeySetUrl) -> Option<Arc<KeySet>> {
        let known = self.0.known.load();
        let known = known.get(url)?;
        // A clock that was set back makes nothing older.
        let age = SystemTime::now().duration_since(known.fetched).unwrap_or_default();
        (age < self.0.lifetime).then(|| known.set.clone())
    }
}

/// Fetches what the own workload's policies name. Never ends.
pub async fn run(key_sets: KeySets, mut own: watch::Receiver<Option<Arc<Workload>>>, settings: Settings) {
    if let Some(state) = &settings.state {
        for (url, set, fetched) in keep::load(state).await {
            key_sets.put(&url, set, fetched);
        }
    }
    let fetcher = Arc::new(Fetcher::new(settings.mark, settings.roots, settings.limits.key_set_bytes));
    let mut round = Round { key_sets, fetcher, limits: settings.limits, due: BTreeMap::new(), running: JoinSet::new() };
    loop {
        // What is not known yet may be on its way: the copy in STATE is forgotten only by what was heard.
        let heard = own.borrow_and_update().clone();
        if let Some(heard) = heard {
            round.follow(&heard);
        }
        round.begin();
        tokio::select! {
            changed = own.changed() => if changed.is_err() { return },
            () = round.key_sets.0.asked.notified() => {}
            () = tokio::time::sleep(round.pause()) => {}
            Some(done) = round.running.join_next() => {
                if let Ok((url, fetched)) = done
                    && round.end(&url, fetched)
                    && let Some(state) = &settings.state
                {
                    let known = round.key_sets.0.known.load();
                    keep::save(state, known.iter().map(|(url, known)| (url, &*known.set, known.fetched))).await;
                }
            }
        }
    }
}

/// The fetches that run and those that are due.
struct Round {
    key_sets: KeySets,
    fetcher: Arc<Fetcher>,
    limits: Limits,
    due: BTreeMap<KeySetUrl, Due>,
    running: JoinSet<(KeySetUrl, Result<KeySet, Failure>)>,
}

struct Due {
    at: Instant,
    timeout: Duration,
    failures: u32,
}

impl Round {
    fn follow(&mut self, own: &Workload) {
        let mut wanted: BTreeMap<KeySetUrl, Duration> = BTreeMap::new();
        for (url, timeout) in own.authentication.remote() {
            let timeout = Duration::from_millis(timeout).min(self.limits.key_set_fetch);
            let longest = wanted.entry(url.clone()).or_default();
            *longest = timeout.max(*longest);
        }
        self.due.retain(|url, _| wanted.contains_key(url));
        for (url, timeout) in &wanted {
            let due = self.due.entry(url.clone()).or_insert(Due { at: Instant::now(), timeout: *timeout, failures: 0 });
            due.timeout = *timeout;
        }
        self.key_sets.forget_others(&wanted);
    }

    /// Begins what is due or asked for.
    fn begin(&mut self) {
        let mut tries = self.key_sets.tries();
        for (url, due) in &self.due {
            let one = tries.entry(url.clone()).or_default();
            if one.running || !(one.asked || due.at <= Instant::now()) {
                continue;
            }
            *one = Try { begun: Some(Instant::now()), running: true, asked: false, ended: one.ended };
            let (fetcher, url, timeout) = (self.fetcher.clone(), url.clone(), due.timeout);
            self.running.spawn(async move {
                let fetched = fetcher.fetch(&url, timeout).await;
                (url, fetched)
            });
        }
    }

    fn pause(&self) -> Duration {
        let running = self.key_sets.tries();
        let waiting = self.due.iter().filter(|(url, _)| !running.get(*url).is_some_and(|one| one.running));
        let first = waiting.map(|(_, due)| due.at).min();
        first.map_or(self.limits.key_set_refresh, |at| at.saturating_duration_since(Instant::now()))
    }

    /// True when something is to be kept.
    fn end(&mut self, url: &KeySetUrl, fetched: Result<KeySet, Failure>) -> bool {
        let limits = &self.limits;
        let good = fetched.is_ok();
        let due = self.due.get_mut(url);
        match fetched {
            Ok(set) => {
                if let Some(due) = due {
                    // Not all sidecars at once.
                    due.at = Instant::now() + limits.key_set_refresh.mul_f64(0.9 + 0.2 * fastrand::f64());
                    due.failures = 0;
                    self.key_sets.put(url, set, SystemTime::now());
                }
            }
            Err(failure) => {
                tracing::warn!(%url, "the key set cannot be fetched, the last good one is used for a day: {failure}");
                if let Some(due) = due {
                    let pause = limits.key_set_again.max(SHORTEST_PAUSE).saturating_mul(1 << due.failures.min(5));
                    due.at = Instant::now() + pause.min(limits.key_set_refresh);
                    due.failures += 1;
                }
            }
        }
        let mut tries = self.key_sets.tries();
        let one = tries.entry(url.clone()).or_default();
        one.running = false;
        one.ended += 1;
        drop(tries);
        self.key_sets.0.ended.send_modify(|ended| *ended += 1);
        good
    }
}

#[cfg(test)]
mod tests;
