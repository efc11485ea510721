//! Gated delta networks: qwen3_next, qwen3_5, olmo_hybrid and kimi_linear.

use super::by_row::by_row;
use super::{CausalConvolution, DeltaRule};
use crate::batch::Batch;
use crate::caches::LayerCache;
use crate::feed_forward::activate;
use crate::linear::{Linear, Stacked};
use mlxnode_checkpoint::Activation;
use mlxnode_mlx::{Array, Device, Dtype, Result};

/// Added to the sum of squares under the root when queries and keys are normed; the families' value.
const NORM_EPS: f64 = 1e-6;

/// The gated delta network of one layer. States: the convolution's last inputs, then the memories `[1, value_heads, value_dim, key_dim]`.
pub(crate) struct GatedDeltaNet {
    /// Queries, keys and values (one part or three), then gate, strength and decay, in this order.
    pub(crate) inputs: Stacked,
    /// How many outputs each part has.
    pub(crate) widths: Vec<i32>,
    /// What the gate goes through then, in families that make it from a few numbers.
    pub(crate) widened_gate: Option<Linear>,
    /// The same for the decay.
    pub(crate) widened_decay: Option<Linear>,
    /// Over queries, keys and values.
    pub(crate) convolution: CausalConvolution,
    /// Channels of queries, keys and values where the family has a convolution for each, and files of caches an array for each.
    pub(crate) convolutions: Option<[i32; 3]>,
    /// Factors on the normed queries and keys, `[2 key_heads, 1]`.
    pub(crate) scales: Array,
    pub(crate) decay: Decay,
    /// Strength and gate are made in single precision.
    pub(crate) precise: bool,
    /// Memories may turn: strengths count twice.
    pub(crate) doubled: bool,
    pub(crate) rule: DeltaRule,
    /// Norm on what is read, `[value_dim]`.
    pub(crate) norm: Array,
    pub(crate) eps: f32,
    /// The gate goes through a logistic function instead of silu.
    pub(crate) logistic: bool,
    pub(crate) output: Linear,
    pub(crate) key_heads: i32,
    pub(crate) value_heads: i32,
    pub(crate) key_dim: i32,
    pub(crate) value_dim: i32,
}

/// How fast memories fade: `rate * softplus(x + bias)` is the logarithm of what is left after a token; where it is bounded,
/// `bound * logistic(rate * (x + bias))`.
pub(crate) struct Decay {
    /// `-exp(A_log)`, or `exp(A_log)` where it is bounded; single precision, `[value_heads]`, or `[value_heads, 1]` when every channel fades by itself.
    pub(crate) rate: Array,
    /// `[value_heads]` or `[value_heads, key_dim]`.
    pub(crate) bias: Array,
    pub(crate) bound: Option<f32>,
}

impl GatedDeltaNet {
    /// The factors on normed queries and keys: keys get unit length, queries that and `1 / sqrt(key_dim)`.
    pub(crate) fn scales(key_heads: i32, key_dim: i32, dtype: Dtype, device: &Device) -> Result<Array> {
        // The norm divides by the root of the mean square, so unit length is a factor of 1 / sqrt(key_dim).
        let unit = f64::from(key_dim).powf(-0.5);
        let heads = usize::try_from(key_heads).unwrap_or(0);
        let mut scales = vec![(unit * unit) as f32; heads];
        scales.resize(2 * heads, unit as f32);
        device.cast(&Array::from_f32(&scales, &[2 * key_heads, 1])?, dtype)
    }

