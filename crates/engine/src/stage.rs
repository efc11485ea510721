//! The engine's [`Stage`]: a layer range with the caches of the sequences that go through it.
//!
//! A stage that is the whole model works one token ahead: once a token is drawn, the step that most likely comes next is queued on
//! the device before the token is read, so that the device computes while the token travels to the client and back. When another
//! step comes instead, the caches are cut back and nothing has happened.

use crate::batch::Batch;
use crate::blocks::{Block, BlockFiles, Blocks, resumed};
use crate::caches::SequenceCache;
use crate::decoder::last_token;
use crate::loader::LoadError;
use crate::model::Model;
use crate::sampler::{Draw, Sampler};
use bytes::Bytes;
use mlxnode_checkpoint::{Checkpoint, ModelProfile};
use mlxnode_compute::{
    Activation, BLOCK_TOKENS, BlockCapacity, BlockId, BlockOrder, BlockStore, BlockUsage, ByteCount,
    CacheOptions, Keep, LayerRange, Sampled, SequenceId, SequenceSpec, Stage, StageError, StageInfo,
    StageMemory, Step, StepInput, StepOutput,
};
use mlxnode_mlx::{Array, Device, Dtype, Error};
use std::collections::HashMap;
use std::path::Path;

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

/// A stage on MLX. Sequences are independent of each other; each step is one sequence's.
pub struct EngineStage {
    model: Model,
    options: StageOptions,
    sequences: HashMap<SequenceId, Sequence>,
    blocks: Blocks,
    /// Steps done.
    steps: u64,
}

struct Sequence {
    cache: SequenceCache,
    /// Tokens that went through.
    position: usize,
    /// Length of the prompt: token number n is sampled when `prompt + n` tokens went through.
    prompt: usize,
    /// Most tokens to generate.
    max_tokens: usize,
    /// Tokens after which nothing more comes.
    stop_tokens: Vec<u32>,
    /// On the last stage.
    sampling: Option<Sampling>,
    /// A step that was queued before anybody asked for it.
    ahead: Option<Ahead>,
    /// The ids that went through, for the blocks that are kept.
    ids: Vec<u32>,
    /// Blocks to keep once their tokens went through.
    keeps: Vec<Keep>,
}

/// The step of the token that was sampled last; the caches hold it already.
struct Ahead {
    /// The token that goes through.
    token: u32,
    /// The one that is drawn after it.
    draw: Draw,
}

struct Sampling {
    sampler: Sampler,
    /// The last ids, as many as the penalties look at.
    tail: Vec<u32>,
    /// How many those are; None for all.
    keep: Option<usize>,
}

impl EngineStage {
    /// Loads `layers` of a checkpoint. `progress` gets the bytes read so far and in all.
    pub fn load(
        checkpoint: &Checkpoint,
        layers: LayerRange,
        options: StageOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        Ok(Self::new(Model::load(checkpoint, layers, progress)?, options))
    }

    /// A stage of layers that are loaded.
    pub fn new(model: Model, mut options: StageOptions) -> Self {
        if let Some(positions) = model.spec().positions {
            options.context_tokens = options.context_tokens.min(positions);
        }
        Self { model, options, sequences: HashMap::new(), blocks: Blocks::default(), steps: 0 }
    }

    /// Blocks take `memory` bytes at most, and with `files` as many more in that folder, which is made when it is missing: blocks of
    /// other stages that are there count as well.
    pub fn with_blocks(
        mut self,
        memory: ByteCount,
        files: Option<(&Path, ByteCount)>,
    ) -> std::io::Result<Self> {
        let LayerRange { start, end } = self.model.info().layers;
        let CacheOptions { max_kv_size, kv_bits, kv_group_size, quantized_kv_start } = self.options.cache;
        let numbers = [
            BLOCK_TOKENS,
            start,
            end,
            max_kv_size.unwrap_or(0),
            usize::from(kv_bits.unwrap_or(0)),
            kv_group_size,
            quantized_kv_start,
        ];
        let mut hasher = blake3::Hasher::new_derive_key("mlxnode stage of blocks v1");
        hasher.update(&self.model.fingerprint());
        for number in numbers {
            hasher.update(&(number as u64).to_le_bytes());
        }
        let fingerprint = *hasher.finalize().as_bytes();
        let files = match files.filter(|(_, limit)| limit.0 > 0) {
            Some((folder, limit)) => Some(BlockFiles::open(folder, fingerprint, limit)?),
            None => None,
        };
        let layers = LayerRange { start, end };
        let (block, checkpoint) = ModelProfile::stretch_bytes(self.model.spec(), layers, BLOCK_TOKENS);
        let ids = ByteCount(size_of::<[u32; BLOCK_TOKENS]>() as u64);
        let disk = ByteCount(0); // as much as the files allow
        let capacity = BlockCapacity { block: block + ids, checkpoint, memory, disk, fingerprint };
        self.blocks = Blocks::new(capacity, files);
        Ok(self)
    }

