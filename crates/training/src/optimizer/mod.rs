//! Optimizers: from a gradient to the next value of a parameter.
//!
//! Each does what its namesake in `mlx.optimizers` does, in its order of operations and element types, so that runs follow mlx-lm's.
//! Numbers that Python computes in double precision (`1 - beta`) are computed so here before they are rounded. What an optimizer
//! remembers of a parameter are arrays with names, so that a run can be saved and taken up again.

mod adafactor;
mod adam;
mod descent;
mod muon;

use crate::OptimizerConfig;
use mlxnode_mlx::{Array, Device, Dtype, Result};

/// An optimizer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    config: OptimizerConfig,
}

/// An array that an optimizer remembers of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Its name, behind the parameter's.
    pub name: &'static str,
    /// Its dimensions. It begins with zeros, in the parameter's element type.
    pub shape: Vec<i32>,
}

/// What is the same for all parameters in one update.
#[derive(Clone, Copy)]
pub struct Pace<'a> {
    /// What the update is multiplied by: single precision, without dimensions.
    pub rate: &'a Array,
    /// Updates with this one: single precision, without dimensions.
    pub step: &'a Array,
}

impl Optimizer {
    /// With these arguments.
    pub fn new(config: OptimizerConfig) -> Self {
        Self { config }
    }

    /// What it remembers of a parameter of this shape, in the order in which [`Self::update`] takes it.
    pub fn memories(&self, shape: &[i32]) -> Vec<Memory> {
        let whole = |name| Memory { name, shape: shape.to_vec() };
        match self.config {
            OptimizerConfig::Adam { .. } | OptimizerConfig::AdamW { .. } => vec![whole("m"), whole("v")],
            OptimizerConfig::Sgd { .. } | OptimizerConfig::Muon { .. } => vec![whole("v")],
            OptimizerConfig::Adafactor { beta_1, .. } => adafactor::memories(shape, beta_1.is_some()),
        }
    }

    /// The next value of `parameter` and of what is remembered of it.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn update(
        &self,
        device: &Device,
        gradient: &Array,
        parameter: &Array,
        memories: &[Array],
        pace: Pace<'_>,
    ) -> Result<(Array, Vec<Array>)> {
        let numbers = Numbers { device, dtype: gradient.dtype() };
        let rate = device.cast(pace.rate, gradient.dtype())?;
        match self.config {
            OptimizerConfig::Adam { betas, eps, bias_correction } => {
                let adam = adam::Adam { betas, eps, bias_correction };
                adam.update(numbers, gradient, parameter, memories, &rate, pace)
            }
            OptimizerConfig::AdamW { betas, eps, weight_decay, bias_correction } => {
                let one = numbers.of(1.0)?;
                let shrink = device.subtract(&one, &device.multiply(&rate, &numbers.of(weight_decay)?)?)?;
                let shrunk = device.multiply(parameter, &shrink)?;
                let adam = adam::Adam { betas, eps, bias_correction };
                adam.update(numbers, gradient, &shrunk, memories, &rate, pace)
            }
            OptimizerConfig::Sgd { momentum, weight_decay, dampening, nesterov } => {
                let descent = descent::Descent { momentum, weight_decay, dampening, nesterov };
                descent.update(numbers, gradient, parameter, memories, &rate)
            }
            OptimizerConfig::Muon { momentum, weight_decay, nesterov, ns_steps } => {
                let muon = muon::Muon { momentum, weight_decay, nesterov, steps: ns_steps };
                muon.update(numbers, gradient, parameter, memories, &rate)
            }
            OptimizerConfig::Adafactor {
                eps,
                clip_threshold,
                decay_rate,
                beta_1,
                weight_decay,
                scale_parameter,
                relative_step,
                warmup_init,
            } => {
                let adafactor = adafactor::Adafactor {
                    eps,
                    clip_threshold,
                    decay_rate,
                    beta_1,
                    weight_decay,
                    scale_parameter,
                    relative_step,
                    warmup_init,
                };
                adafactor.update(numbers, gradient, parameter, memories, pace)
            }
        }
    }
}

/// Number literals beside arrays of one element type.
#[derive(Clone, Copy)]
struct Numbers<'a> {
    device: &'a Device,
    dtype: Dtype,
}

impl Numbers<'_> {
    fn of(&self, number: f64) -> Result<Array> {
        Array::scalar(number as f32, self.dtype)
    }

    /// `number * array`.
    fn times(&self, number: f64, array: &Array) -> Result<Array> {
        self.device.multiply(&self.of(number)?, array)
    }

    /// `decay * mean + (1 - decay) * new`.
    fn mean_of(&self, decay: f64, mean: &Array, new: &Array) -> Result<Array> {
        self.device.add(&self.times(decay, mean)?, &self.times(1.0 - decay, new)?)
    }

    /// `gradient + weight_decay * parameter`.
    fn decayed(&self, weight_decay: f64, gradient: &Array, parameter: &Array) -> Result<Array> {
        match weight_decay == 0.0 {
            true => Ok(gradient.clone()),
            false => self.device.add(gradient, &self.times(weight_decay, parameter)?),
        }
    }

    /// The velocity, or what it will be after one more such gradient (Nesterov's).
    fn looked_ahead(&self, nesterov: bool, momentum: f64, gradient: &Array, v: &Array) -> Result<Array> {
        match nesterov {
            true => self.device.add(gradient, &self.times(momentum, v)?),
            false => Ok(v.clone()),
        }
    }
}

/// One of the arrays that are remembered.
fn memory(memories: &[Array], place: usize) -> Result<&Array> {
    let missing = || mlxnode_mlx::Error::Mlx("an optimizer's memory is not there".to_owned());
    memories.get(place).ok_or_else(missing)
}
