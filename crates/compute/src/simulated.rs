//! A stage without a model: deterministic tokens, wrong wiring noticed. Tests of the pipeline and the scheduler run on it.

use crate::{
    Activation, BLOCK_TOKENS, BatchOutput, BlockCapacity, BlockHash, BlockId, BlockOrder, BlockStore,
    BlockUsage, ByteCount, Dtype, Keep, MicroBatch, Output, Row, RowOutput, Sampled, SequenceId,
    SequenceSpec, Stage, StageError, StageInfo, StageMemory, StepInput,
};
use bytes::Bytes;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::time::Duration;

/// Blocks that a simulated stage keeps in memory, and on its disk.
pub const SIMULATED_BLOCKS: u64 = 64;

/// Adds the number of its layers to every element. The first stage starts from the token ids, so that the last one can check
/// that each activation went through exactly the layers before it, once and in order.
pub struct SimulatedStage {
    info: StageInfo,
    /// How long a token of a chunk takes; the single tokens of a micro-batch take as long as one.
    step_time: Duration,
    sequences: HashMap<SequenceId, Sequence>,
    /// The digest after each block.
    blocks: HashMap<BlockId, u64>,
    /// The same on a disk that never fails.
    files: HashMap<BlockHash, u64>,
    adapters: BTreeSet<String>,
    /// Tokens that it guesses at once, see [`Self::guessing`].
    guesses: usize,
}

#[derive(Default)]
struct Sequence {
    position: usize,
    /// Sum over everything seen, so that the sampled token depends on the whole history.
    digest: u64,
    /// The digest at the end of each block.
    borders: HashMap<usize, u64>,
    keeps: Vec<Keep>,
    /// Sum of the tokens, for the vector of an embedding.
    sum: f32,
    is_scored: bool,
    is_embedded: bool,
    /// Tokens that may be guessed at once.
    most_guesses: usize,
    /// Guesses that went through, of which it is not known whether they are right: token, digest and sum after each.
    unsure: Vec<(u32, u64, f32)>,
}

impl SimulatedStage {
    /// A stage with these facts whose tokens take `step_time` (slept, not computed).
    pub fn new(info: StageInfo, step_time: Duration) -> Self {
        Self {
            info,
            step_time,
            sequences: HashMap::new(),
            blocks: HashMap::new(),
            files: HashMap::new(),
            adapters: BTreeSet::new(),
            guesses: 0,
        }
    }

    /// As a first stage, puts so many guesses into rows; all but those of some rows are right, and there the last ones are wrong.
    #[must_use]
    pub fn guessing(self, guesses: usize) -> Self {
        Self { guesses, ..self }
    }

    /// The token that follows a history with this digest.
    pub fn next_token(digest: u64, vocabulary: usize) -> u32 {
        // Any fixed mixing will do: multiply by an odd constant and take the upper bits.
        ((digest.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) % vocabulary as u64) as u32
    }

    /// The digest after one more token.
    pub fn digest(digest: u64, token: u32) -> u64 {
        digest.wrapping_mul(31).wrapping_add(u64::from(token) + 1)
    }

    /// What a whole pipeline of simulated stages generates: the oracle for tests.
    pub fn expected_tokens(prompt: &[u32], count: usize, vocabulary: usize) -> Vec<u32> {
        Self::expected_tokens_with(None, prompt, count, vocabulary)
    }

    /// As [`Self::expected_tokens`], with an adapter: it stands like a secret token before the prompt.
    pub fn expected_tokens_with(
        adapter: Option<&str>,
        prompt: &[u32],
        count: usize,
        vocabulary: usize,
    ) -> Vec<u32> {
        let start = adapter.map_or(0, Self::adapter_digest);
        let mut digest = prompt.iter().fold(start, |digest, token| Self::digest(digest, *token));
        let mut tokens = Vec::with_capacity(count);
        for _ in 0..count {
            let token = Self::next_token(digest, vocabulary);
            digest = Self::digest(digest, token);
            tokens.push(token);
        }
        tokens
    }
}

