//! Signed Walsh-Hadamard transforms before packed maps: no element of a turned vector stands out, so few bits hold a matrix that was
//! turned alike (QuIP#, Tseng et al. 2024). The turn is orthogonal, and its own inverse but for the place of the signs.

use mlxnode_mlx::{Array, Device, Dtype, Result};

/// What is done with each vector, in single precision.
pub(crate) struct Turn {
    /// 1 or -1 for each element, `[width]`, single precision.
    pub(crate) signs: Array,
    /// Elements that are turned together; divides the width.
    pub(crate) block: i32,
}

impl Turn {
    /// Of vectors `[.., width]` that go into a map: signs, then the transform. The same shape and type.
    pub(crate) fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        let signed = device.multiply(&device.cast(x, Dtype::F32)?, &self.signs)?;
        device.cast(&self.transform(device, &signed)?, x.dtype())
    }

    /// Of vectors `[.., width]` that were turned: the transform, then the signs. The same shape and type.
    pub(crate) fn back(&self, device: &Device, x: &Array) -> Result<Array> {
        let plain = self.transform(device, &device.cast(x, Dtype::F32)?)?;
        device.cast(&device.multiply(&plain, &self.signs)?, x.dtype())
    }

    fn transform(&self, device: &Device, x: &Array) -> Result<Array> {
        // Worked out in double precision, as Python does.
        let scale = (1.0 / f64::from(self.block).sqrt()) as f32;
        let blocks = device.reshape(x, &[-1, self.block])?;
        device.reshape(&device.hadamard(&blocks, scale)?, x.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_back_undoes_a_turn_and_keeps_lengths() {
        let device = Device::open().unwrap();
        let values: Vec<f32> = (0..24).map(|index| (index as f32 * 0.7).sin()).collect();
        let signs: Vec<f32> = (0..8).map(|index| if index % 3 == 0 { -1.0 } else { 1.0 }).collect();
        let turn = Turn { signs: Array::from_f32(&signs, &[8]).unwrap(), block: 4 };
        let x = Array::from_f32(&values, &[1, 3, 8]).unwrap();
        let turned = turn.forward(&device, &x).unwrap();
        let square = |array: &Array| array.to_f32().unwrap().iter().map(|x| x * x).sum::<f32>();
        assert!((square(&turned) - square(&x)).abs() < 1e-4);
        let back = turn.back(&device, &turned).unwrap();
        let largest = back.to_f32().unwrap().into_iter().zip(&values).map(|(one, other)| (one - other).abs());
        assert!(largest.fold(0.0, f32::max) < 1e-6);
    }
}
