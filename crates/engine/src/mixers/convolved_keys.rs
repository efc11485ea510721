//! Gear's local mixer: see [`mlxnode_checkpoint::ConvolvedKeysSpec`].

use super::CausalConvolution;
use super::by_row::by_row;
use crate::batch::Batch;
use crate::linear::{Linear, Stacked};
use crate::norm::Norm;
use mlxnode_mlx::{Array, Device, Result};

/// The mixer of one layer. States: the last inputs of both convolutions, keys first.
pub(crate) struct ConvolvedKeys {
    /// q, k and v, in this order.
    pub(crate) projections: Stacked,
    pub(crate) query_norm: Norm,
    pub(crate) key_norm: Norm,
    pub(crate) key_convolution: CausalConvolution,
    pub(crate) value_convolution: CausalConvolution,
    pub(crate) output: Linear,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) head_dim: i32,
}

impl ConvolvedKeys {
    /// `[1, tokens of all rows, hidden]` to the same; this is layer `layer` of the range.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let tokens = x.dim(1);
        let (queries, keys, values) = self.project(device, x)?;
        let normed = |norm: &Norm, x: &Array, heads: i32| {
            let by_heads = device.reshape(x, &[1, tokens, heads, self.head_dim])?;
            device.reshape(&norm.forward(device, &by_heads)?, &[1, tokens, heads * self.head_dim])
        };
        let queries = normed(&self.query_norm, &queries, self.heads)?;
        let keys = normed(&self.key_norm, &keys, self.kv_heads)?;
        let mixed =
            by_row(device, [queries, keys, values], layer, batch, |[queries, keys, values], cache| {
                let states = &mut cache.states;
                let [before_keys, before_values] = match states.arrays() {
                    [keys, values] => [Some(keys), Some(values)],
                    _ => [None, None],
                };
                let (keys, last_keys) = self.key_convolution.forward(device, &keys, before_keys)?;
                let (values, last_values) = self.value_convolution.forward(device, &values, before_values)?;
                states.replace(vec![last_keys, last_values], queries.dim(1));
                let open = device.sigmoid(&device.multiply(&queries, &self.for_queries(device, &keys)?)?)?;
                device.multiply(&open, &self.for_queries(device, &values)?)
            })?;
        self.output.forward(device, &mixed)
    }

    fn project(&self, device: &Device, x: &Array) -> Result<(Array, Array, Array)> {
        let tokens = x.dim(1);
        match (&self.projections.whole, self.projections.parts.as_slice()) {
            (Some(whole), _) if tokens == 1 => {
                let all = whole.forward(device, x)?;
                let cut = |from: i32, to: i32| {
                    device.slice(&all, &[0, 0, from * self.head_dim], &[1, 1, to * self.head_dim])
                };
                let keys = self.heads + self.kv_heads;
                Ok((cut(0, self.heads)?, cut(self.heads, keys)?, cut(keys, keys + self.kv_heads)?))
            }
            (_, [queries, keys, values]) => {
                Ok((queries.forward(device, x)?, keys.forward(device, x)?, values.forward(device, x)?))
            }
            _ => Err(mlxnode_mlx::Error::Mlx("this mixer needs three projections".to_owned())),
        }
    }

    /// `[1, tokens, kv_heads * head_dim]` with each head as often as queries have it, `[1, tokens, heads * head_dim]`; of sequences side
    /// by side `[lanes, 1, ..]`.
    fn for_queries(&self, device: &Device, x: &Array) -> Result<Array> {
        if self.heads == self.kv_heads {
            return Ok(x.clone());
        }
        let (lanes, tokens) = (x.dim(0), x.dim(1));
        let (groups, times) = (self.kv_heads, self.heads / self.kv_heads);
        let spread = device.reshape(x, &[lanes, tokens, groups, 1, self.head_dim])?;
        let spread = device.broadcast(&spread, &[lanes, tokens, groups, times, self.head_dim])?;
        device.reshape(&spread, &[lanes, tokens, self.heads * self.head_dim])
    }
}
