//! Products of each row with a matrix of its own out of many, and what sorts rows by their matrix.

use crate::fast::NONE;
use crate::{Array, Device, Quantized, Result};
use mlx_sys as sys;

fn some(value: i32) -> sys::mlx_optional_int {
    sys::mlx_optional_int { value, has_value: true }
}

impl Device {
    /// `x[.., 1, inputs] @ matrices[index]` for each of `indices`, matrices `[count, inputs, outputs]`. Leading axes of `x` and
    /// `indices` broadcast. The indices must be below `count`; `sorted` promises that they never fall.
    pub fn gather_mm(&self, x: &Array, matrices: &Array, indices: &Array, sorted: bool) -> Result<Array> {
        let indices = &*self.as_indices(indices)?;
        // SAFETY: valid handles; the empty one stands for "rows in order".
        self.run(|result, stream| unsafe {
            sys::mlx_gather_mm(result, x.handle(), matrices.handle(), NONE, indices.handle(), sorted, stream)
        })
    }

    /// The same with packed matrices `[count, outputs, inputs]`, transposed.
    pub fn gather_qmm(
        &self,
        x: &Array,
        matrices: &Quantized,
        indices: &Array,
        sorted: bool,
    ) -> Result<Array> {
        let indices = &*self.as_indices(indices)?;
        let layout = matrices.layout;
        let biases = matrices.biases.as_ref().map_or(NONE, Array::handle);
        // SAFETY: valid handles, empty ones stand for "no biases" and "rows in order"; the mode is a NUL-terminated constant.
        self.run(|result, stream| unsafe {
            sys::mlx_gather_qmm(
                result,
                x.handle(),
                matrices.weight.handle(),
                matrices.scales.handle(),
                biases,
                NONE,
                indices.handle(),
                true,
                some(layout.group_size),
                some(layout.bits),
                layout.mode.name().as_ptr(),
                sorted,
                stream,
            )
        })
    }

    /// The indices that sort along an axis.
    pub fn argsort(&self, a: &Array, axis: i32) -> Result<Array> {
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_argsort_axis(result, a.handle(), axis, stream) })
    }

    /// Partly sorted along an axis: the `kth` is in its sorted place, smaller ones before it.
    pub fn partition(&self, a: &Array, kth: i32, axis: i32) -> Result<Array> {
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_partition_axis(result, a.handle(), kth, axis, stream) })
    }

    /// Quotient, rounded down.
    pub fn floor_divide(&self, a: &Array, b: &Array) -> Result<Array> {
        // SAFETY: valid handles; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_floor_divide(result, a.handle(), b.handle(), stream) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_meets_its_matrix() {
        let device = Device::open().unwrap();
        let x = Array::from_f32(&[1.0, 2.0, 3.0, 4.0], &[2, 1, 2]).unwrap();
        let matrices = Array::from_f32(&[1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0], &[2, 2, 2]).unwrap();
        let indices = Array::from_u32(&[1, 0], &[2]).unwrap();
        let product = device.gather_mm(&x, &matrices, &indices, false).unwrap();
        assert_eq!(product.to_f32().unwrap(), [2.0, 1.0, 3.0, 4.0]);
        let order = device.argsort(&indices, 0).unwrap();
        assert_eq!(order.to_u32().unwrap(), [1, 0]);
        let half = device.floor_divide(&indices, &Array::from_u32(&[2], &[1]).unwrap()).unwrap();
        assert_eq!(half.to_u32().unwrap(), [0, 0]);
    }
}
