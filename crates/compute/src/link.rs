//! Training a model whose layers are divided among processes: what a stage says to the others, the trait [`StageLink`].
//!
//! ```text
//! stage 0 ── hidden vectors ─▶ stage 1 ── hidden vectors ─▶ stage 2: loss
//!         ◀──── gradients ────         ◀──── gradients ────
//! ```
//! Stage 0 leads: it says what is done next ([`StageOrder`]), and only it saves, publishes and reports. A stage holds a range of layers and what is
//! trained of them. All have the same rows, so nothing travels but hidden vectors, their gradients, a few numbers and, when the job is
//! saved, what is trained. A line that lost a stage is over: every call then fails, and the job goes on from its last checkpoint.

use crate::Activation;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// What all stages do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StageOrder {
    /// The update made of these micro-batches of the run.
    Update(RangeInclusive<u64>),
    /// Measure on held-back rows, as due before this micro-batch of the run.
    Validate(u64),
    /// Measure on the test rows.
    Test,
    /// Take over the state that comes by [`StageLink::scatter`].
    Load,
    /// Give the own part of the state by [`StageLink::gather`].
    Save,
    /// Give the own part of what is trained by [`StageLink::gather`].
    Publish,
    /// All is done.
    Finish,
}

/// Which way something goes along the stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Way {
    /// To the next stage: hidden vectors.
    Forward,
    /// To the stage before: the gradient of hidden vectors.
    Backward,
}

/// A stage's way to the others of its line. Calls block the trainer's thread, no longer than the link's patience; what comes is buffered, at
/// most a window of the schedule's micro-batches.
pub trait StageLink: Send {
    /// Which stage this is, from 0.
    fn stage(&self) -> usize;

    /// How many there are, at least 2.
    fn stages(&self) -> usize;

    /// Stage 0 only: has all others do this next. Does not wait for them.
    ///
    /// # Errors
    /// When the line is over; here and below.
    fn lead(&mut self, order: &StageOrder) -> Result<(), LinkError>;

    /// Other stages: what stage 0 wants next. Waits for it as long as the line holds.
    fn follow(&mut self) -> Result<StageOrder, LinkError>;

    /// Hands `activation`, of this micro-batch of the run, to the next stage or the one before. Does not wait until it is taken, but until there is room.
    fn send(&mut self, way: Way, micro_batch: u64, activation: Activation) -> Result<(), LinkError>;

    /// Waits for what the neighbour hands on for this micro-batch: from the stage before ([`Way::Forward`]) or the next one
    /// ([`Way::Backward`]). They come in the order in which they were sent; another micro-batch is [`LinkError::OutOfStep`].
    fn receive(&mut self, way: Way, micro_batch: u64) -> Result<Activation, LinkError>;

    /// Gives some numbers to all stages and waits for theirs: all stages' numbers, in the order of the stages. At most 1024.
    fn exchange(&mut self, numbers: &[f64]) -> Result<Vec<Vec<f64>>, LinkError>;

    /// Brings a file of each stage to stage 0: there the files of all in the order of the stages, the own one first; on the others nothing, as soon as theirs is
    /// there. The files that came stay until the next call.
    fn gather(&mut self, file: &Path) -> Result<Vec<PathBuf>, LinkError>;

    /// Stage 0 gives a file, the same one, to all others: there it is where the result says, until the next call.
    fn scatter(&mut self, file: Option<&Path>) -> Result<PathBuf, LinkError>;
}

/// Stages that do not come together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// A stage, or the node that leads the job, is lost or has left.
    #[error("the stages of the job are no longer together: {0}")]
    Over(String),
    /// Nothing came in time.
    #[error("stage {stage} did not answer within {seconds} s")]
    TimedOut {
        /// Whom this one waited for.
        stage: usize,
        /// How long.
        seconds: u64,
    },
    /// What came is not what was due.
    #[error("the stages of the job do not agree: {0}")]
    OutOfStep(String),
    /// A file that could not be read or written.
    #[error("cannot pass the state on: {0}")]
    File(String),
}
