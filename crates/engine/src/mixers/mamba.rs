//! Mamba, as mamba, falcon_mamba and jamba have it (Gu and Dao 2023).
//!
//! A channel's state `s` fades and takes the token up: `s = exp(d A) s + d x B; y = s C + D x`, with the step `d` of the token and
//! the channel, and `A < 0`. The decays differ from number to number of a state, so that there is no way around going token by token;
//! all that does not depend on the state before is computed for a stretch of tokens at once. Order of operations and element
//! types are those of mlx-lm.

use super::CausalConvolution;
use super::by_row::{by_row, channels, tokens};
use crate::batch::Batch;
use crate::feed_forward::activate;
use crate::linear::Linear;
use mlxnode_checkpoint::Activation;
use mlxnode_mlx::{Array, Device, Result};

/// Tokens whose states are held at once: 64 of 8192 channels and 16 numbers are 32 MiB in single precision.
const STRETCH: i32 = 64;

/// The Mamba mixer of one layer. States: the convolution's last inputs, then those of the channels `[1, width, state]`.
pub(crate) struct Mamba {
    /// To channels and gate, in this order.
    pub(crate) input: Linear,
    pub(crate) convolution: CausalConvolution,
    /// To what the steps are made from, B and C.
    pub(crate) selection: Linear,
    pub(crate) norms: StateNorms,
    /// To the steps.
    pub(crate) steps: Linear,
    /// A, `[width, state]`.
    pub(crate) rate: Array,
    /// D, `[width]`.
    pub(crate) skip: Array,
    pub(crate) output: Linear,
    /// States have the element type of what they take up.
    pub(crate) rounded: bool,
    pub(crate) width: i32,
    pub(crate) rank: i32,
    pub(crate) state: i32,
}

/// The norms on what the steps are made from, on B and on C.
pub(crate) enum StateNorms {
    Absent,
    Unweighted {
        eps: f32,
    },
    Weighted {
        /// `[rank]`, `[state]`, `[state]`.
        weights: [Array; 3],
        eps: f32,
    },
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
        let mut kept = Vec::with_capacity(batch.rows.len());
        let convolved = by_row(device, [inputs], layer, batch, |[inputs], cache| {
            let (convolved, last) =
                self.convolution.forward(device, &inputs, cache.states.arrays().first())?;
            kept.push(last);
            Ok(convolved)
        })?;
        let x = activate(device, Activation::Silu, &convolved)?;
        let [steps, b, c] = self.select(device, &x)?;
        let taken = device.multiply(&steps, &x)?;
        let mut kept = kept.into_iter();
        let read = by_row(device, [taken, steps, b, c], layer, batch, |parts, cache| {
            let count = parts[0].dim(1);
            let (read, state) = self.remember(device, parts, cache.states.arrays().get(1))?;
            cache.states.replace(kept.next().into_iter().chain([state]).collect(), count);
            Ok(read)
        })?;
        let read = device.add(&read, &device.multiply(&self.skip, &x)?)?;
        let gated = device.multiply(&activate(device, Activation::Silu, &gate)?, &read)?;
        self.output.forward(device, &gated)
    }

    /// Steps `[1, tokens, width]`, B and C `[1, tokens, state]`.
    fn select(&self, device: &Device, x: &Array) -> Result<[Array; 3]> {
        let all = self.selection.forward(device, x)?;
        let (rank, state) = (self.rank, self.state);
        let parts = [
            channels(device, &all, 0, rank)?,
            channels(device, &all, rank, rank + state)?,
            channels(device, &all, rank + state, rank + 2 * state)?,
        ];
        let [steps, b, c] = match &self.norms {
            StateNorms::Absent => parts,
            StateNorms::Unweighted { eps } => {
                let [steps, b, c] = parts.map(|part| device.rms_normalize(&part, *eps));
                [steps?, b?, c?]
            }
            StateNorms::Weighted { weights: [of_steps, of_b, of_c], eps } => {
                let [steps, b, c] = parts;
                [
                    device.rms_norm(&steps, of_steps, *eps)?,
                    device.rms_norm(&b, of_b, *eps)?,
                    device.rms_norm(&c, of_c, *eps)?,
                ]
            }
        };
        Ok([device.softplus(&self.steps.forward(device, &steps)?)?, b, c])
    }

    /// One row's tokens into its states: what they read, `[1, tokens, width]` without the skip, and the states after them.
    fn remember(
        &self,
        device: &Device,
        [taken, steps, b, c]: [Array; 4],
        state: Option<&Array>,
    ) -> Result<(Array, Array)> {
        let count = taken.dim(1);
        // Of sequences side by side there is a token of each.
        let lanes = taken.dim(0);
        let shape = [lanes, self.width, self.state];
        let (mut state, mut read) = (state.cloned(), Vec::new());
        let mut start = 0;
        while start < count {
            let stop = count.min(start + STRETCH);
            let cut = |array: &Array| match stop - start == count {
                true => Ok(array.clone()),
                false => tokens(device, array, start, stop),
            };
            // `[1, tokens, width, state]`.
            let new = device.multiply(&device.expand(&cut(&taken)?, -1)?, &device.expand(&cut(&b)?, -2)?)?;
            let states = self.states(device, &new, &device.expand(&cut(&steps)?, -1)?, state.as_ref())?;
            let length = stop - start;
            let last = if length > 1 { tokens(device, &states, length - 1, length)? } else { states.clone() };
            let last = device.reshape(&last, &shape)?;
            // A view of a prompt would keep all of it in memory.
            let last = if length > 1 { device.contiguous(&last)? } else { last };
            let stretch = device.matmul(&states, &device.expand(&cut(&c)?, -1)?)?;
            read.push(device.reshape(&stretch, &[lanes, length, self.width])?);
            state = Some(last);
            start = stop;
        }
        let read = if read.len() == 1 { read.swap_remove(0) } else { device.concatenate(&read, 1)? };
        match state {
            Some(state) => Ok((read, state)),
            None => Err(mlxnode_mlx::Error::Mlx("there are no tokens".to_owned())),
        }
    }

    /// The states after each of the tokens, `[1, tokens, width, state]`. `new` is what each token brings, `steps` are
    /// `[1, tokens, width, 1]`.
    fn states(&self, device: &Device, new: &Array, steps: &Array, state: Option<&Array>) -> Result<Array> {
        let count = new.dim(1);
        if count == 1 && state.is_none() {
            return Ok(new.clone());
        }
        let left = device.exp(&device.multiply(steps, &self.rate)?)?;
        let next = |state: &Array, left: &Array, new: &Array| {
            let sum = device.fused(faded_and_taken, &[state, left, new])?;
            if self.rounded { device.cast(&sum, new.dtype()) } else { Ok(sum) }
        };
        if let (1, Some(state)) = (count, state) {
            return next(&device.expand(state, 1)?, &left, new);
        }
        let mut states: Vec<Array> = Vec::with_capacity(count as usize);
        for token in 0..count {
            let new = tokens(device, new, token, token + 1)?;
            let before = states.last().or(state);
            let after = match before {
                Some(before) => next(before, &tokens(device, &left, token, token + 1)?, &new)?,
                None => new,
            };
            states.push(after);
        }
        device.concatenate(&states, 1)
    }
}

/// `state * left + new`: one kernel on a GPU.
fn faded_and_taken(device: &Device, inputs: &[&Array]) -> Result<Array> {
    match inputs {
        [state, left, new] => device.add(&device.multiply(state, left)?, new),
        _ => Err(mlxnode_mlx::Error::Mlx("a state takes a token up with three inputs".to_owned())),
    }
}
