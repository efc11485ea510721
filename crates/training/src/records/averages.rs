//! Updates summed up between two reports.

use crate::TrainingConfig;
use mlxnode_compute::StepReport;
use serde::{Deserialize, Serialize};

/// When a report is due, and what weighs how much in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cadence {
    /// Micro-batches between two reports.
    every: u64,
    /// Micro-batches of an update.
    group: u64,
    /// Each micro-batch weighs the same, as in mlx-lm; else each token.
    parity: bool,
}

impl From<&TrainingConfig> for Cadence {
    fn from(config: &TrainingConfig) -> Self {
        let (every, group) = (config.steps_per_report.max(1), config.grad_accumulation_steps.max(1));
        Self { every, group, parity: config.parity }
    }
}

/// What the updates since the last report add up to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    steps: u64,
    /// Of the losses, each by its weight.
    loss: f64,
    weight: f64,
    tokens: u64,
    seconds: f64,
}

/// A report.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Averages {
    /// Mean loss, in nats.
    pub loss: f64,
    /// Micro-batches in a second.
    pub steps_per_second: f64,
    /// Tokens that counted, in a second.
    pub tokens_per_second: f64,
    /// How long all of it took.
    pub seconds: f64,
}

impl Sums {
    /// Adds an update. When a report is due it is all since the last one, and the next one begins.
    pub fn add(&mut self, report: &StepReport, cadence: Cadence) -> Option<Averages> {
        let Cadence { every, group, parity } = cadence;
        let last = report.step.saturating_sub(1);
        let before = last - last % group;
        let micro_batches = report.step.saturating_sub(before);
        let weight = if parity { micro_batches as f64 } else { report.tokens as f64 };
        self.steps += micro_batches;
        self.loss += report.loss * weight;
        self.weight += weight;
        self.tokens += report.tokens;
        self.seconds += report.seconds;
        if report.step / every == before / every && report.step != report.steps {
            return None;
        }
        let Self { steps, loss, weight, tokens, seconds } = std::mem::take(self);
        let at_least = seconds.max(f64::MIN_POSITIVE);
        Some(Averages {
            loss: loss / weight.max(1.0),
            steps_per_second: steps as f64 / at_least,
            tokens_per_second: tokens as f64 / at_least,
            seconds,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_the_mean_of_what_counts() {
        let cadence = Cadence { every: 4, group: 2, parity: false };
        let report = |step: u64, loss: f64, tokens: u64| StepReport {
            step,
            steps: 7,
            loss,
            tokens,
            learning_rate: 1e-5,
            gradient_norm: None,
            seconds: 0.5,
            peak_memory: 0,
        };
        let mut sums = Sums::default();
        assert_eq!(sums.add(&report(2, 1.0, 10), cadence), None);
        let averages = sums.add(&report(4, 4.0, 30), cadence).unwrap();
        assert_eq!((averages.loss, averages.steps_per_second, averages.tokens_per_second), (3.25, 4.0, 40.0));
        assert_eq!(sums.add(&report(6, 1.0, 10), cadence), None);
        // The last one is told in any case; in parity its one micro-batch weighs half of the two before.
        let mut parity = sums.clone();
        let cadence_of_parity = Cadence { parity: true, ..cadence };
        assert!(sums.add(&report(7, 4.0, 10), cadence).is_some_and(|averages| averages.loss == 2.5));
        parity = Sums { weight: 2.0, loss: 2.0, ..parity };
        let averages = parity.add(&report(7, 4.0, 10), cadence_of_parity).unwrap();
        assert_eq!(averages.loss, 2.0);
        assert_eq!(parity, Sums::default());
    }
}
