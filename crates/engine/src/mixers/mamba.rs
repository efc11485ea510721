//! Mamba, as mamba, falcon_mamba and jamba have it: see [`mlxnode_checkpoint::MambaSpec`].
//!
//! A channel's state `s` fades and takes the token up: `s = exp(a d) s + d x B; y = s C + D x`, with the step `d` of the token and the
//! channel. What does not depend on the state is computed for all tokens at once; then it goes token by token, in the element types
//! of mlx-lm, which rounds states as they come.

use super::CausalConvolution;
use super::by_row::{by_row, channels, tokens};
use crate::batch::Batch;
use crate::feed_forward::activate;
use crate::linear::Linear;
use mlxnode_checkpoint::Activation;
use mlxnode_mlx::{Array, Device, Error, Result};

/// Tokens whose decays are in memory at once: `[tokens, width, state]` twice.
const CHUNK: i32 = 64;

/// The Mamba mixer of one layer. States: the convolution's last inputs, then those of the channels, `[1, width, state]`.
pub(crate) struct Mamba {
    /// To convolved inputs and gate, in this order.
    pub(crate) input: Linear,
    pub(crate) convolution: CausalConvolution,
    /// To steps, B and C, in this order.
    pub(crate) selection: Linear,
    pub(crate) norms: SelectionNorms,
    /// Steps for all channels.
    pub(crate) steps: Linear,
    /// `a = -exp(A_log)`, `[width, state]`.
    pub(crate) rate: Array,
    /// `D`, `[width]`.
    pub(crate) skip: Array,
    pub(crate) output: Linear,
    pub(crate) width: i32,
    pub(crate) state: i32,
    pub(crate) rank: i32,
    /// States have the element type of the inputs.
    pub(crate) rounded_states: bool,
}

/// Norms on steps, B and C.
pub(crate) enum SelectionNorms {
    Absent,
    Unweighted {
        eps: f32,
    },
    /// Weights of the three.
    Weighted {
        weights: [Array; 3],
        eps: f32,
    },
}

impl SelectionNorms {
    /// Of part `index`: steps, B or C.
    pub(crate) fn apply(&self, device: &Device, x: Array, index: usize) -> Result<Array> {
        match self {
            Self::Absent => Ok(x),
            Self::Unweighted { eps } => device.rms_normalize(&x, *eps),
            Self::Weighted { weights, eps } => match weights.get(index) {
                Some(weight) => device.rms_norm(&x, weight, *eps),
                None => Err(Error::Mlx("there are three norms on what is selected".to_owned())),
            },
        }
    }
}

