//! Mamba 2, as mamba2, nemotron_h, falcon_h1 and granitemoehybrid have it.

use super::by_row::by_row;
use super::{CausalConvolution, StateSpace};
use crate::batch::Batch;
use crate::caches::LayerCache;
use crate::feed_forward::activate;
use crate::linear::Linear;
use mlxnode_checkpoint::{Activation, MambaGate};
use mlxnode_mlx::{Array, Device, Result};

/// The Mamba 2 mixer of one layer. States: the convolution's last inputs, then those of the heads `[1, heads, head_dim, state]`.
pub(crate) struct Mamba2 {
    /// To gate, convolved inputs and steps, in this order.
    pub(crate) input: Linear,
    /// Over x, B and C.
    pub(crate) convolution: CausalConvolution,
    pub(crate) core: StateSpace,
    pub(crate) gate: MambaGate,
    /// `[heads * head_dim]`; None when the gate has no norm.
    pub(crate) norm: Option<Array>,
    pub(crate) eps: f32,
    pub(crate) output: Linear,
    pub(crate) heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) groups: i32,
    pub(crate) state: i32,
}

impl Mamba2 {
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
        let convolved = width + width + 2 * self.groups * self.state;
        let [gate, inputs, steps] = device.split(&projected, &[width, convolved], 2)?;
        let mixed = by_row(device, [inputs, steps], layer, batch, |parts, cache| {
            self.remember(device, parts, cache)
        })?;
        self.output.forward(device, &self.gated(device, &gate, mixed)?)
    }

    /// One row's tokens into its states; what they read, `[1, tokens, heads * head_dim]`. Of sequences side by side a token of each,
    /// `[lanes, 1, ..]`.
    fn remember(
        &self,
        device: &Device,
        [inputs, steps]: [Array; 2],
        cache: &mut LayerCache,
    ) -> Result<Array> {
        let (lanes, count, states) = (inputs.dim(0), inputs.dim(1), &mut cache.states);
        let (before, state) = (states.arrays().first(), states.arrays().get(1));
        let (convolved, last) = self.convolution.forward(device, &inputs, before)?;
        let convolved = activate(device, Activation::Silu, &convolved)?;
        let (width, shared) = (self.heads * self.head_dim, self.groups * self.state);
        let [x, b, c] = device.split(&convolved, &[width, width + shared], 2)?;
        let by_heads =
            |part: &Array, heads: i32, size: i32| device.reshape(part, &[lanes, count, heads, size]);
        let x = by_heads(&x, self.heads, self.head_dim)?;
        let b = by_heads(&b, self.groups, self.state)?;
        let c = by_heads(&c, self.groups, self.state)?;
        let inputs = super::state_space::Inputs { x, b, c, steps };
        let (read, state) = self.core.forward(device, &inputs, state)?;
        states.replace(vec![last, state], count);
        device.reshape(&read, &[lanes, count, width])
    }

    fn gated(&self, device: &Device, gate: &Array, mixed: Array) -> Result<Array> {
        let gate = activate(device, Activation::Silu, gate)?;
        let Some(norm) = &self.norm else { return device.multiply(&gate, &mixed) };
        match self.gate {
            MambaGate::AfterNorm => device.multiply(&gate, &device.rms_norm(&mixed, norm, self.eps)?),
            MambaGate::ThenGroupNorm => {
                let gated = device.multiply(&gate, &mixed)?;
                let grouped = device.reshape(&gated, &[1, gated.dim(1), self.groups, -1])?;
                let normed = device.rms_normalize(&grouped, self.eps)?;
                device.multiply(norm, &device.reshape(&normed, gated.shape())?)
            }
            MambaGate::ThenNorm | MambaGate::Plain => {
                device.rms_norm(&device.multiply(&gate, &mixed)?, norm, self.eps)
            }
        }
    }
}
