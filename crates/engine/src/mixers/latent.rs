//! Multi-head latent attention: the keys and values of all heads come from one narrow vector a token (DeepSeek-V2).
//!
//! Three forms, for each the arithmetic of mlx-lm 0.32.2. *Expanded*: keys and values of all heads are cached, as in other attention.
//! *Absorbed*: the cache holds the latent vectors and the one rotated key that heads share; a single token's queries are brought into
//! the latent space, so that cached vectors serve as keys and values as they are, while a prompt expands them first. *Joined* is the
//! same with a prompt's keys made of both parts instead of adding the scores of the parts.

use super::SoftmaxAttention;
use super::indexer::{Indexer, Selection};
use super::softmax::visible;
use crate::batch::Batch;
use crate::caches::{LayerCache, Seen};
use crate::linear::{Linear, OfHeads, Stacked};
use crate::rope::RotaryEmbedding;
use mlxnode_checkpoint::QueryGrowth;
use mlxnode_mlx::{Array, Device, Dtype, Mask, Result};

/// The latent attention of one layer.
pub(crate) struct LatentAttention {
    /// From hidden vectors: to queries, or to the narrow vectors that become queries; and to latent vectors with the shared keys.
    pub(crate) narrow: Stacked,
    /// Outputs of the first of them.
    pub(crate) query_width: i32,
    /// From narrow vectors to queries.
    pub(crate) widen: Option<(LatentNorm, Linear)>,
    pub(crate) latent_norm: LatentNorm,
    pub(crate) expansion: Expansion,
    /// Through a logistic function, on the result.
    pub(crate) gate: Option<Linear>,
    /// To a number for each head that says how much of its result gets through.
    pub(crate) head_gate: Option<Linear>,
    pub(crate) output: Linear,
    /// None: the parts that should rotate stay as they are.
    pub(crate) rope: Option<RotaryEmbedding>,
    pub(crate) growth: Option<QueryGrowth>,
    pub(crate) query_factor: Option<f32>,
    pub(crate) latent_factor: Option<f32>,
    pub(crate) heads: i32,
    pub(crate) still_dims: i32,
    pub(crate) rotated_dims: i32,
    pub(crate) value_dims: i32,
    pub(crate) latent: i32,
    /// On the scores.
    pub(crate) scale: f32,
    pub(crate) indexer: Option<Indexer>,
}

/// Where keys and values are made.
pub(crate) enum Expansion {
    /// Before the cache.
    Expanded {
        /// From latent vectors to the still parts of keys, and values, of all heads.
        up: Linear,
        core: SoftmaxAttention,
    },
    /// After the cache.
    Absorbed(Absorbed),
}

/// The matrices of each head between latent space and its own.
pub(crate) struct Absorbed {
    /// The still part of a query to latent space; backward, a latent vector to the still part of a key.
    pub(crate) embed_query: OfHeads,
    /// A latent vector to a value.
    pub(crate) unembed: OfHeads,
    /// In a prompt keys are joined from both parts.
    pub(crate) joined: bool,
}

/// An RMS norm with an epsilon of its own.
pub(crate) struct LatentNorm {
    pub(crate) weight: Array,
    pub(crate) eps: f32,
}

impl LatentNorm {
    fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        device.rms_norm(x, &self.weight, self.eps)
    }
}

/// What the tokens of all rows are projected to, `[1, tokens, ..]`; a single token's may have one more axis in front.
struct Projected {
    /// Of all heads.
    queries: Array,
    /// Normed.
    latents: Array,
    /// Shared by the heads, not rotated yet.
    keys: Array,
    /// The narrow vectors that became queries, normed.
    narrow: Option<Array>,
    /// Still parts of keys, and values, of all heads, when they are made before the cache.
    expanded: Option<Array>,
}

/// One sequence's queries, `[1, heads, tokens, ..]`, or a token's of each of several, `[lanes, heads, 1, ..]`.
struct Queries {
    still: Array,
    rotated: Array,
}

