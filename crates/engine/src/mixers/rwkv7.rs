//! RWKV-7's layer: see [`mlxnode_checkpoint::Rwkv7Spec`].
//!
//! Order of operations and element types are those of mlx-lm.

use super::by_row::{by_row, tokens};
use super::wkv::{self, Wkv};
use crate::batch::Batch;
use crate::caches::LayerCache;
use crate::feed_forward::activate;
use crate::linear::Linear;
use crate::norm::Norm;
use mlxnode_checkpoint::Activation;
use mlxnode_mlx::{Array, Device, Dtype, Error, Result};

/// A whole layer. States: the last input of the memories `[1, 1, hidden]`, the memories `[1, heads, head_dim, head_dim]` of a value by a
/// key, the last input of the network.
pub(crate) struct Rwkv7 {
    /// In the model's first layer.
    pub(crate) before: Option<Norm>,
    pub(crate) before_memory: Norm,
    pub(crate) memory: TimeMix,
    pub(crate) before_network: Norm,
    pub(crate) network: ChannelMix,
}

/// The part that looks across tokens.
pub(crate) struct TimeMix {
    /// What each projection's input takes of the token before: of receptance, decay, key, value, rate and gate, `[6, 1, hidden]`.
    pub(crate) mixes: Array,
    pub(crate) receptance: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    pub(crate) decay: LowRank,
    pub(crate) rate: LowRank,
    pub(crate) gate: LowRank,
    /// How much of the first layer's value is taken; None in that layer.
    pub(crate) first_value: Option<LowRank>,
    /// `[heads, head_dim]` each: factors on the key that is corrected, on the rate in the key that is written, and on what the
    /// token reads of itself.
    pub(crate) corrected: Array,
    pub(crate) rated: Array,
    pub(crate) own: Array,
    /// Weight and bias, `[heads, head_dim]`, of the norm on what is read.
    pub(crate) norm: [Array; 2],
    pub(crate) core: Wkv,
    pub(crate) heads: i32,
    pub(crate) head_dim: i32,
}

/// Two maps with few numbers between them.
pub(crate) struct LowRank {
    pub(crate) narrow: Linear,
    pub(crate) wide: Linear,
}

/// The part that works on single tokens and the one before.
pub(crate) struct ChannelMix {
    /// What the input takes of the token before, `[hidden]`.
    pub(crate) mix: Array,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
}

/// Epsilon of the norm on what is read.
const READ_EPS: f32 = 64e-5;
/// The least length by which a key is divided.
const LEAST_LENGTH: f32 = 1e-7;
/// The logarithm of the fastest decay: `-exp(-0.5)`, as the family rounds it.
const FASTEST: f32 = -0.606_531;

impl Rwkv7 {
    /// `[1, tokens of all rows, hidden]` through the layer; this is layer `layer` of the range. The first layer leaves its values in
    /// the batch, later ones find them there.
    pub(crate) fn forward(
        &self,
        device: &Device,
        hidden: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let hidden = match &self.before {
            Some(norm) => norm.forward(device, hidden)?,
            None => hidden.clone(),
        };
        let input = self.before_memory.forward(device, &hidden)?;
        let (mixed, states) = self.memory.forward(device, &input, layer, batch)?;
        let hidden = device.add(&hidden, &mixed)?;
        let input = self.before_network.forward(device, &hidden)?;
        let fed = self.network.forward(device, &input, layer, batch, states)?;
        device.add(&hidden, &fed)
    }
}