    /// The logits `[tokens][vocabulary]` of a sequence's next tokens, for evaluation: runs the step and samples nothing.
    /// Only on the last stage.
    pub fn logits(&mut self, step: Step) -> Result<Vec<Vec<f32>>, StageError> {
        let hidden = self.run(&step)?;
        let device = &self.model.device;
        let logits = self.model.decoder.logits(device, &hidden).map_err(device_error)?;
        let all = device.contiguous(&logits).and_then(|logits| logits.to_f32()).map_err(device_error)?;
        Ok(all.chunks(self.model.info().vocabulary).map(<[f32]>::to_vec).collect())
    }

    /// Checks a step and queues it: hidden vectors `[1, tokens, hidden]` after this stage's layers.
    fn run(&mut self, step: &Step) -> Result<Array, StageError> {
        let info = self.model.info();
        let sequence =
            self.sequences.get_mut(&step.sequence).ok_or(StageError::UnknownSequence(step.sequence))?;
        check(step, info, sequence.position, self.options.context_tokens)?;
        if sequence.ahead.take().is_some() && !sequence.cache.truncate(sequence.position as i32) {
            return Err(StageError::Device("a queued step cannot be undone".to_owned()));
        }
        let (device, decoder) = (&self.model.device, &self.model.decoder);
        let count = step.tokens.len() as i32;
        let hidden = match &step.input {
            StepInput::Tokens => {
                let ids = Array::from_u32(&step.tokens, &[1, count]).map_err(device_error)?;
                decoder.embed(device, &ids)
            }
            StepInput::Activation(activation) => {
                let shape = [1, count, activation.hidden() as i32];
                Array::from_bytes(activation.bytes(), &shape, activation.dtype().into())
            }
        };
        let hidden = hidden.and_then(|hidden| {
            decoder.forward(device, hidden, &mut Batch::single(&mut sequence.cache, count))
        });
        let hidden = hidden.map_err(device_error)?;
        sequence.went_through(&step.tokens);
        Ok(hidden)
    }

    /// Takes the draw that was queued for this very step, if there is one.
    fn take_ahead(&mut self, step: &Step) -> Result<Option<Draw>, StageError> {
        let Some(sequence) = self.sequences.get_mut(&step.sequence) else { return Ok(None) };
        let is_next = |ahead: &Ahead| step.sample && step.tokens == [ahead.token];
        if !sequence.ahead.as_ref().is_some_and(is_next) {
            return Ok(None);
        }
        check(step, self.model.info(), sequence.position, self.options.context_tokens)?;
        sequence.went_through(&step.tokens);
        Ok(sequence.ahead.take().map(|ahead| ahead.draw))
    }

    /// Queues the draw after the last of the hidden vectors.
    fn draw(&mut self, id: SequenceId, hidden: &Array) -> Result<Draw, StageError> {
        let (device, decoder) = (&self.model.device, &self.model.decoder);
        let sequence = self.sequences.get_mut(&id).ok_or(StageError::UnknownSequence(id))?;
        let index = sequence.index();
        let Some(sampling) = &mut sequence.sampling else {
            return Err(StageError::Input("only the last stage samples".to_owned()));
        };
        let mut draw = || -> Result<Draw, Error> {
            let logits = decoder.logits(device, &last_token(device, hidden)?)?;
            let history = sampling.history()?;
            let draw = sampling.sampler.draw(device, logits, history.as_ref(), index)?;
            device.async_eval(draw.arrays())?;
            Ok(draw)
        };
        draw().map_err(device_error)
    }