/// Where tokens are.
enum Place {
    /// One after the other from this position on.
    From(i32),
    /// One token of each lane, at its own of the positions `[lanes]`.
    Each(Array),
}

impl LatentAttention {
    /// `[1, tokens, hidden]` to the same; this is layer `layer` of the range.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let projected = self.project(device, x, batch.rows.iter().all(|row| row.tokens == 1))?;
        let mixed = match batch.rows.as_mut_slice() {
            [row] if row.cache.lanes() == 1 => {
                let place = Place::From(row.cache.tokens());
                self.mix(device, x, &projected, [1, row.tokens], place, &mut row.cache.layers[layer])?
            }
            rows => {
                let total = x.dim(1);
                let mut mixed = Vec::with_capacity(rows.len());
                let mut start = 0;
                for row in rows {
                    let stop = start + row.span();
                    let (lanes, tokens) = (row.cache.lanes() as i32, row.tokens);
                    let cut = |array: &Array| match (start, stop) == (0, total) {
                        true => Ok(array.clone()),
                        false => device.slice(array, &[0, start, 0], &[1, stop, array.dim(2)]),
                    };
                    let part = Projected {
                        queries: cut(&projected.queries)?,
                        latents: cut(&projected.latents)?,
                        keys: cut(&projected.keys)?,
                        narrow: projected.narrow.as_ref().map(cut).transpose()?,
                        expanded: projected.expanded.as_ref().map(cut).transpose()?,
                    };
                    let place = match (lanes, &batch.positions) {
                        (2.., Some(positions)) if stop - start == positions.dim(0) => {
                            Place::Each(positions.clone())
                        }
                        (2.., Some(positions)) => {
                            Place::Each(device.slice_axis(positions, 0, start, stop, 1)?)
                        }
                        _ => Place::From(row.cache.tokens()),
                    };
                    let own = if self.indexer.is_some() { cut(x)? } else { x.clone() };
                    let cache = &mut row.cache.layers[layer];
                    mixed.push(self.mix(device, &own, &part, [lanes, tokens], place, cache)?);
                    start = stop;
                }
                match mixed.as_slice() {
                    [only] => only.clone(),
                    _ => device.concatenate(&mixed, 1)?,
                }
            }
        };
        let mixed = match &self.gate {
            Some(gate) => device.multiply(&mixed, &device.sigmoid(&gate.forward(device, x)?)?)?,
            None => mixed,
        };
        let mixed = match &self.head_gate {
            Some(gate) => self.gated(device, gate, x, mixed)?,
            None => mixed,
        };
        self.output.forward(device, &mixed)
    }

    /// `mixed` `[1, tokens, heads * value_dims]`, each head times what the gate makes of `x`.
    fn gated(&self, device: &Device, gate: &Linear, x: &Array, mixed: Array) -> Result<Array> {
        let open = device.sigmoid(&device.cast(&gate.forward(device, x)?, Dtype::F32)?)?;
        let open = device.expand(&device.cast(&open, mixed.dtype())?, -1)?;
        let heads = device.reshape(&mixed, &[1, mixed.dim(1), self.heads, self.value_dims])?;
        device.reshape(&device.multiply(&heads, &open)?, mixed.shape())
    }

    /// `singles`: one token of each sequence. Then all is one product; a prompt goes through its parts, which need no cutting.
    fn project(&self, device: &Device, x: &Array, singles: bool) -> Result<Projected> {
        let (queries, latents, keys) = match (&self.narrow.whole, self.narrow.parts.as_slice()) {
            (Some(whole), _) if singles => {
                let cuts = [self.query_width, self.query_width + self.latent];
                let all = whole.forward(device, x)?;
                // For one token [1, 1, width] and [1, 1, 1, width] are the same; keys are needed so.
                let all = if x.dim(1) == 1 { device.expand(&all, 0)? } else { all };
                let [queries, latents, keys] = device.split(&all, &cuts, -1)?;
                (queries, latents, keys)
            }
            (_, [queries, both]) => {
                let [latents, keys] = device.split(&both.forward(device, x)?, &[self.latent], 2)?;
                (queries.forward(device, x)?, latents, keys)
            }
            _ => return Err(mlxnode_mlx::Error::Mlx("latent attention needs two projections".to_owned())),
        };
        let (queries, narrow) = match &self.widen {
            None => (queries, None),
            Some((norm, widen)) => {
                let narrow = norm.forward(device, &queries)?;
                (widen.forward(device, &narrow)?, Some(narrow))
            }
        };
        let latents = self.latent_norm.forward(device, &latents)?;
        let latents = match self.latent_factor {
            Some(factor) => device.multiply(&latents, &Array::scalar(factor, latents.dtype())?)?,
            None => latents,
        };
        let expanded = match &self.expansion {
            Expansion::Expanded { up, .. } => Some(up.forward(device, &latents)?),
            Expansion::Absorbed(_) => None,
        };
        Ok(Projected { queries, latents, keys, narrow, expanded })
    }

    /// Rotated, in a family in which positions enter so.
    fn rotated(&self, device: &Device, x: Array, place: &Place) -> Result<Array> {
        match (&self.rope, place) {
            (Some(rope), Place::From(offset)) => rope.apply(device, &x, *offset),
            (Some(rope), Place::Each(positions)) => rope.apply_by_row(device, &x, positions),
            (None, _) => Ok(x),
        }
    }

    /// Does it work on sequences side by side? Not where the queries' factor depends on the position, nor with an indexer, which
    /// chooses keys for one sequence.
    pub(super) fn joins(&self) -> bool {
        self.growth.is_none()
            && self.indexer.is_none()
            && self.rope.as_ref().is_none_or(RotaryEmbedding::goes_by_row)
    }

    /// What one sequence's tokens see, or one token of each of several lanes: `[1, lanes * tokens, heads * value_dims]`. `x` is their
    /// input, for an indexer.
    fn mix(
        &self,
        device: &Device,
        x: &Array,
        projected: &Projected,
        [lanes, tokens]: [i32; 2],
        place: Place,
        cache: &mut LayerCache,
    ) -> Result<Array> {
        let queries = self.queries(device, &projected.queries, [lanes, tokens], &place)?;
        // One head: the same elements in the same order as [lanes, tokens, 1, dims] turned.
        let one_head = |x: &Array, dims: i32| match x.shape().len() {
            4 => Ok(x.clone()),
            _ => device.reshape(x, &[lanes, 1, tokens, dims]),
        };
        let keys = self.rotated(device, one_head(&projected.keys, self.rotated_dims)?, &place)?;
        let mixed = match (&self.expansion, &projected.expanded) {
            (Expansion::Expanded { core, .. }, Some(expanded)) => {
                let dims = self.still_dims + self.value_dims;
                let expanded = self.by_heads(device, expanded, [lanes, tokens], dims)?;
                let [still, values] = device.split(&expanded, &[self.still_dims], 3)?;
                let keys = device.broadcast(&keys, &[lanes, self.heads, tokens, self.rotated_dims])?;
                let keys = device.concatenate([&still, &keys], 3)?;
                let queries = device.concatenate([&queries.still, &queries.rotated], 3)?;
                core.forward(device, &queries, &keys, &values, &mut cache.kv)?
            }
            (Expansion::Absorbed(absorbed), _) => {
                let latents = one_head(&projected.latents, self.latent)?;
                let held = cache.kv.extend(device, &latents, &keys, None)?;
                let selection = match (&self.indexer, &projected.narrow, &place) {
                    (Some(indexer), Some(narrow), Place::From(offset)) => {
                        indexer.select(device, x, narrow, *offset, &mut cache.indexer)?
                    }
                    _ => Selection::All,
                };
                match tokens {
                    1 => self.see_one(device, absorbed, queries, &held, selection)?,
                    _ => self.see_many(device, absorbed, queries, &held, selection)?,
                }
            }
            _ => return Err(mlxnode_mlx::Error::Mlx("keys and values were not expanded".to_owned())),
        };
        let width = self.heads * self.value_dims;
        if tokens == 1 {
            return device.reshape(&mixed, &[1, lanes, width]);
        }
        device.reshape(&device.transpose(&mixed, &[0, 2, 1, 3])?, &[1, tokens, width])
    }

    /// What a single token sees: queries and results change spaces, the cached vectors do not.
    fn see_one(
        &self,
        device: &Device,
        absorbed: &Absorbed,
        queries: Queries,
        held: &Seen,
        selection: Selection,
    ) -> Result<Array> {
        let (latents, keys) = held.unpacked(device)?;
        let (latents, keys) = match selection {
            Selection::Indices(indices) => {
                let indices = device.reshape(&indices, &[indices.dim(3)])?;
                (device.take(&latents, &indices, 2)?, device.take(&keys, &indices, 2)?)
            }
            Selection::All | Selection::Visible(_) => (latents, keys),
        };
        let scores = self.rotated_scores(device, &queries.rotated, &keys)?;
        let scores = match &held.taken {
            Some(taken) => {
                let never = Array::scalar(scores.dtype().lowest(), scores.dtype())?;
                device.select(taken, &scores, &never)?
            }
            None => scores,
        };
        let query = absorbed.embed_query.forward(device, &queries.still)?;
        let seen = device.attention(&query, &latents, &latents, self.scale, Mask::Array(&scores))?;
        absorbed.unembed.forward(device, &seen)
    }

    /// What the tokens of a prompt see.
    fn see_many(
        &self,
        device: &Device,
        absorbed: &Absorbed,
        queries: Queries,
        held: &Seen,
        selection: Selection,
    ) -> Result<Array> {
        let (latents, keys) = held.unpacked(device)?;
        let tokens = queries.still.dim(2);
        let still = absorbed.embed_query.backward(device, &latents)?;
        let values = absorbed.unembed.forward(device, &latents)?;
        if absorbed.joined {
            let keys = device.broadcast(&keys, &[1, self.heads, keys.dim(2), self.rotated_dims])?;
            let keys = device.concatenate([&still, &keys], 3)?;
            let queries = device.concatenate([&queries.still, &queries.rotated], 3)?;
            let mask = match held.limit.filter(|limit| held.tokens() > *limit) {
                Some(_) => Some(visible(device, tokens, held.before, held.limit)?),
                None => None,
            };
            let mask = mask.as_ref().map_or(Mask::Causal, Mask::Array);
            return device.attention(&queries, &keys, &values, self.scale, mask);
        }
        let scores = self.rotated_scores(device, &queries.rotated, &keys)?;
        let mask = match selection {
            Selection::Visible(mask) => mask,
            Selection::All | Selection::Indices(_) => visible(device, tokens, held.before, held.limit)?,
        };
        let never = Array::scalar(scores.dtype().lowest(), scores.dtype())?;
        let scores = device.select(&mask, &scores, &never)?;
        device.attention(&queries.still, &still, &values, self.scale, Mask::Array(&scores))
    }

    /// Scores of the rotated parts, `[1, heads, tokens, keys]`.
    fn rotated_scores(&self, device: &Device, queries: &Array, keys: &Array) -> Result<Array> {
        let queries = device.multiply(queries, &Array::scalar(self.scale, queries.dtype())?)?;
        device.matmul(&queries, &device.transpose(keys, &[0, 1, 3, 2])?)
    }

    /// Queries `[1, lanes * tokens, heads * dims]`, cut and rotated.
    fn queries(&self, device: &Device, queries: &Array, span: [i32; 2], place: &Place) -> Result<Queries> {
        let dims = self.still_dims + self.rotated_dims;
        let queries = self.by_heads(device, queries, span, dims)?;
        let queries = match self.query_factor {
            Some(factor) => device.multiply(&queries, &Array::scalar(factor, queries.dtype())?)?,
            None => queries,
        };
        let [still, rotated] = device.split(&queries, &[self.still_dims], 3)?;
        let rotated = self.rotated(device, rotated, place)?;
        match (self.growth, place) {
            // Up to there the factor is one.
            (Some(growth), Place::From(offset))
                if f64::from(offset + queries.dim(2) - 1) >= growth.original_max_positions =>
            {
                let factors = growing(device, growth, queries.dim(2), *offset, queries.dtype())?;
                let (still, rotated) =
                    (device.multiply(&still, &factors)?, device.multiply(&rotated, &factors)?);
                Ok(Queries { still, rotated })
            }
            _ => Ok(Queries { still, rotated }),
        }
    }

    /// `[1, lanes * tokens, heads * dims]` to `[lanes, heads, tokens, dims]`; only one lane has several tokens.
    fn by_heads(&self, device: &Device, x: &Array, [lanes, tokens]: [i32; 2], dims: i32) -> Result<Array> {
        if tokens == 1 {
            return device.reshape(x, &[lanes, self.heads, 1, dims]);
        }
        device.transpose(&device.reshape(x, &[1, tokens, self.heads, dims])?, &[0, 2, 1, 3])
    }
}

