//! The seam between a trainer and the other workers of its job: what is computed here, and the sum over all of them.
//!
//! A step of training is the sum of the gradients of its micro-batches, whose number the configuration fixes. Which worker computes
//! which of them must not show in the result, so the sum is always taken along one [tree](TreeNode) over the micro-batches' indices:
//! every worker adds up whole subtrees, and the rest of the tree is added between the workers. Addition is commutative but not
//! associative; with the tree fixed, one worker and eight give the same bits.
//!
//! ```text
//!   begin(applied) ─▶ Turn::Deal ─▶ gradients of the run ─▶ reduce(deal, partials) ─▶ Reduced::Sum ─▶ apply, once
//!        ▲   └──▶ Turn::Save, Turn::Load                                        └──▶ Reduced::Redeal (a worker was lost)
//!        └─────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! [`sum_step`] does one step by this protocol. [`Alone`] is a group of one.

mod alone;
mod step;
mod tree;

pub use alone::Alone;
pub use step::{MicroBatches, StepError, sum_step};
pub use tree::{TreeNode, TreeSum, nodes_of};

use bytes::Bytes;
use std::ops::Range;
use std::path::PathBuf;

/// Most micro-batches of a step.
pub const MOST_MICRO_BATCHES: u32 = 1 << 16;

/// The workers of a job, seen from the trainer of one of them. Called on the compute thread; every call returns within a deadline.
pub trait Reduce: Send {
    /// What to do next, `applied` updates having been made to the parameters here. Waits while the group is being formed.
    ///
    /// # Errors
    ///
    /// [`ReduceError`]: this worker's part in the job is over.
    fn begin(&mut self, applied: u64) -> Result<Turn, ReduceError>;

    /// True when computing on for `deal` is of no use any more: the group has changed. Asked between two micro-batches.
    fn is_over(&self, deal: &Deal) -> bool;

    /// Gives the sums of this worker's run, which are the nodes that [`nodes_of`] names, in order, and waits for the sum of all.
    ///
    /// When it is [`Reduced::Sum`], the caller must apply it before it calls anything else: the group counts this worker as one
    /// step further from this moment on.
    ///
    /// # Errors
    ///
    /// [`ReduceError`]: this worker's part in the job is over.
    fn reduce(&mut self, deal: &Deal, partials: Vec<Partial>) -> Result<Reduced, ReduceError>;

    /// What the parameters here are after so many updates (a hash of their bytes): all workers must have the same. Told when
    /// [`tells_parameters_after`] says so; never waits.
    fn applied(&mut self, updates: u64, parameters: [u8; 32]) {
        let _ = (updates, parameters); // nobody to compare with
    }
}

/// Updates between two comparisons of the workers' parameters.
const COMPARED_EVERY: u64 = 50;

/// Do workers compare their parameters after so many updates? After the first one, where processors of different kinds show, and from
/// time to time.
pub fn tells_parameters_after(updates: u64) -> bool {
    updates == 1 || (updates > 0 && updates.is_multiple_of(COMPARED_EVERY))
}

/// What a trainer does next.
#[derive(Clone, Debug, PartialEq)]
pub enum Turn {
    /// Compute gradients.
    Deal(Deal),
    /// Write the whole state into this directory, which exists and is empty, for a worker that joins; then begin again.
    Save(PathBuf),
    /// Take over the state in this directory; then begin again with its number of updates.
    Load(PathBuf),
}

/// What one worker computes in one attempt at a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deal {
    /// Counts the formations of the group: a step that is done anew has a new one.
    pub epoch: u64,
    /// Updates made before this step.
    pub step: u64,
    /// Micro-batches of the whole step.
    pub micro_batches: u32,
    /// Which of them are computed here, `0` being the step's first. May be empty.
    pub run: Range<u32>,
}

/// The sum over the micro-batches of one node of the tree.
#[derive(Clone, Debug, PartialEq)]
pub struct Partial {
    /// Which micro-batches.
    pub node: TreeNode,
    /// All gradients one after the other, f32 little-endian. The same length in every worker.
    pub values: Bytes,
    /// What was counted along with them.
    pub tally: Tally,
}

/// The sum over all micro-batches of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Sum {
    /// Updates made before this step.
    pub step: u64,
    /// As in [`Partial`].
    pub values: Bytes,
    /// Of all micro-batches.
    pub tally: Tally,
}

/// What came of a reduction.
#[derive(Clone, Debug, PartialEq)]
pub enum Reduced {
    /// The whole sum.
    Sum(Sum),
    /// The group has changed: compute this of the same step instead. What was computed before stays good.
    Redeal(Deal),
    /// There is something else to do than gradients: call [`Reduce::begin`] again. The step was not done.
    Begin,
}

/// What is counted beside gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Sum of the tokens' losses, in nats. Added along the same tree.
    pub loss: f64,
    /// Tokens that counted.
    pub tokens: u64,
}

impl Tally {
    /// The tally of two neighbouring nodes.
    #[must_use]
    pub fn plus(self, right: Self) -> Self {
        Self { loss: self.loss + right.loss, tokens: self.tokens.saturating_add(right.tokens) }
    }
}

/// A worker's part in its group is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReduceError {
    /// The group was not complete in time.
    #[error("the workers of the job did not come together within {seconds} s: {waiting_for}")]
    TimedOut {
        /// How long this one waited.
        seconds: u64,
        /// For what.
        waiting_for: String,
    },
    /// This worker was told to stop.
    #[error("this worker does not belong to the job any more: {0}")]
    Left(String),
    /// The caller and the group do not agree; a defect.
    #[error("the trainer and its group do not agree: {0}")]
    OutOfStep(String),
}
