//! Products of several tokens with a large matrix on the CPU backend, in ways that MLX does not take by itself. On a GPU (and where
//! somebody asked for a GPU's ways with [`Device::set_fusing`]), and for a single token, they are MLX's own.
//!
//! - Single precision: OpenBLAS copies a matrix into another order before each product with more than 10^6 multiplications. For the 2 to 32
//!   tokens of a batch or of guesses that copy is more than half the time. Blocks of rows that stay below are multiplied as they lie.
//! - Packed, with single-precision scales: MLX unpacks the matrix again for each token, one number at a time. It is unpacked once and
//!   multiplied by BLAS.
//!
//! The numbers that are multiplied are the same and sums are single precision as MLX's; only their order differs. Half precision
//! stays MLX's: bf16 matrices converted to single precision for BLAS were 3.6 times faster for a prompt, and chose other tokens.

use mlxnode_mlx::{Array, Device, Dtype, Quantized, Result};
use std::cell::{Cell, RefCell};

/// Multiplications up to which OpenBLAS takes a matrix as it lies.
const DIRECT: i64 = 1_000_000;
/// Most tokens for which blocks pay: above, the product outweighs the copy.
const MOST_IN_BLOCKS: i64 = 32;
/// Fewest rows of a block that keep its kernel busy.
const LEAST_ROWS: i64 = 8;
/// Fewest elements of a matrix for which any of this pays.
const LARGE: i64 = 1 << 18;
/// Fewest tokens for which it pays to unpack a matrix.
const LEAST_TOKENS: i64 = 4;
/// Most tokens of a batch's step. A prompt has more.
const BATCH: i64 = 8;
/// Elements that are unpacked at a time, for a batch's step and for a prompt: few parts for the one, whose product is one of many small
/// operations, and for the other little memory.
const UNPACKED: [i64; 2] = [1 << 19, 1 << 18];
/// Elements that may be unpacked before the device is waited for, likewise. MLX takes memory for what it is asked to compute long before
/// it computes it, so without a pause most of the model would be unpacked at once.
const IN_FLIGHT: [i64; 2] = [1 << 19, 1 << 19];

thread_local! {
    /// Elements that were unpacked since the last pause.
    static SINCE_PAUSE: Cell<i64> = const { Cell::new(0) };
}

/// A matrix `[outputs, inputs]` of numbers.
#[derive(Clone)]
pub(crate) struct DenseMatrix {
    /// The transposed view `[inputs, outputs]`, made once.
    view: Array,
    /// Blocks of rows `[blocks, inputs, rows]`, as they were needed last.
    blocks: RefCell<Option<Array>>,
}

impl DenseMatrix {
    /// From a matrix as it is stored.
    pub(crate) fn new(device: &Device, matrix: &Array) -> Result<Self> {
        Ok(Self { view: device.transpose(matrix, &[1, 0])?, blocks: RefCell::default() })
    }

    /// The view, to be computed with the matrix.
    pub(crate) fn view(&self) -> &Array {
        &self.view
    }

    /// `x @ matrix.T + bias` for `[1, tokens, inputs]`.
    #[inline]
    pub(crate) fn product(&self, device: &Device, x: &Array, bias: Option<&Array>) -> Result<Array> {
        let tokens = tokens_of(device, x);
        if tokens > 1
            && bias.is_none()
            && let Some(product) = self.on_cpu(device, x, tokens)?
        {
            return Ok(product);
        }
        match bias {
            None => device.matmul(x, &self.view),
            Some(bias) => device.addmm(bias, x, &self.view),
        }
    }

    fn on_cpu(&self, device: &Device, x: &Array, tokens: i64) -> Result<Option<Array>> {
        let (inputs, outputs) = (self.view.dim(0), self.view.dim(1));
        if self.view.dtype() != Dtype::F32 || x.dtype() != Dtype::F32 {
            return Ok(None);
        }
        let count = blocks(tokens, inputs.into(), outputs.into());
        count.map(|count| self.in_blocks(device, x, count)).transpose()
    }

    fn in_blocks(&self, device: &Device, x: &Array, count: i32) -> Result<Array> {
        let (inputs, outputs) = (self.view.dim(0), self.view.dim(1));
        let mut known = self.blocks.borrow_mut();
        let blocks = match known.as_ref().filter(|blocks| blocks.dim(0) == count) {
            Some(blocks) => blocks.clone(),
            None => {
                let rows = device.transpose(&self.view, &[1, 0])?;
                let blocks = device.reshape(&rows, &[count, outputs / count, inputs])?;
                known.insert(device.transpose(&blocks, &[0, 2, 1])?).clone()
            }
        };
        // [blocks, tokens, rows]
        let product = device.matmul(x, &blocks)?;
        device.reshape(&device.transpose(&product, &[1, 0, 2])?, &[1, x.dim(1), outputs])
    }
}