impl Mamba {
    /// `[1, tokens of all rows, hidden]` to the same; this is layer `layer` of the range.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let projected = self.input.forward(device, x)?;
        let inputs = channels(device, &projected, 0, self.width)?;
        let gate = channels(device, &projected, self.width, 2 * self.width)?;
        let mut seen = Vec::with_capacity(batch.rows.len());
        let convolved = by_row(device, [inputs], layer, batch, |[inputs], cache| {
            let (convolved, last) =
                self.convolution.forward(device, &inputs, cache.states.arrays().first())?;
            seen.push(last);
            Ok(convolved)
        })?;
        let x = activate(device, Activation::Silu, &convolved)?;
        let [steps, b, c] = self.select(device, &x)?;
        let steps = device.softplus(&self.steps.forward(device, &steps)?)?;
        let taken = device.multiply(&steps, &x)?;
        let mut seen = seen.into_iter();
        let read = by_row(device, [taken, steps, b, c], layer, batch, |parts, cache| {
            let count = parts[0].dim(1);
            let (read, state) = self.recur(device, parts, cache.states.arrays().get(1))?;
            let last = seen.next().ok_or_else(|| Error::Mlx("a row was not convolved".to_owned()))?;
            cache.states.replace(vec![last, state], count);
            Ok(read)
        })?;
        let mixed = device.add(&read, &device.multiply(&self.skip, &x)?)?;
        let gated = device.multiply(&activate(device, Activation::Silu, &gate)?, &mixed)?;
        self.output.forward(device, &gated)
    }

    /// Steps `[1, tokens, rank]`, B and C `[1, tokens, state]`, normed.
    fn select(&self, device: &Device, x: &Array) -> Result<[Array; 3]> {
        let selected = self.selection.forward(device, x)?;
        let (rank, state) = (self.rank, self.state);
        let part = |index: usize, from: i32, to: i32| {
            self.norms.apply(device, channels(device, &selected, from, to)?, index)
        };
        Ok([part(0, 0, rank)?, part(1, rank, rank + state)?, part(2, rank + state, rank + 2 * state)?])
    }

    /// One row's tokens into its states: what they read, `[1, tokens, width]`, and the states after them.
    fn recur(&self, device: &Device, parts: [Array; 4], before: Option<&Array>) -> Result<(Array, Array)> {
        let count = parts[0].dim(1);
        let mut state = before.cloned();
        let mut read = Vec::new();
        let mut start = 0;
        while start < count {
            let stop = count.min(start + CHUNK);
            let cut = |array: &Array| match stop - start == count {
                true => Ok(array.clone()),
                false => tokens(device, array, start, stop),
            };
            let [taken, steps, b, c] = &parts;
            let chunk = [cut(taken)?, cut(steps)?, cut(b)?, cut(c)?];
            let (read_here, next) = self.chunk(device, &chunk, state.as_ref())?;
            read.push(read_here);
            state = Some(next);
            start = stop;
        }
        let read = if read.len() == 1 { read.swap_remove(0) } else { device.concatenate(&read, 1)? };
        let state = state.ok_or_else(|| Error::Mlx("there are no tokens".to_owned()))?;
        Ok((read, state))
    }

    fn chunk(
        &self,
        device: &Device,
        [taken, steps, b, c]: &[Array; 4],
        before: Option<&Array>,
    ) -> Result<(Array, Array)> {
        let (count, width, size) = (taken.dim(1), self.width, self.state);
        let column = [1, count, width, 1];
        let taken = device.reshape(taken, &column)?;
        let taken = device.multiply(&taken, &device.reshape(b, &[1, count, 1, size])?)?;
        // Of the very first token nothing fades.
        let left = match before.is_some() || count > 1 {
            true => {
                let exponents = device.multiply(&device.reshape(steps, &column)?, &self.rate)?;
                Some(device.exp(&exponents)?)
            }
            false => None,
        };
        let at = |array: &Array, index: i32| match count {
            1 => Ok(array.clone()),
            _ => tokens(device, array, index, index + 1),
        };
        let mut state = match before {
            Some(before) => Some(device.reshape(before, &[1, 1, width, size])?),
            None => None,
        };
        let mut states = Vec::new();
        for index in 0..count {
            let taken = at(&taken, index)?;
            let next = match (&state, &left) {
                (Some(state), Some(left)) => {
                    let next = faded_and_taken(device, state, &at(left, index)?, &taken)?;
                    if self.rounded_states { device.cast(&next, taken.dtype())? } else { next }
                }
                _ => taken,
            };
            states.push(next.clone());
            state = Some(next);
        }
        let last = state.ok_or_else(|| Error::Mlx("there are no tokens".to_owned()))?;
        let last = device.reshape(&last, &[1, width, size])?;
        let states =
            if states.len() == 1 { states.swap_remove(0) } else { device.concatenate(&states, 1)? };
        let read = device.matmul(&states, &device.reshape(c, &[1, count, size, 1])?)?;
        Ok((device.reshape(&read, &[1, count, width])?, last))
    }
}

/// `state * left + taken`: one kernel on a GPU.
fn faded_and_taken(device: &Device, state: &Array, left: &Array, taken: &Array) -> Result<Array> {
    let inputs = [state, left, taken];
    if device.fuses() {
        device.fused(by_single_operations, &inputs)
    } else {
        by_single_operations(device, &inputs)
    }
}

fn by_single_operations(device: &Device, inputs: &[&Array]) -> Result<Array> {
    let [state, left, taken] = inputs else {
        return Err(Error::Mlx("a state takes a token up with three inputs".to_owned()));
    };
    device.add(&device.multiply(state, left)?, taken)
}
