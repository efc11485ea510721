//! Lightning attention, as bailing_moe_linear and bailing_hybrid have it: see [`mlxnode_checkpoint::LightningSpec`].

use super::by_row::{by_row, channels};
use super::fading::Fading;
use crate::batch::Batch;
use crate::linear::{Linear, Stacked};
use crate::rope::RotaryEmbedding;
use mlxnode_mlx::{Array, Device, Error, Result};

/// The linear attention of one layer. States: the memories `[1, heads, head_dim, head_dim]` of a key by a value.
pub(crate) struct Lightning {
    /// To queries, keys and values.
    pub(crate) projections: Stacked,
    /// Weights of the norms on queries and keys, `[head_dim]`.
    pub(crate) norms: Option<[Array; 2]>,
    pub(crate) rope: RotaryEmbedding,
    pub(crate) core: Fading,
    pub(crate) gate: Linear,
    /// Weight of the norm on what is read, `[heads * head_dim]`.
    pub(crate) norm: Array,
    /// Groups of channels that are normed by themselves.
    pub(crate) groups: i32,
    pub(crate) eps: f32,
    pub(crate) output: Linear,
    pub(crate) heads: i32,
    pub(crate) head_dim: i32,
}

impl Lightning {
    /// `[1, tokens of all rows, hidden]` to the same; this is layer `layer` of the range.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let (count, width) = (x.dim(1), self.heads * self.head_dim);
        let [queries, keys, values] = self.project(device, x)?;
        let offsets: Vec<i32> = batch.rows.iter().map(|row| row.cache.tokens()).collect();
        let mut offsets = offsets.into_iter();
        let read = by_row(device, [queries, keys, values], layer, batch, |[q, k, v], cache| {
            let offset =
                offsets.next().ok_or_else(|| Error::Mlx("there are more rows than offsets".to_owned()))?;
            let tokens = q.dim(1);
            let weights = self.norms.as_ref();
            let q = self.turned(device, &q, weights.map(|weights| &weights[0]))?;
            let k = self.turned(device, &k, weights.map(|weights| &weights[1]))?;
            let q = self.rope.apply(device, &q, offset)?;
            let k = self.rope.apply(device, &k, offset)?;
            let v = self.turned(device, &v, None)?;
            let (read, memory) = self.core.forward(device, [&q, &k, &v], cache.states.arrays().first())?;
            cache.states.replace(vec![memory], tokens);
            device.reshape(&device.transpose(&read, &[0, 2, 1, 3])?, &[1, tokens, width])
        })?;
        let grouped = device.reshape(&read, &[1, count, self.groups, -1])?;
        let normed = device.reshape(&device.rms_normalize(&grouped, self.eps)?, &[1, count, width])?;
        let normed = device.multiply(&self.norm, &normed)?;
        let open = device.sigmoid(&self.gate.forward(device, x)?)?;
        self.output.forward(device, &device.multiply(&normed, &open)?)
    }

    fn project(&self, device: &Device, x: &Array) -> Result<[Array; 3]> {
        let width = self.heads * self.head_dim;
        match (&self.projections.whole, self.projections.parts.as_slice()) {
            (Some(whole), _) if x.dim(1) == 1 => {
                let all = whole.forward(device, x)?;
                let part = |index: i32| channels(device, &all, index * width, (index + 1) * width);
                Ok([part(0)?, part(1)?, part(2)?])
            }
            (_, [queries, keys, values]) => {
                Ok([queries.forward(device, x)?, keys.forward(device, x)?, values.forward(device, x)?])
            }
            _ => Err(Error::Mlx("linear attention needs three projections".to_owned())),
        }
    }

    /// `[1, tokens, heads * head_dim]` to `[1, heads, tokens, head_dim]`, normed.
    fn turned(&self, device: &Device, x: &Array, norm: Option<&Array>) -> Result<Array> {
        let x = device.reshape(x, &[1, x.dim(1), self.heads, self.head_dim])?;
        let x = match norm {
            Some(weight) => device.rms_norm(&x, weight, self.eps)?,
            None => x,
        };
        device.transpose(&x, &[0, 2, 1, 3])
    }
}
