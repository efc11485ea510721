//! A stage: a contiguous layer range of one model, ready to run.

use crate::{
    Activation, ActivationError, BlockId, BlockStore, ByteCount, Dtype, Grammar, LayerRange, LogprobRequest,
    Sampled, Sampling, SamplingError,
};

/// Names a sequence within one replica. Chosen by the scheduler, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// What a sequence needs besides its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceSpec {
    /// Tokens in the prompt.
    pub prompt_tokens: usize,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Tokens that end the sequence.
    pub stop_tokens: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Score the prompt as well: the log-probability of each of its tokens but the first, and the likeliest ones in its place.
    pub prompt_logprobs: Option<LogprobRequest>,
    /// What comes out.
    pub output: Output,
    /// What the answer has to look like.
    pub grammar: Option<Grammar>,
    /// The adapter that changes the weights for this sequence, by its name in the deployment. None: the weights as they are.
    pub adapter: Option<String>,
}

/// What a sequence is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Output {
    /// Generated tokens.
    #[default]
    Tokens,
    /// One vector for the prompt: the mean of its tokens' hidden vectors after the last norm. Nothing is sampled.
    Embedding,
}

impl SequenceSpec {
    /// A sequence that generates up to `max_tokens` tokens, without anything that is asked for rarely.
    pub fn new(prompt_tokens: usize, max_tokens: usize, sampling: Sampling) -> Self {
        Self {
            prompt_tokens,
            max_tokens,
            stop_tokens: Vec::new(),
            sampling,
            prompt_logprobs: None,
            output: Output::Tokens,
            grammar: None,
            adapter: None,
        }
    }
}

/// Why a sequence has no further token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceEnd {
    /// A stop token was sampled.
    Stop,
    /// `max_tokens` were generated.
    Length,
}

/// Facts about a loaded stage.
#[derive(Clone, Debug, PartialEq)]
pub struct StageInfo {
    /// Which layers.
    pub layers: LayerRange,
    /// Layers of the whole model.
    pub layer_count: usize,
    /// Width of the activations.
    pub hidden: usize,
    /// Element type of the activations.
    pub dtype: Dtype,
    /// Vocabulary size: token ids are below it.
    pub vocabulary: usize,
    /// Bytes of the weights this stage holds.
    pub weights: ByteCount,
}

impl StageInfo {
    /// Takes token ids.
    pub fn is_first(&self) -> bool {
        self.layers.is_first()
    }

    /// Samples.
    pub fn is_last(&self) -> bool {
        self.layers.is_last(self.layer_count)
    }
}

/// One sequence's part of a step: consecutive tokens, all at once through this stage's layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Position of the first one; equals the number of tokens that went through before.
    pub position: usize,
    /// The ids. Every stage gets them: the first embeds them, the last needs them for the penalties.
    pub tokens: Vec<u32>,
    /// What the layers work on.
    pub input: StepInput,
    /// Shall the last stage sample after the last token? False for all but the last chunk of a prompt.
    pub sample: bool,
}

/// Where the hidden vectors come from.
#[derive(Clone, Debug, PartialEq)]
pub enum StepInput {
    /// First stage: embed the step's tokens.
    Tokens,
    /// The output of the stage before, `[tokens, hidden]`.
    Activation(Activation),
}

/// What a stage made of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum StepOutput {
    /// Input for the next stage.
    Activation(Activation),
    /// Last stage, with `sample`: the next token.
    Sampled(Sampled),
    /// Last stage, without `sample`: the caches are filled, there is nothing to hand on.
    Nothing,
}

/// A layer range of a model that can run. Lives on one thread from load to drop; all calls are blocking.
pub trait Stage {
    /// Facts.
    fn info(&self) -> &StageInfo;

    /// Makes the caches of a new sequence. Checks the sampling parameters against the vocabulary.
    fn open(&mut self, sequence: SequenceId, spec: SequenceSpec) -> Result<(), StageError>;

    /// Runs one step of one sequence.
    fn step(&mut self, step: Step) -> Result<StepOutput, StageError>;

    /// Frees a sequence's caches. Unknown sequences are fine: closing twice is not an error.
    fn close(&mut self, sequence: SequenceId);

    /// Where blocks of prompts outlive their sequences; None when this stage keeps none.
    fn blocks(&mut self) -> Option<&mut dyn BlockStore>;

    /// What the device holds now and held at most since loading.
    fn memory(&self) -> StageMemory;
}

/// Memory of the device that a stage runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageMemory {
    /// Held by arrays now.
    pub active: ByteCount,
    /// Largest value of `active` so far.
    pub peak: ByteCount,
}

/// Why a step could not be done. The stage stays usable for other sequences unless it says [`StageError::Device`].
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// No such sequence was opened, or it was closed.
    #[error("sequence {0:?} is not open in this stage")]
    UnknownSequence(SequenceId),
    /// Opened twice.
    #[error("sequence {0:?} is open already")]
    AlreadyOpen(SequenceId),
    /// A step is missing or came twice.
    #[error("step at position {actual} but the sequence stands at {expected}")]
    Position {
        /// Tokens seen so far.
        expected: usize,
        /// What the step said.
        actual: usize,
    },
    /// A sequence was to begin with a block that is not here: it has to be computed from its first token.
    #[error("block {0:?} is not in this stage")]
    MissingBlock(BlockId),
    /// A token id outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocabulary}")]
    Token {
        /// The id.
        token: u32,
        /// Vocabulary size.
        vocabulary: usize,
    },
    /// The input is not what this stage takes.
    #[error("{0}")]
    Input(String),
    /// The activation is malformed.
    #[error(transparent)]
    Activation(#[from] ActivationError),
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The sequence is longer than the memory reserved for it.
    #[error("the sequence is full: {tokens} tokens of {limit}")]
    Full {
        /// Tokens that it would have.
        tokens: usize,
        /// Most it may have.
        limit: usize,
    },
    /// The arithmetic failed (out of memory, not-a-number, the device is gone). The worker should end.
    #[error("{0}")]
    Device(String),
}
