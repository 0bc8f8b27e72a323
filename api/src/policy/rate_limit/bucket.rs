//! A token bucket as one number (the generic cell rate algorithm): the moment at which it will be full again. Pure; time is
//! passed in, in nanoseconds since some epoch.

use serde::{Deserialize, Serialize};

/// So many requests in so much time, and so many at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Rate {
    /// At least 1.
    pub requests: u32,
    /// At least 1.
    pub per_ms: u64,
    /// At least 1.
    pub burst: u32,
}

/// One more does not fit; it will after so many nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full {
    pub wait: u64,
}

impl Rate {
    /// Nanoseconds until one token has come back.
    fn period(self) -> u64 {
        (self.per_ms.saturating_mul(1_000_000) / u64::from(self.requests.max(1))).max(1)
    }

    /// `full`: when the bucket will be full again, 0 for a new one. Gives the same after one request was taken.
    pub fn take(self, full: u64, now: u64) -> Result<u64, Full> {
        let room = self.period().saturating_mul(u64::from(self.burst.max(1)));
        let next = full.max(now).saturating_add(self.period());
        match next.saturating_sub(now) {
            ahead if ahead <= room => Ok(next),
            ahead => Err(Full { wait: ahead - room }),
        }
    }

    /// Takes one request back that another limit refused.
    pub fn give_back(self, full: u64) -> u64 {
        full.saturating_sub(self.period())
    }

    /// Requests that fit at once now.
    pub fn left(self, full: u64, now: u64) -> u64 {
        let room = self.period().saturating_mul(u64::from(self.burst.max(1)));
        room.saturating_sub(full.saturating_sub(now)) / self.period()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_burst_then_the_rate() {
        let rate = Rate { requests: 10, per_ms: 1000, burst: 3 };
        let mut full = 0;
        for left in [2, 1, 0] {
            full = rate.take(full, SECOND).unwrap();
            assert_eq!(rate.left(full, SECOND), left);
        }
        assert_eq!(rate.take(full, SECOND), Err(Full { wait: SECOND / 10 }));
        assert_eq!(rate.take(full, SECOND + SECOND / 20), Err(Full { wait: SECOND / 20 }));
        full = rate.take(full, SECOND + SECOND / 10).unwrap();
        assert!(rate.take(full, SECOND + SECOND / 10).is_err());
        assert!(rate.take(rate.give_back(full), SECOND + SECOND / 10).is_ok());
        // However long nobody asks, no more than the burst is there.
        assert_eq!(rate.left(full, 100 * SECOND), 3);
    }

    #[test]
    fn within_any_window_no_more_than_burst_and_rate() {
        for rate in [
            Rate { requests: 1, per_ms: 1, burst: 1 },
            Rate { requests: 7, per_ms: 1000, burst: 1 },
            Rate { requests: 100, per_ms: 60_000, burst: 40 },
            Rate { requests: u32::MAX, per_ms: 1, burst: u32::MAX },
            Rate { requests: 1, per_ms: u64::MAX, burst: u32::MAX },
        ] {
            let (mut full, mut taken) = (0, 0_u64);
            for step in 0..5000_u64 {
                if let Ok(next) = rate.take(full, 1 + step * 1_000_000) {
                    (full, taken) = (next, taken + 1);
                }
            }
            let most = 5000.0 * f64::from(rate.requests) / rate.per_ms as f64 + f64::from(rate.burst) + 1.0;
            assert!(taken as f64 <= most, "{rate:?}: {taken}");
        }
    }
}
