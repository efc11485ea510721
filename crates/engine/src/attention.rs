//! Softmax attention with grouped keys and values, optional norms on queries and keys, rotation and window.

use crate::kv_cache::KvCache;
use crate::linear::{Linear, Stacked};
use crate::rope::RotaryEmbedding;
use mlxnode_mlx::{Array, Device, Dtype, Mask, Result};

/// The attention of one layer.
pub(crate) struct Attention {
    /// q, k and v, in this order.
    pub(crate) projections: Stacked,
    pub(crate) output: Linear,
    pub(crate) query_norm: Option<Array>,
    pub(crate) key_norm: Option<Array>,
    pub(crate) norm_eps: f32,
    pub(crate) rope: Option<RotaryEmbedding>,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) scale: f32,
    /// Key j is visible to query i only when `i - window < j`.
    pub(crate) window: Option<i32>,
}

impl Attention {
    /// `[1, tokens, hidden]` to the same. The tokens follow those in the cache.
    pub(crate) fn forward(&self, device: &Device, x: &Array, cache: &mut KvCache) -> Result<Array> {
        let (tokens, offset) = (x.dim(1), cache.tokens());
        let (queries, keys, values) = match &self.projections.whole {
            Some(whole) if tokens == 1 => self.project_one(device, whole, x, offset)?,
            _ => self.project_many(device, x, tokens, offset)?,
        };
        let (keys, values) = cache.update(device, &keys, &values)?;
        let mixed = self.attend(device, &queries, &keys, &values, tokens, offset)?;
        let mixed = device.transpose(&mixed, &[0, 2, 1, 3])?;
        let mixed = device.reshape(&mixed, &[1, tokens, self.heads * self.head_dim])?;
        self.output.forward(device, &mixed)
    }

    /// One product for a single token: `[1, 1, (heads + 2 kv_heads) * head_dim]`, cut by heads.
    fn project_one(
        &self,
        device: &Device,
        whole: &Linear,
        x: &Array,
        offset: i32,
    ) -> Result<(Array, Array, Array)> {
        let (rotating, all) = (self.heads + self.kv_heads, self.heads + 2 * self.kv_heads);
        let projected = whole.forward(device, x)?;
        // For one token [1, 1, heads, width] and [1, heads, 1, width] are the same elements in the same order.
        let projected = device.reshape(&projected, &[1, all, 1, self.head_dim])?;
        let cut = |array: &Array, from: i32, to: i32| {
            device.slice(array, &[0, from, 0, 0], &[1, to, 1, self.head_dim])
        };
        let values = cut(&projected, rotating, all)?;
        if self.query_norm.is_none() && self.key_norm.is_none() {
            let both = self.rotated(device, cut(&projected, 0, rotating)?, offset)?;
            return Ok((cut(&both, 0, self.heads)?, cut(&both, self.heads, rotating)?, values));
        }
        let queries = self.normed(device, cut(&projected, 0, self.heads)?, self.query_norm.as_ref())?;
        let keys = self.normed(device, cut(&projected, self.heads, rotating)?, self.key_norm.as_ref())?;
        Ok((self.rotated(device, queries, offset)?, self.rotated(device, keys, offset)?, values))
    }

    fn project_many(
        &self,
        device: &Device,
        x: &Array,
        tokens: i32,
        offset: i32,
    ) -> Result<(Array, Array, Array)> {
        let [query, key, value] = self.projections.parts.as_slice() else {
            return Err(mlxnode_mlx::Error::Mlx("attention needs three projections".to_owned()));
        };
        let split = |projection: &Linear, heads: i32, norm: Option<&Array>| {
            let projected = projection.forward(device, x)?;
            let projected = device.reshape(&projected, &[1, tokens, heads, self.head_dim])?;
            device.transpose(&self.normed(device, projected, norm)?, &[0, 2, 1, 3])
        };
        let queries = split(query, self.heads, self.query_norm.as_ref())?;
        let keys = split(key, self.kv_heads, self.key_norm.as_ref())?;
        let values = split(value, self.kv_heads, None)?;
        Ok((self.rotated(device, queries, offset)?, self.rotated(device, keys, offset)?, values))
    }

    fn normed(&self, device: &Device, x: Array, weight: Option<&Array>) -> Result<Array> {
        match weight {
            Some(weight) => device.rms_norm(&x, weight, self.norm_eps),
            None => Ok(x),
        }
    }

    fn rotated(&self, device: &Device, x: Array, offset: i32) -> Result<Array> {
        match &self.rope {
            Some(rope) => rope.apply(device, &x, offset),
            None => Ok(x),
        }
    }

    fn attend(
        &self,
        device: &Device,
        queries: &Array,
        keys: &Array,
        values: &Array,
        tokens: i32,
        offset: i32,
    ) -> Result<Array> {
        let total = offset + tokens;
        match self.window {
            Some(window) if total > window && tokens == 1 => {
                // The one query sees the last `window` keys.
                let cut = |array: &Array| {
                    device.slice(array, &[0, 0, total - window, 0], &[1, self.kv_heads, total, self.head_dim])
                };
                device.attention(queries, &cut(keys)?, &cut(values)?, self.scale, Mask::Full)
            }
            Some(window) if total > window => {
                let mask = window_mask(device, tokens, offset, window)?;
                device.attention(queries, keys, values, self.scale, Mask::Array(&mask))
            }
            _ if tokens == 1 => device.attention(queries, keys, values, self.scale, Mask::Full),
            _ => device.attention(queries, keys, values, self.scale, Mask::Causal),
        }
    }
}

/// `[tokens, offset + tokens]`: is the key visible to the query?
fn window_mask(device: &Device, tokens: i32, offset: i32, window: i32) -> Result<Array> {
    let total = f64::from(offset + tokens);
    let queries = device.arange(f64::from(offset), total, 1.0, Dtype::I32)?;
    let queries = device.reshape(&queries, &[tokens, 1])?;
    let keys = device.reshape(&device.arange(0.0, total, 1.0, Dtype::I32)?, &[1, offset + tokens])?;
    let past = device.greater_equal(&queries, &keys)?;
    let reach = device.add(&keys, &Array::scalar(window as f32, Dtype::I32)?)?;
    device.logical_and(&past, &device.less(&queries, &reach)?)
}