/// `x @ matrix.T` for `[1, tokens, inputs]` and a packed matrix.
#[inline]
pub(crate) fn packed_product(device: &Device, x: &Array, matrix: &Quantized) -> Result<Array> {
    let tokens = tokens_of(device, x);
    let (inputs, outputs) = (x.dim(-1), matrix.weight.dim(0));
    let is_single = x.dtype() == Dtype::F32 && matrix.scales.dtype() == Dtype::F32;
    if tokens < LEAST_TOKENS || !is_single || !is_large(inputs, outputs) {
        return device.quantized_matmul(x, matrix);
    }
    let kind = usize::from(tokens > BATCH);
    let rows = i32::try_from((UNPACKED[kind] / i64::from(inputs)).max(1)).unwrap_or(i32::MAX);
    let mut parts = Vec::new();
    let mut start = 0;
    while start < outputs {
        let stop = start.saturating_add(rows).min(outputs);
        let cut = |array: &Array| match (start, stop) == (0, outputs) {
            true => Ok(array.clone()),
            false => device.slice_axis(array, 0, start, stop, 1),
        };
        let part = Quantized {
            weight: cut(&matrix.weight)?,
            scales: cut(&matrix.scales)?,
            biases: matrix.biases.as_ref().map(cut).transpose()?,
            layout: matrix.layout,
        };
        let numbers = device.transpose(&device.dequantize(&part)?, &[1, 0])?;
        let product = device.matmul(x, &numbers)?;
        let unpacked = SINCE_PAUSE.get() + i64::from(stop - start) * i64::from(inputs);
        SINCE_PAUSE.set(unpacked);
        if unpacked >= IN_FLIGHT[kind] {
            device.eval([&product])?;
            SINCE_PAUSE.set(0);
        }
        parts.push(product);
        start = stop;
    }
    match parts.as_slice() {
        [only] => Ok(only.clone()),
        _ => device.concatenate(&parts, 2),
    }
}

/// Tokens of `[1, tokens, inputs]` on the CPU backend; 1 where nothing is to be done otherwise.
#[inline]
fn tokens_of(device: &Device, x: &Array) -> i64 {
    match x.shape() {
        [1, tokens, _] if *tokens > 1 && !device.fuses() && !device.is_tracing() => i64::from(*tokens),
        _ => 1,
    }
}

fn is_large(inputs: i32, outputs: i32) -> bool {
    i64::from(inputs) * i64::from(outputs) >= LARGE
}

/// In how many blocks to multiply. None where it does not pay, or costs more operations than it saves time: the maps of feed-forward
/// networks and of the head, which are wide, hold most of the weights.
fn blocks(tokens: i64, inputs: i64, outputs: i64) -> Option<i32> {
    let is_wide = inputs.max(outputs) > 2 * inputs.min(outputs);
    let rows = DIRECT / (tokens * inputs).max(1);
    if tokens > MOST_IN_BLOCKS || !is_wide || inputs * outputs < LARGE || rows < LEAST_ROWS || rows >= outputs
    {
        return None;
    }
    let count = ((outputs + rows - 1) / rows..=outputs / LEAST_ROWS).find(|count| outputs % count == 0)?;
    i32::try_from(count).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_mlx::{QuantizationMode, QuantizedLayout};

    fn numbers(shape: &[i32], pace: f32) -> Array {
        let count: i32 = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|index| (index as f32 * pace).sin()).collect();
        Array::from_f32(&values, shape).unwrap()
    }

    fn largest_difference(device: &Device, one: &Array, other: &Array) -> f32 {
        let difference = device.subtract(one, other).unwrap();
        let all = device.contiguous(&device.abs(&difference).unwrap()).unwrap();
        assert_eq!(one.shape(), other.shape());
        all.to_f32().unwrap().into_iter().fold(0.0, f32::max)
    }

    #[test]
    fn products_are_those_of_mlx() {
        let device = Device::open().unwrap();
        let (inputs, outputs) = (256, 1152);
        let matrix = numbers(&[outputs, inputs], 0.37);
        for tokens in [2, 5, 8, 20, 40] {
            let x = numbers(&[1, tokens, inputs], 0.11);
            let dense = DenseMatrix::new(&device, &matrix).unwrap();
            for _ in 0..2 {
                let product = dense.product(&device, &x, None).unwrap();
                let expected = device.matmul(&x, dense.view()).unwrap();
                assert!(largest_difference(&device, &product, &expected) < 1e-4, "{tokens}");
            }
            let layout = QuantizedLayout { mode: QuantizationMode::Affine, bits: 4, group_size: 64 };
            let packed = device.quantize(&matrix, layout).unwrap();
            let product = packed_product(&device, &x, &packed).unwrap();
            let expected = device.quantized_matmul(&x, &packed).unwrap();
            assert!(largest_difference(&device, &product, &expected) < 1e-4, "{tokens} packed");
        }
    }

    #[test]
    fn blocks_divide_the_rows_and_stay_small() {
        assert_eq!(blocks(8, 512, 1408), Some(8));
        assert_eq!(blocks(8, 512, 512), None, "not wide");
        assert_eq!(blocks(100, 512, 1408), None, "a prompt");
        assert_eq!(blocks(8, 512, 1409), None, "a prime number of rows");
        for (tokens, inputs, outputs) in [(2, 512, 8192), (8, 1280, 3456), (5, 3456, 1280), (32, 512, 1408)] {
            let count = i64::from(blocks(tokens, inputs, outputs).unwrap());
            assert_eq!(outputs % count, 0);
            assert!(tokens * inputs * (outputs / count) <= DIRECT, "{tokens} {inputs} {outputs} {count}");
        }
    }
}
