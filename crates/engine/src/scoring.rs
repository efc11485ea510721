//! How likely a model finds a text: the log-probability of each token after the ones before it, for perplexity and evaluation.

use crate::batch::{Batch, Row};
use crate::generator::{GenerateError, check_tokens, check_whole};
use crate::model::Model;
use mlxnode_compute::CacheOptions;
use mlxnode_mlx::{Array, Dtype, Error};

/// Tokens of all rows that go through the layers at once. Eight rows of the usual 512 tokens go in one piece, as in mlx-lm.
const TOKENS_AT_ONCE: usize = 4096;
/// Logits that are held at once, in single precision: 256 MiB. All of eight rows of 512 tokens would be 2.5 GB for a vocabulary
/// of 150,000.
const LOGITS_AT_ONCE: usize = 64 << 20;

impl Model {
    /// The natural logarithm of each token's probability after the tokens before it, computed in single precision. A row has one
    /// number less than tokens: the first token comes after nothing. Rows may differ in length; one that has a single token has
    /// no numbers. The rows go through together, so that weights are read once for all; memory grows with their caches only.
    ///
    /// # Errors
    /// An empty row, a token outside the vocabulary, a model of which only some layers are loaded, and whatever MLX fails at.
    pub fn token_logprobs(&self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, GenerateError> {
        check_whole(self)?;
        self.adapters.enter_default();
        rows.iter().try_for_each(|row| check_tokens(self, row))?;
        let mut logprobs: Vec<Vec<f32>> = rows.iter().map(|row| Vec::with_capacity(row.len() - 1)).collect();
        let mut caches: Vec<_> =
            rows.iter().map(|_| self.decoder.new_cache(&CacheOptions::default())).collect();
        let longest = rows.iter().map(|row| row.len() - 1).max().unwrap_or(0);
        let step = (TOKENS_AT_ONCE / rows.len().max(1)).max(1);
        for start in (0..longest).step_by(step) {
            // The rows that still have tokens here, and how many.
            let inputs = |row: &[u32]| (row.len() - 1).saturating_sub(start).min(step);
            let (mut ids, mut targets, mut parts) = (Vec::new(), Vec::new(), Vec::new());
            for ((place, row), cache) in rows.iter().enumerate().zip(&mut caches) {
                let count = inputs(row);
                if count > 0 {
                    ids.extend_from_slice(&row[start..start + count]);
                    targets.extend_from_slice(&row[start + 1..=start + count]);
                    parts.push((place, Row { tokens: count as i32, cache }));
                }
            }
            let places: Vec<(usize, usize)> =
                parts.iter().map(|(place, row)| (*place, row.tokens as usize)).collect();
            let mut scored =
                score(self, &ids, &targets, parts.into_iter().map(|part| part.1).collect())?.into_iter();
            for (place, count) in places {
                logprobs[place].extend(scored.by_ref().take(count));
            }
            self.device.clear_cache()?;
        }
        match logprobs.iter().flatten().all(|logprob| logprob.is_finite()) {
            true => Ok(logprobs),
            false => Err(GenerateError::NotANumber),
        }
    }
}

/// The log-probability of each of `targets` after the token of the same number in `ids`, which belong to `rows` one after the other.
fn score(model: &Model, ids: &[u32], targets: &[u32], rows: Vec<Row<'_>>) -> Result<Vec<f32>, Error> {
    let (device, decoder) = (&model.device, &model.decoder);
    let ids = Array::from_u32(ids, &[1, ids.len() as i32])?;
    let mut batch = Batch::of(rows)?;
    let hidden = decoder.embed(device, &ids, &mut batch)?;
    let hidden = decoder.forward(device, hidden, &mut batch)?;
    // What the tokens after these need too is computed once.
    device.eval([&hidden].into_iter().chain(batch.rows.iter().flat_map(|row| row.cache.state())))?;
    let at_once = (LOGITS_AT_ONCE / model.info().vocabulary.max(1)).max(1);
    let mut scored = Vec::with_capacity(targets.len());
    for targets in targets.chunks(at_once) {
        let (start, end) = (scored.len() as i32, (scored.len() + targets.len()) as i32);
        let part = device.slice(&hidden, &[0, start, 0], &[1, end, hidden.dim(2)])?;
        // [tokens, vocabulary]
        let logits = device.cast(&decoder.logits(device, &part)?, Dtype::F32)?;
        let chosen = device.take_along(&logits, &Array::from_u32(targets, &[end - start, 1])?, -1)?;
        scored.extend(device.subtract(&chosen, &device.logsumexp(&logits, -1, true)?)?.to_f32()?);
    }
    Ok(scored)
}
