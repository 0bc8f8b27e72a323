//! Where the token buckets of rate limits are kept: for all workers of the sidecar together, at most 10,000 per policy, of
//! which the least recently used goes first. What fits and what does not is decided by `outrigger_api::policy::rate_limit`.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrigger_api::facts::{Connection, Request};
use outrigger_api::policy::rate_limit::{By, Counted, Full, Policy, Rate, RateLimits};

/// Buckets of one policy.
const MOST: usize = 10_000;

/// The buckets of all policies in force. Cloning shares them.
#[derive(Clone, Default)]
pub struct Buckets(Arc<Mutex<BTreeMap<String, Arc<OfPolicy>>>>);

/// Those of one policy, by limit and value.
struct OfPolicy {
    limits: Vec<By>,
    /// Two, so that no caller can find values that share a bucket.
    hashers: [RandomState; 2],
    recent: Mutex<Recent>,
}

/// The buckets of the rate limits that a worker knows.
#[derive(Default)]
pub struct Followed {
    rules: Option<Arc<RateLimits>>,
    kept: Vec<Arc<OfPolicy>>,
}

impl Followed {
    /// Finds the buckets of `rules`, where these are others than before. What a policy has counted is kept as long as its
    /// limits count by the same things.
    pub fn follow(&mut self, rules: &Arc<RateLimits>, buckets: &Buckets) {
        if self.rules.as_ref().is_some_and(|known| Arc::ptr_eq(known, rules)) {
            return;
        }
        let mut all = buckets.0.lock().unwrap_or_else(PoisonError::into_inner);
        let named: Vec<String> = rules.policies.iter().map(Policy::full_name).collect();
        all.retain(|name, _| named.contains(name));
        let kept = rules.policies.iter().zip(named).map(|(policy, name)| {
            let same = |known: &&Arc<OfPolicy>| known.limits.iter().eq(policy.limits.iter().map(|limit| &limit.by));
            let known = all.get(&name).filter(same).cloned();
            let kept = known.unwrap_or_else(|| Arc::new(OfPolicy::new(policy)));
            all.insert(name, kept.clone());
            kept
        });
        self.kept = kept.collect();
        self.rules = Some(rules.clone());
    }

    /// Takes one from a bucket. `now`: nanoseconds since the process's epoch.
    pub fn take(&self, counted: &Counted<'_>, facts: (&Connection<'_>, &Request<'_>), now: u64) -> Result<Taken, Full> {
        let Some(of) = self.kept.get(counted.policy_index) else { return Ok(Taken(None)) };
        let Some(limit) = counted.policy.limits.get(counted.limit_index) else { return Ok(Taken(None)) };
        let key = of.key(counted.limit_index, &limit.by, facts);
        of.recent().take(key, counted.rate, now)?;
        Ok(Taken(Some((of.clone(), key, counted.rate))))
    }
}

/// What was taken, for the case that another limit refuses the request.
pub struct Taken(Option<(Arc<OfPolicy>, Key, Rate)>);

impl Taken {
    pub fn give_back(self) {
        if let Some((of, key, rate)) = self.0 {
            of.recent().give_back(key, rate);
        }
    }
}

type Key = [u64; 2];

impl OfPolicy {
    fn new(policy: &Policy) -> OfPolicy {
        OfPolicy {
            limits: policy.limits.iter().map(|limit| limit.by.clone()).collect(),
            hashers: [RandomState::new(), RandomState::new()],
            recent: Mutex::default(),
        }
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, limit: usize, by: &By, (connection, request): (&Connection<'_>, &Request<'_>)) -> Key {
        let [mut one, mut other] = [self.hashers[0].build_hasher(), self.hashers[1].build_hasher()];
        one.write_usize(limit);
        other.write_usize(limit);
        by.key(connection, request, &mut |part| {
            for hasher in [&mut one, &mut other] {
                // With its length, so that `ab`, `c` is not `a`, `bc`.
                hasher.write_usize(part.len());
                hasher.write(part);
            }
        });
        [one.finish(), other.finish()]
    }
}

/// Buckets in the order of their use: a list through a vector, newest first.
#[derive(Default)]
struct Recent {
    places: HashMap<Key, usize>,
    buckets: Vec<Bucket>,
    newest: usize,
    oldest: usize,
}

