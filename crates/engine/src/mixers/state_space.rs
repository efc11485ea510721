//! The state-space recurrence of Mamba 2 (Dao and Gu 2024).
//!
//! A head's state `S` `[head_dim, state]` fades and takes the token up: `S = exp(a d) S + d x B^T; y = S C + D x`, with the step `d`
//! of the token and the head, and `a < 0`. One token by itself is these equations, on Metal in a kernel. Prompts go in chunks, within
//! which tokens meet as in attention, their scores `C B^T` faded by the decay between them. Order of operations and element types
//! are those of mlx-lm: products of B and C in the model's type, all else in single precision.

use super::by_row::tokens;
use mlxnode_mlx::{Array, Constant, Device, Dtype, Launch, MetalKernel, Result};

/// Tokens of a chunk; mlx-lm's value.
const CHUNK: i32 = 256;

/// The recurrence with its parameters.
pub(crate) struct StateSpace {
    /// `a`, `[heads]`, single precision.
    pub(crate) rate: Array,
    /// `D`, `[heads]`.
    pub(crate) skip: Array,
    /// Added to the steps before softplus, `[heads]`.
    pub(crate) step_bias: Array,
    /// Smallest and largest step.
    pub(crate) limits: (f32, f32),
    pub(crate) kernel: Option<MetalKernel>,
}

/// What a row's tokens bring; with several lanes in place of the first 1 one token of each.
pub(crate) struct Inputs {
    /// `[1, tokens, heads, head_dim]`.
    pub(crate) x: Array,
    /// `[1, tokens, groups, state]`; neighbouring heads share a group.
    pub(crate) b: Array,
    /// `[1, tokens, groups, state]`.
    pub(crate) c: Array,
    /// `[1, tokens, heads]`, before bias and softplus.
    pub(crate) steps: Array,
}

impl StateSpace {
    /// The kernel, where there is Metal.
    pub(crate) fn kernel(device: &Device) -> Result<Option<MetalKernel>> {
        let inputs = [c"x", c"b", c"c", c"steps", c"rate", c"skip", c"before"];
        MetalKernel::new(device, c"mlxnode_state_space", &inputs, &[c"read", c"after"], KERNEL)
    }

    /// What the tokens read, `[1, tokens, heads, head_dim]`, and the states after them, `[1, heads, head_dim, state]` in single
    /// precision. Without `state` they begin empty.
    pub(crate) fn forward(
        &self,
        device: &Device,
        inputs: &Inputs,
        state: Option<&Array>,
    ) -> Result<(Array, Array)> {
        let steps = self.steps(device, &inputs.steps)?;
        let (lanes, count) = (inputs.x.dim(0), inputs.x.dim(1));
        if let (1, Some(state), Some(kernel)) = (count, state, &self.kernel)
            && state.dim(3) % LANES == 0
            && !device.is_tracing()
        {
            return self.on_metal(device, kernel, inputs, &steps, state);
        }
        let decay = device.multiply(&steps, &self.rate)?;
        let heads = inputs.x.dim(2);
        let taken = device.multiply(&device.reshape(&steps, &[lanes, count, heads, 1])?, &inputs.x)?;
        let (read, state) = match count {
            1 => step(device, inputs, &taken, &decay, state)?,
            _ => chunks(device, inputs, &taken, &decay, state)?,
        };
        let skip = device.reshape(&self.skip, &[1, 1, heads, 1])?;
        Ok((device.add(&read, &device.multiply(&inputs.x, &skip)?)?, state))
    }

    /// `softplus(steps + bias)` within the limits, single precision.
    fn steps(&self, device: &Device, steps: &Array) -> Result<Array> {
        let number = |value: f32| Array::scalar(value, Dtype::F32);
        let sum = device.add(&device.cast(steps, Dtype::F32)?, &self.step_bias)?;
        let mut steps = device.logaddexp(&sum, &number(0.0)?)?;
        let (smallest, largest) = self.limits;
        if smallest > 0.0 {
            steps = device.maximum(&steps, &number(smallest)?)?; // softplus is never below 0
        }
        if largest.is_finite() {
            steps = device.minimum(&steps, &number(largest)?)?;
        }
        Ok(steps)
    }

