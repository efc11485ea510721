//! What chooses the blocks of keys that queries see: see [`mlxnode_checkpoint::BlockIndexerSpec`].

use super::softmax::visible;
use crate::caches::KvCache;
use crate::linear::Linear;
use crate::norm::Norm;
use crate::rope::RotaryEmbedding;
use mlxnode_mlx::{Array, Device, Dtype, Result};

/// The indexer of one layer.
pub(crate) struct BlockIndexer {
    pub(crate) queries: Linear,
    pub(crate) keys: Linear,
    pub(crate) query_norm: Norm,
    pub(crate) key_norm: Norm,
    pub(crate) rope: RotaryEmbedding,
    pub(crate) heads: i32,
    pub(crate) head_dim: i32,
    /// Keys in a block.
    pub(crate) block: i32,
    /// How many blocks a query sees.
    pub(crate) blocks: i32,
    /// How many blocks up to its own a query sees whatever their scores.
    pub(crate) local: i32,
    /// Query heads of the attention.
    pub(crate) attention_heads: i32,
}

impl BlockIndexer {
    /// Takes up the keys of `x` `[1, tokens, hidden]`, the first at position `offset`. Says which keys its queries see,
    /// `[1, attention heads, tokens, keys]`; None: all up to their own position.
    pub(crate) fn select(
        &self,
        device: &Device,
        x: &Array,
        offset: i32,
        cache: &mut KvCache,
    ) -> Result<Option<Array>> {
        let tokens = x.dim(1);
        let keys = device.reshape(&self.keys.forward(device, x)?, &[1, 1, tokens, self.head_dim])?;
        let keys = self.rope.apply(device, &self.key_norm.forward(device, &keys)?, offset)?;
        // A cache holds pairs; there are no values here, so the second of the pair is as narrow as can be.
        let no_values = device.zeros(&[1, 1, tokens, 1], keys.dtype())?;
        let (keys, _) = cache.extend(device, &keys, &no_values, None)?.unpacked(device)?;
        let total = keys.dim(2);
        if self.blocks >= total.div_euclid(self.block) + i32::from(total % self.block > 0) {
            return Ok(None);
        }
        let queries =
            device.reshape(&self.queries.forward(device, x)?, &[1, tokens, self.heads, self.head_dim])?;
        let queries = device.transpose(&self.query_norm.forward(device, &queries)?, &[0, 2, 1, 3])?;
        let queries = self.rope.apply(device, &queries, offset)?;
        let single = |x: &Array| device.cast(x, Dtype::F32);
        let scores = device.matmul(&single(&queries)?, &device.transpose(&single(&keys)?, &[0, 1, 3, 2])?)?;
        // A key that is not there yet must not win a block.
        let past = visible(device, tokens, total - tokens, None)?;
        let scores = device.select(&past, &scores, &Array::scalar(f32::NEG_INFINITY, Dtype::F32)?)?;
        let of_blocks =
            self.with_last_blocks(device, self.best_of_blocks(device, &scores)?, total - tokens)?;
        let order = device.argpartition(&device.negative(&of_blocks)?, self.blocks - 1, -1)?;
        let chosen = device.slice(&order, &[0; 4], &[1, self.heads, tokens, self.blocks])?;
        let none = device.zeros(of_blocks.shape(), Dtype::Bool)?;
        let kept = device.put_along(&none, &chosen, &Array::scalar(1.0, Dtype::Bool)?, -1)?;
        let kept = device.repeat(&kept, self.block, 3)?;
        let kept = device.slice(&kept, &[0; 4], &[1, self.heads, tokens, total])?;
        let kept = device.logical_and(&kept, &past)?;
        device.repeat(&kept, self.attention_heads / self.heads, 1).map(Some)
    }

    /// The largest of each block of scores `[1, heads, tokens, keys]`, the last of which may be short.
    fn best_of_blocks(&self, device: &Device, scores: &Array) -> Result<Array> {
        let (tokens, total) = (scores.dim(2), scores.dim(3));
        let full = total / self.block;
        let split = full * self.block;
        let whole = match split == total {
            true => scores.clone(),
            false => device.slice(scores, &[0; 4], &[1, self.heads, tokens, split])?,
        };
        let whole = device.reshape(&whole, &[1, self.heads, tokens, full, self.block])?;
        let best = device.max(&whole, -1, false)?;
        if split == total {
            return Ok(best);
        }
        let rest = device.slice(scores, &[0, 0, 0, split], &[1, self.heads, tokens, total])?;
        device.concatenate([&best, &device.max(&rest, -1, true)?], -1)
    }

    /// The blocks' scores with infinity for the last ones up to each query's own; `before` keys come before the first query's.
    fn with_last_blocks(&self, device: &Device, scores: Array, before: i32) -> Result<Array> {
        if self.local == 0 {
            return Ok(scores);
        }
        let (tokens, blocks) = (scores.dim(2), scores.dim(3));
        let number = |value: i32| Array::scalar(value as f32, Dtype::I32);
        let positions = device.arange(f64::from(before), f64::from(before + tokens), 1.0, Dtype::I32)?;
        let own = device.floor_divide(&device.reshape(&positions, &[tokens, 1])?, &number(self.block)?)?;
        let ids = device.reshape(&device.arange(0.0, f64::from(blocks), 1.0, Dtype::I32)?, &[1, blocks])?;
        let up_to_own = device.greater_equal(&own, &ids)?;
        let near = device.greater(&ids, &device.subtract(&own, &number(self.local)?)?)?;
        let last = device.logical_and(&up_to_own, &near)?;
        device.select(&last, &Array::scalar(f32::INFINITY, Dtype::F32)?, &scores)
    }
}
