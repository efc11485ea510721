//! The softmax attention itself: which keys a query sees, and what it makes of them.

use crate::caches::{Chunk, KvCache, Seen, Stored};
use mlxnode_mlx::{Array, Device, Dtype, Mask, Quantized, Result};

/// Softmax over the scores of queries and keys, with the keys and values that a cache holds.
pub(crate) struct SoftmaxAttention {
    /// Factor on the scores.
    pub(crate) scale: f32,
    /// Key j is visible to query i only when `i - window < j`.
    pub(crate) window: Option<i32>,
    /// Several queries at once see this many keys more than the window says, as far as they are kept.
    pub(crate) wider: i32,
    /// The scores become `cap * tanh(score / cap)`.
    pub(crate) score_cap: Option<f32>,
    /// Computed in single precision whatever the keys' element type.
    pub(crate) single_precision: bool,
    /// Key j is visible to query i only when both are in the same chunk of this many tokens.
    pub(crate) chunk: Option<i32>,
    /// `[heads]`: scores of a key without a value. Not with a cap on scores.
    pub(crate) sinks: Option<Array>,
    /// Later layers see the same keys and values again.
    pub(crate) shown: bool,
}

impl SoftmaxAttention {
    /// Over all keys up to the query's own.
    pub(crate) fn plain(scale: f32) -> Self {
        Self {
            scale,
            window: None,
            wider: 0,
            score_cap: None,
            single_precision: false,
            chunk: None,
            sinks: None,
            shown: false,
        }
    }

    /// Queries `[1, heads, tokens, head_dim]` of the tokens after those in the cache, whose keys and values
    /// `[1, kv_heads, tokens, width]` it takes up, to what they see, `[1, heads, tokens, width of the values]`. With sequences side by
    /// side a token of each, `[lanes, .., 1, ..]`.
    pub(crate) fn forward(
        &self,
        device: &Device,
        queries: &Array,
        keys: &Array,
        values: &Array,
        cache: &mut KvCache,
    ) -> Result<Array> {
        let seen = match self.chunk {
            Some(size) => cache.extend_chunked(device, keys, values, size)?,
            None => cache.extend(device, keys, values, self.window)?,
        };
        if self.shown {
            cache.show(&seen);
        }
        self.attend(device, queries, &seen)
    }

    /// The same for a layer without keys and values of its own: `cache` is that of the layer whose it sees, which has taken up
    /// the same tokens in this step.
    pub(crate) fn again(&self, device: &Device, queries: &Array, cache: &KvCache) -> Result<Array> {
        let Some(seen) = cache.shown() else {
            let missing = "a layer sees keys of another one that did not run in this step";
            return Err(mlxnode_mlx::Error::Mlx(missing.to_owned()));
        };
        self.attend(device, queries, seen)
    }

    /// Queries `[1, heads, tokens, head_dim]` of the tokens whose keys and values were appended last.
    pub(crate) fn attend(&self, device: &Device, queries: &Array, seen: &Seen) -> Result<Array> {
        let tokens = queries.dim(2);
        let mask = self.mask(device, tokens, seen)?;
        let is_plain = self.score_cap.is_none() && !self.single_precision && self.sinks.is_none();
        let (keys, values) = match seen.stored() {
            Stored::Packed(keys, values) if is_plain => {
                let mask = match mask {
                    None if tokens > 1 => Some(window_mask(device, tokens, seen.before, EVERYTHING)?),
                    mask => mask,
                };
                return self.mix_packed(device, queries, &keys, &values, mask.as_ref());
            }
            // mlx-lm has no arithmetic of its own for these on packed keys; they get the numbers back.
            _ => seen.unpacked(device)?,
        };
        let mask = match &mask {
            Some(mask) => Mask::Array(mask),
            None if tokens == 1 => Mask::Full,
            None => Mask::Causal,
        };
        self.mix(device, queries, &keys, &values, mask)
    }