    /// Queues the step of the token that `draw` will give, when this stage is the whole model and the sequence may go on.
    fn queue_next(&mut self, id: SequenceId, draw: &Draw) -> Result<Option<Draw>, StageError> {
        let (model, limit) = (&self.model, self.options.context_tokens);
        let sequence = self.sequences.get_mut(&id).ok_or(StageError::UnknownSequence(id))?;
        let index = sequence.index();
        let goes_on = index + 1 < sequence.max_tokens as u64
            && sequence.position < limit
            && sequence.cache.can_undo_next();
        let Some(sampling) = sequence.sampling.as_mut().filter(|_| goes_on && model.info().is_first()) else {
            return Ok(None);
        };
        let (device, decoder) = (&model.device, &model.decoder);
        let mut queue = || -> Result<Draw, Error> {
            let hidden = decoder.embed(device, &device.reshape(&draw.token, &[1, 1])?)?;
            let hidden = decoder.forward(device, hidden, &mut Batch::single(&mut sequence.cache, 1))?;
            let logits = decoder.logits(device, &hidden)?;
            let history = sampling.history_and(device, &draw.token)?;
            let next = sampling.sampler.draw(device, logits, history.as_ref(), index + 1)?;
            device.async_eval(next.arrays())?;
            Ok(next)
        };
        queue().map(Some).map_err(device_error)
    }

    fn sample(&mut self, id: SequenceId, draw: &Draw) -> Result<Sampled, StageError> {
        let next = self.queue_next(id, draw)?;
        let sampled = draw.read(&self.model.device).map_err(device_error)?.ok_or_else(|| {
            StageError::Device(
                "the model computed logits that are not numbers; its weights may be damaged".to_owned(),
            )
        })?;
        let sequence = self.sequences.get_mut(&id).ok_or(StageError::UnknownSequence(id))?;
        match next {
            Some(_) if sequence.stop_tokens.contains(&sampled.token) => {
                // Nothing more comes; a cache that cannot be cut back is of no use to anybody.
                let _ = sequence.cache.truncate(sequence.position as i32);
            }
            Some(draw) => sequence.ahead = Some(Ahead { token: sampled.token, draw }),
            None => {}
        }
        Ok(sampled)
    }

    /// Gives free buffers back after a chunk of a prompt, and now and then.
    fn clean_up(&mut self, tokens: usize) -> Result<(), StageError> {
        self.steps += 1;
        if tokens > 1 || self.steps.is_multiple_of(STEPS_PER_CLEAN_UP) {
            self.model.device.clear_cache().map_err(device_error)?;
        }
        Ok(())
    }

    /// Takes the blocks of a sequence whose tokens went through. One of which a part is lost (a limit on tokens dropped it) is not
    /// taken, and missing when a sequence wants to begin with it.
    fn take_blocks(&mut self, id: SequenceId) -> Result<(), StageError> {
        let Some(sequence) = self.sequences.get_mut(&id) else { return Ok(()) };
        let position = sequence.position;
        let is_due = |keep: &Keep| keep.number.saturating_add(1).saturating_mul(BLOCK_TOKENS) <= position;
        if !sequence.keeps.iter().any(is_due) {
            return Ok(());
        }
        let (due, later) = std::mem::take(&mut sequence.keeps).into_iter().partition(is_due);
        sequence.keeps = later;
        let due: Vec<Keep> = due;
        for Keep { number, block: name, checkpoint } in due {
            let device = &self.model.device;
            let block = Block::of(device, &sequence.cache, 0, &sequence.ids, number, checkpoint);
            let Some(block) = block.map_err(device_error)? else {
                tracing::debug!(number, "a block could not be kept");
                continue;
            };
            // Now, or the block would hold the caches' buffers, which are then no longer written in place.
            device.async_eval(block.arrays()).map_err(device_error)?;
            self.blocks.insert(name, block);
        }
        Ok(())
    }

