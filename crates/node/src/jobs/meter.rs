//! What the steps of a job come to: how far it is, how fast, and the losses that nobody has heard of yet.

use mlxnode_compute::StepReport;
use mlxnode_coordinator::jobs::{LossPoint, Progress};
use std::time::Duration;

/// How much the newest step counts in the mean time of a step.
const NEWEST: f64 = 0.1;

/// Sums steps up for people.
#[derive(Default)]
pub(super) struct Meter {
    pub(super) step: u64,
    steps: u64,
    pub(super) points: Vec<LossPoint>,
    /// Mean time of a step from its begin to the next one's, and mean tokens.
    seconds: f64,
    tokens: f64,
    trained: u64,
    learning_rate: f64,
    gradient_norm: Option<f64>,
    peak: u64,
    pub(super) stood_back: Duration,
}

impl Meter {
    /// Of a job that goes on from this step.
    pub(super) fn at(step: u64) -> Self {
        Self { step, ..Self::default() }
    }

    /// A step is done, in a piece that took so long.
    pub(super) fn step(&mut self, report: &StepReport, piece: Duration) {
        let seconds = (piece + std::mem::take(&mut self.stood_back)).as_secs_f64();
        let mean = |mean: f64, new: f64| if mean == 0.0 { new } else { mean + NEWEST * (new - mean) };
        self.seconds = mean(self.seconds, seconds);
        self.tokens = mean(self.tokens, report.tokens as f64);
        (self.step, self.steps) = (report.step, report.steps);
        self.trained += report.tokens;
        self.learning_rate = report.learning_rate;
        self.gradient_norm = report.gradient_norm.or(self.gradient_norm);
        self.peak = self.peak.max(report.peak_memory);
        self.points.push(LossPoint { step: report.step, training: Some(report.loss), validation: None });
    }

    /// How far the job is.
    pub(super) fn progress(&self) -> Progress {
        Progress {
            step: self.step,
            steps: self.steps,
            tokens_per_second: if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 },
            seconds_per_step: self.seconds,
            learning_rate: self.learning_rate,
            gradient_norm: self.gradient_norm,
            peak_memory: self.peak,
            trained_tokens: self.trained,
        }
    }
}