    /// What each of several queries sees, where that is not simply everything up to itself; one query sees all that is left, and
    /// of sequences side by side all but the padding.
    fn mask(&self, device: &Device, tokens: i32, seen: &Seen) -> Result<Option<Array>> {
        if tokens == 1 {
            return Ok(seen.taken.clone());
        }
        let limit = seen.limit.map(|limit| limit.saturating_add(self.wider));
        let limit = limit.filter(|limit| seen.tokens() > *limit);
        let chunk = seen.chunk.filter(|Chunk { size, offset }| {
            offset / size != (offset + tokens - 1) / size || seen.before > offset % size
        });
        let limited = match limit {
            Some(limit) => Some(window_mask(device, tokens, seen.before, limit)?),
            None if self.score_cap.is_some() => Some(window_mask(device, tokens, seen.before, EVERYTHING)?),
            None => None,
        };
        let Some(chunk) = chunk else { return Ok(limited) };
        let chunked = chunk_mask(device, tokens, seen.before, chunk)?;
        match limited {
            Some(limited) => device.logical_and(&limited, &chunked).map(Some),
            None => Ok(Some(chunked)),
        }
    }

    /// On packed keys and values, by mlx-lm's arithmetic: products with the packed matrices, softmax in single precision.
    fn mix_packed(
        &self,
        device: &Device,
        queries: &Array,
        keys: &Quantized,
        values: &Quantized,
        mask: Option<&Array>,
    ) -> Result<Array> {
        let (heads, tokens, width) = (queries.dim(1), queries.dim(2), queries.dim(3));
        let groups = keys.weight.dim(1);
        let mut queries = device.multiply(queries, &Array::scalar(self.scale, queries.dtype())?)?;
        let (mut keys, mut values) = (keys.clone(), values.clone());
        if heads > groups {
            queries = device.reshape(&queries, &[1, groups, heads / groups, tokens, width])?;
            let spread = |array: &Array| device.reshape(array, &[1, groups, 1, array.dim(2), array.dim(3)]);
            for matrix in [&mut keys, &mut values] {
                matrix.weight = spread(&matrix.weight)?;
                matrix.scales = spread(&matrix.scales)?;
                matrix.biases = matrix.biases.as_ref().map(spread).transpose()?;
            }
        }
        let scores = device.quantized_product(&queries, &keys, true)?;
        let scores = match mask {
            Some(mask) => device.select(mask, &scores, &Array::scalar(f32::NEG_INFINITY, scores.dtype())?)?,
            None => scores,
        };
        let mixed = device.quantized_product(&device.softmax(&scores, -1, true)?, &values, false)?;
        match heads > groups {
            true => device.reshape(&mixed, &[1, heads, tokens, mixed.dim(-1)]),
            false => Ok(mixed),
        }
    }

    /// The attention itself.
    #[inline]
    fn mix(
        &self,
        device: &Device,
        queries: &Array,
        keys: &Array,
        values: &Array,
        mask: Mask<'_>,
    ) -> Result<Array> {
        if let Some(cap) = self.score_cap {
            return self.mix_capped(device, queries, keys, values, mask, cap);
        }
        if !self.single_precision {
            let sinks = self.sinks.as_ref();
            return device.attention_with_sinks(queries, keys, values, self.scale, mask, sinks);
        }
        let (queries, keys) = (device.cast(queries, Dtype::F32)?, device.cast(keys, Dtype::F32)?);
        let sinks = self.sinks.as_ref();
        let mixed = device.attention_with_sinks(&queries, &keys, values, self.scale, mask, sinks)?;
        device.cast(&mixed, values.dtype())
    }

