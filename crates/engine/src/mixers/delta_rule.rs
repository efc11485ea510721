//! The delta rule with decay: what a gated delta network does with its memory.
//!
//! A head's memory `S` `[value_dim, key_dim]` fades, is corrected by what it does not know yet, and is read:
//! `S = decay * S; u = strength * (v - S k); S = S + u k^T; y = S q`, all in single precision.
//!
//! There are three ways, which differ in rounding only. One token by itself is these equations. On Metal a kernel walks over the
//! tokens with the memory in registers. Elsewhere prompts go in chunks (Yang et al. 2024, "Parallelizing Linear Transformers with
//! the Delta Rule", "Gated Delta Networks"): within a chunk the corrections `u` are the solution of a triangular system, so that all
//! that is left to do token by token is to go from chunk to chunk. mlx-lm loops over tokens there.

use super::delta_chunks::chunks;
use mlxnode_mlx::{Array, Constant, Device, Dtype, Launch, MetalKernel, Result};

/// Applies the rule.
pub(crate) struct DeltaRule {
    kernel: Option<MetalKernel>,
}

/// What a row's tokens bring; with several lanes in place of the first 1 one token of each.
pub(crate) struct Inputs {
    /// `[1, tokens, key_heads, key_dim]`.
    pub(crate) queries: Array,
    /// `[1, tokens, key_heads, key_dim]`.
    pub(crate) keys: Array,
    /// `[1, tokens, value_heads, value_dim]`; neighbouring value heads share a key head.
    pub(crate) values: Array,
    /// Logarithm of the decay, single precision, `[1, tokens, value_heads]`, or `[1, tokens, value_heads, key_dim]`.
    pub(crate) log_decay: Array,
    /// `[1, tokens, value_heads]`.
    pub(crate) strength: Array,
}

impl DeltaRule {
    /// Takes the kernel where there is Metal.
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let inputs = [c"queries", c"keys", c"values", c"decay", c"strength", c"before", c"tokens"];
        let kernel = MetalKernel::new(device, c"mlxnode_delta_rule", &inputs, &[c"read", c"after"], KERNEL)?;
        Ok(Self { kernel })
    }

    /// What the tokens read, `[1, tokens, value_heads, value_dim]` in the queries' element type, and the memories after them,
    /// `[1, value_heads, value_dim, key_dim]` in single precision. Without `memory` they begin empty.
    pub(crate) fn forward(
        &self,
        device: &Device,
        inputs: &Inputs,
        memory: Option<&Array>,
    ) -> Result<(Array, Array)> {
        let (heads, value_dim) = (inputs.values.dim(2), inputs.values.dim(3));
        let (tokens, key_dim) = (inputs.keys.dim(1), inputs.keys.dim(3));
        let memory = match memory {
            Some(memory) => memory.clone(),
            None => device.zeros(&[inputs.values.dim(0), heads, value_dim, key_dim], Dtype::F32)?,
        };
        match &self.kernel {
            // A kernel has no gradient.
            Some(kernel) if key_dim % LANES == 0 && !device.is_tracing() => {
                on_metal(device, kernel, inputs, &memory)
            }
            _ if tokens == 1 => step(device, inputs, &memory),
            _ => chunks(device, inputs, &memory),
        }
    }
}

/// One token.
fn step(device: &Device, inputs: &Inputs, memory: &Array) -> Result<(Array, Array)> {
    let Inputs { queries, keys, values, log_decay, strength } = inputs;
    let (key_heads, key_dim) = (keys.dim(2), keys.dim(3));
    let (lanes, heads, value_dim) = (values.dim(0), values.dim(2), values.dim(3));
    let shared = heads / key_heads; // value heads of a key head
    let decay = device.reshape(&device.exp(log_decay)?, &[lanes, heads, 1, -1])?;
    let faded = device.multiply(memory, &decay)?;
    // The memories of one key head lie one under the other: one product for all of them.
    let rows = [lanes, key_heads, shared * value_dim, key_dim];
    let faded = device.reshape(&faded, &rows)?;
    let row = [lanes, key_heads, 1, key_dim];
    let keys = device.cast(&device.reshape(keys, &row)?, Dtype::F32)?;
    let queries32 = device.cast(queries, Dtype::F32)?;
    let column = [lanes, key_heads, key_dim, 1];
    let known = device.matmul(&faded, &device.reshape(&keys, &column)?)?;
    let known = device.reshape(&known, &[lanes, heads, value_dim])?;
    let values = device.reshape(values, &[lanes, heads, value_dim])?;
    let strength = device.reshape(strength, &[lanes, heads, 1])?;
    let correction = device.multiply(&device.subtract(&values, &known)?, &strength)?;
    let correction = device.reshape(&correction, &[lanes, key_heads, shared * value_dim, 1])?;
    let memory = device.add(&faded, &device.multiply(&correction, &keys)?)?;
    let read = device.matmul(&memory, &device.reshape(&queries32, &column)?)?;
    let read = device.cast(&device.reshape(&read, &[lanes, 1, heads, value_dim])?, queries.dtype())?;
    Ok((read, device.reshape(&memory, &[lanes, heads, value_dim, key_dim])?))
}

