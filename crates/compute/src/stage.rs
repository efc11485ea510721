//! A stage: a contiguous layer range of one model, ready to run.

use crate::{
    Activation, ActivationError, BlockId, BlockStore, ByteCount, Dtype, Grammar, GrammarError, LayerRange,
    LogprobRequest, Sampled, Sampling, SamplingError, TraceContext,
};
use std::path::Path;

/// Names a sequence within one replica. Chosen by the scheduler, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// What a sequence needs besides its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceSpec {
    /// Tokens in the prompt. A sequence that is continued elsewhere brings generated ones behind them, which do not count here.
    pub prompt_tokens: usize,
    /// Most tokens to generate, those that a continued sequence brings along included.
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
    /// Tokens that may be guessed ahead at once. None: as many as the first stage likes; 0: none. Changes when tokens come, not which.
    pub most_guesses: Option<usize>,
    /// The request that it belongs to, for logs and traces; changes nothing.
    pub trace: Option<TraceContext>,
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
            most_guesses: None,
            trace: None,
        }
    }

    /// Checks what is asked against a vocabulary of `vocabulary` tokens.
    ///
    /// # Errors
    /// Names the parameter that is out of its range.
    pub fn check(&self, vocabulary: usize) -> Result<(), SamplingError> {
        self.sampling.check(vocabulary)?;
        match self.prompt_logprobs {
            Some(request) => request.check("prompt_logprobs", vocabulary),
            None => Ok(()),
        }
    }
}

/// Why a sequence has no further token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceEnd {
    /// A stop token was sampled.
    Stop,
    /// The token completed what the grammar asks for. Unlike a stop token it is part of the answer.
    Complete,
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

/// What goes through a stage at once: parts of one or several sequences, so that a weight is read once for all of them.
///
/// A sequence has at most one row. Rows of a single token come first, and among them those that are drawn alike can be drawn
/// together; a row's result does not depend on the others.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    /// The sequences' parts, at least one.
    pub rows: Vec<Row>,
    /// What the layers work on, for all rows.
    pub input: StepInput,
}

/// One sequence's part of a micro-batch: consecutive tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Position of the first one; equals the number of tokens that went through before.
    pub position: usize,
    /// The ids. Every stage gets them: the first embeds them, the last needs them for the penalties.
    pub tokens: Vec<u32>,
    /// Is something made of the last token: the next token sampled, or the prompt's vector? False for all but the last chunk of
    /// a prompt.
    pub sample: bool,
    /// Tokens that may come next: they go through behind the others, and the last stage says which of them are right.
    /// Empty but for a row of one token that is sampled.
    pub guesses: Vec<u32>,
}

impl Row {
    /// Most guesses that a row may have.
    pub const MOST_GUESSES: usize = 32;

    /// One past the position of its last token. Guesses do not count.
    pub fn end(&self) -> usize {
        self.position.saturating_add(self.tokens.len())
    }

    /// Vectors that it has in an activation: one for each token and each guess.
    pub fn width(&self) -> usize {
        self.tokens.len() + self.guesses.len()
    }
}

impl MicroBatch {
    /// Most guesses of all rows together.
    pub const MOST_GUESSES: usize = 64;

    /// Tokens of all rows, guesses among them.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(Row::width).sum()
    }

    /// Leaves only the rows for which `keeps` says so, and their part of the activation. Copies when that is not all of it.
    ///
    /// # Errors
    /// An activation that has not one vector for each token.
    pub fn retain(&mut self, mut keeps: impl FnMut(&Row) -> bool) -> Result<(), ActivationError> {
        let kept: Vec<bool> = self.rows.iter().map(&mut keeps).collect();
        if kept.iter().all(|kept| *kept) {
            return Ok(());
        }
        if let StepInput::Activation(activation) = &self.input {
            let (mut ranges, mut start) = (Vec::new(), 0);
            for (row, kept) in self.rows.iter().zip(&kept) {
                let end = start + row.width();
                if *kept {
                    ranges.push(start..end);
                }
                start = end;
            }
            self.input = StepInput::Activation(activation.rows(&ranges)?);
        }
        let mut kept = kept.into_iter();
        self.rows.retain(|_| kept.next().unwrap_or(true));
        Ok(())
    }
}

/// Where the hidden vectors come from.
#[derive(Clone, Debug, PartialEq)]
pub enum StepInput {
    /// First stage: embed the rows' tokens.
    Tokens,
    /// The output of the stage before, `[tokens of all rows, hidden]`.
    Activation(Activation),
}

