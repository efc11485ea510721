//! The engine's [`Stage`]: a layer range with the caches of the sequences that go through it.
//!
//! A stage that is the whole model works one token ahead: once tokens are drawn, the step that most likely comes next is queued on
//! the device before they are read, so that the device computes while the tokens travel to the clients and back. When another
//! step comes instead, the caches are cut back and nothing has happened.
//!
//! - [`sequence`]: what is kept of an open sequence
//! - [`step`]: a micro-batch on its way through the layers: rows are looked at ([`checks`]), go through them ([`passes`]), tokens are drawn
//!   ([`drawing`])
//! - [`queued`]: the step that most likely comes next
//! - [`guessing`]: tokens ahead of what is known; [`verifying`]: which of them are right
//! - [`blocks`]: what outlives sequences
//! - [`scores`]: what is made of prompts themselves
//! - [`adapters`]: which rows go with which adapter, and adapters that come and go meanwhile

mod adapters;
mod blocks;
mod checks;
mod drawing;
mod guessing;
mod passes;
mod queued;
mod scores;
mod sequence;
mod step;
mod verifying;

use self::adapters::Retired;
use self::guessing::Guesser;
use self::queued::Queued;
use self::scores::{Scoring, VectorSum};
use self::sequence::{Constraint, Purpose, Sampling, Sequence};
use crate::adapters::AdapterId;
use crate::blocks::Blocks;
use crate::cache_pool::CachePool;
use crate::loader::LoadError;
use crate::model::Model;
use crate::sampler::Sampler;
use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{
    BatchOutput, BlockStore, ByteCount, CacheOptions, Grammar, GrammarError, Grammars, LayerRange,
    MicroBatch, Output, SequenceId, SequenceSpec, Stage, StageError, StageInfo, StageMemory, Step,
};
use mlxnode_mlx::Error;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// How many steps are done between two clean-ups of the device's cache of free buffers, as in mlx-lm.
const STEPS_PER_CLEAN_UP: u64 = 256;

/// Limits of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageOptions {
    /// Most tokens of one sequence, prompt and generated together.
    pub context_tokens: usize,
    /// Most sequences that are open at once.
    pub max_sequences: usize,
    /// What the caches keep, and how.
    pub cache: CacheOptions,
}

impl Default for StageOptions {
    fn default() -> Self {
        Self { context_tokens: 32_768, max_sequences: 64, cache: CacheOptions::default() }
    }
}

/// A stage on MLX. Sequences are independent of each other, whichever go through together.
pub struct EngineStage {
    model: Model,
    options: StageOptions,
    sequences: HashMap<SequenceId, Sequence>,
    caches: CachePool<SequenceId>,
    /// The step that was queued before anybody asked for it.
    queued: Option<Queued>,
    /// What guesses further tokens, on a first stage.
    guesser: Option<Guesser>,
    grammars: Option<Box<dyn Grammars>>,
    blocks: Blocks,
    /// The model's folder, against whose files adapters are checked. None: the model was loaded elsewhere.
    folder: Option<PathBuf>,
    retired: Retired,
    /// The contents of the adapters' files, so that blocks of one are not taken for those of another.
    adapter_files: HashMap<AdapterId, blake3::Hash>,
    /// Steps done.
    steps: u64,
}

impl EngineStage {
    /// Loads `layers` of a checkpoint. `progress` gets the bytes read so far and in all.
    pub fn load(
        checkpoint: &Checkpoint,
        layers: LayerRange,
        options: StageOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let stage = Self::new(Model::load(checkpoint, layers, progress)?, options);
        Ok(Self { folder: Some(checkpoint.folder().to_owned()), ..stage })
    }

    /// A stage of layers that are loaded.
    pub fn new(model: Model, mut options: StageOptions) -> Self {
        if let Some(positions) = model.spec().positions {
            options.context_tokens = options.context_tokens.min(positions);
        }
        let caches = CachePool::new(model.decoder.joins());
        let sequences = HashMap::new();
        Self {
            model,
            options,
            sequences,
            caches,
            queued: None,
            guesser: None,
            grammars: None,
            blocks: Blocks::default(),
            folder: None,
            retired: Retired::default(),
            adapter_files: HashMap::new(),
            steps: 0,
        }
    }

    /// With grammars for the model's tokenizer; without them a sequence with a grammar is refused.
    #[must_use]
    pub fn with_grammars(mut self, grammars: Box<dyn Grammars>) -> Self {
        self.grammars = Some(grammars);
        self
    }

    /// The logits `[tokens][vocabulary]` of a sequence's next tokens, for evaluation: runs the step and samples nothing.
    /// Only on the last stage.
    pub fn logits(&mut self, step: Step) -> Result<Vec<Vec<f32>>, StageError> {
        let hidden = self.hidden(&step.into())?;
        let device = &self.model.device;
        let logits = self.model.decoder.logits(device, &hidden).map_err(device_error)?;
        let all = device.contiguous(&logits).and_then(|logits| logits.to_f32()).map_err(device_error)?;
        Ok(all.chunks(self.model.info().vocabulary).map(<[f32]>::to_vec).collect())
    }