/// Threads of a SIMD group, which share the channels of a key.
const LANES: i32 = 32;

/// A SIMD group works on one row of one memory: each lane holds `WIDTH` neighbouring channels of it in registers while the tokens
/// go by, and sums over channels are sums over lanes. It has not run on this project's own machines, which have no Metal; on a Mac
/// the tests that compare with mlx-lm run it.
const KERNEL: &str = r"
    constexpr uint WIDTH = KEY_DIM / 32;
    const uint lane = thread_position_in_threadgroup.x;
    const uint row = thread_position_in_grid.y;
    const uint each = thread_position_in_grid.z; // head by head, sequence by sequence
    const uint sequence = each / HEADS;
    const uint head = each % HEADS;
    const uint key_head = head / (HEADS / KEY_HEADS);
    const uint first = lane * WIDTH;
    const uint place = (each * VALUE_DIM + row) * KEY_DIM + first;

    float memory[WIDTH];
    for (uint i = 0; i < WIDTH; ++i) {
        memory[i] = before[place + i];
    }
    for (int token = 0; token < tokens; ++token) {
        const uint number = sequence * tokens + token;
        const uint of_head = number * HEADS + head;
        const uint of_key = (number * KEY_HEADS + key_head) * KEY_DIM + first;
        float known = 0.0f;
        for (uint i = 0; i < WIDTH; ++i) {
            memory[i] *= BY_CHANNEL ? decay[of_head * KEY_DIM + first + i] : decay[of_head];
            known += memory[i] * static_cast<float>(keys[of_key + i]);
        }
        known = simd_sum(known);
        const float value = static_cast<float>(values[of_head * VALUE_DIM + row]);
        const float correction = (value - known) * static_cast<float>(strength[of_head]);
        float sum = 0.0f;
        for (uint i = 0; i < WIDTH; ++i) {
            memory[i] += correction * static_cast<float>(keys[of_key + i]);
            sum += memory[i] * static_cast<float>(queries[of_key + i]);
        }
        sum = simd_sum(sum);
        if (lane == 0) {
            read[of_head * VALUE_DIM + row] = static_cast<ELEMENT>(sum);
        }
    }
    for (uint i = 0; i < WIDTH; ++i) {
        after[place + i] = memory[i];
    }
";

