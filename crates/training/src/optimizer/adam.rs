//! Adam (Kingma and Ba 2015).

use super::{Numbers, Pace, memory};
use mlxnode_mlx::{Array, Dtype, Result};

pub(super) struct Adam {
    pub(super) betas: (f64, f64),
    pub(super) eps: f64,
    pub(super) bias_correction: bool,
}

impl Adam {
    pub(super) fn update(
        &self,
        numbers: Numbers<'_>,
        gradient: &Array,
        parameter: &Array,
        memories: &[Array],
        rate: &Array,
        pace: Pace<'_>,
    ) -> Result<(Array, Vec<Array>)> {
        let device = numbers.device;
        let (first, second) = self.betas;
        let m = numbers.mean_of(first, memory(memories, 0)?, gradient)?;
        let v = numbers.mean_of(second, memory(memories, 1)?, &device.square(gradient)?)?;
        let root = device.sqrt(&v)?;
        let eps = numbers.of(self.eps)?;
        let change = if self.bias_correction {
            let single = |number: f64| Array::scalar(number as f32, Dtype::F32);
            let left = |beta: f64| device.subtract(&single(1.0)?, &device.power(&single(beta)?, pace.step)?);
            let of_mean = device.cast(&device.divide(rate, &left(first)?)?, gradient.dtype())?;
            let of_root = device.cast(&device.rsqrt(&left(second)?)?, gradient.dtype())?;
            let below = device.add(&device.multiply(&root, &of_root)?, &eps)?;
            device.divide(&device.multiply(&of_mean, &m)?, &below)?
        } else {
            device.divide(&device.multiply(rate, &m)?, &device.add(&root, &eps)?)?
        };
        Ok((device.subtract(parameter, &change)?, vec![m, v]))
    }
}
