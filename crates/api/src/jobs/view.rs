//! The jobs of the cluster as they are shown. Who knows them implements [`JobTable`].

use serde::Serialize;
use tokio::sync::watch;

/// All jobs that the cluster remembers.
pub trait JobTable: Send + Sync + 'static {
    /// As they are now, the newest first.
    fn jobs(&self) -> Vec<JobView>;
}

/// The jobs as this node heard of them last.
#[derive(Clone, Debug)]
pub struct JobsView(pub watch::Receiver<Vec<JobView>>);

impl JobTable for JobsView {
    fn jobs(&self) -> Vec<JobView> {
        self.0.borrow().clone()
    }
}

/// One job.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct JobView {
    /// Names it.
    pub id: String,
    /// "fine-tuning", "rehearsal".
    pub kind: String,
    /// The model that it is about.
    pub model: String,
    /// "queued", "preparing", "running", "paused", "waiting for nodes", "finished", "failed", "cancelled".
    pub state: String,
    /// Why it is in this state, when that needs saying.
    pub detail: String,
    /// Name of the node that runs it; empty: none.
    pub node: String,
    /// Steps done, and all of them; 0 while that is unknown.
    pub step: u64,
    /// See `step`.
    pub steps: u64,
    /// Tokens that counted in the loss, by second.
    pub tokens_per_second: f64,
    /// For the steps that are left; none while that is unknown.
    pub seconds_left: Option<f64>,
    /// What requests write into `model` for its result.
    pub served_as: Vec<String>,
    /// The curve so far, in the order of steps.
    pub losses: Vec<LossPoint>,
    /// What can be gone on from, and served, the newest last.
    pub checkpoints: Vec<CheckpointView>,
    /// Name of the API key it was submitted with; empty: this cluster's own people.
    pub owner: String,
}

impl JobView {
    /// The last loss that was measured on what is learned from.
    pub fn last_loss(&self) -> Option<f64> {
        self.losses.iter().rev().find_map(|point| point.training)
    }
}

/// What a job saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CheckpointView {
    /// After so many steps.
    pub step: u64,
    /// How much it takes.
    pub bytes: u64,
    /// When, in seconds since 1970.
    pub saved_unix: i64,
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
