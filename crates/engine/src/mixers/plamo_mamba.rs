//! PLaMo 2's Mamba 2: see [`mlxnode_checkpoint::PlamoMambaSpec`].

use super::by_row::{by_row, channels};
use super::mamba::SelectionNorms;
use super::state_space::Inputs;
use super::{CausalConvolution, StateSpace};
use crate::batch::Batch;
use crate::feed_forward::activate;
use crate::linear::{Linear, Stacked};
use mlxnode_checkpoint::Activation;
use mlxnode_mlx::{Array, Device, Error, Result};

/// The Mamba mixer of one layer of PLaMo 2. States: the convolution's last inputs, then those of the heads
/// `[1, heads, head_dim, state]`.
pub(crate) struct PlamoMamba {
    /// To gate and convolved inputs, in this order; stored by heads.
    pub(crate) input: Stacked,
    pub(crate) convolution: CausalConvolution,
    /// To B, C and steps, in this order.
    pub(crate) selection: Linear,
    pub(crate) norms: SelectionNorms,
    /// One step for each head.
    pub(crate) steps: Linear,
    pub(crate) core: StateSpace,
    pub(crate) output: Linear,
    pub(crate) heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) state: i32,
    pub(crate) rank: i32,
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
        let [gate, inputs] = self.input.forward(device, x, [width, width])?;
        let mut seen = Vec::with_capacity(batch.rows.len());
        let convolved = by_row(device, [inputs], layer, batch, |[inputs], cache| {
            let (convolved, last) =
                self.convolution.forward(device, &inputs, cache.states.arrays().first())?;
            seen.push(last);
            Ok(convolved)
        })?;
        let x = activate(device, Activation::Silu, &convolved)?;
        let selected = self.selection.forward(device, &x)?;
        let (rank, size) = (self.rank, self.state);
        let part = |index: usize, from: i32, to: i32| {
            self.norms.apply(device, channels(device, &selected, from, to)?, index)
        };
        let (b, c) = (part(1, 0, size)?, part(2, size, 2 * size)?);
        let steps = self.steps.forward(device, &part(0, 2 * size, 2 * size + rank)?)?;
        let mut seen = seen.into_iter();
        let mixed = by_row(device, [x, b, c, steps], layer, batch, |[x, b, c, steps], cache| {
            let count = x.dim(1);
            let inputs = Inputs {
                x: device.reshape(&x, &[1, count, self.heads, self.head_dim])?,
                b: device.reshape(&b, &[1, count, 1, size])?,
                c: device.reshape(&c, &[1, count, 1, size])?,
                steps,
            };
            let (read, state) = self.core.forward(device, &inputs, cache.states.arrays().get(1))?;
            let last = seen.next().ok_or_else(|| Error::Mlx("a row was not convolved".to_owned()))?;
            cache.states.replace(vec![last, state], count);
            device.reshape(&read, &[1, count, width])
        })?;
        let gated = device.multiply(&activate(device, Activation::Silu, &gate)?, &mixed)?;
        self.output.forward(device, &gated)
    }
}
