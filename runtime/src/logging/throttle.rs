//! One line per key and second: what somebody else can make a process log as often as he likes. What is held back is
//! counted, and the next line of that key says how many were. Bounded in keys, too.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);
/// Keys beyond share one line per second.
const MAX_KEYS: usize = 256;

pub struct Throttle<K> {
    keys: Mutex<HashMap<Option<K>, Window>>,
}

#[derive(Default)]
struct Window {
    last: Option<Instant>,
    suppressed: u64,
}

/// The line may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Lines of this key that were not written since its last one; None: none, so that no field shows it.
    pub suppressed: Option<u64>,
}

impl<K> Default for Throttle<K> {
    fn default() -> Throttle<K> {
        Throttle { keys: Mutex::default() }
    }
}

impl<K: Eq + Hash> Throttle<K> {
    /// None: a line of this key was written less than a second ago.
    pub fn admit(&self, key: K, now: Instant) -> Option<Admitted> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = Some(key);
        if keys.len() >= MAX_KEYS && !keys.contains_key(&key) {
            keys.retain(|_, window| window.suppressed > 0 || window.last.is_some_and(|last| now < last + INTERVAL));
            if keys.len() >= MAX_KEYS {
                key = None;
            }
        }
        let window = keys.entry(key).or_default();
        if window.last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            window.suppressed += 1;
            return None;
        }
        window.last = Some(now);
        let suppressed = std::mem::take(&mut window.suppressed);
        Some(Admitted { suppressed: (suppressed > 0).then_some(suppressed) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_key_and_second_and_the_next_says_what_was_held_back() {
        let throttle = Throttle::default();
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let admitted = |suppressed| Some(Admitted { suppressed });
        assert_eq!(throttle.admit("a", at(0)), admitted(None));
        for millis in 1..1_000 {
            assert_eq!(throttle.admit("a", at(millis)), None);
        }
        assert_eq!(throttle.admit("b", at(500)), admitted(None));
        assert_eq!(throttle.admit("a", at(1_000)), admitted(Some(999)));
        assert_eq!(throttle.admit("a", at(2_000)), admitted(None));
    }

    #[test]
    fn keys_are_bounded() {
        let throttle = Throttle::default();
        let start = Instant::now();
        let lines = (0..100_000).filter(|key| throttle.admit(*key, start).is_some()).count();
        assert_eq!(lines, MAX_KEYS + 1);
        // The oldest are forgotten when they have nothing to say.
        let later = start + 2 * INTERVAL;
        assert_eq!(throttle.admit(100_000, later), Some(Admitted { suppressed: None }));
    }
}
