//! What stages tell each other, as plain data: the frames of a link without their wire form.
//!
//! Down the pipeline go `Open`, `Batch`, `Close` and `Failed`; round the ring, from the last stage to the first, go `Opened`,
//! `Results`, `Close` and `Failed`. Batches keep their order everywhere, and so do the other messages; a close may overtake batches,
//! whose rows of that sequence are then dropped. A batch comes round even when it has no row left.

use mlxnode_compute::{
    BlockCapacity, BlockOrder, BlockPlan, Keep, MicroBatch, Sampled, SequenceEnd, SequenceId, SequenceSpec,
};
use std::time::Duration;

/// One message between neighbouring stages.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "batches are the many, and they are no small messages either")]
pub(crate) enum Message {
    /// A new sequence; `stages` have opened it so far.
    Open { sequence: SequenceId, spec: SequenceSpec, stages: u32, blocks: BlockPlan },
    /// Tokens on their way through the layers.
    Batch(Batch),
    /// Free the sequence. Back at the first stage it means: free everywhere.
    Close { sequence: SequenceId },
    /// A stage gave the sequence up. It is still closed by the first stage.
    Failed { sequence: SequenceId, reason: String },
    /// Every stage has opened the sequence.
    Opened { sequence: SequenceId, stages: u32 },
    /// Keep one more block of a sequence.
    Keep { sequence: SequenceId, keep: Keep },
    /// What becomes of a block.
    Blocks(BlockOrder),
    /// A new scheduler: free all blocks, and say what there is room for. Comes round with what all stages said.
    Reset { capacities: Vec<BlockCapacity> },
    /// A stage does not have a block that the sequence was to begin with. It is still closed by the first stage.
    Missing { sequence: SequenceId },
    /// A batch went through all stages.
    Results(Results),
}

/// A micro-batch on its way.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Batch {
    /// Counts the batches of a replica.
    pub(crate) number: u64,
    /// Sequences that failed or were closed on the way are not in it any more; without any row it has no activation either.
    pub(crate) micro: MicroBatch,
    /// What it took in the stages before.
    pub(crate) times: Vec<StageTimes>,
}

/// What became of a batch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Results {
    pub(crate) number: u64,
    pub(crate) rows: Vec<RowResult>,
    /// For each stage.
    pub(crate) times: Vec<StageTimes>,
}

/// What became of a row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RowResult {
    pub(crate) sequence: SequenceId,
    /// One past its last token; guesses do not count.
    pub(crate) position: usize,
    /// The next token, and whether it is the last one.
    pub(crate) token: Option<(Sampled, Option<SequenceEnd>)>,
    /// Those after it, when guesses were right.
    pub(crate) further: Vec<(Sampled, Option<SequenceEnd>)>,
    /// Scores of the prompt's tokens up to `position`.
    pub(crate) scores: Vec<Sampled>,
    pub(crate) embedding: Option<Vec<f32>>,
}

/// What a batch took in one stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// In the layers.
    pub compute: Duration,
    /// From its arrival until the stage began with it.
    pub wait: Duration,
    /// To the next stage; what the batch before took, since its own is not known when it leaves.
    pub send: Duration,
}

impl Message {
    /// Notes what a batch took in one more stage.
    pub(crate) fn took(&mut self, times: StageTimes) {
        match self {
            Self::Batch(Batch { times: all, .. }) | Self::Results(Results { times: all, .. }) => {
                all.push(times)
            }
            _ => {}
        }
    }
}

/// A token that the last stage chose, and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// Whose.
    pub sequence: SequenceId,
    /// Its position in the sequence: the prompt's length for the first one.
    pub position: usize,
    /// The token, and its probabilities when asked for.
    pub sampled: Sampled,
    /// Set when no further token follows.
    pub end: Option<SequenceEnd>,
}

/// What a scheduler asks of the first stage.
#[allow(clippy::large_enum_variant)] // few, short-lived, and moved once; a box would be in every caller's way
#[derive(Clone, Debug, PartialEq)]
pub enum DriveCommand {
    /// Run this sequence. `spec.prompt_tokens` is the prompt's length without the tokens at its end that were generated before.
    Open {
        /// Never used before in this replica.
        sequence: SequenceId,
        /// Token ids.
        prompt: Vec<u32>,
        /// Everything else.
        spec: SequenceSpec,
        /// What it begins with, and what is kept of it.
        blocks: BlockPlan,
    },
    /// Keep one more block of an open sequence. Unknown ones are ignored.
    Keep {
        /// Which sequence.
        sequence: SequenceId,
        /// Which block.
        keep: Keep,
    },
    /// What becomes of a block, in all stages.
    Blocks(BlockOrder),
    /// Stop working on it; answered by `Closed`. Unknown sequences are ignored: the end may have crossed the command.
    Cancel {
        /// Which one.
        sequence: SequenceId,
    },
}

/// What the first stage tells its scheduler. Every opened sequence ends with exactly one `Closed`.
#[derive(Clone, Debug, PartialEq)]
pub enum DriveEvent {
    /// The sequence's first chunk entered the pipeline.
    Started {
        /// Which one.
        sequence: SequenceId,
        /// Tokens at the front of the prompt whose keys and values were there already.
        cached_tokens: usize,
    },
    /// What each stage has for blocks of prompts; they have none in memory. Comes once, before any block may be named.
    Capacity {
        /// In order.
        stages: Vec<BlockCapacity>,
    },
    /// All stages computed more of a prompt.
    Progress {
        /// Which one.
        sequence: SequenceId,
        /// Tokens from its first one on.
        tokens: usize,
    },
    /// A stage does not have a block that the sequence was to begin with. `Closed` follows.
    Missing {
        /// Which one.
        sequence: SequenceId,
    },
    /// Tokens of the prompt with their log-probabilities, in order, when asked for.
    Scores {
        /// Which one.
        sequence: SequenceId,
        /// Position of the first one; at least 1.
        position: usize,
        /// The prompt's own tokens.
        scores: Vec<Sampled>,
    },
    /// The next token, in order and without gaps.
    Token(SampledToken),
    /// The vector of a sequence that is embedded: its last event before `Closed`.
    Embedding {
        /// Which one.
        sequence: SequenceId,
        /// As wide as the hidden vectors.
        values: Vec<f32>,
    },
    /// The sequence was refused or given up. `Closed` follows.
    Failed {
        /// Which one.
        sequence: SequenceId,
        /// For people.
        reason: String,
    },
    /// The sequence's memory is free again.
    Closed {
        /// Which one.
        sequence: SequenceId,
    },
}
