//! A stage without a model: deterministic tokens, wrong wiring noticed. Tests of the pipeline and the scheduler run on it.

use crate::{
    Activation, Dtype, Sampled, SequenceId, SequenceSpec, Stage, StageError, StageInfo, StageMemory, Step,
    StepInput, StepOutput,
};
use bytes::Bytes;
use std::collections::HashMap;
use std::time::Duration;

/// Adds the number of its layers to every element. The first stage starts from the token ids, so that the last one can check
/// that each activation went through exactly the layers before it, once and in order.
pub struct SimulatedStage {
    info: StageInfo,
    /// How long a step takes, per token.
    step_time: Duration,
    sequences: HashMap<SequenceId, Sequence>,
}

struct Sequence {
    position: usize,
    /// Sum over everything seen, so that the sampled token depends on the whole history.
    digest: u64,
}

impl SimulatedStage {
    /// A stage with these facts whose steps take `step_time` (slept, not computed).
    pub fn new(info: StageInfo, step_time: Duration) -> Self {
        Self { info, step_time, sequences: HashMap::new() }
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
        let mut digest = prompt.iter().fold(0, |digest, token| Self::digest(digest, *token));
        let mut tokens = Vec::with_capacity(count);
        for _ in 0..count {
            let token = Self::next_token(digest, vocabulary);
            digest = Self::digest(digest, token);
            tokens.push(token);
        }
        tokens
    }
}

impl Stage for SimulatedStage {
    fn info(&self) -> &StageInfo {
        &self.info
    }

    fn open(&mut self, sequence: SequenceId, spec: SequenceSpec) -> Result<(), StageError> {
        spec.sampling.check(self.info.vocabulary)?;
        if self.sequences.insert(sequence, Sequence { position: 0, digest: 0 }).is_some() {
            return Err(StageError::AlreadyOpen(sequence));
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<StepOutput, StageError> {
        let sequence =
            self.sequences.get_mut(&step.sequence).ok_or(StageError::UnknownSequence(step.sequence))?;
        if step.position != sequence.position {
            return Err(StageError::Position { expected: sequence.position, actual: step.position });
        }
        let mut values = match &step.input {
            StepInput::Tokens => {
                step.tokens.iter().flat_map(|token| vec![*token as f32; self.info.hidden]).collect()
            }
            StepInput::Activation(activation) => read(activation),
        };
        let expected_rows = step.tokens.len() * self.info.hidden;
        if values.len() != expected_rows {
            return Err(StageError::Input(format!("{} values for {expected_rows}", values.len())));
        }
        for (row, token) in values.chunks(self.info.hidden).zip(&step.tokens) {
            let expected = *token as f32 + self.info.layers.start as f32;
            if row.iter().any(|value| *value != expected) {
                return Err(StageError::Input(format!("expected {expected} for token {token}, got {row:?}")));
            }
        }
        values.iter_mut().for_each(|value| *value += self.info.layers.len() as f32);
        sequence.position += step.tokens.len();
        sequence.digest =
            step.tokens.iter().fold(sequence.digest, |digest, token| Self::digest(digest, *token));
        if !self.step_time.is_zero() {
            std::thread::sleep(self.step_time * step.tokens.len() as u32);
        }
        if !self.info.is_last() {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
            let activation =
                Activation::new(step.tokens.len(), self.info.hidden, Dtype::F32, Bytes::from(bytes))?;
            return Ok(StepOutput::Activation(activation));
        }
        if !step.sample {
            return Ok(StepOutput::Nothing);
        }
        let token = Self::next_token(sequence.digest, self.info.vocabulary);
        Ok(StepOutput::Sampled(Sampled { token, logprob: None, top: Vec::new() }))
    }

    fn close(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    fn memory(&self) -> StageMemory {
        StageMemory { active: self.info.weights, peak: self.info.weights }
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
    use crate::{ByteCount, LayerRange};

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
}