/// The factors on the queries of `tokens` positions from `offset` on, `[tokens, 1]`.
pub(super) fn growing(
    device: &Device,
    growth: QueryGrowth,
    tokens: i32,
    offset: i32,
    dtype: Dtype,
) -> Result<Array> {
    let number = |value: f64| Array::scalar(value as f32, Dtype::F32);
    let positions = device.arange(f64::from(offset), f64::from(offset + tokens), 1.0, Dtype::F32)?;
    let times = device.floor(&device.divide(&positions, &number(growth.original_max_positions)?)?)?;
    let logarithm = device.log(&device.add(&number(1.0)?, &times)?)?;
    let factors = device.add(&number(1.0)?, &device.multiply(&number(growth.beta)?, &logarithm)?)?;
    device.cast(&device.reshape(&factors, &[tokens, 1])?, dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Row;
    use crate::caches::SequenceCache;
    use crate::linear::Weight;
    use mlxnode_checkpoint::{RopeScaling, RopeSpec};
    use mlxnode_compute::CacheOptions;

    const HIDDEN: i32 = 12;
    const NARROW: i32 = 6;
    const HEADS: i32 = 3;
    const STILL: i32 = 4;
    const ROTATED: i32 = 2;
    const VALUE: i32 = 5;
    const LATENT: i32 = 7;

    /// Numbers that look random, other ones for each seed.
    fn numbers(shape: &[i32], seed: f32) -> Array {
        let count: i32 = shape.iter().product();
        let values: Vec<f32> =
            (0..count).map(|index| (index as f32 * 0.77 + seed * 13.1).sin() * 0.7).collect();
        Array::from_f32(&values, shape).unwrap()
    }

    fn linear(device: &Device, inputs: i32, outputs: i32, seed: f32) -> Linear {
        Linear {
            weight: Weight::dense(device, &numbers(&[outputs, inputs], seed)).unwrap(),
            bias: None,
            changes: crate::adapters::Slot::new(std::rc::Rc::default()),
        }
    }

    fn of_heads(device: &Device, inputs: i32, outputs: i32, seed: f32) -> OfHeads {
        let stored = numbers(&[HEADS, outputs, inputs], seed);
        let turned = device.transpose(&stored, &[0, 2, 1]).unwrap();
        OfHeads::Dense { stored, turned }
    }

    fn rope(device: &Device) -> RotaryEmbedding {
        let spec = RopeSpec {
            dims: ROTATED as usize,
            base: 100.0,
            traditional: true,
            scaling: RopeScaling::Default,
        };
        RotaryEmbedding::new(device, &spec).unwrap()
    }

    fn norm(width: i32) -> LatentNorm {
        LatentNorm { weight: numbers(&[width], 9.0), eps: 1e-6 }
    }

    fn attention(device: &Device, absorbed: bool, sparse: bool) -> LatentAttention {
        let expansion = match absorbed {
            true => Expansion::Absorbed(Absorbed {
                embed_query: of_heads(device, STILL, LATENT, 4.0),
                unembed: of_heads(device, LATENT, VALUE, 5.0),
                joined: false,
            }),
            false => Expansion::Expanded {
                up: linear(device, LATENT, HEADS * (STILL + VALUE), 4.0),
                core: SoftmaxAttention::plain(0.4),
            },
        };
        let indexer = sparse.then(|| Indexer {
            queries: linear(device, NARROW, 2 * 4, 6.0),
            keys: linear(device, HIDDEN, 4, 7.0),
            key_norm: [numbers(&[4], 1.0), numbers(&[4], 2.0)],
            eps: 1e-5,
            weights: linear(device, HIDDEN, 2, 8.0),
            rope: rope(device),
            heads: 2,
            head_dim: 4,
            seen: 3,
        });
        let parts = vec![linear(device, HIDDEN, NARROW, 1.0), linear(device, HIDDEN, LATENT + ROTATED, 2.0)];
        let widen = linear(device, NARROW, HEADS * (STILL + ROTATED), 3.0);
        LatentAttention {
            narrow: Stacked { whole: None, parts },
            query_width: NARROW,
            widen: Some((norm(NARROW), widen)),
            latent_norm: norm(LATENT),
            expansion,
            head_gate: None,
            output: linear(device, HEADS * VALUE, HIDDEN, 10.0),
            rope: Some(rope(device)),
            growth: None,
            query_factor: None,
            latent_factor: None,
            heads: HEADS,
            still_dims: STILL,
            rotated_dims: ROTATED,
            value_dims: VALUE,
            latent: LATENT,
            scale: 0.4,
            gate: None,
            indexer,
        }
    }

    /// Each row alone and all at once, in steps of these numbers of tokens for each of three rows.
    #[test]
    fn rows_do_not_see_each_other() {
        let device = Device::open().unwrap();
        let steps = [[5, 1, 2], [1, 6, 1], [3, 1, 4], [1, 1, 1]];
        for (absorbed, sparse) in [(false, false), (true, false), (true, true)] {
            let attention = attention(&device, absorbed, sparse);
            let caches = || -> Vec<SequenceCache> {
                (0..3).map(|_| SequenceCache::new(1, &CacheOptions::default())).collect()
            };
            let (mut alone, mut together) = (caches(), caches());
            for (step, rows) in steps.iter().enumerate() {
                let inputs: Vec<Array> = (0..3)
                    .map(|row| numbers(&[1, rows[row], HIDDEN], (step * 3 + row) as f32 + 20.0))
                    .collect();
                let mut expected = Vec::new();
                for (input, cache) in inputs.iter().zip(&mut alone) {
                    let mut batch = Batch::single(cache, input.dim(1));
                    let seen = attention.forward(&device, input, 0, &mut batch).unwrap();
                    cache.advance(input.dim(1));
                    expected.extend(device.contiguous(&seen).unwrap().to_f32().unwrap());
                }
                let all = device.concatenate(&inputs, 1).unwrap();
                let rows =
                    together.iter_mut().zip(rows).map(|(cache, tokens)| Row { tokens: *tokens, cache });
                let mut batch = Batch::of(rows.collect()).unwrap();
                let seen = attention.forward(&device, &all, 0, &mut batch).unwrap();
                for row in batch.rows {
                    row.cache.advance(row.tokens);
                }
                let seen = device.contiguous(&seen).unwrap().to_f32().unwrap();
                for (index, (seen, expected)) in seen.iter().zip(&expected).enumerate() {
                    assert!(
                        (seen - expected).abs() < 1e-5,
                        "absorbed {absorbed}, sparse {sparse}, step {step}, element {index}: {seen} and {expected}"
                    );
                }
                assert_eq!(seen.len(), expected.len());
            }
        }
    }
}
