//! Muon (Jordan et al. 2024): the momentum of a matrix is brought near an orthogonal matrix by a Newton-Schulz iteration.

use super::{Numbers, memory};
use mlxnode_mlx::{Array, Result};

pub(super) struct Muon {
    pub(super) momentum: f64,
    pub(super) weight_decay: f64,
    pub(super) nesterov: bool,
    pub(super) steps: u32,
}

/// The polynomial of the iteration.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];

impl Muon {
    pub(super) fn update(
        &self,
        numbers: Numbers<'_>,
        gradient: &Array,
        parameter: &Array,
        memories: &[Array],
        rate: &Array,
    ) -> Result<(Array, Vec<Array>)> {
        let device = numbers.device;
        let gradient = numbers.decayed(self.weight_decay, gradient, parameter)?;
        let fresh = numbers.times(1.0 - self.momentum, &gradient)?;
        let v = device.add(&numbers.times(self.momentum, memory(memories, 0)?)?, &fresh)?;
        let update = numbers.looked_ahead(self.nesterov, self.momentum, &fresh, &v)?;
        let shape = update.shape().to_vec();
        let (update, rate) = match shape.as_slice() {
            [] | [_] => (update, rate.clone()),
            [first, .., last] => {
                let matrix = device.reshape(&update, &[*first, -1])?;
                let near = self.orthogonal(numbers, &matrix)?;
                let rows = shape[shape.len() - 2];
                let tall = (f64::from(rows) / f64::from(*last)).max(1.0).sqrt();
                (device.reshape(&near, &shape)?, device.multiply(rate, &numbers.of(tall)?)?)
            }
        };
        Ok((device.subtract(parameter, &device.multiply(&rate, &update)?)?, vec![v]))
    }

    /// Of a matrix.
    fn orthogonal(&self, numbers: Numbers<'_>, matrix: &Array) -> Result<Array> {
        let device = numbers.device;
        let [a, b, c] = COEFFICIENTS;
        let is_tall = matrix.dim(0) > matrix.dim(1);
        let turned = |x: &Array| device.transpose(x, &[1, 0]);
        let x = if is_tall { turned(matrix)? } else { matrix.clone() };
        let length = device.sqrt(&device.sum_over(&device.square(&x)?, &[0, 1])?)?;
        let mut x = device.divide(&x, &device.add(&length, &numbers.of(1e-7)?)?)?;
        for _ in 0..self.steps {
            let square = device.matmul(&x, &turned(&x)?)?;
            let inner = device.addmm_scaled(&numbers.times(b, &square)?, &square, &square, c as f32)?;
            x = device.addmm_scaled(&numbers.times(a, &x)?, &inner, &x, 1.0)?;
        }
        if is_tall { turned(&x) } else { Ok(x) }
    }
}
