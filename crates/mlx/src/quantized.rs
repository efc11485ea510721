//! Packed matrices: 32-bit words of small integers or floats, with a scale (and for affine a bias) per group.
//!
//! mlx-rs knows affine packing only, so the floating-point modes call mlx-c; so does the product, which every token passes.

use crate::error::through;
use crate::fast::NONE;
use crate::{Array, Device, Error, Result};
use mlx_sys as sys;
use std::ffi::CStr;

/// What a packed value means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantizationMode {
    /// `scale * integer + bias`: 2, 3, 4, 5, 6 or 8 bits, groups of 32, 64 or 128.
    Affine,
    /// 4-bit floats, groups of 32.
    Mxfp4,
    /// 8-bit floats, groups of 32.
    Mxfp8,
    /// 4-bit floats, groups of 16.
    Nvfp4,
}

impl QuantizationMode {
    pub(crate) fn name(self) -> &'static CStr {
        match self {
            Self::Affine => c"affine",
            Self::Mxfp4 => c"mxfp4",
            Self::Mxfp8 => c"mxfp8",
            Self::Nvfp4 => c"nvfp4",
        }
    }
}

/// How a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantizedLayout {
    /// What a value means.
    pub mode: QuantizationMode,
    /// Bits of one value.
    pub bits: i32,
    /// Values that share a scale.
    pub group_size: i32,
}

/// A packed matrix `[rows, columns]`.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// `[rows, columns * bits / 32]`, `uint32`.
    pub weight: Array,
    /// `[rows, columns / group_size]`.
    pub scales: Array,
    /// As the scales; affine only.
    pub biases: Option<Array>,
    /// How it is packed.
    pub layout: QuantizedLayout,
}

fn some(value: i32) -> sys::mlx_optional_int {
    sys::mlx_optional_int { value, has_value: true }
}

impl Device {
    /// `x @ matrix.T`.
    pub fn quantized_matmul(&self, x: &Array, matrix: &Quantized) -> Result<Array> {
        self.quantized_product(x, matrix, true)
    }

    /// `x @ matrix.T` when `transposed`, else `x @ matrix`; both may have axes before the last two.
    pub fn quantized_product(&self, x: &Array, matrix: &Quantized, transposed: bool) -> Result<Array> {
        let layout = matrix.layout;
        let biases = matrix.biases.as_ref().map_or(NONE, Array::handle);
        // SAFETY: valid handles, an empty one stands for "no biases"; the mode is a NUL-terminated constant.
        self.run(|result, stream| unsafe {
            sys::mlx_quantized_matmul(
                result,
                x.handle(),
                matrix.weight.handle(),
                matrix.scales.handle(),
                biases,
                transposed,
                some(layout.group_size),
                some(layout.bits),
                layout.mode.name().as_ptr(),
                stream,
            )
        })
    }

    /// The matrix in floating point, in the type of its scales.
    pub fn dequantize(&self, matrix: &Quantized) -> Result<Array> {
        let layout = matrix.layout;
        if layout.mode == QuantizationMode::Affine {
            return self.through(|| {
                mlx_rs::ops::dequantize(
                    matrix.weight.native(),
                    matrix.scales.native(),
                    matrix.biases.as_ref().map(Array::native),
                    layout.group_size,
                    layout.bits,
                )
            });
        }
        let biases = matrix.biases.as_ref().map_or(NONE, Array::handle);
        let dtype = sys::mlx_optional_dtype { value: 0, has_value: false };
        // SAFETY: as above.
        self.run(|result, stream| unsafe {
            sys::mlx_dequantize(
                result,
                matrix.weight.handle(),
                matrix.scales.handle(),
                biases,
                some(layout.group_size),
                some(layout.bits),
                layout.mode.name().as_ptr(),
                NONE,
                dtype,
                stream,
            )
        })
    }