    /// `[1, tokens of all rows, hidden]` to the same; this is layer `layer` of the range.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let count = x.dim(1);
        let [mixed, gate, strength, decay] = self.project(device, x)?;
        let precise = |x: Array| match self.precise {
            true => device.cast(&x, Dtype::F32),
            false => Ok(x),
        };
        let strength = device.sigmoid(&precise(strength)?)?;
        let strength = match self.doubled {
            true => device.multiply(&strength, &Array::scalar(2.0, strength.dtype())?)?,
            false => strength,
        };
        let decay = self.log_decay(device, &decay)?;
        let read = by_row(device, [mixed, decay, strength], layer, batch, |parts, cache| {
            self.remember(device, parts, cache)
        })?;
        let gate = device.reshape(&gate, &[1, count, self.value_heads, self.value_dim])?;
        let normed = device.rms_norm(&read, &self.norm, self.eps)?;
        let gated = match self.logistic {
            true => {
                let open = device.cast(&device.sigmoid(&precise(gate)?)?, normed.dtype())?;
                device.multiply(&normed, &open)?
            }
            false => {
                let gate = activate(device, Activation::Silu, &device.cast(&gate, Dtype::F32)?)?;
                let gated = device.multiply(&gate, &device.cast(&normed, Dtype::F32)?)?;
                device.cast(&gated, read.dtype())?
            }
        };
        let gated = device.reshape(&gated, &[1, count, self.value_heads * self.value_dim])?;
        self.output.forward(device, &gated)
    }

    /// Queries, keys and values in one; gate; strength; decay.
    fn project(&self, device: &Device, x: &Array) -> Result<[Array; 4]> {
        let parts: Vec<Array> = match &self.inputs.whole {
            Some(whole) if x.dim(1) == 1 => {
                let all = whole.forward(device, x)?;
                let (before, last) = self.widths.split_at(self.widths.len().saturating_sub(3));
                let mut cuts = vec![before.iter().sum::<i32>()];
                for width in last.iter().take(2) {
                    cuts.push(cuts.last().copied().unwrap_or(0) + width);
                }
                device.pieces(&all, &cuts, 2)?
            }
            _ => self.inputs.parts.iter().map(|part| part.forward(device, x)).collect::<Result<_>>()?,
        };
        let [mixed @ .., gate, strength, decay] = parts.as_slice() else {
            return Err(mlxnode_mlx::Error::Mlx("a gated delta network needs four projections".to_owned()));
        };
        let mixed = match mixed {
            [mixed] => mixed.clone(),
            several => device.concatenate(several, 2)?,
        };
        let through = |widened: &Option<Linear>, x: &Array| match widened {
            Some(widened) => widened.forward(device, x),
            None => Ok(x.clone()),
        };
        let (gate, decay) = (through(&self.widened_gate, gate)?, through(&self.widened_decay, decay)?);
        Ok([mixed, gate, strength.clone(), decay])
    }

    /// The logarithm of what is left of a memory after each token, `[1, tokens, value_heads]` or one for each channel of the keys.
    fn log_decay(&self, device: &Device, decay: &Array) -> Result<Array> {
        let decay = match self.decay.rate.shape().len() {
            1 => decay.clone(),
            _ => device.reshape(decay, &[1, decay.dim(1), self.value_heads, self.key_dim])?,
        };
        if let Some(bound) = self.decay.bound {
            let sum = device.add(&device.cast(&decay, Dtype::F32)?, &self.decay.bias)?;
            let part = device.sigmoid(&device.multiply(&self.decay.rate, &sum)?)?;
            return device.multiply(&Array::scalar(bound, Dtype::F32)?, &part);
        }
        let sum = device.add(&decay, &self.decay.bias)?;
        let softplus = device.logaddexp(&sum, &Array::scalar(0.0, sum.dtype())?)?;
        device.multiply(&self.decay.rate, &softplus)
    }

    /// One row's tokens into its memories; what they read, `[1, tokens, value_heads, value_dim]`. Of sequences side by side a token
    /// of each, `[lanes, 1, ..]`.
    fn remember(
        &self,
        device: &Device,
        [mixed, decay, strength]: [Array; 3],
        cache: &mut LayerCache,
    ) -> Result<Array> {
        let (lanes, count, states) = (mixed.dim(0), mixed.dim(1), &mut cache.states);
        let (before, memory) = (states.arrays().first(), states.arrays().get(1));
        let (convolved, last) = self.convolution.forward(device, &mixed, before)?;
        let convolved = activate(device, Activation::Silu, &convolved)?;
        let (heads, width) = (self.key_heads, self.key_dim);
        let keys = 2 * heads * width;
        let [both, values] = device.split(&convolved, &[keys], 2)?;
        let both = device.reshape(&both, &[lanes, count, 2 * heads, width])?;
        let eps = (NORM_EPS / f64::from(width)) as f32; // the norm adds it to the mean of squares
        let both = device.multiply(&device.rms_normalize(&both, eps)?, &self.scales)?;
        let [queries, keys] = device.split(&both, &[heads], 2)?;
        let values = device.reshape(&values, &[lanes, count, self.value_heads, self.value_dim])?;
        let inputs = super::delta_rule::Inputs { queries, keys, values, log_decay: decay, strength };
        let (read, memory) = self.rule.forward(device, &inputs, memory)?;
        states.replace(vec![last, memory], count);
        Ok(read)
    }
}
