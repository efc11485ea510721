//! The memory of RWKV-7 (Peng et al. 2025).
//!
//! A head's memory `S` `[value, key]` fades by channel, takes back along a direction what it says there, and is written to:
//! `S = S diag(w) + (S a) b^T + v k^T; y = S r`. On Metal a kernel walks over the tokens with the memory in registers; elsewhere each token
//! is a few operations in the model's element type, as in mlx-lm.

use super::by_row::tokens;
use mlxnode_mlx::{Array, Constant, Device, Launch, MetalKernel, Result};

/// The rule.
pub(crate) struct Wkv {
    kernel: Option<MetalKernel>,
}

/// What a row's tokens bring, `[1, tokens, heads, head_dim]` each; with several lanes in place of the first 1 one token of each.
pub(crate) struct Inputs {
    pub(crate) receptance: Array,
    pub(crate) decay: Array,
    pub(crate) key: Array,
    pub(crate) value: Array,
    pub(crate) away: Array,
    pub(crate) back: Array,
}

impl Wkv {
    /// Takes the kernel where there is Metal.
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let inputs = [c"receptance", c"decay", c"key", c"value", c"away", c"back", c"before", c"tokens"];
        let kernel = MetalKernel::new(device, c"mlxnode_wkv", &inputs, &[c"read", c"after"], KERNEL)?;
        Ok(Self { kernel })
    }

    /// What the tokens read, `[1, tokens, heads, head_dim]`, and the memories after them, `[1, heads, head_dim, head_dim]`, in the
    /// inputs' element type. Without `memory` they begin empty.
    pub(crate) fn forward(
        &self,
        device: &Device,
        inputs: &Inputs,
        memory: Option<&Array>,
    ) -> Result<(Array, Array)> {
        let &[lanes, count, heads, head_dim] = inputs.receptance.shape() else {
            return Err(mlxnode_mlx::Error::Mlx("what memories take up has four dimensions".to_owned()));
        };
        let mut memory = match memory {
            Some(memory) => memory.clone(),
            None => device.zeros(&[lanes, heads, head_dim, head_dim], inputs.receptance.dtype())?,
        };
        if let Some(kernel) = self.kernel.as_ref().filter(|_| head_dim % LANES == 0 && !device.is_tracing()) {
            return on_metal(device, kernel, inputs, &memory);
        }
        let mut read = Vec::with_capacity(count as usize);
        for token in 0..count {
            let of = |array: &Array, shape: &[i32]| {
                let array = if count == 1 { array.clone() } else { tokens(device, array, token, token + 1)? };
                device.reshape(&array, shape)
            };
            let (row, column) = ([lanes, heads, 1, head_dim], [lanes, heads, head_dim, 1]);
            let known = device.matmul(&memory, &of(&inputs.away, &column)?)?;
            let taken_back = device.multiply(&known, &of(&inputs.back, &row)?)?;
            let faded = device.multiply(&memory, &of(&inputs.decay, &row)?)?;
            let written = device.multiply(&of(&inputs.value, &column)?, &of(&inputs.key, &row)?)?;
            memory = device.add(&device.add(&faded, &written)?, &taken_back)?;
            let seen = device.matmul(&memory, &of(&inputs.receptance, &column)?)?;
            read.push(device.reshape(&seen, &[lanes, 1, heads, head_dim])?);
        }
        let read = if read.len() == 1 { read.swap_remove(0) } else { device.concatenate(&read, 1)? };
        Ok((read, memory))
    }
}

fn on_metal(
    device: &Device,
    kernel: &MetalKernel,
    inputs: &Inputs,
    memory: &Array,
) -> Result<(Array, Array)> {
    let shape = inputs.receptance.shape();
    let dtype = inputs.receptance.dtype();
    let (lanes, count, heads, head_dim) =
        (memory.dim(0), inputs.receptance.dim(1), memory.dim(1), memory.dim(2));
    let launch = Launch {
        constants: &[
            (c"ELEMENT", Constant::Type(dtype)),
            (c"HEADS", Constant::Int(heads)),
            (c"HEAD_DIM", Constant::Int(head_dim)),
        ],
        grid: [LANES, head_dim, lanes * heads],
        group: [LANES, 4, 1],
        outputs: &[(shape, dtype), (memory.shape(), dtype)],
    };
    let tokens = Array::from_bytes(&count.to_le_bytes(), &[], mlxnode_mlx::Dtype::I32)?;
    let Inputs { receptance, decay, key, value, away, back } = inputs;
    let arrays = [receptance, decay, key, value, away, back, memory, &tokens];
    match kernel.run(device, &arrays, &launch)?.as_slice() {
        [read, after] => Ok((read.clone(), after.clone())),
        _ => Err(mlxnode_mlx::Error::Mlx("the kernel of the memory has two results".to_owned())),
    }
}

/// Threads of a SIMD group, which share the channels of a key.
const LANES: i32 = 32;

/// A SIMD group works on one row of one memory, a channel of the value: each lane holds `WIDTH` neighbouring channels of the key in
/// registers, single precision, while the tokens go by, and sums over channels are sums over lanes. It has not run on this project's
/// own machines, which have no Metal; on a Mac the tests that compare with mlx-lm run it.
const KERNEL: &str = r"
    constexpr uint WIDTH = HEAD_DIM / 32;
    const uint lane = thread_position_in_threadgroup.x;
    const uint row = thread_position_in_grid.y;
    const uint each = thread_position_in_grid.z; // head by head, sequence by sequence
    const uint begin = (each / HEADS) * tokens * HEADS + each % HEADS;
    const uint first = lane * WIDTH;
    const uint place = (each * HEAD_DIM + row) * HEAD_DIM + first;

    float memory[WIDTH];
    for (uint i = 0; i < WIDTH; ++i) {
        memory[i] = static_cast<float>(before[place + i]);
    }
    for (int token = 0; token < tokens; ++token) {
        const uint of_head = (begin + token * HEADS) * HEAD_DIM;
        float known = 0.0f;
        for (uint i = 0; i < WIDTH; ++i) {
            known += memory[i] * static_cast<float>(away[of_head + first + i]);
        }
        known = simd_sum(known);
        const float written = static_cast<float>(value[of_head + row]);
        float sum = 0.0f;
        for (uint i = 0; i < WIDTH; ++i) {
            const uint channel = of_head + first + i;
            memory[i] = memory[i] * static_cast<float>(decay[channel]) + written * static_cast<float>(key[channel])
                + known * static_cast<float>(back[channel]);
            sum += memory[i] * static_cast<float>(receptance[channel]);
        }
        sum = simd_sum(sum);
        if (lane == 0) {
            read[of_head + row] = static_cast<ELEMENT>(sum);
        }
    }
    for (uint i = 0; i < WIDTH; ++i) {
        after[place + i] = static_cast<ELEMENT>(memory[i]);
    }
";