/// What a stage made of a micro-batch.
#[derive(Debug)]
pub struct BatchOutput {
    /// For each row, in order.
    pub rows: Vec<Result<RowOutput, StageError>>,
    /// Input for the next stage, of the rows without an error. None on the last stage, and when there is no such row.
    pub activation: Option<Activation>,
}

/// What the last stage made of a row; other stages leave it empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowOutput {
    /// The tokens of the row with their log-probabilities, when the prompt is scored: all but the sequence's first token.
    pub scores: Vec<Sampled>,
    /// With `sample`: the next token.
    pub sampled: Option<Sampled>,
    /// The tokens after that one: as many as the row had guesses that are right. `sampled` is the first of those, or what comes in
    /// place of a wrong one; each of these is drawn after the guess before it.
    pub further: Vec<Sampled>,
    /// The grammar's sentence is complete with that token: the sequence ends.
    pub is_complete: bool,
    /// With `sample`, for a sequence that is embedded: its vector.
    pub embedding: Option<Vec<f32>>,
}

/// A micro-batch of a single sequence, for whoever runs one by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// As [`Row::position`].
    pub position: usize,
    /// As [`Row::tokens`].
    pub tokens: Vec<u32>,
    /// What the layers work on.
    pub input: StepInput,
    /// As [`Row::sample`].
    pub sample: bool,
}

impl From<Step> for MicroBatch {
    fn from(step: Step) -> Self {
        let Step { sequence, position, tokens, input, sample } = step;
        Self { rows: vec![Row { sequence, position, tokens, sample, guesses: Vec::new() }], input }
    }
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

    /// Puts guesses into rows, on a first stage that has means to guess. What comes out does not depend on them, only when.
    ///
    /// # Errors
    /// [`StageError::Device`]: no sequence can go on.
    fn guess(&mut self, _batch: &mut MicroBatch) -> Result<(), StageError> {
        Ok(())
    }

    /// Runs a micro-batch. Of a row's guesses, those that were right count as gone through: a next row begins behind them, as
    /// [`RowOutput::further`] says. A row that cannot be done has an error of its own and spares the others.
    ///
    /// # Errors
    /// [`StageError::Device`]: no sequence can go on. What the input is wrong about as a whole.
    fn run(&mut self, batch: &MicroBatch) -> Result<BatchOutput, StageError>;

    /// Frees a sequence's caches. Unknown sequences are fine: closing twice is not an error.
    fn close(&mut self, sequence: SequenceId);

    /// Where blocks of prompts outlive their sequences; None when this stage keeps none.
    fn blocks(&mut self) -> Option<&mut dyn BlockStore>;

    /// Reads what the adapter in `folder` changes in these layers, for sequences that ask for it by `name`. The weights stay as they
    /// are, and other sequences do not see it.
    ///
    /// # Errors
    /// [`StageError::Adapter`] when it is none, is for another model, or the name is taken; then nothing has changed.
    fn load_adapter(&mut self, name: &str, folder: &Path) -> Result<(), StageError>;

    /// No further sequence gets the adapter. Those that have it keep it to their end; then its memory is free. One that is not there
    /// is fine.
    fn unload_adapter(&mut self, name: &str);

    /// What the device holds now and held at most since loading.
    fn memory(&self) -> StageMemory;

    /// Runs a micro-batch of one row, of a sequence that generates tokens.
    ///
    /// # Errors
    /// As [`Stage::run`], and the row's own.
    fn step(&mut self, step: Step) -> Result<StepOutput, StageError> {
        let output = self.run(&step.into())?;
        let row = output.rows.into_iter().next().unwrap_or_else(|| Ok(RowOutput::default()))?;
        Ok(match (output.activation, row.sampled) {
            (Some(activation), _) => StepOutput::Activation(activation),
            (None, Some(sampled)) => StepOutput::Sampled(sampled),
            (None, None) => StepOutput::Nothing,
        })
    }
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
    /// An adapter cannot be loaded, or is not there.
    #[error("{0}")]
    Adapter(String),
    /// The answer's grammar cannot be followed.
    #[error("grammar: {0}")]
    Grammar(#[from] GrammarError),
    /// The sequence is longer than the memory reserved for it.
    #[error("the sequence is full: {tokens} tokens of {limit}")]
    Full {
        /// Tokens that it would have.
        tokens: usize,
        /// Most it may have.
        limit: usize,
    },
    /// The sequence's logits are not finite numbers.
    #[error("the model computed logits that are not numbers; its weights may be damaged")]
    NotANumber,
    /// The arithmetic failed (out of memory, the device is gone). The worker should end.
    #[error("{0}")]
    Device(String),
}
