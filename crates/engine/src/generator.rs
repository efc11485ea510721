//! Generation in this process, one sequence at a time: the loop of mlx-lm's `generate_step`.
//!
//! The prompt goes through in chunks of which only the caches are evaluated; its last token is the first that is sampled after.
//! Then token n + 1 is queued on the device before token n is read, so that the device never waits for the host.

use crate::adapters::UnknownAdapter;
use crate::caches::SequenceCache;
use crate::constrained;
use crate::model::Model;
use crate::prompt_cache::{ForeignCache, PromptCache};
use crate::sequence::{Sequence, fill};
use crate::speculation::{self, Speculation};
use mlxnode_compute::{
    ByteCount, CacheOptions, CacheOptionsError, GrammarError, Grammars, Sampled, SamplingError, SequenceEnd,
    SequenceSpec,
};
use mlxnode_mlx::{Array, Error};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Generated tokens between two clean-ups of the device's cache of free buffers.
const TOKENS_PER_CLEAN_UP: usize = 256;

/// How the loop runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneratorOptions {
    /// Prompt tokens that are processed at once.
    pub prefill_step: usize,
    /// What the caches keep, and how.
    pub cache: CacheOptions,
}

impl Default for GeneratorOptions {
    fn default() -> Self {
        Self { prefill_step: 2048, cache: CacheOptions::default() }
    }
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// Its number, from 0.
    pub index: usize,
    /// Its id and the log-probabilities that were asked for.
    pub sampled: Sampled,
    /// A draft had guessed it.
    pub from_draft: bool,
    /// Set on the last token. A stop token is reported too.
    pub end: Option<SequenceEnd>,
}

/// What happened, and how fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Tokens in the prompt.
    pub prompt_tokens: usize,
    /// Tokens that were generated, a stop token included.
    pub generation_tokens: usize,
    /// Tokens that were drafted.
    pub drafted_tokens: usize,
    /// Generated tokens that a draft had guessed.
    pub accepted_tokens: usize,
    /// From the start to the first token.
    pub prompt_time: Duration,
    /// From the first token to the last.
    pub generation_time: Duration,
    /// Most that arrays held on the device since the process started.
    pub peak_memory: ByteCount,
    /// Why it ended; None when the receiver of the tokens wanted no more.
    pub end: Option<SequenceEnd>,
}

impl Summary {
    /// Prompt tokens per second.
    pub fn prompt_tps(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_time)
    }

    /// Generated tokens per second, after the first as mlx-lm counts them.
    pub fn generation_tps(&self) -> f64 {
        rate(self.generation_tokens, self.generation_time)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
}

