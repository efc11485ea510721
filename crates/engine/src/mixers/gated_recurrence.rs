//! Griffin's recurrent block, as recurrent_gemma has it (De et al. 2024).
//!
//! A channel's state `h` fades and takes the token up: `h = a h + sqrt(1 - a^2) (i x)`, with `a = exp(-8 r softplus(param))` and the
//! gates `r` and `i` logistic functions of linear maps of x. The first token of a sequence gets in whole. Order of operations and
//! element types are those of mlx-lm.

use super::CausalConvolution;
use super::by_row::{by_row, channels, tokens};
use crate::batch::Batch;
use crate::feed_forward::activate;
use crate::linear::{Linear, Stacked};
use mlxnode_checkpoint::Activation;
use mlxnode_mlx::{Array, Device, Result};

/// The block of one layer. States: the convolution's last inputs, then `[1, width]`.
pub(crate) struct GatedRecurrence {
    /// To the gate on the result, then to what recurs.
    pub(crate) inputs: Stacked,
    pub(crate) convolution: CausalConvolution,
    /// Both gates, the input's first: `[heads, head_dim, 2 head_dim]`.
    pub(crate) gates: Array,
    /// `[heads, 1, 2 head_dim]`.
    pub(crate) gate_bias: Array,
    /// softplus(param), `[width]`.
    pub(crate) rate: Array,
    pub(crate) output: Linear,
    pub(crate) width: i32,
    pub(crate) heads: i32,
}

impl GatedRecurrence {
    /// `[1, tokens of all rows, hidden]` to the same; this is layer `layer` of the range.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let (gate, inputs) = match (&self.inputs.whole, self.inputs.parts.as_slice()) {
            (Some(whole), _) if x.dim(1) == 1 => {
                let both = whole.forward(device, x)?;
                (channels(device, &both, 0, self.width)?, channels(device, &both, self.width, both.dim(2))?)
            }
            (_, [gate, inputs]) => (gate.forward(device, x)?, inputs.forward(device, x)?),
            _ => {
                return Err(mlxnode_mlx::Error::Mlx("a gated recurrence needs two projections".to_owned()));
            }
        };
        let gate = activate(device, Activation::GeluTanh, &gate)?;
        let mut kept = Vec::with_capacity(batch.rows.len());
        let x = by_row(device, [inputs], layer, batch, |[inputs], cache| {
            let (convolved, last) =
                self.convolution.forward(device, &inputs, cache.states.arrays().first())?;
            kept.push(last);
            Ok(convolved)
        })?;
        let [input_gate, left] = self.gated(device, &x)?;
        let number = |value: f32| Array::scalar(value, left.dtype());
        let left = device.multiply(&device.multiply(&number(-8.0)?, &left)?, &self.rate)?; // the logarithm
        let squared = device.exp(&device.multiply(&number(2.0)?, &left)?)?;
        let factor = device.sqrt(&device.subtract(&number(1.0)?, &squared)?)?;
        let factor = device.cast(&factor, x.dtype())?;
        let left = device.exp(&left)?;
        let taken = device.multiply(&x, &input_gate)?;
        let mut kept = kept.into_iter();
        let read = by_row(device, [taken, factor, left], layer, batch, |[taken, factor, left], cache| {
            let (count, state) = (taken.dim(1), cache.states.arrays().get(1));
            let factor = match state {
                Some(_) => factor,
                None => self.whole_first(device, &factor)?,
            };
            let (read, state) = recur(device, &device.multiply(&taken, &factor)?, &left, state)?;
            cache.states.replace(kept.next().into_iter().chain([state]).collect(), count);
            Ok(read)
        })?;
        self.output.forward(device, &device.multiply(&read, &gate)?)
    }

    /// The input's gate and the recurrence's, `[1, tokens, width]`.
    fn gated(&self, device: &Device, x: &Array) -> Result<[Array; 2]> {
        let (count, width) = (x.dim(1), self.width / self.heads);
        let by_head = device.reshape(x, &[1, count, self.heads, width])?;
        let product = device.matmul(&device.transpose(&by_head, &[0, 2, 1, 3])?, &self.gates)?;
        let open = device.sigmoid(&device.add(&product, &self.gate_bias)?)?;
        let part = |from: i32, to: i32| {
            let part = device.transpose(&channels(device, &open, from, to)?, &[0, 2, 1, 3])?;
            device.reshape(&part, &[1, count, self.width])
        };
        Ok([part(0, width)?, part(width, 2 * width)?])
    }

    /// The factors `[1, tokens, width]` with one for the first token.
    fn whole_first(&self, device: &Device, factor: &Array) -> Result<Array> {
        let one = device.broadcast(&Array::scalar(1.0, factor.dtype())?, &[1, 1, self.width])?;
        match factor.dim(1) {
            1 => Ok(one),
            count => device.concatenate([&one, &tokens(device, factor, 1, count)?], 1),
        }
    }
}

/// The states after each of the tokens `[1, tokens, width]`, of which a part `left` stays, and the last one `[1, width]`. Of sequences
/// side by side a token of each, `[lanes, 1, width]`.
fn recur(device: &Device, x: &Array, left: &Array, state: Option<&Array>) -> Result<(Array, Array)> {
    let (lanes, count, width) = (x.dim(0), x.dim(1), x.dim(2));
    let state = match state {
        Some(state) => Some(device.reshape(state, &[lanes, 1, width])?),
        None => None,
    };
    let mut states: Vec<Array> = Vec::with_capacity(count as usize);
    for token in 0..count {
        let cut = |array: &Array| match count {
            1 => Ok(array.clone()),
            _ => tokens(device, array, token, token + 1),
        };
        let new = cut(x)?;
        let next = match states.last().or(state.as_ref()) {
            Some(before) => device.add(&device.multiply(&cut(left)?, before)?, &new)?,
            None => new,
        };
        states.push(next);
    }
    let Some(last) = states.last() else {
        return Err(mlxnode_mlx::Error::Mlx("there are no tokens".to_owned()));
    };
    let last = device.reshape(last, &[lanes, width])?;
    let all = if states.len() == 1 { states.swap_remove(0) } else { device.concatenate(&states, 1)? };
    Ok((all, last))
}