    /// Packs a matrix by rounding to nearest.
    pub fn quantize(&self, matrix: &Array, layout: QuantizedLayout) -> Result<Quantized> {
        if layout.mode == QuantizationMode::Affine {
            let (weight, scales, biases) =
                through(|| mlx_rs::ops::quantize(matrix.native(), layout.group_size, layout.bits))?;
            let biases = Some(Array::wrap(biases));
            return Ok(Quantized {
                weight: Array::wrap(weight),
                scales: Array::wrap(scales),
                biases,
                layout,
            });
        }
        let parts = self.run_many(|result, stream| {
            // SAFETY: a valid handle; the result vector is made and freed by the caller.
            unsafe {
                sys::mlx_quantize(
                    result,
                    matrix.handle(),
                    some(layout.group_size),
                    some(layout.bits),
                    layout.mode.name().as_ptr(),
                    NONE,
                    stream,
                )
            }
        })?;
        let mut parts = parts.into_iter();
        let (Some(weight), Some(scales)) = (parts.next(), parts.next()) else {
            return Err(Error::Mlx("quantize gave no scales".to_owned()));
        };
        Ok(Quantized { weight, scales, biases: parts.next(), layout })
    }

    /// The rows of a packed matrix that `indices` names, still packed. The promise of [`Device::take`] holds.
    pub fn take_rows(&self, matrix: &Quantized, indices: &Array) -> Result<Quantized> {
        Ok(Quantized {
            weight: self.take(&matrix.weight, indices, 0)?,
            scales: self.take(&matrix.scales, indices, 0)?,
            biases: matrix.biases.as_ref().map(|biases| self.take(biases, indices, 0)).transpose()?,
            layout: matrix.layout,
        })
    }

    /// Packed matrices with equal layouts and columns, one under the other.
    pub fn stack_rows(&self, matrices: &[&Quantized]) -> Result<Quantized> {
        let Some(first) = matrices.first() else { return Err(Error::Mlx("nothing to stack".to_owned())) };
        if matrices.iter().any(|matrix| matrix.layout != first.layout) {
            return Err(Error::Mlx("matrices are packed in different ways".to_owned()));
        }
        let biases: Option<Vec<&Array>> = matrices.iter().map(|matrix| matrix.biases.as_ref()).collect();
        Ok(Quantized {
            weight: self.concatenate(matrices.iter().map(|matrix| &matrix.weight), 0)?,
            scales: self.concatenate(matrices.iter().map(|matrix| &matrix.scales), 0)?,
            biases: biases.map(|biases| self.concatenate(biases, 0)).transpose()?,
            layout: first.layout,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn all_layouts_multiply_like_the_matrix_they_stand_for() {
        let device = Device::open().unwrap();
        let values: Vec<f32> = (0..256).map(|i| (i as f32 * 0.37).sin()).collect();
        let matrix = Array::from_f32(&values, &[2, 128]).unwrap();
        let x = Array::from_f32(&values[..128], &[1, 128]).unwrap();
        let mut layouts = vec![
            QuantizedLayout { mode: QuantizationMode::Mxfp4, bits: 4, group_size: 32 },
            QuantizedLayout { mode: QuantizationMode::Mxfp8, bits: 8, group_size: 32 },
            QuantizedLayout { mode: QuantizationMode::Nvfp4, bits: 4, group_size: 16 },
        ];
        for bits in [2, 3, 4, 5, 6, 8] {
            for group_size in [32, 64, 128] {
                layouts.push(QuantizedLayout { mode: QuantizationMode::Affine, bits, group_size });
            }
        }
        for layout in layouts {
            let packed = device.quantize(&matrix, layout).unwrap();
            assert_eq!(packed.biases.is_some(), layout.mode == QuantizationMode::Affine);
            let dense = device.cast(&device.dequantize(&packed).unwrap(), Dtype::F32).unwrap();
            let dense = device.transpose(&dense, &[1, 0]).unwrap();
            let expected = device.matmul(&x, &dense).unwrap().to_f32().unwrap();
            let actual = device.quantized_matmul(&x, &packed).unwrap().to_f32().unwrap();
            for (expected, actual) in expected.iter().zip(&actual) {
                assert!((expected - actual).abs() < 1e-3, "{layout:?}: {expected} {actual}");
            }
        }
    }
}