impl TimeMix {
    /// Also returns each row's first two states.
    fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<(Array, Vec<[Array; 2]>)> {
        let (count, hidden) = (x.dim(1), x.dim(2));
        let mut kept = Vec::with_capacity(batch.rows.len());
        let previous = by_row(device, [x.clone()], layer, batch, |[x], cache| {
            let (previous, last) = shifted(device, &x, cache.states.arrays().first())?;
            kept.push(last);
            Ok(previous)
        })?;
        let step = device.subtract(&previous, x)?;
        let mixed = device.add(x, &device.multiply(&step, &self.mixes)?)?; // [6, tokens, hidden]
        let of = |index: i32| device.slice(&mixed, &[index, 0, 0], &[index + 1, count, hidden]);
        let by_head = |array: &Array| device.reshape(array, &[1, count, self.heads, self.head_dim]);
        let (for_receptance, for_decay, for_key) = (of(0)?, of(1)?, of(2)?);
        let (for_value, for_rate, for_gate) = (of(3)?, of(4)?, of(5)?);

        let key = by_head(&self.key.forward(device, &for_key)?)?;
        let value = by_head(&self.value.forward(device, &for_value)?)?;
        let receptance = by_head(&self.receptance.forward(device, &for_receptance)?)?;
        let rate = by_head(&device.sigmoid(&self.rate.forward(device, &for_rate, |_, x| Ok(x))?)?)?;
        let gate = self.gate.forward(device, &for_gate, |device, x| device.sigmoid(&x))?;
        let value = self.with_first(device, value, &for_value, batch)?;

        let decay = self.decay.forward(device, &for_decay, |device, x| device.tanh(&x))?;
        let decay = device.cast(&device.sigmoid(&by_head(&decay)?)?, Dtype::F32)?;
        let decay = device.exp(&device.multiply(&Array::scalar(FASTEST, Dtype::F32)?, &decay)?)?;
        let decay = device.cast(&decay, receptance.dtype())?;
        let direction = unit(device, &device.multiply(&key, &self.corrected)?)?;
        let one = Array::scalar(1.0, rate.dtype())?;
        let factor = device.multiply(&device.subtract(&rate, &one)?, &self.rated)?;
        let key = device.multiply(&key, &device.add(&one, &factor)?)?;
        let away = device.negative(&direction)?;
        let back = device.multiply(&direction, &rate)?;

        let arrays = [receptance.clone(), decay, key.clone(), value.clone(), away, back];
        let mut memories = Vec::with_capacity(batch.rows.len());
        let read = by_row(device, arrays, layer, batch, |[r, w, k, v, a, b], cache| {
            let inputs = wkv::Inputs { receptance: r, decay: w, key: k, value: v, away: a, back: b };
            let (read, memory) = self.core.forward(device, &inputs, cache.states.arrays().get(1))?;
            memories.push(memory);
            Ok(read)
        })?;
        let [weight, bias] = &self.norm;
        let normed = device.layer_norm(&read, None, None, READ_EPS)?;
        let normed = device.add(&device.multiply(weight, &normed)?, bias)?;
        let own = device.multiply(&device.multiply(&receptance, &key)?, &self.own)?;
        let own = device.multiply(&device.sum(&own, -1, true)?, &value)?;
        let result = device.reshape(&device.add(&normed, &own)?, &[1, count, hidden])?;
        let result = self.output.forward(device, &device.multiply(&result, &gate)?)?;
        Ok((result, kept.into_iter().zip(memories).map(|(last, memory)| [last, memory]).collect()))
    }

    /// The layer's values and those of the first layer, which `batch` has.
    fn with_first(
        &self,
        device: &Device,
        value: Array,
        input: &Array,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let Some(part) = &self.first_value else {
            batch.projected = vec![device.reshape(&value, input.shape())?];
            return Ok(value);
        };
        let Some(first) = batch.projected.first() else {
            return Err(Error::Mlx("the first layer's values did not come along".to_owned()));
        };
        let part = device.sigmoid(&part.forward(device, input, |_, x| Ok(x))?)?;
        let part = device.reshape(&part, value.shape())?;
        let first = device.reshape(first, value.shape())?;
        device.add(&value, &device.multiply(&device.subtract(&first, &value)?, &part)?)
    }
}

impl LowRank {
    fn forward(
        &self,
        device: &Device,
        x: &Array,
        between: impl Fn(&Device, Array) -> Result<Array>,
    ) -> Result<Array> {
        self.wide.forward(device, &between(device, self.narrow.forward(device, x)?)?)
    }
}

impl ChannelMix {
    /// Completes each row's states, of which it gets the first two.
    fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
        states: Vec<[Array; 2]>,
    ) -> Result<Array> {
        let mut states = states.into_iter();
        let previous = by_row(device, [x.clone()], layer, batch, |[x], cache: &mut LayerCache| {
            let (previous, last) = shifted(device, &x, cache.states.arrays().get(2))?;
            let all = states.next().into_iter().flatten().chain([last]);
            cache.states.replace(all.collect(), x.dim(1));
            Ok(previous)
        })?;
        let mixed = device.add(x, &device.multiply(&device.subtract(&previous, x)?, &self.mix)?)?;
        let key = activate(device, Activation::SquaredRelu, &self.key.forward(device, &mixed)?)?;
        self.value.forward(device, &key)
    }
}

/// For each of one row's tokens `[1, tokens, hidden]` the one before it, and the last one. `before` is the one before the first; without
/// it there are zeros. Of sequences side by side there is a token of each, `[lanes, 1, hidden]`.
fn shifted(device: &Device, x: &Array, before: Option<&Array>) -> Result<(Array, Array)> {
    let (lanes, count, hidden) = (x.dim(0), x.dim(1), x.dim(2));
    let before = match before {
        Some(before) => before.clone(),
        None => device.zeros(&[lanes, 1, hidden], x.dtype())?,
    };
    if count == 1 {
        return Ok((before, x.clone()));
    }
    let previous = device.concatenate([&before, &tokens(device, x, 0, count - 1)?], 1)?;
    // A view of a prompt would keep all of it in memory.
    let last = device.contiguous(&tokens(device, x, count - 1, count)?)?;
    Ok((previous, last))
}

/// Of unit length over the last axis.
fn unit(device: &Device, x: &Array) -> Result<Array> {
    let length = device.sqrt(&device.sum(&device.multiply(x, x)?, -1, true)?)?;
    device.divide(x, &device.maximum(&length, &Array::scalar(LEAST_LENGTH, x.dtype())?)?)
}
