//! The jobs of the cluster (training, quantization, downloads) as they are shown. Who runs jobs implements [`JobTable`].

use serde::Serialize;

/// All jobs that the cluster remembers.
pub trait JobTable: Send + Sync + 'static {
    /// As they are now, the newest first.
    fn jobs(&self) -> Vec<JobView>;
}

/// One job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobView {
    /// Names it.
    pub id: String,
    /// "training", "quantization", "download".
    pub kind: String,
    /// The model that it is about.
    pub model: String,
    /// "waiting", "running", "done", "failed", "cancelled".
    pub state: String,
    /// Why it is in this state, when that needs saying.
    pub detail: String,
    /// Steps done, and all of them; 0 while that is unknown.
    pub step: u64,
    /// See `step`.
    pub steps: u64,
    /// The curve so far, in the order of steps.
    pub losses: Vec<LossPoint>,
}

/// What the loss was at a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LossPoint {
    /// After so many steps.
    pub step: u64,
    /// On what was learned from, where it was measured.
    pub training: Option<f64>,
    /// On what was held back, where it was measured.
    pub validation: Option<f64>,
}