impl SimulatedStage {
    fn adapter_digest(name: &str) -> u64 {
        name.bytes().fold(1, |digest, byte| Self::digest(digest, byte.into()))
    }
}

impl Stage for SimulatedStage {
    fn info(&self) -> &StageInfo {
        &self.info
    }

    fn open(&mut self, sequence: SequenceId, spec: SequenceSpec) -> Result<(), StageError> {
        spec.check(self.info.vocabulary)?;
        if let Some(adapter) = spec.adapter.as_ref().filter(|adapter| !self.adapters.contains(*adapter)) {
            return Err(StageError::Adapter(format!("the adapter {adapter:?} is not loaded")));
        }
        let state = Sequence {
            digest: spec.adapter.as_deref().map_or(0, Self::adapter_digest),
            is_scored: spec.prompt_logprobs.is_some(),
            is_embedded: spec.output == Output::Embedding,
            most_guesses: spec.most_guesses.unwrap_or(usize::MAX),
            ..Sequence::default()
        };
        if self.sequences.insert(sequence, state).is_some() {
            return Err(StageError::AlreadyOpen(sequence));
        }
        Ok(())
    }

    fn guess(&mut self, batch: &mut MicroBatch) -> Result<(), StageError> {
        for row in &mut batch.rows {
            let Some(sequence) = self.sequences.get_mut(&row.sequence) else { continue };
            sequence.settle(row.position, &mut self.blocks);
            let [token] = row.tokens.as_slice() else { continue };
            let room = BLOCK_TOKENS - row.end() % BLOCK_TOKENS;
            if !row.sample || sequence.is_embedded || room == BLOCK_TOKENS {
                continue;
            }
            let mut digest = Self::digest(sequence.digest, *token);
            let right = row.end() % (self.guesses + 1);
            for number in 0..self.guesses.min(room).min(sequence.most_guesses) {
                let next = Self::next_token(digest, self.info.vocabulary);
                let guess = if number < right { next } else { (next + 1) % self.info.vocabulary as u32 };
                row.guesses.push(guess);
                digest = Self::digest(digest, guess);
            }
        }
        Ok(())
    }

    fn run(&mut self, batch: &MicroBatch) -> Result<BatchOutput, StageError> {
        let values = match &batch.input {
            StepInput::Tokens => {
                let tokens = batch.rows.iter().flat_map(|row| row.tokens.iter().chain(&row.guesses));
                tokens.flat_map(|token| vec![*token as f32; self.info.hidden]).collect()
            }
            StepInput::Activation(activation) => read(activation),
        };
        let expected = batch.tokens() * self.info.hidden;
        if values.len() != expected {
            return Err(StageError::Input(format!("{} values for {expected}", values.len())));
        }
        let (mut rows, mut handed_on, mut rest) = (Vec::new(), Vec::new(), values.as_slice());
        for row in &batch.rows {
            let (own, after) = rest.split_at(row.width() * self.info.hidden);
            rest = after;
            let output = self.row(row, own);
            if output.is_ok() {
                handed_on.extend(own.iter().map(|value| value + self.info.layers.len() as f32));
            }
            rows.push(output);
        }
        self.take_time(&batch.rows);
        let activation = match self.info.is_last() || handed_on.is_empty() {
            true => None,
            false => {
                let bytes = handed_on.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
                let (tokens, hidden) = (handed_on.len() / self.info.hidden, self.info.hidden);
                Some(Activation::new(tokens, hidden, Dtype::F32, Bytes::from(bytes))?)
            }
        };
        Ok(BatchOutput { rows, activation })
    }