    fn output(&self, hidden: &Array, tokens: usize) -> Result<Activation, StageError> {
        let (device, info) = (&self.model.device, self.model.info());
        let bytes = device
            .cast(hidden, Dtype::from(info.dtype))
            .and_then(|hidden| device.contiguous(&hidden))
            .and_then(|hidden| hidden.to_bytes())
            .map_err(device_error)?;
        Ok(Activation::new(tokens, info.hidden, info.dtype, Bytes::from(bytes))?)
    }
}

/// Is the step one that this stage can do?
fn check(step: &Step, info: &StageInfo, position: usize, limit: usize) -> Result<(), StageError> {
    if step.position != position {
        return Err(StageError::Position { expected: position, actual: step.position });
    }
    if step.tokens.is_empty() {
        return Err(StageError::Input("a step needs at least one token".to_owned()));
    }
    let total = position.saturating_add(step.tokens.len());
    if total > limit {
        return Err(StageError::Full { tokens: total, limit });
    }
    if let Some(token) = step.tokens.iter().find(|token| **token as usize >= info.vocabulary) {
        return Err(StageError::Token { token: *token, vocabulary: info.vocabulary });
    }
    match (&step.input, info.is_first()) {
        (StepInput::Tokens, true) => Ok(()),
        (StepInput::Tokens, false) => {
            Err(StageError::Input(format!("layers {} take activations, not token ids", info.layers)))
        }
        (StepInput::Activation(_), true) => {
            Err(StageError::Input(format!("layers {} take token ids, not activations", info.layers)))
        }
        (StepInput::Activation(activation), false) => {
            let expected = (step.tokens.len(), info.hidden, info.dtype);
            let actual = (activation.tokens(), activation.hidden(), activation.dtype());
            if expected == actual {
                return Ok(());
            }
            Err(StageError::Input(format!(
                "the activation is {} x {} of {:?}, but these layers take {} x {} of {:?}",
                actual.0, actual.1, actual.2, expected.0, expected.1, expected.2
            )))
        }
    }
}

impl Sampling {
    fn remember(&mut self, tokens: &[u32]) {
        let keep = self.keep.unwrap_or(usize::MAX);
        self.tail.extend_from_slice(&tokens[tokens.len().saturating_sub(keep)..]);
        let excess = self.tail.len().saturating_sub(keep);
        self.tail.drain(..excess);
    }

    /// The ids that the penalties look at; None when they look at none.
    fn history(&self) -> Result<Option<Array>, Error> {
        match self.tail.is_empty() {
            true => Ok(None),
            false => Array::from_u32(&self.tail, &[self.tail.len() as i32]).map(Some),
        }
    }
}

impl Sampling {
    /// The same with one more id, `[1]`, that may still be computed.
    fn history_and(&self, device: &Device, token: &Array) -> Result<Option<Array>, Error> {
        match (self.history()?, self.keep) {
            (_, Some(0)) => Ok(None),
            (None, _) => Ok(Some(token.clone())),
            (Some(before), _) => device.concatenate([&before, token], 0).map(Some),
        }
    }
}

impl Sequence {
    fn went_through(&mut self, tokens: &[u32]) {
        self.position += tokens.len();
        self.ids.extend_from_slice(tokens);
        if let Some(sampling) = &mut self.sampling {
            sampling.remember(tokens);
        }
    }

    /// Number of the token that is drawn now.
    fn index(&self) -> u64 {
        self.position.saturating_sub(self.prompt) as u64
    }
}

impl Stage for EngineStage {
    fn info(&self) -> &StageInfo {
        self.model.info()
    }

