//! Softmax attention with grouped keys and values, optional norms on queries and keys, rotation and window.

use crate::kv_cache::KvCache;
use crate::linear::{Linear, Stacked};
use crate::rope::RotaryEmbedding;
use mlxnode_checkpoint::QkNormKind;
use mlxnode_mlx::{Array, Device, Dtype, Mask, Result};

/// The attention of one layer.
pub(crate) struct Attention {
    /// q, k and v, in this order.
    pub(crate) projections: Stacked,
    pub(crate) output: Linear,
    pub(crate) norms: Option<QkNorms>,
    pub(crate) rope: Option<RotaryEmbedding>,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) scale: f32,
    /// Key j is visible to query i only when `i - window < j`.
    pub(crate) window: Option<i32>,
    /// The scores become `cap * tanh(score / cap)`.
    pub(crate) score_cap: Option<f32>,
    /// Computed in single precision whatever the keys' element type.
    pub(crate) single_precision: bool,
}

/// Norms on queries and keys.
pub(crate) struct QkNorms {
    pub(crate) kind: QkNormKind,
    pub(crate) query: Array,
    pub(crate) key: Array,
    pub(crate) eps: f32,
    pub(crate) after_rope: bool,
}

impl Attention {
    /// `[1, tokens, hidden]` to the same. The tokens follow those in the cache.
    pub(crate) fn forward(&self, device: &Device, x: &Array, cache: &mut KvCache) -> Result<Array> {
        let (tokens, offset) = (x.dim(1), cache.tokens());
        let (queries, keys, values) = match &self.projections.whole {
            Some(whole) if tokens == 1 => self.project_one(device, whole, x, offset)?,
            _ => self.project_many(device, x, offset)?,
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
        if self.norms.as_ref().is_some_and(|norms| norms.kind != QkNormKind::PerHead || norms.after_rope) {
            let cut = |from: i32, to: i32| {
                device.slice(&projected, &[0, 0, from * self.head_dim], &[1, 1, to * self.head_dim])
            };
            return self.arranged(
                device,
                [cut(0, self.heads)?, cut(self.heads, rotating)?, cut(rotating, all)?],
                offset,
            );
        }
        // For one token [1, 1, heads, width] and [1, heads, 1, width] are the same elements in the same order.
        let projected = device.reshape(&projected, &[1, all, 1, self.head_dim])?;
        let cut = |array: &Array, from: i32, to: i32| {
            device.slice(array, &[0, from, 0, 0], &[1, to, 1, self.head_dim])
        };
        let values = cut(&projected, rotating, all)?;
        let Some(norms) = &self.norms else {
            let both = self.rotated(device, cut(&projected, 0, rotating)?, offset)?;
            return Ok((cut(&both, 0, self.heads)?, cut(&both, self.heads, rotating)?, values));
        };
        let queries = device.rms_norm(&cut(&projected, 0, self.heads)?, &norms.query, norms.eps)?;
        let keys = device.rms_norm(&cut(&projected, self.heads, rotating)?, &norms.key, norms.eps)?;
        Ok((self.rotated(device, queries, offset)?, self.rotated(device, keys, offset)?, values))
    }

    fn project_many(&self, device: &Device, x: &Array, offset: i32) -> Result<(Array, Array, Array)> {
        let [query, key, value] = self.projections.parts.as_slice() else {
            return Err(mlxnode_mlx::Error::Mlx("attention needs three projections".to_owned()));
        };
        let projected = [query.forward(device, x)?, key.forward(device, x)?, value.forward(device, x)?];
        self.arranged(device, projected, offset)
    }

    /// Projections `[1, tokens, heads * head_dim]` to `[1, heads, tokens, head_dim]`, normed and rotated.
    fn arranged(&self, device: &Device, projected: [Array; 3], offset: i32) -> Result<(Array, Array, Array)> {
        let [queries, keys, values] = projected;
        let turned = |x: Array, heads: i32, weight: Option<&Array>| {
            let tokens = x.dim(1);
            let norm = self.norms.as_ref().filter(|norms| !norms.after_rope).zip(weight);
            let x = match norm {
                Some((norms, weight)) if norms.kind == QkNormKind::Whole => {
                    device.rms_norm(&x, weight, norms.eps)?
                }
                _ => x,
            };
            let x = device.reshape(&x, &[1, tokens, heads, self.head_dim])?;
            let x = match norm {
                Some((norms, weight)) if norms.kind == QkNormKind::PerHead => {
                    device.rms_norm(&x, weight, norms.eps)?
                }
                Some((norms, weight)) if norms.kind == QkNormKind::LayerPerHead => {
                    device.multiply(weight, &device.layer_norm(&x, None, None, norms.eps)?)?
                }
                _ => x,
            };
            device.transpose(&x, &[0, 2, 1, 3])
        };
        let (query_norm, key_norm) = match &self.norms {
            Some(norms) => (Some(&norms.query), Some(&norms.key)),
            None => (None, None),
        };
        let queries = self.rotated(device, turned(queries, self.heads, query_norm)?, offset)?;
        let keys = self.rotated(device, turned(keys, self.kv_heads, key_norm)?, offset)?;
        let values = turned(values, self.kv_heads, None)?;
        match &self.norms {
            Some(norms) if norms.after_rope => Ok((
                device.rms_norm(&queries, &norms.query, norms.eps)?,
                device.rms_norm(&keys, &norms.key, norms.eps)?,
                values,
            )),
            _ => Ok((queries, keys, values)),
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
                self.mix(device, queries, &cut(keys)?, &cut(values)?, Mask::Full)
            }
            Some(window) if total > window => {
                let mask = window_mask(device, tokens, offset, window)?;
                self.mix(device, queries, keys, values, Mask::Array(&mask))
            }
            _ if tokens == 1 => self.mix(device, queries, keys, values, Mask::Full),
            _ if self.score_cap.is_some() => {
                let mask = window_mask(device, tokens, offset, i32::MAX / 2)?;
                self.mix(device, queries, keys, values, Mask::Array(&mask))
            }
            _ => self.mix(device, queries, keys, values, Mask::Causal),
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
            return device.attention(queries, keys, values, self.scale, mask);
        }
        let (queries, keys) = (device.cast(queries, Dtype::F32)?, device.cast(keys, Dtype::F32)?);
        let mixed = device.attention(&queries, &keys, values, self.scale, mask)?;
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
        let (tokens, total, groups) = (queries.dim(2), keys.dim(2), self.kv_heads);
        let queries = device.multiply(queries, &number(self.scale)?)?;
        let queries = device.reshape(&queries, &[1, groups, self.heads / groups, tokens, self.head_dim])?;
        let grouped = |array: &Array| device.reshape(array, &[1, groups, 1, total, self.head_dim]);
        let keys = device.transpose(&grouped(keys)?, &[0, 1, 2, 4, 3])?;
        let scores = device.divide(&device.matmul(&queries, &keys)?, &number(cap)?)?;
        let scores = device.multiply(&device.tanh(&scores)?, &number(cap)?)?;
        let scores = match mask {
            Mask::Array(mask) => device.select(mask, &scores, &number(f32::NEG_INFINITY)?)?,
            Mask::Full | Mask::Causal => scores,
        };
        let mixed = device.matmul(&device.softmax(&scores, -1, true)?, &grouped(values)?)?;
        device.reshape(&mixed, &[1, self.heads, tokens, self.head_dim])
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