    fn close(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    fn blocks(&mut self) -> Option<&mut dyn BlockStore> {
        Some(self)
    }

    fn load_adapter(&mut self, name: &str, folder: &Path) -> Result<(), StageError> {
        if !folder.is_dir() {
            return Err(StageError::Adapter(format!("{} is no folder", folder.display())));
        }
        match self.adapters.insert(name.to_owned()) {
            true => Ok(()),
            false => Err(StageError::Adapter(format!("an adapter named {name:?} is loaded already"))),
        }
    }

    fn unload_adapter(&mut self, name: &str) {
        self.adapters.remove(name);
    }

    fn memory(&self) -> StageMemory {
        StageMemory { active: self.info.weights, peak: self.info.weights }
    }
}

impl Sequence {
    /// The next row begins here: so many of the guesses before were right.
    fn settle(&mut self, position: usize, blocks: &mut HashMap<BlockId, u64>) {
        let right = position.saturating_sub(self.position);
        for (_, digest, sum) in self.unsure.drain(..).take(right) {
            (self.digest, self.sum) = (digest, sum);
            self.position += 1;
            if self.position.is_multiple_of(BLOCK_TOKENS) {
                self.borders.insert(self.position, digest);
            }
        }
        self.take_blocks(blocks);
    }

    /// Takes the blocks that are due.
    fn take_blocks(&mut self, blocks: &mut HashMap<BlockId, u64>) {
        let borders = &self.borders;
        self.keeps.retain(|keep| match borders.get(&((keep.number + 1) * BLOCK_TOKENS)) {
            Some(digest) => {
                blocks.insert(keep.block, *digest);
                false
            }
            None => true,
        });
    }
}

impl BlockStore for SimulatedStage {
    fn reset(&mut self) -> BlockCapacity {
        self.blocks.clear();
        let room = ByteCount(8 * SIMULATED_BLOCKS);
        let fingerprint = [self.info.layers.start as u8; 32];
        BlockCapacity { block: ByteCount(8), checkpoint: ByteCount(0), memory: room, disk: room, fingerprint }
    }

    fn begin_with(&mut self, sequence: SequenceId, blocks: &[BlockId]) -> Result<(), StageError> {
        let state = self.sequences.get_mut(&sequence).ok_or(StageError::UnknownSequence(sequence))?;
        for (number, block) in blocks.iter().enumerate() {
            let digest = *self.blocks.get(block).ok_or(StageError::MissingBlock(*block))?;
            state.borders.insert((number + 1) * BLOCK_TOKENS, digest);
            state.digest = digest;
        }
        state.position = blocks.len() * BLOCK_TOKENS;
        Ok(())
    }

    fn keep(&mut self, sequence: SequenceId, keep: Keep) -> Result<(), StageError> {
        let state = self.sequences.get_mut(&sequence).ok_or(StageError::UnknownSequence(sequence))?;
        state.keeps.push(keep);
        state.take_blocks(&mut self.blocks);
        Ok(())
    }

    fn order(&mut self, order: BlockOrder) -> Result<(), StageError> {
        match order {
            BlockOrder::Drop { block } => {
                self.blocks.remove(&block);
            }
            BlockOrder::Spill { block, hash } => {
                self.files.extend(self.blocks.get(&block).map(|digest| (hash, *digest)));
            }
            BlockOrder::Restore { block, hash } => {
                self.blocks.extend(self.files.get(&hash).map(|digest| (block, *digest)));
            }
            BlockOrder::Erase { hash } => {
                self.files.remove(&hash);
            }
        }
        Ok(())
    }

