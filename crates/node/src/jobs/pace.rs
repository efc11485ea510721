//! How long a job stands back while its node answers requests.

use std::time::Duration;

/// After a piece that took `piece`, so that the job has `share` percent of the time.
pub(super) fn pause_after(piece: Duration, share: u32) -> Duration {
    let share = share.clamp(1, 100);
    piece.mul_f64(f64::from(100 - share) / f64::from(share))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_share_of_the_time() {
        for (share, seconds) in [(100, 0.0), (50, 2.0), (25, 6.0), (20, 8.0), (1, 198.0)] {
            let piece = Duration::from_secs(2);
            let pause = pause_after(piece, share);
            assert!((pause.as_secs_f64() - seconds).abs() < 1e-9, "{share}: {pause:?}");
        }
        assert_eq!(pause_after(Duration::from_secs(1), 0), Duration::from_secs(99));
    }
}
