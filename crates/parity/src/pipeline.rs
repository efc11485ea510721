//! A chain of stages in this process: what workers do, without the network between them.

use anyhow::{Context as _, Result, bail};
use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{
    CacheOptions, LayerRange, Sampled, Sampling, SequenceId, SequenceSpec, Stage as _, Step, StepInput,
    StepOutput,
};
use mlxnode_engine::{EngineStage, StageOptions};

/// The stages of one model.
pub(crate) struct Pipeline {
    stages: Vec<EngineStage>,
    next: u64,
}

/// A sequence that is open on all stages.
#[derive(Clone, Copy)]
pub(crate) struct Sequence {
    id: SequenceId,
    position: usize,
}

impl Pipeline {
    /// Loads a model cut at these layers.
    pub(crate) fn load(checkpoint: &Checkpoint, cuts: &[usize], cache: CacheOptions) -> Result<Self> {
        let options = StageOptions { cache, ..StageOptions::default() };
        let layers = checkpoint.spec().layer_count();
        let bounds: Vec<usize> = [0].into_iter().chain(cuts.iter().copied()).chain([layers]).collect();
        let mut stages = Vec::new();
        for pair in bounds.windows(2) {
            if pair[0] >= pair[1] {
                bail!("cannot cut {layers} layers at {cuts:?}");
            }
            let range = LayerRange::new(pair[0], pair[1]);
            let stage = EngineStage::load(checkpoint, range, options, &mut |_, _| {});
            stages.push(stage.with_context(|| format!("cannot load layers {range}"))?);
        }
        Ok(Self { stages, next: 0 })
    }

    /// Opens a sequence.
    pub(crate) fn open(&mut self, prompt: usize, max_tokens: usize, sampling: &Sampling) -> Result<Sequence> {
        let id = SequenceId(self.next);
        self.next += 1;
        for stage in &mut self.stages {
            stage.open(id, spec(prompt, max_tokens, sampling.clone()))?;
        }
        Ok(Sequence { id, position: 0 })
    }

    /// Frees it.
    pub(crate) fn close(&mut self, sequence: Sequence) {
        self.stages.iter_mut().for_each(|stage| stage.close(sequence.id));
    }

    /// The token after `tokens`.
    pub(crate) fn sample(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Result<Sampled> {
        match self.step(sequence, tokens, true)? {
            StepOutput::Sampled(sampled) => Ok(sampled),
            other => bail!("the last stage samples nothing, but answers {other:?}"),
        }
    }

    /// Puts `tokens` through, for what comes after.
    pub(crate) fn feed(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Result<()> {
        self.step(sequence, tokens, false).map(drop)
    }

    fn step(&mut self, sequence: &mut Sequence, tokens: &[u32], sample: bool) -> Result<StepOutput> {
        let mut input = StepInput::Tokens;
        let mut output = StepOutput::Nothing;
        for stage in &mut self.stages {
            output = stage.step(sequence.step(tokens, input.clone(), sample))?;
            if let StepOutput::Activation(activation) = &output {
                input = StepInput::Activation(activation.clone());
            }
        }
        sequence.position += tokens.len();
        Ok(output)
    }

    /// The logits of all positions of `tokens`.
    pub(crate) fn logits(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        let (last, before) = self.stages.split_last_mut().context("a pipeline has stages")?;
        let mut input = StepInput::Tokens;
        for stage in before {
            match stage.step(sequence.step(tokens, input, false))? {
                StepOutput::Activation(activation) => input = StepInput::Activation(activation),
                other => bail!("a stage before the last hands on nothing, but answers {other:?}"),
            }
        }
        let logits = last.logits(sequence.step(tokens, input, false))?;
        sequence.position += tokens.len();
        Ok(logits)
    }

    /// The logits of all positions of a prompt, which goes through in pieces of these lengths, or as a whole.
    pub(crate) fn prompt_logits(
        &mut self,
        prompt: &[u32],
        pieces: Option<&[usize]>,
    ) -> Result<Vec<Vec<f32>>> {
        let mut sequence = self.open(prompt.len(), 1, &Sampling::default())?;
        let mut logits = Vec::new();
        let mut left = prompt;
        for length in pieces.unwrap_or(&[prompt.len()]) {
            let (tokens, after) =
                left.split_at_checked(*length).context("the pieces are longer than the prompt")?;
            logits.extend(self.logits(&mut sequence, tokens)?);
            left = after;
        }
        self.close(sequence);
        Ok(logits)
    }

    /// Generates `count` tokens. The prompt goes through in chunks, its last token by itself as in mlx-lm.
    pub(crate) fn generate(
        &mut self,
        prompt: &[u32],
        count: usize,
        sampling: &Sampling,
        chunk: usize,
    ) -> Result<Vec<Sampled>> {
        let mut sequence = self.open(prompt.len(), count, sampling)?;
        let (last, before) = prompt.split_last().context("the prompt is empty")?;
        for tokens in before.chunks(chunk) {
            self.feed(&mut sequence, tokens)?;
        }
        let mut token = *last;
        let mut generated = Vec::new();
        while generated.len() < count {
            let sampled = self.sample(&mut sequence, &[token])?;
            token = sampled.token;
            generated.push(sampled);
        }
        self.close(sequence);
        Ok(generated)
    }
}

impl Sequence {
    fn step(&self, tokens: &[u32], input: StepInput, sample: bool) -> Step {
        Step { sequence: self.id, position: self.position, tokens: tokens.to_vec(), input, sample }
    }
}

/// A sequence that nothing but its length ends.
pub(crate) fn spec(prompt_tokens: usize, max_tokens: usize, sampling: Sampling) -> SequenceSpec {
    SequenceSpec::new(prompt_tokens, max_tokens, sampling)
}
