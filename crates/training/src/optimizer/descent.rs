//! Gradient descent, with momentum where that is asked for (Sutskever et al. 2013).

use super::{Numbers, memory};
use mlxnode_mlx::{Array, Result};

pub(super) struct Descent {
    pub(super) momentum: f64,
    pub(super) weight_decay: f64,
    pub(super) dampening: f64,
    pub(super) nesterov: bool,
}

impl Descent {
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
        if self.momentum <= 0.0 {
            let next = device.subtract(parameter, &device.multiply(rate, &gradient)?)?;
            return Ok((next, vec![memory(memories, 0)?.clone()]));
        }
        let kept = numbers.times(self.momentum, memory(memories, 0)?)?;
        let v = match self.dampening > 0.0 {
            true => device.add(&kept, &numbers.times(1.0 - self.dampening, &gradient)?)?,
            false => device.add(&kept, &gradient)?,
        };
        let update = numbers.looked_ahead(self.nesterov, self.momentum, &gradient, &v)?;
        Ok((device.subtract(parameter, &device.multiply(rate, &update)?)?, vec![v]))
    }
}
