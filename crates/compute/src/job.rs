//! What a job of the cluster does on the compute thread: the trait [`Job`] and what it reports.
//!
//! The network side (worker, job runner) drives a job and moves files; the compute side (training, quantization) computes. A job is
//! driven in pieces of at most a few seconds, so that it can be paused, cancelled, saved and made to yield between any two.

use crate::LinkError;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A long computation, in pieces.
pub trait Job {
    /// Does the next piece and says what came of it. Not called again after [`Advance::Finished`] or an error.
    ///
    /// # Errors
    ///
    /// When the job cannot go on; what was saved stays good.
    fn advance(&mut self) -> Result<Advance, JobError>;

    /// Writes all that is needed to go on from here, bit by bit the same, into `directory`, which exists and is empty. Called only
    /// between pieces. Who calls makes the directory durable and names it.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    fn save(&mut self, directory: &Path) -> Result<(), JobError>;

    /// Writes what the job makes (an adapter, a model), as far as it has come, into `directory`, which exists and is empty.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    fn publish(&mut self, directory: &Path) -> Result<(), JobError>;
}

/// What a piece of a job was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Advance {
    /// Preparation, for people: "reading the model".
    Prepared(String),
    /// A step of training.
    Step(StepReport),
    /// A measurement on rows that are held back.
    Validated {
        /// After so many steps.
        step: u64,
        /// Mean loss over the tokens, in nats.
        loss: f64,
        /// How long it took, in seconds.
        seconds: f64,
    },
    /// A measurement on the test rows.
    Tested {
        /// Mean loss over the tokens, in nats.
        loss: f64,
    },
    /// All is done.
    Finished,
}

/// One step of training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// All steps.
    pub steps: u64,
    /// Mean loss over the step's tokens, in nats.
    pub loss: f64,
    /// Tokens that counted in the loss.
    pub tokens: u64,
    /// What the update was multiplied by.
    pub learning_rate: f64,
    /// Length of the gradient before clipping, where it was measured.
    pub gradient_norm: Option<f64>,
    /// How long the step took, in seconds.
    pub seconds: f64,
    /// The most memory that was in use, in bytes.
    pub peak_memory: u64,
}

/// A job cannot go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum JobError {
    /// What was asked for cannot be done: it says what to change.
    #[error("{0}")]
    Refused(String),
    /// There is no room on the disk; the job can go on when there is.
    #[error("no room left on the disk: {0}")]
    NoRoom(String),
    /// The loss or a gradient is not a finite number.
    #[error("the loss is not finite at step {step} ({detail}); the last good checkpoint is kept")]
    NotFinite {
        /// The step that was not done.
        step: u64,
        /// Which rows.
        detail: String,
    },
    /// Another process of the job is lost or has left, without which this one cannot go on: nobody's fault. The job goes on from its last
    /// checkpoint.
    #[error("{0}")]
    Lost(String),
    /// Something went wrong that the asker cannot help.
    #[error("{0}")]
    Failed(String),
}

impl From<LinkError> for JobError {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Over(_) | LinkError::TimedOut { .. } => Self::Lost(error.to_string()),
            LinkError::OutOfStep(_) | LinkError::File(_) => Self::Failed(error.to_string()),
        }
    }
}
