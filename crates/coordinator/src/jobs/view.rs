//! A job for those who look.

use super::{Checkpoint, ContentHash, JobSpec, LossPoint, PlannedStage};
use crate::NodeId;
use serde::{Deserialize, Serialize};

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobState {
    /// Its turn comes.
    Queued,
    /// A node fetches and reads what it needs.
    Preparing,
    /// A node computes.
    Running,
    /// Stands still: the detail says by whom and why.
    Paused,
    /// No node can run it now: the detail says what is missing.
    WaitingForNodes,
    /// Done.
    Finished,
    /// It cannot be done: the detail says why.
    Failed,
    /// Not wanted any more.
    Cancelled,
}

impl JobState {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::WaitingForNodes => "waiting for nodes",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Will it change no more by itself, nor by being resumed?
    pub fn is_over(self) -> bool {
        matches!(self, Self::Finished | Self::Failed | Self::Cancelled)
    }
}

/// How far a job's steps are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// All steps; 0 while that is unknown.
    pub steps: u64,
    /// Tokens that counted in the loss, by second, over the last steps.
    pub tokens_per_second: f64,
    /// Mean time of a step, in seconds, waiting included.
    pub seconds_per_step: f64,
    /// What the last update was multiplied by.
    pub learning_rate: f64,
    /// Length of the last gradient before clipping, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient_norm: Option<f64>,
    /// The most memory that was in use, in bytes.
    pub peak_memory: u64,
    /// Tokens that counted in the loss since the beginning of the attempt.
    #[serde(default)]
    pub trained_tokens: u64,
}

impl Progress {
    /// For the steps that are left, in seconds; none while that cannot be told.
    pub fn seconds_left(&self) -> Option<f64> {
        let is_known = self.steps >= self.step && self.steps > 0 && self.seconds_per_step > 0.0;
        is_known.then(|| (self.steps - self.step) as f64 * self.seconds_per_step)
    }
}

/// A line of a job's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// When, in seconds since 1970.
    pub at: u64,
    /// What happened.
    pub text: String,
}

/// A checkpoint and who has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldCheckpoint {
    /// What.
    #[serde(flatten)]
    pub checkpoint: Checkpoint,
    /// When it was made.
    pub at: u64,
    /// Who.
    pub holders: Vec<NodeId>,
}

/// What became of a wish to serve a job's result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// Which checkpoint.
    pub hash: ContentHash,
    /// Of which deployment it is an adapter.
    pub deployment: String,
    /// Its name there.
    pub adapter: String,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A job as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct JobView {
    /// What was submitted.
    pub spec: JobSpec,
    /// How far it is.
    pub state: JobState,
    /// Why it is in this state, when that needs saying.
    pub detail: String,
    /// When it was submitted, in seconds since 1970.
    pub submitted_at: u64,
    /// When it ran first.
    pub started_at: Option<u64>,
    /// When it was over.
    pub ended_at: Option<u64>,
    /// Attempts so far.
    pub attempts: u32,
    /// Of the newest attempt.
    pub epoch: u64,
    /// Where it runs; of several nodes the one that leads.
    pub node: Option<NodeId>,
    /// What each node computes of it, while it runs.
    pub stages: Vec<PlannedStage>,
    /// How far its steps are.
    pub progress: Progress,
    /// The losses, in the order of steps.
    pub curve: Vec<LossPoint>,
    /// What can be gone on from, the newest last. Of a job that is finished the last is its result.
    pub checkpoints: Vec<HeldCheckpoint>,
    /// Where what it made is served.
    pub publications: Vec<Publication>,
}