    /// Written out, as no fused operation caps scores. `mask` is an array or there is none.
    fn mix_capped(
        &self,
        device: &Device,
        queries: &Array,
        keys: &Array,
        values: &Array,
        mask: Mask<'_>,
        cap: f32,
    ) -> Result<Array> {
        let number = |value: f32| Array::scalar(value, queries.dtype());
        let (lanes, heads, tokens, width) = (queries.dim(0), queries.dim(1), queries.dim(2), queries.dim(3));
        let (groups, total) = (keys.dim(1), keys.dim(2));
        let queries = device.multiply(queries, &number(self.scale)?)?;
        let queries = device.reshape(&queries, &[lanes, groups, heads / groups, tokens, width])?;
        let grouped = |array: &Array| device.reshape(array, &[lanes, groups, 1, total, array.dim(3)]);
        let keys = device.transpose(&grouped(keys)?, &[0, 1, 2, 4, 3])?;
        let scores = device.divide(&device.matmul(&queries, &keys)?, &number(cap)?)?;
        let scores = device.multiply(&device.tanh(&scores)?, &number(cap)?)?;
        let scores = match mask {
            Mask::Array(mask) => {
                // Of lanes: over groups of heads and heads of a group.
                let mask = if mask.shape().len() == 4 { device.expand(mask, 2)? } else { mask.clone() };
                device.select(&mask, &scores, &number(f32::NEG_INFINITY)?)?
            }
            Mask::Full | Mask::Causal => scores,
        };
        let mixed = device.matmul(&device.softmax(&scores, -1, true)?, &grouped(values)?)?;
        device.reshape(&mixed, &[lanes, heads, tokens, values.dim(3)])
    }
}

/// `[tokens, before + tokens]`: is the key, after `before` others, at the query's position or before, and within the limit?
pub(super) fn visible(device: &Device, tokens: i32, before: i32, limit: Option<i32>) -> Result<Array> {
    if let Some(limit) = limit.filter(|limit| before + tokens > *limit) {
        return window_mask(device, tokens, before, limit);
    }
    let total = f64::from(before + tokens);
    let queries = device.arange(f64::from(before), total, 1.0, Dtype::I32)?;
    let keys = device.reshape(&device.arange(0.0, total, 1.0, Dtype::I32)?, &[1, before + tokens])?;
    device.greater_equal(&device.reshape(&queries, &[tokens, 1])?, &keys)
}

/// A window that no sequence reaches.
const EVERYTHING: i32 = i32::MAX / 2;

/// `[tokens, offset + tokens]`: is the key visible to the query? The first query is key `offset`.
fn window_mask(device: &Device, tokens: i32, offset: i32, window: i32) -> Result<Array> {
    let total = f64::from(offset + tokens);
    let queries = device.arange(f64::from(offset), total, 1.0, Dtype::I32)?;
    let queries = device.reshape(&queries, &[tokens, 1])?;
    let keys = device.reshape(&device.arange(0.0, total, 1.0, Dtype::I32)?, &[1, offset + tokens])?;
    let past = device.greater_equal(&queries, &keys)?;
    let reach = device.add(&keys, &Array::scalar(window as f32, Dtype::I32)?)?;
    device.logical_and(&past, &device.less(&queries, &reach)?)
}

/// `[tokens, before + tokens]`: is the key visible to the query, the first of which has `before` keys before its own?
fn chunk_mask(device: &Device, tokens: i32, before: i32, chunk: Chunk) -> Result<Array> {
    let Chunk { size, offset } = chunk;
    let end = f64::from(offset + tokens);
    let queries = device.arange(f64::from(offset), end, 1.0, Dtype::I32)?;
    let queries = device.reshape(&queries, &[tokens, 1])?;
    let keys = device.arange(f64::from(offset - before), end, 1.0, Dtype::I32)?;
    let keys = device.reshape(&keys, &[1, before + tokens])?;
    // A key of the query's chunk is at or after that chunk's first position.
    let size = Array::scalar(size as f32, Dtype::I32)?;
    let first = device.multiply(&device.floor_divide(&queries, &size)?, &size)?;
    let past = device.greater_equal(&queries, &keys)?;
    device.logical_and(&past, &device.greater_equal(&keys, &first)?)
}
