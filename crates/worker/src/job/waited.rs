//! How long a trainer has waited for the other processes of its job: what of a piece was no computing.
//!
//! A node that answers requests gives a job a share of its time by what the job computes. Without this, two nodes that stand back would each
//! take the other's pause for work, and stand back longer every time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time that one trainer's calls have blocked. Only that trainer adds to it.
#[derive(Debug, Default)]
pub(crate) struct Waited {
    nanos: AtomicU64,
}

impl Waited {
    /// Counts how long `wait` takes.
    pub(crate) fn during<T>(&self, wait: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let done = wait();
        let nanos = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
        done
    }

    /// All of it so far.
    pub(crate) fn total(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_waited_adds_up() {
        let waited = Waited::default();
        let pause = Duration::from_millis(5);
        assert_eq!(waited.during(|| 7), 7);
        let before = waited.total();
        waited.during(|| std::thread::sleep(pause));
        waited.during(|| std::thread::sleep(pause));
        assert!(waited.total() - before >= 2 * pause);
    }
}