    /// Gives free buffers back after a chunk of a prompt, and now and then.
    fn clean_up(&mut self, has_chunk: bool) -> Result<(), StageError> {
        self.steps += 1;
        if has_chunk || self.steps.is_multiple_of(STEPS_PER_CLEAN_UP) {
            self.model.device.clear_cache().map_err(device_error)?;
        }
        Ok(())
    }

    /// What the last stage does with a sequence.
    fn purpose(&mut self, spec: &SequenceSpec) -> Result<Purpose, StageError> {
        if spec.output == Output::Embedding {
            return Ok(Purpose::Vector(VectorSum::default()));
        }
        let vocabulary = self.model.info().vocabulary;
        let sampler = Sampler::new(spec.sampling.clone(), vocabulary).map_err(device_error)?;
        let constraint = spec.grammar.as_ref().map(|grammar| self.constraint(grammar)).transpose()?;
        Ok(Purpose::Tokens(Box::new(Sampling::new(sampler, constraint))))
    }

    fn constraint(&mut self, grammar: &Grammar) -> Result<Constraint, GrammarError> {
        let Some(grammars) = &mut self.grammars else {
            return Err(GrammarError(
                "this model has no tokenizer that grammars could be read for".to_owned(),
            ));
        };
        grammars.constraint(grammar).map(Constraint::new)
    }
}

impl Stage for EngineStage {
    fn info(&self) -> &StageInfo {
        self.model.info()
    }

    fn open(&mut self, id: SequenceId, spec: SequenceSpec) -> Result<(), StageError> {
        spec.check(self.model.info().vocabulary)?;
        if self.sequences.contains_key(&id) {
            return Err(StageError::AlreadyOpen(id));
        }
        if self.sequences.len() >= self.options.max_sequences {
            let limit = self.options.max_sequences;
            return Err(StageError::Input(format!(
                "{limit} sequences are open, which is the most; close one first"
            )));
        }
        let adapter = self.adapter_named(spec.adapter.as_deref())?;
        let is_last = self.model.info().is_last();
        let purpose = if is_last { Some(self.purpose(&spec)?) } else { None };
        let cache = self.model.new_cache(&self.options.cache);
        self.caches.insert(id, cache.map_err(|error| StageError::Input(error.to_string()))?);
        let sequence = Sequence {
            position: 0,
            prompt: spec.prompt_tokens,
            max_tokens: spec.max_tokens,
            may_guess: spec.output == Output::Tokens
                && spec.grammar.is_none()
                && spec.most_guesses != Some(0),
            most_guesses: spec.most_guesses.unwrap_or(usize::MAX),
            unsure: Vec::new(),
            adapter,
            purpose,
            scoring: spec.prompt_logprobs.filter(|_| is_last).map(Scoring::new),
            ids: Vec::new(),
            keeps: Vec::new(),
        };
        if let Some(guesser) = self.guesser.as_mut().filter(|_| sequence.may_guess) {
            guesser.open(id, spec.sampling, self.model.info().vocabulary).map_err(device_error)?;
        }
        self.sequences.insert(id, sequence);
        Ok(())
    }

    fn guess(&mut self, batch: &mut MicroBatch) -> Result<(), StageError> {
        self.put_guesses(batch)
    }

    fn run(&mut self, batch: &MicroBatch) -> Result<BatchOutput, StageError> {
        let has_chunk = batch.rows.iter().any(|row| row.tokens.len() > 1);
        let output = self.run_rows(batch)?;
        for row in &batch.rows {
            self.take_blocks(row.sequence)?;
        }
        // A stage that is never idle writes all the same, a block with each step.
        self.blocks.write_next(&self.model.device).map_err(device_error)?;
        self.clean_up(has_chunk)?;
        Ok(output)
    }

    fn close(&mut self, id: SequenceId) {
        let closed = self.sequences.remove(&id);
        self.caches.remove(id);
        if let Some(guesser) = &mut self.guesser {
            guesser.close(id);
        }
        if let Some(adapter) = closed.and_then(|sequence| sequence.adapter) {
            self.let_go(adapter);
        }
    }

    fn load_adapter(&mut self, name: &str, folder: &Path) -> Result<(), StageError> {
        self.read_adapter(name, folder)
    }

    fn unload_adapter(&mut self, name: &str) {
        self.retire_adapter(name);
    }

    fn blocks(&mut self) -> Option<&mut dyn BlockStore> {
        Some(self)
    }

    fn memory(&self) -> StageMemory {
        let memory = self.model.device.memory().unwrap_or_default();
        StageMemory { active: ByteCount(memory.active as u64), peak: ByteCount(memory.peak as u64) }
    }
}

fn device_error(error: Error) -> StageError {
    StageError::Device(error.to_string())
}
