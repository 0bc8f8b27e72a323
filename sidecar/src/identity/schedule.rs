//! When to ask for the next certificate. Pure: time and randomness are passed in.

use std::time::{Duration, SystemTime};

use crate::tls::Credential;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(150);
/// While there is no certificate at all and nobody has refused us: a mesh that starts together is up together.
const LAST_RETRY_AT_START: Duration = Duration::from_secs(5);

/// Half of the leaf's life after it began, ten percent sooner or later, so that sidecars that started together do
/// not renew together. `random` is in 0..1.
pub(super) fn renew_at(credential: &Credential, random: f64) -> SystemTime {
    let life = credential.lifetime();
    let left_then = life.mul_f64(0.5 + 0.1 * (random.clamp(0.0, 1.0) - 0.5));
    credential.not_after().checked_sub(left_then).unwrap_or(credential.not_before())
}

/// What a failed try says about the next one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// There is a certificate of this life.
    Certified(Duration),
    /// There is none, and nobody answered.
    Unheard,
    /// There is none, and the control plane or our own files say no.
    Refused,
}

/// How long to wait after `failures` failed tries in a row: doubling from 1 s to 150 s, less when the leaf is short,
/// so that a leaf of 20 s gets its tries too; the upper half of it is random.
pub(super) fn retry_after(failures: u32, standing: Standing, random: f64) -> Duration {
    let longest = match standing {
        Standing::Certified(life) => LAST_RETRY.min(life / 20),
        Standing::Unheard => LAST_RETRY_AT_START,
        Standing::Refused => LAST_RETRY,
    };
    let doubled = FIRST_RETRY.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)));
    doubled.min(longest).mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::test_authority::{Authority, LeafSpec};

    #[test]
    fn renewal_is_at_half_life_give_or_take() {
        let authority = Authority::new("outrigger.local");
        let now = SystemTime::now();
        let cases = [
            // back-dated as the control plane does, 24 h
            (300, 24 * 3600, 0.0, 11.0 * 3600.0 + 24.0 * 180.0, 14.0 * 3600.0),
            (300, 20, 0.5, 9.0, 11.0),
            // not back-dated
            (0, 20, 0.5, 9.0, 11.0),
            (0, 20, 0.0, 10.0, 12.0),
            (0, 20, 1.0, 8.0, 10.0),
        ];
        for (before, after, random, least, most) in cases {
            let spec = LeafSpec::valid("shop", "cart").times(now, before, after);
            let at = renew_at(&authority.credential(&spec), random);
            let wait = at.duration_since(now).unwrap().as_secs_f64();
            assert!((least..=most).contains(&wait), "{before} {after} {random}: {wait}");
        }
    }

    #[test]
    fn retries_grow_and_end() {
        let day = Standing::Certified(Duration::from_secs(86_400));
        let cases = [
            (1, day, 1.0, 1.0),
            (1, day, 0.0, 0.5),
            (2, day, 1.0, 2.0),
            (8, day, 1.0, 128.0),
            (9, day, 1.0, 150.0),
            (u32::MAX, day, 1.0, 150.0),
            (u32::MAX, day, 0.0, 75.0),
            (9, Standing::Certified(Duration::from_secs(20)), 1.0, 1.0),
            (1, Standing::Certified(Duration::from_secs(10)), 1.0, 0.5),
            (9, Standing::Unheard, 1.0, 5.0),
            (9, Standing::Refused, 1.0, 150.0),
        ];
        for (failures, standing, random, expected) in cases {
            let wait = retry_after(failures, standing, random);
            assert_eq!(wait.as_secs_f64(), expected, "{failures} {standing:?} {random}");
        }
    }
}