    fn on_metal(
        &self,
        device: &Device,
        kernel: &MetalKernel,
        inputs: &Inputs,
        steps: &Array,
        state: &Array,
    ) -> Result<(Array, Array)> {
        let (lanes, heads, head_dim) = (state.dim(0), state.dim(1), state.dim(2));
        let launch = Launch {
            constants: &[
                (c"ELEMENT", Constant::Type(inputs.x.dtype())),
                (c"HEADS", Constant::Int(heads)),
                (c"GROUPS", Constant::Int(inputs.b.dim(2))),
                (c"HEAD_DIM", Constant::Int(head_dim)),
                (c"STATE", Constant::Int(state.dim(3))),
            ],
            grid: [LANES, head_dim, lanes * heads],
            group: [LANES, 8, 1],
            outputs: &[(inputs.x.shape(), inputs.x.dtype()), (state.shape(), Dtype::F32)],
        };
        let arrays = [&inputs.x, &inputs.b, &inputs.c, steps, &self.rate, &self.skip, state];
        match kernel.run(device, &arrays, &launch)?.as_slice() {
            [read, state] => Ok((read.clone(), state.clone())),
            _ => Err(mlxnode_mlx::Error::Mlx("the kernel of the state space has two results".to_owned())),
        }
    }
}

/// Threads of a SIMD group, which share the state of one channel.
const LANES: i32 = 32;

/// One token: a SIMD group works on one channel of one head, each lane on `WIDTH` neighbouring numbers of its state. It has not run
/// on this project's own machines, which have no Metal; on a Mac the tests that compare with mlx-lm run it.
const KERNEL: &str = r"
    constexpr uint WIDTH = STATE / 32;
    const uint lane = thread_position_in_threadgroup.x;
    const uint channel = thread_position_in_grid.y;
    const uint each = thread_position_in_grid.z; // head by head, sequence by sequence
    const uint head = each % HEADS;
    const uint shared = ((each / HEADS) * GROUPS + head / (HEADS / GROUPS)) * STATE + lane * WIDTH;
    const uint place = (each * HEAD_DIM + channel) * STATE + lane * WIDTH;

    const float value = static_cast<float>(x[each * HEAD_DIM + channel]);
    const float left = metal::exp(rate[head] * steps[each]);
    const float taken = value * steps[each];
    float sum = 0.0f;
    for (uint i = 0; i < WIDTH; ++i) {
        const float next = left * before[place + i] + taken * static_cast<float>(b[shared + i]);
        after[place + i] = next;
        sum += next * static_cast<float>(c[shared + i]);
    }
    sum = simd_sum(sum);
    if (lane == 0) {
        read[each * HEAD_DIM + channel] = static_cast<ELEMENT>(sum + value * static_cast<float>(skip[head]));
    }
";

/// One token; `taken` is `d x` and `decay` is `a d`. What it reads is without the skip.
fn step(
    device: &Device,
    inputs: &Inputs,
    taken: &Array,
    decay: &Array,
    state: Option<&Array>,
) -> Result<(Array, Array)> {
    let (lanes, heads, head_dim) = (taken.dim(0), taken.dim(2), taken.dim(3));
    let (groups, size) = (inputs.b.dim(2), inputs.b.dim(3));
    let shared = heads / groups; // heads of a group
    let b = device.reshape(&inputs.b, &[lanes, groups, 1, size])?;
    let c = device.reshape(&inputs.c, &[lanes, groups, size, 1])?;
    let score = device.matmul(&b, &c)?; // [lanes, groups, 1, 1]
    let taken = device.reshape(taken, &[lanes, groups, shared * head_dim, 1])?;
    let mut read = device.multiply(&score, &taken)?;
    let mut next = device.multiply(&taken, &b)?;
    if let Some(state) = state {
        let left = device.reshape(&device.exp(decay)?, &[lanes, heads, 1, 1])?;
        let rows = [lanes, groups, shared * head_dim, size];
        let faded = device.reshape(&device.multiply(&left, state)?, &rows)?;
        next = device.add(&next, &faded)?;
        read = device.add(&read, &device.matmul(&faded, &c)?)?;
    }
    let read = device.cast(&device.reshape(&read, &[lanes, 1, heads, head_dim])?, inputs.x.dtype())?;
    Ok((read, device.reshape(&next, &[lanes, heads, head_dim, size])?))
}

