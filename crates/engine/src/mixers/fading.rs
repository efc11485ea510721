//! Linear attention with a memory that fades by a constant: `S = d S + k^T v; y = s q S`.
//!
//! There are two ways in mlx-lm, and so here. *Rounded*: token by token in the model's element type. *In chunks*: memories in single
//! precision; within a chunk tokens meet as in attention, their scores faded by the tokens between them, so that all that is left to
//! do one after the other is to go from chunk to chunk. The fading between tokens j and i, `d^(i-j)`, is split into a factor of each,
//! centred so that both stay within single precision: at 128 tokens neither is above `e^64`.

use super::by_row::tokens;
use mlxnode_mlx::{Array, Device, Dtype, Result};

/// Tokens of a chunk; mlx-lm's value.
const CHUNK: i32 = 128;

/// The recurrence of one layer's heads.
pub(crate) enum Fading {
    Rounded {
        /// d, `[heads, 1, 1]`, in the model's element type.
        left: Array,
        /// s.
        scale: f32,
    },
    InChunks(Box<Tables>),
}

/// Powers of d, single precision.
pub(crate) struct Tables {
    /// The logarithm of d, `[heads, 1, 1]`.
    decay: Array,
    /// d, `[heads, 1, 1]`.
    left: Array,
    /// For chunks of full length.
    full: Powers,
    scale: f32,
}

/// Powers of d for the tokens of chunks, counted from 1: `[heads, tokens, 1]` each.
struct Powers {
    /// `s d^(i - c)`, with c half the tokens of a chunk.
    of_queries: Array,
    /// `d^(c - i)`.
    of_keys: Array,
    /// `d^(i - c)`.
    centred: Array,
    /// `d^i`.
    whole: Array,
    /// `d^c`, `[heads, 1, 1]`.
    half: Array,
}

impl Powers {
    /// Of chunks of so many tokens; `decay` is the logarithm of d, `[heads, 1, 1]`.
    fn new(device: &Device, decay: &Array, length: i32, scale: f32) -> Result<Self> {
        let places = device.arange(1.0, f64::from(length) + 1.0, 1.0, Dtype::F32)?;
        let places = device.reshape(&places, &[1, length, 1])?;
        let centre = Array::scalar(length as f32 / 2.0, Dtype::F32)?;
        let exponents = device.multiply(decay, &device.subtract(&places, &centre)?)?;
        let centred = device.exp(&exponents)?;
        Ok(Self {
            of_queries: device.multiply(&centred, &Array::scalar(scale, Dtype::F32)?)?,
            of_keys: device.exp(&device.negative(&exponents)?)?,
            centred,
            whole: device.exp(&device.multiply(decay, &places)?)?,
            half: device.exp(&device.multiply(decay, &centre)?)?,
        })
    }
}

impl Fading {
    /// For heads of which `log_decay` is the logarithm of d. `rounded` is the element type of memories that are rounded.
    pub(crate) fn new(
        device: &Device,
        log_decay: &[f32],
        scale: f32,
        rounded: Option<Dtype>,
    ) -> Result<Self> {
        let heads = log_decay.len() as i32;
        let decay = Array::from_f32(log_decay, &[heads, 1, 1])?;
        let left = device.exp(&decay)?;
        if let Some(dtype) = rounded {
            return Ok(Self::Rounded { left: device.cast(&left, dtype)?, scale });
        }
        let full = Powers::new(device, &decay, CHUNK, scale)?;
        Ok(Self::InChunks(Box::new(Tables { decay, left, full, scale })))
    }

    /// Its arrays.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Rounded { left, .. } => vec![left],
            Self::InChunks(tables) => {
                let Tables { decay, left, full, .. } = &**tables;
                vec![decay, left, &full.of_queries, &full.of_keys, &full.centred, &full.whole, &full.half]
            }
        }
    }

    /// What the tokens read, `[1, heads, tokens, head_dim]` like queries, keys and values, and the memories after them,
    /// `[1, heads, head_dim, head_dim]`. Without `memory` they begin empty.
    pub(crate) fn forward(
        &self,
        device: &Device,
        [queries, keys, values]: [&Array; 3],
        memory: Option<&Array>,
    ) -> Result<(Array, Array)> {
        let count = queries.dim(2);
        let scaled = |scale: f32| device.multiply(queries, &Array::scalar(scale, queries.dtype())?);
        match self {
            Self::Rounded { left, scale } => {
                let queries = scaled(*scale)?;
                let (mut memory, mut read) = (memory.cloned(), Vec::with_capacity(count as usize));
                for token in 0..count {
                    let cut = |array: &Array| match count {
                        1 => Ok(array.clone()),
                        _ => device.slice_axis(array, 2, token, token + 1, 1),
                    };
                    let after = step(device, left, [&cut(keys)?, &cut(values)?], memory.as_ref())?;
                    read.push(device.matmul(&cut(&queries)?, &after)?);
                    memory = Some(after);
                }
                finish(device, read, memory)
            }
            Self::InChunks(tables) if count == 1 => {
                let after = step(device, &tables.left, [keys, values], memory)?;
                // The memory of a first token is what it brings, but in single precision like all others.
                let after = device.cast(&after, Dtype::F32)?;
                let read = device.matmul(&scaled(tables.scale)?, &after)?;
                Ok((device.cast(&read, queries.dtype())?, after))
            }
            Self::InChunks(tables) => tables.chunks(device, [queries, keys, values], memory),
        }
    }
}

