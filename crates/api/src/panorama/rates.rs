//! What a stage does, from two looks at its counters.

use crate::metrics::StageSeen;
use std::time::Duration;

/// Means over the time between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StageRates {
    /// Part of the time that it computed, 0 to 1.
    pub busy: f64,
    /// Seconds of a step, of a batch's waiting before its step, and of sending what it made; 0 when there was no step.
    pub compute_seconds: f64,
    /// See `compute_seconds`.
    pub wait_seconds: f64,
    /// See `compute_seconds`.
    pub send_seconds: f64,
    /// Tokens of prompts that went through.
    pub prompt_tokens_per_second: f64,
    /// Generated tokens that went through.
    pub tokens_per_second: f64,
    /// While it sends; 0 when it sent nothing.
    pub sent_bytes_per_second: f64,
}

impl StageRates {
    /// What changed within `passed`; none when the counters are those of another worker, which began again at zero.
    pub fn between(before: &StageSeen, now: &StageSeen, passed: Duration) -> Option<Self> {
        let passed = passed.as_secs_f64();
        let steps = now.steps.checked_sub(before.steps)? as f64;
        let compute = now.compute.checked_sub(before.compute)?.as_secs_f64();
        let time = |now: Option<Duration>, before: Option<Duration>| {
            now.unwrap_or_default().saturating_sub(before.unwrap_or_default()).as_secs_f64()
        };
        let (wait, send) = (time(now.wait, before.wait), time(now.send, before.send));
        let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let count = |now: u64, before: u64| now.saturating_sub(before) as f64;
        Some(Self {
            busy: ratio(compute, passed).min(1.0),
            compute_seconds: ratio(compute, steps),
            wait_seconds: ratio(wait, steps),
            send_seconds: ratio(send, steps),
            prompt_tokens_per_second: ratio(count(now.prompt_tokens, before.prompt_tokens), passed),
            tokens_per_second: ratio(count(now.decode_tokens, before.decode_tokens), passed),
            sent_bytes_per_second: ratio(count(now.sent_bytes, before.sent_bytes), send),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(steps: u64, compute: f64, wait: f64, send: f64, tokens: u64, bytes: u64) -> StageSeen {
        StageSeen {
            steps,
            compute: Duration::from_secs_f64(compute),
            wait: Some(Duration::from_secs_f64(wait)),
            send: Some(Duration::from_secs_f64(send)),
            decode_tokens: tokens,
            prompt_tokens: tokens * 2,
            sent_bytes: bytes,
            ..StageSeen::default()
        }
    }

    #[test]
    fn means_are_of_what_changed() {
        let rates = StageRates::between(
            &seen(100, 1.0, 4.0, 0.5, 50, 1000),
            &seen(110, 2.0, 6.0, 1.0, 70, 2000),
            Duration::from_secs(2),
        );
        let expected = StageRates {
            busy: 0.5,
            compute_seconds: 0.1,
            wait_seconds: 0.2,
            send_seconds: 0.05,
            prompt_tokens_per_second: 20.0,
            tokens_per_second: 10.0,
            sent_bytes_per_second: 2000.0,
        };
        assert_eq!(rates, Some(expected));
    }

    #[test]
    fn a_stage_that_rests_has_zeros_and_one_that_began_again_has_nothing() {
        let (idle, second) = (seen(7, 1.0, 1.0, 1.0, 7, 7), Duration::from_secs(1));
        assert_eq!(StageRates::between(&idle, &idle, second), Some(StageRates::default()));
        assert_eq!(StageRates::between(&idle, &seen(1, 0.1, 0.0, 0.0, 1, 1), second), None);
        assert_eq!(
            StageRates::between(&idle, &idle, Duration::ZERO),
            Some(StageRates::default()),
            "no time, no rate"
        );
    }
}