    fn open(&mut self, id: SequenceId, spec: SequenceSpec) -> Result<(), StageError> {
        let vocabulary = self.model.info().vocabulary;
        spec.sampling.check(vocabulary)?;
        if self.sequences.contains_key(&id) {
            return Err(StageError::AlreadyOpen(id));
        }
        if self.sequences.len() >= self.options.max_sequences {
            let limit = self.options.max_sequences;
            return Err(StageError::Input(format!(
                "{limit} sequences are open, which is the most; close one first"
            )));
        }
        let sampling = match self.model.info().is_last() {
            true => {
                let sampler = Sampler::new(spec.sampling, vocabulary).map_err(device_error)?;
                let keep = sampler.penalties().history();
                Some(Sampling { sampler, tail: Vec::new(), keep })
            }
            false => None,
        };
        let cache = self.model.new_cache(&self.options.cache);
        let cache = cache.map_err(|error| StageError::Input(error.to_string()))?;
        let sequence = Sequence {
            cache,
            position: 0,
            prompt: spec.prompt_tokens,
            max_tokens: spec.max_tokens,
            stop_tokens: spec.stop_tokens,
            sampling,
            ahead: None,
            ids: Vec::new(),
            keeps: Vec::new(),
        };
        self.sequences.insert(id, sequence);
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<StepOutput, StageError> {
        if let Some(draw) = self.take_ahead(&step)? {
            self.take_blocks(step.sequence)?;
            let sampled = self.sample(step.sequence, &draw)?;
            self.clean_up(1)?;
            return Ok(StepOutput::Sampled(sampled));
        }
        let hidden = self.run(&step)?;
        self.take_blocks(step.sequence)?;
        let output = if !self.model.info().is_last() {
            StepOutput::Activation(self.output(&hidden, step.tokens.len())?)
        } else if step.sample {
            let draw = self.draw(step.sequence, &hidden)?;
            StepOutput::Sampled(self.sample(step.sequence, &draw)?)
        } else {
            // The head is not computed for tokens that nothing is sampled after.
            let sequence =
                self.sequences.get(&step.sequence).ok_or(StageError::UnknownSequence(step.sequence))?;
            self.model.device.eval(sequence.cache.state()).map_err(device_error)?;
            StepOutput::Nothing
        };
        self.clean_up(step.tokens.len())?;
        Ok(output)
    }

    fn close(&mut self, id: SequenceId) {
        self.sequences.remove(&id);
    }

    fn blocks(&mut self) -> Option<&mut dyn BlockStore> {
        Some(self)
    }

    fn memory(&self) -> StageMemory {
        let memory = self.model.device.memory().unwrap_or_default();
        StageMemory { active: ByteCount(memory.active as u64), peak: ByteCount(memory.peak as u64) }
    }
}

impl BlockStore for EngineStage {
    fn reset(&mut self) -> BlockCapacity {
        self.blocks.reset()
    }

    fn begin_with(&mut self, id: SequenceId, blocks: &[BlockId]) -> Result<(), StageError> {
        let sequence = self.sequences.get_mut(&id).ok_or(StageError::UnknownSequence(id))?;
        if sequence.position > 0 {
            return Err(StageError::Position { expected: sequence.position, actual: 0 });
        }
        let device = &self.model.device;
        let found = self.blocks.get(device, blocks).map_err(device_error)?;
        let found = found.map_err(StageError::MissingBlock)?;
        let layers = self.model.decoder.layers.len();
        let fits = |block: &&Block| block.layers.len() == layers && block.tokens.len() == BLOCK_TOKENS;
        let (Some(last), Some(name)) = (found.last(), blocks.last()) else { return Ok(()) };
        if !last.is_border || !found.iter().all(fits) {
            return Err(StageError::MissingBlock(*name));
        }
        let tokens = found.len() * BLOCK_TOKENS;
        if tokens > self.options.context_tokens {
            return Err(StageError::Full { tokens, limit: self.options.context_tokens });
        }
        let room = sequence.prompt.saturating_sub(tokens);
        sequence.cache = resumed(device, &self.options.cache, &found, room).map_err(device_error)?;
        for block in found {
            sequence.went_through(&block.tokens);
        }
        Ok(())
    }

    fn keep(&mut self, id: SequenceId, keep: Keep) -> Result<(), StageError> {
        let sequence = self.sequences.get_mut(&id).ok_or(StageError::UnknownSequence(id))?;
        sequence.keeps.push(keep);
        self.take_blocks(id)
    }

    fn order(&mut self, order: BlockOrder) -> Result<(), StageError> {
        self.blocks.order(&self.model.device, order).map_err(device_error)
    }

    fn usage(&self) -> BlockUsage {
        self.blocks.usage()
    }
}

fn device_error(error: Error) -> StageError {
    StageError::Device(error.to_string())
}
