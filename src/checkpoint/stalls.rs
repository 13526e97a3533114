//! How long vCPUs waited for write faults.

use std::time::Duration;

use serde::Serialize;

use crate::checkpoint::stats::micros;

/// Buckets for each doubling of the time: a quantile is exact to an eighth.
const STEPS: usize = 8;

/// Up to 2^32 µs, more than an hour.
const BUCKETS: usize = 32 * STEPS;

/// Waits of vCPUs, and of the VMM's own threads, for the capture of a piece that they wanted to
/// write. From the moment that the fault was seen, to the moment that its writer was let go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StallStatistics {
    /// How many there were.
    pub count: u64,
    /// The median.
    pub p50_us: u64,
    /// 99 of 100 were no longer.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
    /// All together.
    pub total_us: u64,
    /// How many waited for the disk, because staging was full.
    pub waited_for_staging: u64,
}

/// Counts waits in memory of fixed size; one for each thread that ends them.
#[derive(Clone, Debug)]
pub(crate) struct StallCounter {
    buckets: Box<[u64; BUCKETS]>,
    max_us: u64,
    total_us: u64,
    pub(crate) waited_for_staging: u64,
}

impl StallCounter {
    pub(crate) fn new() -> Self {
        Self {
            buckets: Box::new([0; BUCKETS]),
            max_us: 0,
            total_us: 0,
            waited_for_staging: 0,
        }
    }

    pub(crate) fn add(&mut self, wait: Duration) {
        let us = micros(wait);
        self.buckets[bucket_of(us)] += 1;
        self.max_us = self.max_us.max(us);
        self.total_us += us;
    }

    /// Takes over what another thread counted.
    pub(crate) fn merge(&mut self, other: &Self) {
        let pairs = self.buckets.iter_mut().zip(other.buckets.iter());
        pairs.for_each(|(mine, theirs)| *mine += theirs);
        self.max_us = self.max_us.max(other.max_us);
        self.total_us += other.total_us;
        self.waited_for_staging += other.waited_for_staging;
    }

    pub(crate) fn statistics(&self) -> StallStatistics {
        let count = self.buckets.iter().sum();
        StallStatistics {
            count,
            p50_us: self.quantile(count, 50),
            p99_us: self.quantile(count, 99),
            max_us: self.max_us,
            total_us: self.total_us,
            waited_for_staging: self.waited_for_staging,
        }
    }

    /// Returns the upper end of the bucket in which `percent` of all waits are reached.
    fn quantile(&self, count: u64, percent: u64) -> u64 {
        let wanted = (count * percent).div_ceil(100);
        let mut seen = 0;
        for (bucket, in_bucket) in self.buckets.iter().enumerate() {
            seen += in_bucket;
            if seen >= wanted && *in_bucket > 0 {
                return upper_end(bucket).min(self.max_us);
            }
        }
        0
    }
}

fn bucket_of(us: u64) -> usize {
    if us < STEPS as u64 {
        return usize::try_from(us).expect("it is below 8");
    }
    let octave = us.ilog2();
    // The three bits below the highest.
    let step = us >> (octave - 3) & (STEPS as u64 - 1);
    let bucket = (octave as usize - 2) * STEPS + usize::try_from(step).expect("it is below 8");
    bucket.min(BUCKETS - 1)
}

fn upper_end(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let shift = bucket / STEPS - 1;
    let first = (STEPS + bucket % STEPS) as u64;
    ((first + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_in_a_bucket_that_ends_at_most_an_eighth_above_it() {
        for us in (0..2000).chain([1 << 20, (1 << 31) + 5]) {
            let end = upper_end(bucket_of(us));
            assert!(
                end >= us && end <= us + us / 8,
                "{us} in a bucket up to {end}"
            );
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_those_of_all_threads_together() {
        let mut all = StallCounter::new();
        assert_eq!(all.statistics(), StallStatistics::default());
        for thread in 0..2 {
            let mut counter = StallCounter::new();
            (0..100).for_each(|number| {
                counter.add(Duration::from_micros(100 + number + 1000 * thread));
            });
            all.merge(&counter);
        }
        (0..2).for_each(|_| all.add(Duration::from_micros(50)));
        all.add(Duration::from_micros(9000));
        let stalls = all.statistics();
        assert_eq!((stalls.count, stalls.max_us), (203, 9000));
        assert!((190..=230).contains(&stalls.p50_us), "{stalls:?}");
        assert!((1190..=1350).contains(&stalls.p99_us), "{stalls:?}");
    }
}
