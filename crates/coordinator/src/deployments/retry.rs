//! When to try again, and when to stop trying.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// So many failures within [`FAILURE_WINDOW`] open the breaker.
pub const MAX_FAILURES: usize = 5;

/// How long a failure counts.
pub const FAILURE_WINDOW: Duration = Duration::from_secs(600);

/// The pause after the second failure; it doubles with each further one (0.5 s, 1 s, 2 s). After the first there is none: a
/// worker that was killed should be back as soon as it can load.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// The failures of one deployment, newest last. At most [`MAX_FAILURES`] are kept.
#[derive(Clone, Debug, Default)]
pub(super) struct Failures {
    times: VecDeque<Instant>,
}

impl Failures {
    /// Counts a failure: `Some(when)` to try again, `None` to give up.
    pub(super) fn failed(&mut self, now: Instant) -> Option<Instant> {
        self.times.retain(|time| now.saturating_duration_since(*time) < FAILURE_WINDOW);
        self.times.push_back(now);
        let doublings = match self.times.len() {
            1 => return Some(now),
            failures if failures >= MAX_FAILURES => return None,
            failures => failures - 2,
        };
        Some(now + FIRST_PAUSE * 2u32.pow(doublings as u32))
    }

    pub(super) fn forget(&mut self) {
        self.times.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_the_fifth_failure_is_the_last() {
        let start = Instant::now();
        let mut failures = Failures::default();
        let pauses: Vec<_> =
            (0..5).map(|_| failures.failed(start).map(|at| (at - start).as_millis())).collect();
        assert_eq!(pauses, [Some(0), Some(500), Some(1000), Some(2000), None]);
    }

    #[test]
    fn old_failures_do_not_count() {
        let start = Instant::now();
        let mut failures = Failures::default();
        for number in 0..20 {
            assert!(failures.failed(start + FAILURE_WINDOW / 3 * number).is_some());
        }
    }
}