fn on_metal(
    device: &Device,
    kernel: &MetalKernel,
    inputs: &Inputs,
    memory: &Array,
) -> Result<(Array, Array)> {
    let Inputs { queries, keys, values, log_decay, strength } = inputs;
    let (tokens, key_heads, key_dim) = (keys.dim(1), keys.dim(2), keys.dim(3));
    let (heads, value_dim) = (values.dim(2), values.dim(3));
    let decay = device.exp(log_decay)?;
    let by_channel = i32::from(log_decay.shape().len() == 4);
    let tokens = Array::from_bytes(&tokens.to_le_bytes(), &[], Dtype::I32)?;
    let launch = Launch {
        constants: &[
            (c"ELEMENT", Constant::Type(queries.dtype())),
            (c"KEY_DIM", Constant::Int(key_dim)),
            (c"VALUE_DIM", Constant::Int(value_dim)),
            (c"KEY_HEADS", Constant::Int(key_heads)),
            (c"HEADS", Constant::Int(heads)),
            (c"BY_CHANNEL", Constant::Int(by_channel)),
        ],
        grid: [LANES, value_dim, values.dim(0) * heads],
        group: [LANES, 4, 1],
        outputs: &[(values.shape(), queries.dtype()), (memory.shape(), Dtype::F32)],
    };
    let arrays = [queries, keys, values, &decay, strength, memory, &tokens];
    match kernel.run(device, &arrays, &launch)?.as_slice() {
        [read, memory] => Ok((read.clone(), memory.clone())),
        _ => Err(mlxnode_mlx::Error::Mlx("the kernel of the delta rule has two results".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, within -1 and 1.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32) / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn inputs(tokens: i32, (key_heads, heads): (i32, i32), by_channel: bool, repeated: bool) -> Inputs {
        let (device, key_dim, value_dim) = (Device::open().unwrap(), 6, 5);
        let array = |shape: &[i32], seed: u64| {
            let count = shape.iter().product::<i32>() as usize;
            Array::from_f32(&numbers(count, seed), shape).unwrap()
        };
        let unit = |shape: &[i32], seed: u64| {
            let x = device.rms_normalize(&array(shape, seed), 0.0).unwrap();
            device.multiply(&x, &Array::scalar((key_dim as f32).powf(-0.5), Dtype::F32).unwrap()).unwrap()
        };
        let shape = [1, tokens, key_heads, key_dim];
        let keys = match repeated {
            true => {
                let one = unit(&[1, 1, key_heads, key_dim], 2);
                device.contiguous(&device.broadcast(&one, &shape).unwrap()).unwrap()
            }
            false => unit(&shape, 2),
        };
        let mut decay_shape = vec![1, tokens, heads];
        if by_channel {
            decay_shape.push(key_dim);
        }
        // From almost nothing lost to almost all.
        let log_decay = array(&decay_shape, 4);
        let log_decay =
            device.multiply(&log_decay, &array(&[1, tokens, heads, 1][..decay_shape.len()], 6)).unwrap();
        let scale = Array::scalar(if repeated { 1e-3 } else { 9.0 }, Dtype::F32).unwrap();
        let log_decay = device.multiply(&log_decay, &log_decay).unwrap();
        let log_decay = device.negative(&device.multiply(&log_decay, &scale).unwrap()).unwrap();
        Inputs {
            queries: unit(&shape, 1),
            keys,
            values: array(&[1, tokens, heads, value_dim], 3),
            log_decay,
            strength: device.sigmoid(&array(&[1, tokens, heads], 5)).unwrap(),
        }
    }

    fn token(device: &Device, inputs: &Inputs, index: i32) -> Inputs {
        let cut = |array: &Array| super::super::by_row::tokens(device, array, index, index + 1).unwrap();
        Inputs {
            queries: cut(&inputs.queries),
            keys: cut(&inputs.keys),
            values: cut(&inputs.values),
            log_decay: cut(&inputs.log_decay),
            strength: cut(&inputs.strength),
        }
    }

    fn values(device: &Device, array: &Array) -> Vec<f32> {
        device.contiguous(array).unwrap().to_f32().unwrap()
    }

    #[test]
    fn chunks_compute_what_single_tokens_do() {
        let device = Device::open().unwrap();
        for by_channel in [false, true] {
            for (tokens, heads, repeated) in [
                (2, (2, 2), false),
                (7, (1, 3), false),
                (8, (2, 4), false),
                (40, (2, 4), false),
                (64, (1, 1), true),
                (150, (2, 4), false),
                (150, (1, 2), true),
            ] {
                let heads = if by_channel { (heads.1, heads.1) } else { heads };
                let inputs = inputs(tokens, heads, by_channel, repeated);
                let memory =
                    Array::from_f32(&numbers((heads.1 * 30) as usize, 9), &[1, heads.1, 5, 6]).unwrap();
                let (read, after) = chunks(&device, &inputs, &memory).unwrap();
                let (mut expected, mut state) = (Vec::new(), memory);
                for index in 0..tokens {
                    let (read, next) = step(&device, &token(&device, &inputs, index), &state).unwrap();
                    expected.extend(values(&device, &read));
                    state = next;
                }
                let close = |actual: &[f32], expected: &[f32]| {
                    let pairs = actual.iter().zip(expected);
                    actual.len() == expected.len() && pairs.clone().all(|(a, b)| (a - b).abs() < 2e-5)
                };
                let place =
                    format!("{tokens} tokens, heads {heads:?}, by channel {by_channel}, repeated {repeated}");
                assert!(close(&values(&device, &read), &expected), "{place}");
                assert!(close(&values(&device, &after), &values(&device, &state)), "{place}: memory");
            }
        }
    }
}
