//! Layer norm and the functions of feed-forward networks beside silu.

use crate::fast::NONE;
use crate::{Array, Device, Dtype, Result};
use mlx_sys as sys;

impl Device {
    /// `(x - mean(x)) / deviation(x)` over the last axis, times `weight`, plus `bias` where they are given.
    pub fn layer_norm(
        &self,
        x: &Array,
        weight: Option<&Array>,
        bias: Option<&Array>,
        eps: f32,
    ) -> Result<Array> {
        let (weight, bias) = (weight.map_or(NONE, Array::handle), bias.map_or(NONE, Array::handle));
        // SAFETY: valid handles; an empty one stands for "none".
        self.run(|result, stream| unsafe {
            sys::mlx_fast_layer_norm(result, x.handle(), weight, bias, eps, stream)
        })
    }

    /// Mean along an axis, which stays with length 1.
    pub fn mean(&self, x: &Array, axis: i32) -> Result<Array> {
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_mean_axis(result, x.handle(), axis, true, stream) })
    }

    /// Standard deviation along an axis, which stays with length 1: the root of the mean square of the distances from the mean.
    pub fn deviation(&self, x: &Array, axis: i32) -> Result<Array> {
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_std_axis(result, x.handle(), axis, true, 0, stream) })
    }

    /// The inverse of the error function.
    pub fn erfinv(&self, x: &Array) -> Result<Array> {
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_erfinv(result, x.handle(), stream) })
    }

    /// `ln(1 + e^x)`.
    pub fn softplus(&self, x: &Array) -> Result<Array> {
        let zero = Array::scalar(0.0, x.dtype())?;
        // SAFETY: valid handles; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_logaddexp(result, x.handle(), zero.handle(), stream) })
    }

    /// The nearest whole number; the even one of two.
    pub fn round(&self, x: &Array) -> Result<Array> {
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_round(result, x.handle(), 0, stream) })
    }

    /// The Walsh-Hadamard transform of the last axis, times `scale`. Its length is a power of two, or 12, 20 or 28 times one.
    pub fn hadamard(&self, x: &Array, scale: f32) -> Result<Array> {
        let scale = sys::mlx_optional_float { value: scale, has_value: true };
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_hadamard_transform(result, x.handle(), scale, stream) })
    }

    /// Hyperbolic tangent.
    pub fn tanh(&self, x: &Array) -> Result<Array> {
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_tanh(result, x.handle(), stream) })
    }

    /// The third power, as MLX's `power` rounds it: the third power of the number itself, rounded once.
    ///
    /// On the CPU backend `power` calls the C library for each number, which is a twentieth of the time of a prompt in a network with
    /// GELU. Two products in a wider type round the same: a double holds the square of a single exactly, and so does a single for the halves.
    pub fn cube(&self, x: &Array) -> Result<Array> {
        let wider = match x.dtype() {
            Dtype::F32 if !self.fuses() => sys::mlx_dtype__MLX_FLOAT64,
            Dtype::F16 | Dtype::BF16 if !self.fuses() => sys::mlx_dtype__MLX_FLOAT32,
            _ => return self.power(x, &Array::scalar(3.0, x.dtype())?),
        };
        // SAFETY: a valid handle; the result is written to an empty handle.
        let wide =
            self.run(|result, stream| unsafe { sys::mlx_astype(result, x.handle(), wider, stream) })?;
        let cubed = self.multiply(&self.multiply(&wide, &wide)?, &wide)?;
        self.cast(&cubed, x.dtype())
    }

    /// The error function.
    pub fn erf(&self, x: &Array) -> Result<Array> {
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_erf(result, x.handle(), stream) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_third_power_has_the_bits_of_the_general_one() {
        let device = Device::open().unwrap();
        // Every sign and exponent of which the cube is not zero or infinite in a single, with digits of many kinds.
        let mut values = vec![0.0, -0.0, 1.0, -1.0];
        for exponent in -40..40 {
            for step in 0..97 {
                let value = (1.0 + step as f32 * 0.010_309_278) * 2.0_f32.powi(exponent);
                values.extend([value, -value]);
            }
        }
        let x = Array::from_f32(&values, &[values.len() as i32]).unwrap();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let x = device.cast(&x, dtype).unwrap();
            let by_power = device.power(&x, &Array::scalar(3.0, dtype).unwrap()).unwrap();
            let bits = |array: &Array| {
                let single = device.cast(array, Dtype::F32).unwrap().to_f32().unwrap();
                single.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let cubed = device.cube(&x).unwrap();
            assert_eq!(cubed.dtype(), dtype);
            assert_eq!(bits(&cubed), bits(&by_power), "{dtype:?}");
        }
    }

    #[test]
    fn the_hadamard_transform_of_a_unit_vector_is_a_row_of_signs() {
        let device = Device::open().unwrap();
        let x = Array::from_f32(&[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0], &[2, 4]).unwrap();
        let turned = device.hadamard(&x, 0.5).unwrap();
        assert_eq!(turned.to_f32().unwrap(), [0.5, -0.5, 0.5, -0.5, 0.5, 0.5, -0.5, -0.5]);
        let back = device.hadamard(&turned, 0.5).unwrap();
        assert_eq!(back.to_f32().unwrap(), x.to_f32().unwrap());
    }

    #[test]
    fn layer_norm_centres_and_scales() {
        let device = Device::open().unwrap();
        let x = Array::from_f32(&[1.0, 3.0, -5.0, 5.0], &[2, 2]).unwrap();
        let weight = Array::from_f32(&[2.0, 3.0], &[2]).unwrap();
        let bias = Array::from_f32(&[0.5, 1.0], &[2]).unwrap();
        let plain = device.layer_norm(&x, None, None, 0.0).unwrap().to_f32().unwrap();
        let whole = device.layer_norm(&x, Some(&weight), Some(&bias), 0.0).unwrap().to_f32().unwrap();
        for (actual, expected) in plain.iter().zip([-1.0, 1.0, -1.0, 1.0]) {
            assert!((actual - expected).abs() < 1e-5);
        }
        for (actual, expected) in whole.iter().zip([-1.5, 4.0, -1.5, 4.0]) {
            assert!((actual - expected).abs() < 1e-5);
        }
    }

    #[test]
    fn mean_and_deviation_are_those_of_all_elements() {
        let device = Device::open().unwrap();
        let x = Array::from_f32(&[1.0, 3.0, 5.0, 7.0], &[1, 4]).unwrap();
        assert_eq!(device.mean(&x, -1).unwrap().to_f32().unwrap(), [4.0]);
        assert!((device.deviation(&x, -1).unwrap().to_f32().unwrap()[0] - 5.0_f32.sqrt()).abs() < 1e-6);
        let softplus = device.softplus(&x).unwrap().to_f32().unwrap();
        assert!((softplus[0] - (1.0 + 1.0_f32.exp()).ln()).abs() < 1e-6);
        let half = Array::scalar(0.5, crate::Dtype::F32).unwrap();
        let back = device.erf(&device.erfinv(&half).unwrap()).unwrap();
        assert!((back.to_f32().unwrap()[0] - 0.5).abs() < 1e-5);
    }

    #[test]
    fn halves_are_rounded_to_even_numbers() {
        let device = Device::open().unwrap();
        let x = Array::from_f32(&[0.5, 1.5, -2.5, 2.4], &[4]).unwrap();
        assert_eq!(device.round(&x).unwrap().to_f32().unwrap(), [0.0, 2.0, -2.0, 2.0]);
    }

    #[test]
    fn tanh_and_erf_have_their_values() {
        let device = Device::open().unwrap();
        let x = Array::from_f32(&[0.0, 1.0], &[2]).unwrap();
        let tanh = device.tanh(&x).unwrap().to_f32().unwrap();
        let erf = device.erf(&x).unwrap().to_f32().unwrap();
        assert!(tanh[0].abs() < 1e-6 && (tanh[1] - 0.761_594_2).abs() < 1e-5);
        assert!(erf[0].abs() < 1e-6 && (erf[1] - 0.842_700_8).abs() < 1e-5);
    }
}