/// Why nothing or not everything could be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Nothing to start from.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    /// Nothing to generate.
    #[error("max_tokens is 0: ask for at least one token")]
    NoTokens,
    /// A token id outside the vocabulary.
    #[error(
        "token {token} is outside the vocabulary of {vocabulary}: the tokenizer belongs to another model"
    )]
    Token {
        /// The id.
        token: u32,
        /// Vocabulary size.
        vocabulary: usize,
    },
    /// The model has a table of positions, and it is shorter than what is to go through.
    #[error("the prompt needs {tokens} positions, but the model has {positions}: shorten it")]
    TooLong {
        /// Tokens of the prompt and of what the cache holds before it.
        tokens: usize,
        /// Positions of the model.
        positions: usize,
    },
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The cache options do not fit the model.
    #[error(transparent)]
    Cache(#[from] CacheOptionsError),
    /// It is not loaded.
    #[error(transparent)]
    Adapter(#[from] UnknownAdapter),
    /// The prompt cache is another model's.
    #[error(transparent)]
    ForeignCache(#[from] ForeignCache),
    /// Guesses of a size that is not possible.
    #[error("{name} cannot be {value}; 1 to {most} are possible")]
    Speculation {
        /// What it is about.
        name: &'static str,
        /// What was asked for.
        value: usize,
        /// The largest possible.
        most: usize,
    },
    /// The draft model has other tokens.
    #[error(
        "the draft model has {draft} tokens but the model has {model}; take a draft model with the same tokenizer"
    )]
    DraftVocabulary {
        /// Vocabulary size of the draft model.
        draft: usize,
        /// That of the model.
        model: usize,
    },
    /// Guesses cannot be taken back, because recurrent layers keep states.
    #[error(
        "this model has recurrent layers, whose states cannot be taken back after a wrong guess on the cluster: load it without a draft model and without prompt lookup"
    )]
    KeepsStates,
    /// A token's vectors depend on which tokens go through with it, so that guesses would change answers.
    #[error(
        "the positions of this model are stretched by the length of the text (dynamic NTK), so that guesses would change its answers on the cluster: load it without a draft model and without prompt lookup"
    )]
    DependsOnStep,
    /// The answer's grammar cannot be followed.
    #[error("grammar: {0}")]
    Grammar(#[from] GrammarError),
    /// Nobody can read it.
    #[error("this model has no tokenizer that grammars could be read for")]
    NoGrammars,
    /// Only some of the layers were loaded.
    #[error("generation needs all {layers} layers of the model, but only some are loaded")]
    Partial {
        /// Layers of the model.
        layers: usize,
    },
    /// The logits were not numbers.
    #[error("the model computed logits that are not numbers; its weights may be damaged")]
    NotANumber,
    /// MLX failed.
    #[error(transparent)]
    Device(#[from] Error),
}

/// Generates with a whole model.
pub struct Generator {
    model: Model,
    options: GeneratorOptions,
    speculation: Option<Speculation>,
    grammars: Option<Box<dyn Grammars>>,
}

/// What a run of the loop did.
#[derive(Default)]
pub(crate) struct Progress {
    pub(crate) generated: usize,
    pub(crate) drafted: usize,
    pub(crate) accepted: usize,
    /// When the first token came.
    pub(crate) first: Option<Instant>,
    pub(crate) end: Option<SequenceEnd>,
}

/// Receives generated tokens, and breaks when it wants no more.
pub(crate) type OnToken<'a> = &'a mut dyn FnMut(TokenEvent) -> ControlFlow<()>;

impl Progress {
    /// Reports one more token. True when it was the last.
    pub(crate) fn report(
        &mut self,
        sampled: Sampled,
        from_draft: bool,
        spec: &SequenceSpec,
        on_token: OnToken<'_>,
    ) -> bool {
        self.accepted += usize::from(from_draft);
        self.report_completing(sampled, from_draft, false, spec, on_token)
    }

    /// The same for a token that may complete what a grammar asks for.
    pub(crate) fn report_completing(
        &mut self,
        sampled: Sampled,
        from_draft: bool,
        is_complete: bool,
        spec: &SequenceSpec,
        on_token: OnToken<'_>,
    ) -> bool {
        self.first.get_or_insert_with(Instant::now);
        self.generated += 1;
        if spec.stop_tokens.contains(&sampled.token) {
            self.end = Some(SequenceEnd::Stop);
        } else if is_complete {
            self.end = Some(SequenceEnd::Complete);
        } else if self.generated >= spec.max_tokens {
            self.end = Some(SequenceEnd::Length);
        }
        let event = TokenEvent { index: self.generated - 1, sampled, from_draft, end: self.end };
        on_token(event).is_break() || self.end.is_some()
    }
}

impl Generator {
    /// A generator for a model whose layers are all loaded.
    pub fn new(model: Model, options: GeneratorOptions) -> Result<Self, GenerateError> {
        check_whole(&model)?;
        model.check_cache(&options.cache)?;
        Ok(Self { model, options, speculation: None, grammars: None })
    }

    /// The same with several tokens guessed ahead, which changes the speed and no token.
    pub fn with_speculation(mut self, speculation: Speculation) -> Result<Self, GenerateError> {
        speculation.check(&self.model)?;
        self.speculation = Some(speculation);
        Ok(self)
    }

    /// The same with grammars for the model's tokenizer. Nothing is guessed ahead while one is followed.
    #[must_use]
    pub fn with_grammars(mut self, grammars: Box<dyn Grammars>) -> Self {
        self.grammars = Some(grammars);
        self
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// An empty prompt cache with the generator's options.
    pub fn new_cache(&self) -> Result<PromptCache, GenerateError> {
        Ok(PromptCache::new(&self.model, self.options.cache)?)
    }

    /// Puts a prompt into a cache and generates nothing. `on_progress` gets the tokens done so far and in all. After an error the
    /// cache is empty.
    pub fn fill(
        &mut self,
        cache: &mut PromptCache,
        prompt: &[u32],
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), GenerateError> {
        self.check_tokens(prompt)?;
        cache.check(&self.model)?;
        most_tokens(&self.model, cache.sequence.tokens(), prompt.len())?;
        self.model.adapters.enter_default();
        let empty = self.model.decoder.new_cache(&cache.options());
        let mut sequence = std::mem::replace(&mut cache.sequence, empty);
        // The last token goes by itself, as in mlx-lm, whose files these caches become.
        let (last, before) = prompt.split_last().ok_or(GenerateError::EmptyPrompt)?;
        let mut done = 0;
        on_progress(done, prompt.len());
        for chunk in before.chunks(self.options.prefill_step.max(1)).chain([std::slice::from_ref(last)]) {
            fill(&self.model, &mut sequence, chunk)?;
            done += chunk.len();
            on_progress(done, prompt.len());
        }
        sequence.prepare(&self.model.device)?;
        self.model.device.eval(sequence.state())?;
        cache.sequence = sequence;
        Ok(())
    }

    /// Generates until a stop token, `spec.max_tokens`, or until `on_token` breaks. `spec.prompt_tokens` is the number of ids
    /// of `prompt` that the generated ones are counted from: smaller than its length when generation is resumed.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        spec: &SequenceSpec,
        on_token: &mut dyn FnMut(TokenEvent) -> ControlFlow<()>,
    ) -> Result<Summary, GenerateError> {
        let cache = self.model.new_cache(&self.options.cache)?;
        Ok(self.run(cache, self.options.cache, prompt, spec, on_token)?.0)
    }

    /// The same after what `cache` remembers, which grows by the prompt and the generated tokens but the last, whenever that can be
    /// told ([`PromptCache::tokens`] says). Penalties look at the tokens of this call only. After an error the cache is empty.
    pub fn generate_from(
        &mut self,
        cache: &mut PromptCache,
        prompt: &[u32],
        spec: &SequenceSpec,
        on_token: &mut dyn FnMut(TokenEvent) -> ControlFlow<()>,
    ) -> Result<Summary, GenerateError> {
        cache.check(&self.model)?;
        let empty = self.model.decoder.new_cache(&cache.options());
        let sequence = std::mem::replace(&mut cache.sequence, empty);
        let (summary, sequence) = self.run(sequence, cache.options(), prompt, spec, on_token)?;
        cache.sequence = sequence;
        Ok(summary)
    }

    fn run(
        &mut self,
        cache: SequenceCache,
        options: CacheOptions,
        prompt: &[u32],
        spec: &SequenceSpec,
        on_token: OnToken<'_>,
    ) -> Result<(Summary, SequenceCache), GenerateError> {
        spec.sampling.check(self.model.info().vocabulary)?;
        self.check_tokens(prompt)?;
        let adapter = self.model.adapters.named(spec.adapter.as_deref())?;
        self.model.adapters.active.set_all(adapter);
        let constraint = match (&spec.grammar, &mut self.grammars) {
            (None, _) => None,
            (Some(grammar), Some(grammars)) => Some(grammars.constraint(grammar)?),
            (Some(_), None) => return Err(GenerateError::NoGrammars),
        };
        let start = Instant::now();
        let known = cache.tokens();
        let max_tokens = spec.max_tokens.min(most_tokens(&self.model, known, prompt.len())?);
        let spec = &SequenceSpec { max_tokens, ..spec.clone() };
        let mut sequence = Sequence::new(&self.model, cache, options, spec, prompt.len())?;
        let mut progress = Progress::default();
        if spec.max_tokens == 0 {
            progress.end = Some(SequenceEnd::Length);
        } else if let Some(mut constraint) = constraint {
            let step = self.options.prefill_step.max(1);
            constrained::run(&mut sequence, prompt, step, &mut *constraint, spec, on_token, &mut progress)?;
        } else if let Some(speculation) = &self.speculation {
            let step = self.options.prefill_step.max(1);
            speculation::run(&mut sequence, speculation, prompt, step, spec, on_token, &mut progress)?;
        } else {
            plain(&mut sequence, prompt, self.options.prefill_step.max(1), spec, on_token, &mut progress)?;
        }
        let done = Instant::now();
        let first = progress.first.unwrap_or(done);
        self.model.device.synchronize()?;
        let mut cache = sequence.cache;
        // A token that was queued ahead is taken back where that is possible.
        let sure = prompt.len() + progress.generated.saturating_sub(1);
        let _ = cache.truncate(known.saturating_add(i32::try_from(sure).unwrap_or(i32::MAX)));
        let summary = Summary {
            prompt_tokens: prompt.len(),
            generation_tokens: progress.generated,
            drafted_tokens: progress.drafted,
            accepted_tokens: progress.accepted,
            prompt_time: first - start,
            generation_time: done - first,
            peak_memory: ByteCount(self.model.device.memory()?.peak as u64),
            end: progress.end,
        };
        Ok((summary, cache))
    }

    fn check_tokens(&self, prompt: &[u32]) -> Result<(), GenerateError> {
        check_tokens(&self.model, prompt)
    }
}

/// Are all layers loaded?
pub(crate) fn check_whole(model: &Model) -> Result<(), GenerateError> {
    let info = model.info();
    match info.is_first() && info.is_last() {
        true => Ok(()),
        false => Err(GenerateError::Partial { layers: info.layer_count }),
    }
}

/// How many tokens can come after `known` tokens in the cache and `prompt` more. Only a table of positions limits them; the last
/// token needs none, as nothing comes after it.
pub(crate) fn most_tokens(model: &Model, known: i32, prompt: usize) -> Result<usize, GenerateError> {
    let Some(positions) = model.spec().positions else { return Ok(usize::MAX) };
    let tokens = prompt.saturating_add(known.unsigned_abs() as usize);
    match positions.checked_sub(tokens) {
        Some(left) => Ok(left + 1),
        None => Err(GenerateError::TooLong { tokens, positions }),
    }
}

/// Is there a prompt, and are its tokens the model's?
pub(crate) fn check_tokens(model: &Model, prompt: &[u32]) -> Result<(), GenerateError> {
    let vocabulary = model.info().vocabulary;
    if prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    match prompt.iter().find(|token| **token as usize >= vocabulary) {
        Some(token) => Err(GenerateError::Token { token: *token, vocabulary }),
        None => Ok(()),
    }
}

/// One token after the other, the next always queued before the last is read.
fn plain(
    sequence: &mut Sequence<'_>,
    prompt: &[u32],
    prefill_step: usize,
    spec: &SequenceSpec,
    on_token: OnToken<'_>,
    progress: &mut Progress,
) -> Result<(), GenerateError> {
    let Some((last, before)) = prompt.split_last() else { return Err(GenerateError::EmptyPrompt) };
    for chunk in before.chunks(prefill_step) {
        sequence.prefill(chunk)?;
    }
    let device = &sequence.model.device;
    let mut draw = sequence.step(&Array::from_u32(&[*last], &[1])?)?;
    loop {
        // Queue the next token before waiting for this one.
        let goes_on = progress.generated + 1 < spec.max_tokens;
        let next = if goes_on { Some(sequence.step(&draw.token)?) } else { None };
        let sampled = draw.read(device)?.ok_or(GenerateError::NotANumber)?;
        if progress.report(sampled, false, spec, on_token) {
            return Ok(());
        }
        if progress.generated % TOKENS_PER_CLEAN_UP == 1 {
            device.clear_cache()?;
        }
        match next {
            Some(next) => draw = next,
            None => return Ok(()),
        }
    }
}
