//! What stages tell each other, as plain data: the frames of a link without their wire form.
//!
//! Down the pipeline go `Open`, `Step`, `Close` and `Failed`; round the ring, from the last stage to the first, go `Opened`,
//! `Sampled`, `Done`, `Close` and `Failed`. Messages of one sequence keep their order everywhere; messages of different sequences
//! may overtake each other.

use mlxnode_compute::{Sampled, SequenceEnd, SequenceId, SequenceSpec, Step};

/// One message between neighbouring stages.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "steps are the many, and they are no small messages either")]
pub(crate) enum Message {
    /// A new sequence; `stages` have opened it so far.
    Open { sequence: SequenceId, spec: SequenceSpec, stages: u32 },
    /// Tokens on their way through the layers.
    Step(Step),
    /// Free the sequence. Back at the first stage it means: free everywhere, and nothing of it is on its way any more.
    Close { sequence: SequenceId },
    /// A stage gave the sequence up. It is still closed by the first stage.
    Failed { sequence: SequenceId, reason: String },
    /// Every stage has opened the sequence.
    Opened { sequence: SequenceId, stages: u32 },
    /// The last stage chose a token.
    Sampled(SampledToken),
    /// A chunk that was not to be sampled went through; `position` is one past its last token.
    Done { sequence: SequenceId, position: usize },
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
    /// Run this sequence. `spec.prompt_tokens` equals the prompt's length.
    Open {
        /// Never used before in this replica.
        sequence: SequenceId,
        /// Token ids.
        prompt: Vec<u32>,
        /// Everything else.
        spec: SequenceSpec,
    },
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