/// The memory after one token.
fn step(device: &Device, left: &Array, [key, value]: [&Array; 2], memory: Option<&Array>) -> Result<Array> {
    let new = device.multiply(&device.transpose(key, &[0, 1, 3, 2])?, value)?;
    match memory {
        Some(memory) => device.add(&device.multiply(memory, left)?, &new),
        None => Ok(new),
    }
}

fn finish(device: &Device, mut read: Vec<Array>, memory: Option<Array>) -> Result<(Array, Array)> {
    let Some(memory) = memory else {
        return Err(mlxnode_mlx::Error::Mlx("there are no tokens".to_owned()));
    };
    let read = if read.len() == 1 { read.swap_remove(0) } else { device.concatenate(&read, 2)? };
    Ok((read, memory))
}

impl Tables {
    fn chunks(&self, device: &Device, parts: [&Array; 3], memory: Option<&Array>) -> Result<(Array, Array)> {
        let count = parts[0].dim(2);
        let (mut memory, mut read) = (memory.cloned(), Vec::new());
        let mut start = 0;
        // A prompt shorter than a chunk is centred by its own length, as in mlx-lm.
        let own = match count < CHUNK {
            true => Some(Powers::new(device, &self.decay, count, self.scale)?),
            false => None,
        };
        let powers = own.as_ref().unwrap_or(&self.full);
        while start < count {
            let stop = count.min(start + CHUNK);
            let cut = |array: &Array| match stop - start == count {
                true => Ok(array.clone()),
                false => device.slice_axis(array, 2, start, stop, 1),
            };
            let [queries, keys, values] = parts;
            let (seen, after) =
                powers.chunk(device, [cut(queries)?, cut(keys)?, cut(values)?], memory.as_ref())?;
            read.push(device.cast(&seen, queries.dtype())?);
            memory = Some(after);
            start = stop;
        }
        finish(device, read, memory)
    }
}

impl Powers {
    fn chunk(
        &self,
        device: &Device,
        [queries, keys, values]: [Array; 3],
        memory: Option<&Array>,
    ) -> Result<(Array, Array)> {
        let length = queries.dim(2);
        let first = |table: &Array| match table.dim(1) == length {
            true => Ok(table.clone()),
            false => tokens(device, table, 0, length),
        };
        let last = |table: &Array| tokens(device, table, length - 1, length);
        let queries = device.multiply(&queries, &first(&self.of_queries)?)?;
        let keys = device.multiply(&keys, &first(&self.of_keys)?)?;
        let turned = device.transpose(&keys, &[0, 1, 3, 2])?;
        let values = device.cast(&values, Dtype::F32)?;
        // What lies above the diagonal may be infinite; it is left out, not multiplied by zero.
        let scores = device.lower_triangle(&device.matmul(&queries, &turned)?, 0)?;
        let seen = device.matmul(&scores, &values)?;
        let new = device.multiply(&device.matmul(&turned, &values)?, &last(&self.centred)?)?;
        let Some(memory) = memory else { return Ok((seen, new)) };
        let old = device.multiply(&device.matmul(&queries, memory)?, &self.half)?;
        let faded = device.multiply(&last(&self.whole)?, memory)?;
        Ok((device.add(&seen, &old)?, device.add(&faded, &new)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_compute_what_single_tokens_do() {
        let device = Device::open().unwrap();
        let (heads, width, count) = (3, 4, 300);
        let wave = |pace: f32| {
            let values: Vec<f32> =
                (0..heads * count * width).map(|index| (index as f32 * pace).sin()).collect();
            Array::from_f32(&values, &[1, heads, count, width]).unwrap()
        };
        let core = Fading::new(&device, &[-0.9, -0.1, -0.003], 0.5, None).unwrap();
        let parts = [wave(0.37), wave(0.53), wave(0.91)];
        let values = |array: &Array| device.contiguous(array).unwrap().to_f32().unwrap();
        let (read, after) = core.forward(&device, [&parts[0], &parts[1], &parts[2]], None).unwrap();
        let (mut expected, mut memory) = (Vec::new(), None);
        for index in 0..count {
            let [q, k, v] =
                [0, 1, 2].map(|part: usize| device.slice_axis(&parts[part], 2, index, index + 1, 1).unwrap());
            let (read, next) = core.forward(&device, [&q, &k, &v], memory.as_ref()).unwrap();
            expected.push(read);
            memory = Some(next);
        }
        let expected = device.concatenate(&expected, 2).unwrap();
        let close = |actual: &Array, expected: &Array| {
            let (actual, expected) = (values(actual), values(expected));
            let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
            let mut pairs = actual.iter().zip(&expected);
            actual.len() == expected.len() && pairs.all(|(a, b)| (a - b).abs() < 1e-5 * largest)
        };
        assert!(close(&read, &expected));
        assert!(close(&after, &memory.unwrap()));
    }
}
