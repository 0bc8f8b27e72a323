//! Latencies in nanoseconds, counted in buckets that are at most 1.6 % wide. What the load measures goes to the parent
//! as text and is added up there. Pure.

use serde::{Deserialize, Serialize};

/// Buckets per power of two, as bits.
const PRECISION: u32 = 6;
const PER_POWER: u64 = 1 << PRECISION;
const BUCKETS: usize = ((64 - PRECISION as usize) + 1) * PER_POWER as usize;

#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

/// The buckets that are not empty: index and count.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sparse(Vec<(usize, u64)>);

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: vec![0; BUCKETS], total: 0 }
    }
}

impl Histogram {
    pub fn record(&mut self, nanos: u64) {
        self.counts[bucket(nanos)] += 1;
        self.total += 1;
    }

    pub fn add(&mut self, other: &Sparse) {
        for (index, count) in &other.0 {
            if let Some(place) = self.counts.get_mut(*index) {
                *place += count;
                self.total += count;
            }
        }
    }

    pub fn merge(&mut self, other: &Histogram) {
        self.add(&other.sparse());
    }

    pub fn sparse(&self) -> Sparse {
        Sparse(self.counts.iter().copied().enumerate().filter(|(_, count)| *count > 0).collect())
    }

    /// The middle of the bucket in which the value of this rank lies; 0 when nothing was recorded.
    pub fn quantile(&self, share: f64) -> u64 {
        let rank = ((self.total as f64 * share).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle(index);
            }
        }
        0
    }
}

impl From<&Sparse> for Histogram {
    fn from(sparse: &Sparse) -> Histogram {
        let mut histogram = Histogram::default();
        histogram.add(sparse);
        histogram
    }
}

/// Small values have a bucket each; of larger ones the seven highest bits count.
fn bucket(nanos: u64) -> usize {
    if nanos < PER_POWER {
        return nanos as usize;
    }
    let power = 63 - nanos.leading_zeros();
    let shift = power - PRECISION;
    ((u64::from(shift + 1) << PRECISION) + ((nanos >> shift) - PER_POWER)) as usize
}

fn middle(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < PER_POWER {
        return bucket;
    }
    let shift = (bucket >> PRECISION) - 1;
    let low = ((bucket & (PER_POWER - 1)) + PER_POWER) << shift;
    low + ((1 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_narrow_and_holds_its_middle() {
        for power in 0..64 {
            for nanos in [1u64 << power, (1u64 << power) + (1u64 << power) / 3, (1u64 << power).wrapping_sub(1)] {
                let middle = middle(bucket(nanos));
                assert_eq!(bucket(middle), bucket(nanos), "{nanos}");
                assert!(middle.abs_diff(nanos) as f64 <= nanos as f64 * 0.016, "{nanos} in {middle}");
            }
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn quantiles() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.99), 0);
        (1..=1000).for_each(|n| histogram.record(n * 1000));
        for (share, expected) in [(0.0, 1_000.0), (0.5, 500_000.0), (0.99, 990_000.0), (1.0, 1_000_000.0)] {
            let got = histogram.quantile(share) as f64;
            assert!((got / expected - 1.0).abs() < 0.016, "{share}: {got}");
        }
    }

    #[test]
    fn a_sum_is_what_both_saw() {
        let (mut one, mut two) = (Histogram::default(), Histogram::default());
        one.record(10);
        two.record(1_000_000);
        one.merge(&two);
        let text = serde_json::to_string(&one.sparse()).unwrap();
        let back = Histogram::from(&serde_json::from_str::<Sparse>(&text).unwrap());
        assert_eq!((back.total, back.quantile(0.5), bucket(back.quantile(1.0))), (2, 10, bucket(1_000_000)));
    }
}
