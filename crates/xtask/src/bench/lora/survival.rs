//! How much of a job's time is training when its process is killed again and again: a simulated clock over measured times.

use std::time::Duration;

/// What was measured of a job.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// Of a step.
    pub(super) step: f64,
    /// While a checkpoint is written.
    pub(super) save: f64,
    /// From a kill to the first step that is done again.
    pub(super) restart: f64,
}

/// The default cadence: by time, later where saving would take more than 2% of it.
pub(super) const PERIOD: Duration = Duration::from_secs(60);
const BETWEEN: f64 = 49.0;

/// What 30 days with a kill every `between_kills` seconds brings: training that counted, as a part of all the time.
pub(super) fn effective(times: Times, between_kills: f64) -> f64 {
    const LONG: f64 = 30.0 * 86_400.0;
    let period = PERIOD.as_secs_f64().max(BETWEEN * times.save);
    let (mut now, mut kept) = (0.0, 0.0);
    let mut next_kill = between_kills;
    let mut kills = 0.0_f64;
    while now < LONG {
        // One attempt: steps and checkpoints until the kill.
        let (mut saved_at, mut unsaved) = (now, 0.0);
        while now + times.step <= next_kill {
            now += times.step;
            unsaved += times.step;
            if now - saved_at < period {
                continue;
            }
            if now + times.save > next_kill {
                break; // killed while it writes: the checkpoint does not count
            }
            now += times.save;
            kept += unsaved;
            (saved_at, unsaved) = (now, 0.0);
        }
        now = next_kill + times.restart - times.step; // the restart ends with a step, which is counted by the next attempt
        // Not in time with the checkpoints: at any moment of a period (multiples of the golden ratio spread evenly).
        kills += 1.0;
        next_kill = between_kills * (kills + 1.0)
            + period.min(between_kills) * ((kills * 0.618_033_988_749_895).fract() - 0.5);
        if now >= next_kill {
            // It does not get up between two kills.
            return 0.0;
        }
    }
    kept / now
}

/// What saving takes of the time.
pub(super) fn pause_share(times: Times) -> f64 {
    let period = PERIOD.as_secs_f64().max(BETWEEN * times.save);
    // A checkpoint comes behind a step.
    let period = (period / times.step).ceil() * times.step;
    times.save / (period + times.save)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_half_a_period_and_a_restart() {
        let times = Times { step: 0.1, save: 0.05, restart: 5.0 };
        let kept = effective(times, 1800.0);
        // 1800 s are 29 whole periods and what is lost of one, and the restart.
        let expected = 1.0 - (30.0 + 5.0 + 30.0 * 0.05) / 1800.0;
        assert!((kept - expected).abs() < 0.003, "{kept} is not {expected}");
        assert!(effective(times, 30.0) < 0.01, "no checkpoint between two kills");
        assert!(effective(Times { restart: 40.0, ..times }, 30.0) < 0.01);
    }

    #[test]
    fn saving_takes_two_percent_at_most() {
        for save in [0.001, 0.1, 1.0, 10.0, 100.0] {
            for step in [0.01, 1.0, 90.0] {
                let share = pause_share(Times { step, save, restart: 1.0 });
                assert!(share <= 0.02 + 1e-9, "a save of {save} s takes {share}");
            }
        }
    }
}