/// Several tokens; arguments and results as in [`step`].
fn chunks(
    device: &Device,
    inputs: &Inputs,
    taken: &Array,
    decay: &Array,
    state: Option<&Array>,
) -> Result<(Array, Array)> {
    let (count, heads, head_dim) = (taken.dim(1), taken.dim(2), taken.dim(3));
    let (groups, size) = (inputs.b.dim(2), inputs.b.dim(3));
    let shared = heads / groups;
    let mut state =
        state.map(|state| device.reshape(state, &[1, groups, shared, head_dim, size])).transpose()?;
    let mut read = Vec::new();
    let mut start = 0;
    while start < count {
        let stop = count.min(start + CHUNK);
        let length = stop - start;
        let cut = |array: &Array, shape: &[i32]| {
            let part = if length == count { array.clone() } else { tokens(device, array, start, stop)? };
            let part = device.reshape(&part, shape)?;
            device.transpose(&part, &[0, 2, 3, 1, 4])
        };
        // `[1, groups, heads of a group or 1, tokens, channels]`.
        let b = cut(&inputs.b, &[1, length, groups, 1, size])?;
        let c = cut(&inputs.c, &[1, length, groups, 1, size])?;
        let taken = cut(taken, &[1, length, groups, shared, head_dim])?;
        let decay = cut(decay, &[1, length, groups, shared, 1])?;
        // Row t, column i: the sum over the tokens after i up to t.
        let between = device.broadcast(&decay, &[1, groups, shared, length, length])?;
        let between = device.prefix_sum(&device.lower_triangle(&between, -1)?, -2)?;
        let between = device.exp(&between)?;
        let scores = device.matmul(&c, &device.transpose(&b, &[0, 1, 2, 4, 3])?)?;
        let scores = device.lower_triangle(&device.multiply(&scores, &between)?, 0)?;
        let mut mixed = device.matmul(&scores, &taken)?;
        let to_end =
            device.slice(&between, &[0, 0, 0, length - 1, 0], &[1, groups, shared, length, length])?;
        let faded = device.transpose(&taken, &[0, 1, 2, 4, 3])?;
        let faded = device.multiply(&faded, &to_end)?;
        let mut next = device.matmul(&faded, &device.cast(&b, Dtype::F32)?)?;
        if let Some(state) = &state {
            let left = device.exp(&device.prefix_sum(&decay, -2)?)?;
            let whole = device.slice(&left, &[0, 0, 0, length - 1, 0], &[1, groups, shared, length, 1])?;
            next = device.add(&next, &device.multiply(&whole, state)?)?;
            let turned = device.transpose(state, &[0, 1, 2, 4, 3])?;
            let old = device.matmul(&device.cast(&c, Dtype::F32)?, &turned)?;
            mixed = device.add(&mixed, &device.multiply(&left, &old)?)?;
        }
        let mixed = device.transpose(&mixed, &[0, 3, 1, 2, 4])?;
        let mixed = device.reshape(&mixed, &[1, length, heads, head_dim])?;
        read.push(device.cast(&mixed, inputs.x.dtype())?);
        state = Some(next);
        start = stop;
    }
    let read = if read.len() == 1 { read.swap_remove(0) } else { device.concatenate(&read, 1)? };
    let Some(state) = state else {
        return Err(mlxnode_mlx::Error::Mlx("there are no tokens".to_owned()));
    };
    Ok((read, device.reshape(&state, &[1, heads, head_dim, size])?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_compute_what_single_tokens_do() {
        let device = Device::open().unwrap();
        let (heads, groups, head_dim, size, count) = (4, 2, 3, 5, 300);
        let wave = |shape: &[i32], pace: f32| {
            let length = shape.iter().product::<i32>();
            let values: Vec<f32> = (0..length).map(|index| (index as f32 * pace).sin()).collect();
            Array::from_f32(&values, shape).unwrap()
        };
        let core = StateSpace {
            rate: device.negative(&device.exp(&wave(&[heads], 0.7)).unwrap()).unwrap(),
            skip: wave(&[heads], 1.1),
            step_bias: wave(&[heads], 0.3),
            limits: (0.001, 1.0),
            kernel: None,
        };
        let inputs = Inputs {
            x: wave(&[1, count, heads, head_dim], 0.37),
            b: wave(&[1, count, groups, size], 0.53),
            c: wave(&[1, count, groups, size], 0.91),
            steps: wave(&[1, count, heads], 0.17),
        };
        let values = |array: &Array| device.contiguous(array).unwrap().to_f32().unwrap();
        let (read, after) = core.forward(&device, &inputs, None).unwrap();
        let (mut expected, mut state) = (Vec::new(), None);
        for index in 0..count {
            let cut = |array: &Array| tokens(&device, array, index, index + 1).unwrap();
            let token =
                Inputs { x: cut(&inputs.x), b: cut(&inputs.b), c: cut(&inputs.c), steps: cut(&inputs.steps) };
            let (read, next) = core.forward(&device, &token, state.as_ref()).unwrap();
            expected.extend(values(&read));
            state = Some(next);
        }
        let close = |actual: &[f32], expected: &[f32]| {
            let mut pairs = actual.iter().zip(expected);
            actual.len() == expected.len() && pairs.all(|(a, b)| (a - b).abs() < 1e-5)
        };
        assert!(close(&values(&read), &expected));
        assert!(close(&values(&after), &values(&state.unwrap())));
    }
}
