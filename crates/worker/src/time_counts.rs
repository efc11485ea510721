//! How often something took how long: counts by upper bounds, for a histogram.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How many times were at most as long as each of [`Self::BOUNDS`] and longer than the bound before; the last ones were longer than all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeCounts(pub [u64; Self::COUNT]);

impl TimeCounts {
    /// Upper bounds in seconds: a decoding step of a small model takes less than a millisecond, a chunk of a prompt on a slow machine seconds.
    pub const BOUNDS: [f64; Self::COUNT - 1] =
        [0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 4.096];
    const COUNT: usize = 15;

    /// From a list, as the wire has it; what it lacks is 0.
    pub fn of(counts: &[u64]) -> Self {
        let mut all = Self::default();
        all.0.iter_mut().zip(counts).for_each(|(own, count)| *own = *count);
        all
    }

    fn bucket(time: Duration) -> usize {
        Self::BOUNDS.partition_point(|bound| *bound < time.as_secs_f64())
    }
}

/// The same while it is counted.
#[derive(Debug, Default)]
pub(crate) struct TimeCounter([AtomicU64; TimeCounts::COUNT]);

impl TimeCounter {
    pub(crate) fn add(&self, time: Duration) {
        if let Some(count) = self.0.get(TimeCounts::bucket(time)) {
            count.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn counts(&self) -> TimeCounts {
        let mut all = TimeCounts::default();
        all.0.iter_mut().zip(&self.0).for_each(|(own, count)| *own = count.load(Relaxed));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_counts_below_its_bound() {
        let counter = TimeCounter::default();
        for millis in [0, 1, 1, 3, 5000] {
            counter.add(Duration::from_millis(millis));
        }
        let counts = counter.counts();
        assert_eq!(counts.0, [1, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(TimeCounts::of(&counts.0[..3]).0[..4], [1, 0, 2, 0]);
    }
}
