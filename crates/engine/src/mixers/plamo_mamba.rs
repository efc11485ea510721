//! PLaMo 2's Mamba: see [`mlxnode_checkpoint::PlamoMambaSpec`].

use super::by_row::{by_row, channels};
use super::{CausalConvolution, StateSpace};
use crate::batch::Batch;
use crate::feed_forward::activate;
use crate::linear::Linear;
use mlxnode_checkpoint::Activation;
use mlxnode_mlx::{Array, Device, Result};

/// The mixer of one layer. States: the convolution's last inputs, then those of the heads `[1, heads, head_dim, state]`.
pub(crate) struct PlamoMamba {
    /// To all heads' gates, then all heads' channels.
    pub(crate) input: Linear,
    pub(crate) convolution: CausalConvolution,
    /// To B, C and what the steps are made from.
    pub(crate) selection: Linear,
    /// Weights of the norms on these, in this order: `[state]`, `[state]`, `[rank]`.
    pub(crate) norms: [Array; 3],
    pub(crate) eps: f32,
    /// To the steps.
    pub(crate) steps: Linear,
    pub(crate) core: StateSpace,
    pub(crate) output: Linear,
    pub(crate) heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) state: i32,
}

impl PlamoMamba {
    /// `[1, tokens of all rows, hidden]` to the same; this is layer `layer` of the range.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let width = self.heads * self.head_dim;
        let projected = self.input.forward(device, x)?;
        let gate = channels(device, &projected, 0, width)?;
        let inputs = channels(device, &projected, width, 2 * width)?;
        let mut kept = Vec::with_capacity(batch.rows.len());
        let convolved = by_row(device, [inputs], layer, batch, |[inputs], cache| {
            let (convolved, last) =
                self.convolution.forward(device, &inputs, cache.states.arrays().first())?;
            kept.push(last);
            Ok(convolved)
        })?;
        let x = activate(device, Activation::Silu, &convolved)?;
        let [b, c, steps] = self.select(device, &x)?;
        let mut kept = kept.into_iter();
        let read = by_row(device, [x, b, c, steps], layer, batch, |[x, b, c, steps], cache| {
            let (lanes, count) = (x.dim(0), x.dim(1));
            let by_head = |array: &Array, heads: i32| device.reshape(array, &[lanes, count, heads, -1]);
            let inputs = super::state_space::Inputs {
                x: by_head(&x, self.heads)?,
                b: by_head(&b, 1)?,
                c: by_head(&c, 1)?,
                steps,
            };
            let (read, state) = self.core.forward(device, &inputs, cache.states.arrays().get(1))?;
            cache.states.replace(kept.next().into_iter().chain([state]).collect(), count);
            device.reshape(&read, &[lanes, count, width])
        })?;
        let gated = device.multiply(&activate(device, Activation::Silu, &gate)?, &read)?;
        self.output.forward(device, &gated)
    }

    /// B and C `[1, tokens, state]`, steps `[1, tokens, heads]` before bias and softplus.
    fn select(&self, device: &Device, x: &Array) -> Result<[Array; 3]> {
        let all = self.selection.forward(device, x)?;
        let [of_b, of_c, of_steps] = &self.norms;
        let part = |from: i32, to: i32, norm: &Array| {
            device.rms_norm(&channels(device, &all, from, to)?, norm, self.eps)
        };
        let steps = part(2 * self.state, all.dim(2), of_steps)?;
        Ok([
            part(0, self.state, of_b)?,
            part(self.state, 2 * self.state, of_c)?,
            self.steps.forward(device, &steps)?,
        ])
    }
}
