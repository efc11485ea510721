//! One sequence on its way through a whole model: prompt chunks, then a token at a time.

use crate::batch::Batch;
use crate::caches::SequenceCache;
use crate::model::Model;
use crate::penalties::History;
use crate::sampler::{Draw, Sampler};
use mlxnode_compute::{CacheOptions, SequenceSpec};
use mlxnode_mlx::{Array, Error};

/// A sequence that is being generated.
pub(crate) struct Sequence<'a> {
    pub(crate) model: &'a Model,
    pub(crate) cache: SequenceCache,
    /// What the cache keeps.
    pub(crate) options: CacheOptions,
    pub(crate) sampler: Sampler,
    pub(crate) history: History,
    /// Number of the token that is drawn next.
    pub(crate) index: u64,
}

impl<'a> Sequence<'a> {
    /// `prompt` is the number of tokens that come now; those that `cache` holds do not count.
    pub(crate) fn new(
        model: &'a Model,
        cache: SequenceCache,
        options: CacheOptions,
        spec: &SequenceSpec,
        prompt: usize,
    ) -> Result<Self, Error> {
        let sampler = Sampler::new(spec.sampling.clone(), model.info().vocabulary)?;
        let history = History::new(sampler.penalties());
        let index = prompt.saturating_sub(spec.prompt_tokens) as u64;
        Ok(Self { model, cache, options, sampler, history, index })
    }

    /// A chunk of the prompt: fills the caches.
    pub(crate) fn prefill(&mut self, tokens: &[u32]) -> Result<(), Error> {
        fill(self.model, &mut self.cache, tokens)?;
        self.history.extend(&self.model.device, tokens)
    }

    /// One token `[1]`, which may still be computed; queues the draw of the next and returns without waiting.
    pub(crate) fn step(&mut self, token: &Array) -> Result<Draw, Error> {
        self.step_among(token, None)
    }

    /// The same with a draw among the tokens that `allowed` `[1, vocabulary]` says are possible; None for all.
    pub(crate) fn step_among(&mut self, token: &Array, allowed: Option<&Array>) -> Result<Draw, Error> {
        let device = &self.model.device;
        let hidden = forward(self.model, &mut self.cache, &device.reshape(token, &[1, 1])?)?;
        let logits = self.model.decoder.logits(device, &hidden)?;
        self.history.push(device, token)?;
        let draw = self.sampler.draw_among(device, logits, self.history.tokens(), self.index, allowed)?;
        self.index += 1;
        device.async_eval(draw.arrays())?;
        Ok(draw)
    }
}

/// Tokens whose results nobody needs: fills the caches, and waits.
pub(crate) fn fill(model: &Model, cache: &mut SequenceCache, tokens: &[u32]) -> Result<(), Error> {
    let device = &model.device;
    forward(model, cache, &Array::from_u32(tokens, &[1, tokens.len() as i32])?)?;
    device.eval(cache.state())?;
    device.clear_cache()
}

/// Ids `[1, tokens]` through all layers, to `[1, tokens, hidden]`.
pub(crate) fn forward(model: &Model, cache: &mut SequenceCache, ids: &Array) -> Result<Array, Error> {
    let (device, decoder) = (&model.device, &model.decoder);
    let mut batch = Batch::single(cache, ids.dim(1));
    let hidden = decoder.embed(device, ids, &mut batch)?;
    decoder.forward(device, hidden, &mut batch)
}