    fn usage(&self) -> BlockUsage {
        let bytes = |count: usize| ByteCount(8 * count as u64);
        BlockUsage {
            blocks: self.blocks.len(),
            memory: bytes(self.blocks.len()),
            disk: bytes(self.files.len()),
        }
    }
}

impl SimulatedStage {
    fn row(&mut self, row: &Row, values: &[f32]) -> Result<RowOutput, StageError> {
        let Self { info, sequences, blocks, .. } = self;
        let sequence = sequences.get_mut(&row.sequence).ok_or(StageError::UnknownSequence(row.sequence))?;
        sequence.settle(row.position, blocks);
        if row.position != sequence.position {
            return Err(StageError::Position { expected: sequence.position, actual: row.position });
        }
        for (vector, token) in values.chunks(info.hidden).zip(row.tokens.iter().chain(&row.guesses)) {
            let expected = *token as f32 + info.layers.start as f32;
            if vector.iter().any(|value| *value != expected) {
                return Err(StageError::Input(format!(
                    "expected {expected} for token {token}, got {vector:?}"
                )));
            }
        }
        let mut output = RowOutput::default();
        for token in &row.tokens {
            if sequence.is_scored && sequence.position > 0 {
                output.scores.push(Self::score(sequence.digest, *token));
            }
            sequence.digest = Self::digest(sequence.digest, *token);
            sequence.sum += *token as f32;
            sequence.position += 1;
            if sequence.position.is_multiple_of(BLOCK_TOKENS) {
                sequence.borders.insert(sequence.position, sequence.digest);
            }
        }
        sequence.take_blocks(blocks);
        let (mut digest, mut sum) = (sequence.digest, sequence.sum);
        for guess in &row.guesses {
            (digest, sum) = (Self::digest(digest, *guess), sum + *guess as f32);
            sequence.unsure.push((*guess, digest, sum));
        }
        if !info.is_last() {
            return Ok(RowOutput::default());
        }
        if row.sample && sequence.is_embedded {
            output.embedding = Some(vec![sequence.sum / sequence.position as f32; info.hidden]);
        } else if row.sample {
            let token = Self::next_token(sequence.digest, info.vocabulary);
            sequence.is_scored = false; // the prompt is over
            let sampled = |token| Sampled { token, logprob: None, top: Vec::new() };
            output.sampled = Some(sampled(token));
            let mut next = token;
            for (guess, digest, _) in &sequence.unsure {
                if *guess != next {
                    break;
                }
                next = Self::next_token(*digest, info.vocabulary);
                output.further.push(sampled(next));
            }
            sequence.settle(sequence.position + output.further.len(), blocks);
        }
        Ok(output)
    }

    /// The score of a token that comes after a history with this digest.
    pub fn score(digest: u64, token: u32) -> Sampled {
        let logprob = -((digest % 1000) as f32) / 100.0;
        Sampled { token, logprob: Some(logprob), top: Vec::new() }
    }

    fn take_time(&self, rows: &[Row]) {
        let chunks: usize = rows.iter().map(|row| row.tokens.len()).filter(|tokens| *tokens > 1).sum();
        let singles = usize::from(rows.iter().any(|row| row.tokens.len() == 1));
        let time = self.step_time * (chunks + singles) as u32;
        if !time.is_zero() {
            std::thread::sleep(time);
        }
    }
}

fn read(activation: &Activation) -> Vec<f32> {
    activation
        .bytes()
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("chunks of four bytes")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ByteCount, LayerRange, Step, StepOutput};

    fn stage(start: usize, end: usize) -> SimulatedStage {
        let info = StageInfo {
            layers: LayerRange::new(start, end),
            layer_count: 4,
            hidden: 3,
            dtype: Dtype::F32,
            vocabulary: 100,
            weights: ByteCount(0),
        };
        SimulatedStage::new(info, Duration::ZERO)
    }

