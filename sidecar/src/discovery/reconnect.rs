//! How long to wait before the control plane is dialled again. Pure.

use std::time::Duration;

const LEAST: Duration = Duration::from_millis(200);
const MOST: Duration = Duration::from_secs(5);

/// Anything from 0.2 s to an upper end that doubles from 1 s to 5 s: when a control plane comes back its sidecars do
/// not all arrive at once. `random` is in 0..1.
pub(super) fn reconnect_after(failures: u32, random: f64) -> Duration {
    let upper = Duration::from_secs(1).saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1))).min(MOST);
    LEAST + (upper - LEAST).mul_f64(random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_between_its_ends() {
        let cases = [(0, 0.0, 200), (1, 1.0, 1_000), (2, 1.0, 2_000), (3, 0.5, 2_100), (u32::MAX, 1.0, 5_000)];
        for (failures, random, expected) in cases {
            assert_eq!(reconnect_after(failures, random).as_millis(), expected, "{failures} {random}");
        }
    }
}
