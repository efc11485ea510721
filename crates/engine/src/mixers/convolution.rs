//! The convolution over the last few tokens that recurrent mixers begin with: each channel by itself, looking back only.

use super::by_row::tokens;
use mlxnode_mlx::{Array, Device, Dtype, Result};

/// A causal convolution of channels.
pub(crate) struct CausalConvolution {
    /// `[channels, kernel, 1]`; the last entry of the kernel is for the newest token.
    weight: Array,
    /// `[channels]`.
    bias: Option<Array>,
    /// The same weights in single precision, `[kernel, channels]`, on the CPU backend. Its convolution is an unvectorized loop: sums of
    /// products give the same bits, since it accumulates in single precision too, six times faster for a token (2048 channels, 4
    /// taps, f32: 0.24 ms instead of 1.4) and two to seven times for a prompt.
    taps: Option<Array>,
}

impl CausalConvolution {
    /// From weights `[channels, kernel, 1]` and a bias `[channels]`.
    pub(crate) fn new(device: &Device, weight: Array, bias: Option<Array>) -> Result<Self> {
        let taps = match device.is_gpu() {
            true => None,
            false => {
                let taps = device.reshape(&weight, &[weight.dim(0), weight.dim(1)])?;
                let taps = device.cast(&device.transpose(&taps, &[1, 0])?, Dtype::F32)?;
                Some(device.contiguous(&taps)?)
            }
        };
        Ok(Self { weight, bias, taps })
    }

    /// Its tensors.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        std::iter::once(&self.weight).chain(&self.bias).chain(&self.taps)
    }

    /// `[1, tokens, channels]` to the same. `before` are the last inputs of the tokens before, `[1, kernel - 1, channels]`, none at
    /// the start. Returns the inputs to remember as well.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        before: Option<&Array>,
    ) -> Result<(Array, Array)> {
        let (count, kept) = (x.dim(1), self.weight.dim(1) - 1);
        let whole = match before {
            Some(before) => device.concatenate([before, x], 1)?,
            None => device.concatenate([&device.zeros(&[x.dim(0), kept, x.dim(2)], x.dtype())?, x], 1)?,
        };
        let last = tokens(device, &whole, count, count + kept)?;
        // A view of a prompt would keep all of it in memory.
        let last = if count > 1 { device.contiguous(&last)? } else { last };
        let convolved = match &self.taps {
            Some(taps) => self.by_taps(device, &whole, taps, count)?,
            None => device.convolve_channels(&whole, &self.weight)?,
        };
        let convolved = match &self.bias {
            Some(bias) => device.add(&convolved, bias)?,
            None => convolved,
        };
        Ok((convolved, last))
    }

    /// The last `count` results of `[1, kernel - 1 + count, channels]`: products added from the oldest token on.
    fn by_taps(&self, device: &Device, whole: &Array, taps: &Array, count: i32) -> Result<Array> {
        let single = device.cast(whole, Dtype::F32)?;
        let sum = match count {
            1 => device.sum(&device.multiply(&single, taps)?, 1, true)?,
            _ => {
                let product = |tap: i32| {
                    let taps = device.slice_axis(taps, 0, tap, tap + 1, 1)?;
                    device.multiply(&tokens(device, &single, tap, tap + count)?, &taps)
                };
                let mut sum = product(0)?;
                for tap in 1..taps.dim(0) {
                    sum = device.add(&sum, &product(tap)?)?;
                }
                sum
            }
        };
        // What the convolution's result would be: the type that inputs and weights promote to.
        match whole.dtype() == self.weight.dtype() {
            true => device.cast(&sum, whole.dtype()),
            false => Ok(sum),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_give_the_bits_of_the_convolution() {
        let device = Device::open().unwrap();
        let wave = |shape: &[i32], pace: f32, dtype: Dtype| {
            let length = shape.iter().product::<i32>();
            let values: Vec<f32> = (0..length).map(|index| (index as f32 * pace).sin()).collect();
            device.cast(&Array::from_f32(&values, shape).unwrap(), dtype).unwrap()
        };
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for (kernel, count) in [(2, 1), (4, 1), (4, 2), (3, 37)] {
                let weight = wave(&[24, kernel, 1], 0.7, dtype);
                let convolution = CausalConvolution::new(&device, weight.clone(), None).unwrap();
                let before = wave(&[1, kernel - 1, 24], 0.31, dtype);
                let x = wave(&[1, count, 24], 0.13, dtype);
                let (actual, last) = convolution.forward(&device, &x, Some(&before)).unwrap();
                let whole = device.concatenate([&before, &x], 1).unwrap();
                let expected = device.convolve_channels(&whole, &weight).unwrap();
                assert_eq!(actual.dtype(), dtype);
                assert_eq!(
                    actual.to_f32().unwrap(),
                    expected.to_f32().unwrap(),
                    "{dtype:?} {kernel} {count}"
                );
                let kept = tokens(&device, &whole, count, count + kernel - 1).unwrap();
                let bytes = |array: &Array| device.contiguous(array).unwrap().to_f32().unwrap();
                assert_eq!(bytes(&last), bytes(&kept));
            }
        }
    }
}
