//! Adafactor (Shazeer and Stern 2018): of a matrix only the means of rows and columns are remembered.

use super::{Memory, Numbers, Pace, memory};
use mlxnode_mlx::{Array, Device, Dtype, Result};

pub(super) struct Adafactor {
    pub(super) eps: (f64, f64),
    pub(super) clip_threshold: f64,
    pub(super) decay_rate: f64,
    pub(super) beta_1: Option<f64>,
    pub(super) weight_decay: f64,
    pub(super) scale_parameter: bool,
    pub(super) relative_step: bool,
    pub(super) warmup_init: bool,
}

/// What is remembered of a parameter of this shape.
pub(super) fn memories(shape: &[i32], has_first: bool) -> Vec<Memory> {
    let mut memories = match shape {
        [before @ .., rows, columns] => {
            let of_rows = [before, &[*rows]].concat();
            let of_columns = [before, &[*columns]].concat();
            vec![
                Memory { name: "exp_avg_sq_row", shape: of_rows },
                Memory { name: "exp_avg_sq_col", shape: of_columns },
            ]
        }
        _ => vec![Memory { name: "exp_avg_sq", shape: shape.to_vec() }],
    };
    if has_first {
        memories.push(Memory { name: "exp_avg", shape: shape.to_vec() });
    }
    memories
}

impl Adafactor {
    pub(super) fn update(
        &self,
        numbers: Numbers<'_>,
        gradient: &Array,
        parameter: &Array,
        memories: &[Array],
        pace: Pace<'_>,
    ) -> Result<(Array, Vec<Array>)> {
        let device = numbers.device;
        let size = root_mean_square(device, parameter)?;
        let rate = self.rate(numbers, pace, &size)?;
        let decay = device.power(pace.step, &Array::scalar(self.decay_rate as f32, Dtype::F32)?)?;
        let decay = device.cast(&decay, size.dtype())?;
        let kept = device.subtract(&numbers.of(1.0)?, &decay)?;
        // As mlx has it: one less what is kept, and not the decay again.
        let fresh = device.subtract(&numbers.of(1.0)?, &kept)?;
        let mean = |old: &Array, new: &Array| {
            device.add(&device.multiply(&kept, old)?, &device.multiply(&fresh, new)?)
        };
        let squares = device.add(&device.square(gradient)?, &numbers.of(self.eps.0)?)?;
        let axes = gradient.shape().len();
        let (mut next, update) = if axes >= 2 {
            let of_rows = mean(memory(memories, 0)?, &mean_along(device, &squares, -1)?)?;
            let of_columns = mean(memory(memories, 1)?, &mean_along(device, &squares, -2)?)?;
            let average = device.mean(&of_rows, -1)?;
            let row = device.expand(&device.rsqrt(&device.divide(&of_rows, &average)?)?, -1)?;
            let column = device.expand(&device.rsqrt(&of_columns)?, -2)?;
            let factor = device.multiply(&row, &column)?;
            (vec![of_rows, of_columns], device.multiply(&factor, gradient)?)
        } else {
            let of_all = mean(memory(memories, 0)?, &squares)?;
            let update = device.multiply(&device.rsqrt(&of_all)?, gradient)?;
            (vec![of_all], update)
        };
        let excess = device.divide(&root_mean_square(device, &update)?, &numbers.of(self.clip_threshold)?)?;
        let update = device.divide(&update, &device.maximum(&numbers.of(1.0)?, &excess)?)?;
        let mut update = device.multiply(&rate, &update)?;
        if let Some(beta) = self.beta_1 {
            update = numbers.mean_of(beta, memory(memories, next.len())?, &update)?;
            next.push(update.clone());
        }
        let parameter = match self.weight_decay == 0.0 {
            true => parameter.clone(),
            false => {
                let shrink = numbers.times(-self.weight_decay, &rate)?;
                device.add(parameter, &device.multiply(parameter, &shrink)?)?
            }
        };
        Ok((device.subtract(&parameter, &update)?, next))
    }

    fn rate(&self, numbers: Numbers<'_>, pace: Pace<'_>, size: &Array) -> Result<Array> {
        let device = numbers.device;
        let single = |number: f64| Array::scalar(number as f32, Dtype::F32);
        let step = if self.relative_step {
            let least = match self.warmup_init {
                true => device.multiply(&single(1e-6)?, pace.step)?,
                false => single(1e-2)?,
            };
            device.minimum(&least, &device.rsqrt(pace.step)?)?
        } else {
            pace.rate.clone()
        };
        let step = device.cast(&step, size.dtype())?;
        if !self.scale_parameter {
            return Ok(step);
        }
        device.multiply(&device.maximum(&numbers.of(self.eps.1)?, size)?, &step)
    }
}

/// Over all elements, without dimensions.
fn root_mean_square(device: &Device, x: &Array) -> Result<Array> {
    let flat = device.reshape(&device.square(x)?, &[-1])?;
    device.sqrt(&device.reshape(&device.mean(&flat, 0)?, &[])?)
}

/// The mean along an axis, which goes away.
fn mean_along(device: &Device, x: &Array, axis: i32) -> Result<Array> {
    let mut shape = x.shape().to_vec();
    shape.remove((shape.len() as i32 + axis).max(0) as usize);
    device.reshape(&device.mean(x, axis)?, &shape)
}