struct Bucket {
    key: Key,
    /// See [`Rate::take`].
    full: u64,
    newer: usize,
    older: usize,
}

/// No bucket.
const NONE: usize = usize::MAX;

impl Recent {
    fn take(&mut self, key: Key, rate: Rate, now: u64) -> Result<(), Full> {
        let place = self.place(key);
        let Some(bucket) = self.buckets.get_mut(place) else { return Ok(()) };
        bucket.full = rate.take(bucket.full, now)?;
        Ok(())
    }

    fn give_back(&mut self, key: Key, rate: Rate) {
        let place = self.places.get(&key).copied().unwrap_or(NONE);
        if let Some(bucket) = self.buckets.get_mut(place) {
            bucket.full = rate.give_back(bucket.full);
        }
    }

    /// The bucket of a key as the newest one; the oldest gives way to a new one.
    fn place(&mut self, key: Key) -> usize {
        if let Some(place) = self.places.get(&key).copied() {
            if place != self.newest {
                self.unlink(place);
                self.link(place);
            }
            return place;
        }
        let bucket = Bucket { key, full: 0, newer: NONE, older: NONE };
        let place = if self.buckets.len() < MOST {
            if self.buckets.is_empty() {
                (self.newest, self.oldest) = (NONE, NONE);
            }
            self.buckets.push(bucket);
            self.buckets.len() - 1
        } else {
            let place = self.oldest;
            self.unlink(place);
            if let Some(old) = self.buckets.get_mut(place) {
                self.places.remove(&old.key);
                *old = bucket;
            }
            place
        };
        self.places.insert(key, place);
        self.link(place);
        place
    }

    fn link(&mut self, place: usize) {
        let before = std::mem::replace(&mut self.newest, place);
        if let Some(bucket) = self.buckets.get_mut(place) {
            (bucket.newer, bucket.older) = (NONE, before);
        }
        match self.buckets.get_mut(before) {
            Some(bucket) => bucket.newer = place,
            None => self.oldest = place,
        }
    }

    fn unlink(&mut self, place: usize) {
        let Some((newer, older)) = self.buckets.get(place).map(|bucket| (bucket.newer, bucket.older)) else { return };
        match self.buckets.get_mut(newer) {
            Some(bucket) => bucket.older = older,
            None => self.newest = older,
        }
        match self.buckets.get_mut(older) {
            Some(bucket) => bucket.newer = newer,
            None => self.oldest = newer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { requests: 1, per_ms: 1000, burst: 2 };

    fn key(n: usize) -> Key {
        [n as u64, 7]
    }

    #[test]
    fn the_least_recently_used_bucket_goes() {
        let mut recent = Recent::default();
        for n in 0..MOST {
            recent.take(key(n), RATE, 1).unwrap();
            recent.take(key(n), RATE, 1).unwrap();
        }
        assert!(recent.take(key(0), RATE, 1).is_err());
        // 1 is the oldest now.
        recent.take(key(MOST), RATE, 1).unwrap();
        assert_eq!((recent.buckets.len(), recent.places.len()), (MOST, MOST));
        assert!(recent.take(key(0), RATE, 1).is_err(), "used a moment ago");
        assert!(recent.take(key(2), RATE, 1).is_err());
        assert!(recent.take(key(1), RATE, 1).is_ok(), "begins anew");
        assert!(recent.take(key(3), RATE, 1).is_ok(), "gave way to it");
        for n in (0..4 * MOST).rev() {
            let _ = recent.take(key(n * 7 % (2 * MOST)), RATE, 2);
            assert!(recent.buckets.len() <= MOST && recent.places.len() == recent.buckets.len());
        }
        let mut walked = 0;
        let mut place = recent.newest;
        while let Some(bucket) = recent.buckets.get(place) {
            assert_eq!(recent.places[&bucket.key], place);
            (place, walked) = (bucket.older, walked + 1);
        }
        assert_eq!(walked, MOST);
    }

    #[test]
    fn what_another_limit_refuses_is_given_back() {
        let mut recent = Recent::default();
        recent.take(key(1), RATE, 1).unwrap();
        recent.take(key(1), RATE, 1).unwrap();
        assert!(recent.take(key(1), RATE, 1).is_err());
        recent.give_back(key(1), RATE);
        assert!(recent.take(key(1), RATE, 1).is_ok());
    }
}
