//! An amount that is spent, earned, and given back by time: how often a peer may do what costs the other side more than
//! itself. `protocol/http/flood.rs` holds clients to it, and `lane/http2.rs` holds itself to the same one, so that a
//! connection which many clients share is never ended for what some of them do.

use std::time::Instant;

/// Never above the amount with which it began.
pub struct Allowance {
    left: i64,
    most: i64,
    per_second: i64,
    /// Up to when time has given back. Clocks are read only when there is not enough left.
    since: Instant,
}

impl Allowance {
    /// `per_second` comes back each second.
    pub fn new(most: i64, per_second: i64) -> Allowance {
        Allowance { left: most, most, per_second, since: Instant::now() }
    }

    pub fn earn(&mut self, amount: i64) {
        self.left = self.left.saturating_add(amount).min(self.most);
    }

    /// Whether so much is left.
    pub fn has(&mut self, amount: i64) -> bool {
        if self.left < amount {
            self.give_back();
        }
        self.left >= amount
    }

    /// False when there is not so much left.
    pub fn spend(&mut self, amount: i64) -> bool {
        if !self.has(amount) {
            return false;
        }
        self.left -= amount;
        true
    }

    /// Spends it, also when it is not there.
    pub fn owe(&mut self, amount: i64) {
        self.left = self.left.saturating_sub(amount).max(-self.most);
    }

    fn give_back(&mut self) {
        let now = Instant::now();
        let passed = now.duration_since(self.since).as_millis();
        let given = passed.saturating_mul(u128::from(self.per_second.unsigned_abs())) / 1000;
        let given = i64::try_from(given).unwrap_or(i64::MAX);
        if given > 0 {
            self.since = now;
            self.earn(given);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn time_gives_back_from_the_beginning() {
        let mut allowance = Allowance::new(2, 1_000);
        assert!(allowance.spend(2));
        allowance.since = Instant::now() - Duration::from_millis(10);
        assert!(allowance.has(2), "what was spent long ago has come back at the first look");
        assert!(!allowance.has(3), "never more than it began with");
        allowance.owe(3);
        assert!(!allowance.has(1));
    }
}
