//! Requests into steps: one scheduler for each replica, on the node of its first stage.
//!
//! [`Scheduler`] decides (a plain struct: events and `now` in, [`Effect`]s out): who waits, who runs, when a request ends. The
//! task behind [`SchedulerHandle`] moves the messages between the fronts, the machine and the replica's first worker.
//!
//! ```text
//! front ── run() ──▶ SchedulerHandle ──▶ task ── DriveCommand ──▶ worker of the first stage
//!       ◀─ RunStream ──────────────────── task ◀── DriveEvent ─── (tokens come back from the last stage)
//! ```
//!
//! The workers do the steps: prefill chunks, micro-batches and the ring are theirs. The scheduler decides which sequences
//! they have at once, so that everybody gets a fair share and the reserved KV memory is never exceeded:
//!
//! - `limits`: what a replica takes
//! - `machine`: the decisions; `machine::admission`: who is let in and who gives way; `machine::answers`: what comes back
//! - `queue`: who is next
//! - `forecast`: what fits
//! - `reuse`: what of a prompt is computed already

mod forecast;
mod limits;
mod machine;
mod queue;
mod request;
mod reuse;
mod stream;
mod task;

pub use limits::{Limits, Promise};
pub use machine::{Effect, RequestId, Scheduler};
pub use stream::{RunRequest, RunStream};
pub use task::{Drive, Ended, SchedulerHandle, SchedulerTask, start};

use crate::prompt_index;
use mlxnode_compute::{
    BlockCapacity, BlockOrder, BlockPlan, Keep, Sampled, SequenceEnd, SequenceId, SequenceSpec,
};

/// What the scheduler tells the first worker.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "most commands are opens, and few exist at a time")]
pub enum DriveCommand {
    /// Run a sequence.
    Open {
        /// Its name.
        sequence: SequenceId,
        /// At least one token.
        prompt: Vec<u32>,
        /// `prompt_tokens` is the prompt's length without the tokens at its end that were generated before.
        spec: SequenceSpec,
        /// What it begins with, and what is kept of it.
        blocks: BlockPlan,
    },
    /// Keep one more block of an open sequence, as soon as its tokens went through.
    Keep {
        /// Its name.
        sequence: SequenceId,
        /// Which block.
        keep: Keep,
    },
    /// What becomes of a block, in all stages.
    Blocks(BlockOrder),
    /// Stop working on a sequence; answered by [`DriveEvent::Closed`].
    Cancel {
        /// Its name.
        sequence: SequenceId,
    },
}

/// What the first worker tells the scheduler. For each sequence: at most one `Started`, tokens in order, then `Closed` or `Failed`
/// (which `Closed` may follow).
#[derive(Clone, Debug, PartialEq)]
pub enum DriveEvent {
    /// What each stage has for blocks. They have none in memory. Comes once; sequences that were opened before begin with none.
    Capacity {
        /// In order.
        stages: Vec<BlockCapacity>,
    },
    /// The first chunk of the prompt entered the pipeline.
    Started {
        /// Whose.
        sequence: SequenceId,
    },
    /// All stages computed more of a prompt.
    Progress {
        /// Whose.
        sequence: SequenceId,
        /// Tokens from its first one on.
        tokens: usize,
    },
    /// A stage did not have a block that the sequence was to begin with. `Closed` follows.
    Missing {
        /// Whose.
        sequence: SequenceId,
    },
    /// Tokens of the prompt with their log-probabilities, in order.
    Scores {
        /// Whose.
        sequence: SequenceId,
        /// Position of the first one.
        position: usize,
        /// The prompt's own tokens.
        scores: Vec<Sampled>,
    },
    /// The vector of a sequence that is embedded. `Closed` follows.
    Embedding {
        /// Whose.
        sequence: SequenceId,
        /// As wide as the hidden vectors.
        values: Vec<f32>,
    },
    /// A token was sampled.
    Token {
        /// Whose.
        sequence: SequenceId,
        /// Where it stands; the first one at the prompt's length.
        position: usize,
        /// The token and its log-probabilities.
        sampled: Sampled,
        /// Set on the last one.
        end: Option<SequenceEnd>,
    },
    /// The sequence's memory is free again.
    Closed {
        /// Whose.
        sequence: SequenceId,
    },
    /// The replica is lost: nothing follows. (So it is when the channel is closed; this says why.)
    Lost {
        /// Why, in a sentence.
        reason: String,
    },
    /// A stage could not go on with this sequence.
    Failed {
        /// Whose.
        sequence: SequenceId,
        /// Why, in a sentence.
        reason: String,
    },
}

/// What a front hears of its request.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEvent {
    /// The first step starts now.
    Started {
        /// Tokens of the prompt that need no work.
        cached_tokens: usize,
    },
    /// Tokens of the prompt with their log-probabilities, in order and without gaps, when asked for.
    Scores {
        /// Position of the first one; 1 in the first event.
        position: usize,
        /// The prompt's own tokens.
        scores: Vec<Sampled>,
    },
    /// The vector of a sequence that is embedded; the last event.
    Embedding(Vec<f32>),
    /// The next token. The one with `end` is the last event.
    Token {
        /// Where it stands in the sequence; the first one at the prompt's length.
        position: usize,
        /// The token and its log-probabilities.
        sampled: Sampled,
        /// Why there is no further one.
        end: Option<SequenceEnd>,
    },
}

/// Why a request ended without its last token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// Too many requests wait already.
    #[error("the queue is full: {queued} requests wait; try again in a moment")]
    QueueFull {
        /// How many wait.
        queued: usize,
        /// Tokens of their prompts: what a newcomer would wait behind.
        tokens: usize,
    },
    /// Prompt and answer do not fit the context.
    #[error("{tokens} tokens (prompt and answer) do not fit the context of {context}")]
    TooLong {
        /// Prompt plus `max_tokens`.
        tokens: usize,
        /// What the deployment allows.
        context: usize,
    },
    /// The request makes no sense; [`crate::requests::ValidRequest`] never lets such a one through.
    #[error("{0}")]
    Invalid(String),
    /// Its time is up.
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// The front went away or asked for it.
    #[error("the request was cancelled")]
    Cancelled,
    /// The replica is gone. The request may be tried again once the deployment is ready.
    #[error("a stage of the model was lost: {0}")]
    Unavailable(String),
    /// This sequence failed; others go on.
    #[error("{0}")]
    Failed(String),
}

/// How busy a scheduler is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Requests that are generating.
    pub active: usize,
    /// Requests that wait.
    pub queued: usize,
    /// Sequences that hold memory in the workers; more than `active` while some are being closed.
    pub open_sequences: usize,
    /// KV tokens that these reserve.
    pub reserved_tokens: usize,
    /// How often a sequence gave its memory back for older ones, to be computed again.
    pub preemptions: u64,
    /// What is remembered of prompts.
    pub prompts: prompt_index::Statistics,
}