    #[test]
    fn two_stages_generate_what_the_oracle_says() {
        let (mut first, mut last) = (stage(0, 2), stage(2, 4));
        let id = SequenceId(1);
        let spec = SequenceSpec::new(2, 5, Default::default());
        first.open(id, spec.clone()).unwrap();
        last.open(id, spec).unwrap();
        let (mut tokens, mut position, mut generated) = (vec![7, 9], 0, Vec::new());
        for _ in 0..5 {
            let step = Step {
                sequence: id,
                position,
                tokens: tokens.clone(),
                input: StepInput::Tokens,
                sample: true,
            };
            let StepOutput::Activation(activation) = first.step(step.clone()).unwrap() else {
                panic!("not last")
            };
            let output = last.step(Step { input: StepInput::Activation(activation), ..step }).unwrap();
            let StepOutput::Sampled(sampled) = output else { panic!("last stage samples") };
            position += tokens.len();
            tokens = vec![sampled.token];
            generated.push(sampled.token);
        }
        assert_eq!(generated, SimulatedStage::expected_tokens(&[7, 9], 5, 100));
    }

    #[test]
    fn a_sequence_goes_on_after_the_blocks_of_another_one() {
        let mut stage = stage(0, 4);
        let tokens: Vec<u32> = (0..2 * BLOCK_TOKENS as u32 + 3).map(|token| token % 90).collect();
        let spec = SequenceSpec::new(tokens.len(), 1, Default::default());
        let step = |sequence: u64, position: usize| Step {
            sequence: SequenceId(sequence),
            position,
            tokens: tokens[position..].to_vec(),
            input: StepInput::Tokens,
            sample: true,
        };
        stage.open(SequenceId(1), spec.clone()).unwrap();
        for number in 0..2 {
            let keep = Keep { number, block: BlockId(number as u64), checkpoint: true };
            stage.keep(SequenceId(1), keep).unwrap();
        }
        let cold = stage.step(step(1, 0)).unwrap();
        stage.close(SequenceId(1));
        let hash = BlockHash([7; 32]);
        stage.order(BlockOrder::Spill { block: BlockId(1), hash }).unwrap();
        stage.order(BlockOrder::Drop { block: BlockId(1) }).unwrap();
        stage.open(SequenceId(2), spec).unwrap();
        let missing = stage.begin_with(SequenceId(2), &[BlockId(0), BlockId(1)]);
        assert!(matches!(missing, Err(StageError::MissingBlock(BlockId(1)))));
        stage.order(BlockOrder::Restore { block: BlockId(5), hash }).unwrap();
        stage.begin_with(SequenceId(2), &[BlockId(0), BlockId(5)]).unwrap();
        assert_eq!(stage.step(step(2, 2 * BLOCK_TOKENS)).unwrap(), cold);
        assert_eq!(stage.usage().blocks, 2);
    }

    #[test]
    fn a_row_that_fails_spares_the_others() {
        let (mut first, mut last) = (stage(0, 2), stage(2, 4));
        for sequence in [1, 2] {
            for stage in [&mut first, &mut last] {
                stage.open(SequenceId(sequence), SequenceSpec::new(2, 5, Default::default())).unwrap();
            }
        }
        let row = |sequence, position, tokens: &[u32]| Row {
            sequence: SequenceId(sequence),
            position,
            tokens: tokens.to_vec(),
            sample: true,
            guesses: Vec::new(),
        };
        let rows = vec![row(1, 0, &[4]), row(9, 0, &[5, 6]), row(2, 0, &[7, 8, 9])];
        let output = first.run(&MicroBatch { rows: rows.clone(), input: StepInput::Tokens }).unwrap();
        assert!(matches!(output.rows[1], Err(StageError::UnknownSequence(SequenceId(9)))));
        let activation = output.activation.unwrap();
        assert_eq!(activation.tokens(), 4);
        let mut batch = MicroBatch { rows, input: StepInput::Tokens };
        batch.retain(|row| row.sequence.0 != 9).unwrap();
        let output = last.run(&MicroBatch { input: StepInput::Activation(activation), ..batch }).unwrap();
        let tokens: Vec<u32> =
            output.rows.into_iter().map(|row| row.unwrap().sampled.unwrap().token).collect();
        let expected =
            [&[4][..], &[7, 8, 9]].map(|prompt| SimulatedStage::expected_tokens(prompt, 1, 100)[0]);
        assert_eq!(tokens, expected);
    }
}
