//! Several tokens drawn in one step: those of a batch's rows, or those that verify a draft.

use crate::sampler::{Draw, NO_TOKEN, told};
use mlxnode_compute::Sampled;
use mlxnode_mlx::{Array, Device, Result};

/// Tokens that were chosen on the device: first the greedy ones, drawn in one go, then the others one by one.
#[derive(Default)]
pub(crate) struct Draws {
    /// Tokens `[n]`, and what the host is told `[n]`.
    greedy: Option<(Array, Array)>,
    others: Vec<Draw>,
    /// What the host is told of all, `[n]`, when there are several arrays of it.
    told: Option<Array>,
}

impl Draws {
    /// The likeliest token of each row of logits `[n, vocabulary]`; the arithmetic is that of [`crate::sampler::Sampler::draw`].
    pub(crate) fn greedy(device: &Device, logits: &Array) -> Result<Self> {
        let norms = device.logsumexp(logits, -1, true)?;
        let logprobs = device.subtract(logits, &norms)?;
        let tokens = device.argmax(&logprobs, -1, false)?;
        let finite = device.reshape(&device.is_finite(&norms)?, &[-1])?;
        let told = told(device, &finite, &tokens)?;
        Ok(Self { greedy: Some((tokens, told)), ..Self::default() })
    }

    /// One more, after those that are there.
    pub(crate) fn push(&mut self, draw: Draw) {
        self.others.push(draw);
    }

    /// The tokens `[n]`, which may still be computed. There is at least one.
    pub(crate) fn tokens(&self, device: &Device) -> Result<Array> {
        let greedy = self.greedy.iter().map(|(tokens, _)| tokens);
        let mut all: Vec<&Array> = greedy.chain(self.others.iter().map(|draw| &draw.token)).collect();
        match (all.pop(), all.is_empty()) {
            (Some(only), true) => Ok(only.clone()),
            (last, _) => device.concatenate(all.into_iter().chain(last), 0),
        }
    }

    /// To be called when all are there, before [`Self::read`]: the host then learns all tokens by one read.
    pub(crate) fn close(&mut self, device: &Device) -> Result<()> {
        if self.others.is_empty() {
            return Ok(());
        }
        let greedy = self.greedy.iter().map(|(_, told)| Ok(told.clone()));
        let others = self.others.iter().map(|draw| device.reshape(draw.told(), &[1]));
        let all = greedy.chain(others).collect::<Result<Vec<_>>>()?;
        self.told = Some(device.concatenate(&all, 0)?);
        Ok(())
    }

    /// What must be evaluated before [`Self::read`] returns at once.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        let greedy = self.greedy.iter().flat_map(|(tokens, told)| [tokens, told]);
        greedy.chain(self.others.iter().flat_map(Draw::arrays)).chain(&self.told)
    }

    /// Waits for the tokens. None for one whose logits were not finite numbers.
    pub(crate) fn read(&self, device: &Device) -> Result<Vec<Option<Sampled>>> {
        let told = match (&self.told, &self.greedy) {
            (Some(told), _) | (None, Some((_, told))) => told.to_u32()?,
            (None, None) => Vec::new(),
        };
        let greedy = self.greedy.as_ref().map_or(0, |(tokens, _)| tokens.len());
        let (greedy, others) = told.split_at(greedy.min(told.len()));
        let plain = |token: &u32| {
            (*token != NO_TOKEN).then_some(Sampled { token: *token, logprob: None, top: Vec::new() })
        };
        let mut all: Vec<_> = greedy.iter().map(plain).collect();
        for (draw, token) in self.others.iter().zip(others) {
            all.push(draw.read_told(device, *token)?);
        }
        Ok(all)
    }
}
