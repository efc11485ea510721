//! From the sum of gradients to the next parameters.

use super::{MicroGradients, number};
use crate::optimizer::{Optimizer, Pace};
use mlxnode_mlx::{Array, Device, Dtype, Error, Function, Result};

/// What an update was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Applied {
    /// Mean loss over the tokens, in nats.
    pub loss: f64,
    /// Tokens that counted.
    pub tokens: u64,
    /// Length of the gradient before clipping.
    pub gradient_norm: f64,
}

/// The update as a function of arrays.
pub(super) struct Update {
    optimizer: Optimizer,
    clip: Option<f64>,
    compiled: Option<Function>,
}

/// What an update makes.
pub(super) struct Made {
    /// The parameters, then what the optimizer remembers.
    pub(super) arrays: Vec<Array>,
    pub(super) norm: f64,
}

impl Update {
    pub(super) fn new(optimizer: Optimizer, count: usize, clip: Option<f64>, compile: bool) -> Result<Self> {
        let compiled = match compile {
            true => Some(Function::new(move |device, inputs| next(device, optimizer, inputs, count, clip))?),
            false => None,
        };
        Ok(Self { optimizer, clip, compiled })
    }

    /// What the parameters are updated by.
    pub(super) fn optimizer(&self) -> Optimizer {
        self.optimizer
    }

    #[allow(clippy::too_many_arguments)] // each is another kind of thing
    pub(super) fn apply(
        &self,
        device: &Device,
        parameters: &[Array],
        memories: &[Array],
        sum: &MicroGradients,
        divisor: f64,
        learning_rate: f64,
        step: u64,
    ) -> Result<Made> {
        let scalars = [number(divisor.max(1.0))?, number(learning_rate)?, number(step as f64)?];
        let mut inputs: Vec<&Array> = scalars.iter().collect();
        inputs.extend(parameters.iter().chain(&sum.gradients).chain(memories));
        let mut made = match &self.compiled {
            Some(compiled) => compiled.apply(&inputs)?,
            None => next(device, self.optimizer, &inputs, parameters.len(), self.clip)?,
        };
        device.eval(&made)?;
        let norm = made.pop().ok_or_else(|| Error::Mlx("an update made nothing".to_owned()))?;
        let norm = f64::from(norm.to_f32()?.first().copied().unwrap_or(f32::NAN));
        Ok(Made { arrays: made, norm })
    }
}

/// Of the divisor, the learning rate and the number of the update, `count` parameters, their gradients, and memories: the next
/// parameters and memories, and the length of the gradient.
fn next(
    device: &Device,
    optimizer: Optimizer,
    inputs: &[&Array],
    count: usize,
    clip: Option<f64>,
) -> Result<Vec<Array>> {
    let wrong = || Error::Mlx("an update has parameters and as many gradients".to_owned());
    let [divisor, rate, step, arrays @ ..] = inputs else { return Err(wrong()) };
    if arrays.len() < 2 * count {
        return Err(wrong());
    }
    let (parameters, rest) = arrays.split_at(count);
    let (gradients, memories) = rest.split_at(count);
    let mut means = Vec::with_capacity(count);
    for (gradient, parameter) in gradients.iter().zip(parameters) {
        let mean = device.divide(gradient, &device.cast(divisor, gradient.dtype())?)?;
        means.push(device.cast(&mean, parameter.dtype())?);
    }
    let norm = length(device, &means)?;
    if let Some(most) = clip {
        let factor = device.divide(&number(most)?, &device.add(&norm, &number(1e-6)?)?)?;
        let factor = device.minimum(&factor, &number(1.0)?)?;
        for mean in &mut means {
            *mean = device.multiply(mean, &device.cast(&factor, mean.dtype())?)?;
        }
    }
    let (mut made, mut next_memories, mut place) = (Vec::new(), Vec::new(), 0);
    for (parameter, mean) in parameters.iter().zip(&means) {
        let own = optimizer.memories(parameter.shape()).len();
        let memories = memories.get(place..place + own).ok_or_else(wrong)?;
        let memories: Vec<Array> = memories.iter().map(|array| (*array).clone()).collect();
        place += own;
        let (next, memories) = optimizer.update(device, mean, parameter, &memories, Pace { rate, step })?;
        made.push(next);
        next_memories.extend(memories);
    }
    made.extend(next_memories);
    made.push(norm);
    Ok(made)
}

/// Of all gradients together, in single precision and without dimensions.
fn length(device: &Device, gradients: &[Array]) -> Result<Array> {
    let mut sum = number(0.0)?;
    for gradient in gradients {
        let squares = device.square(&device.cast(gradient, Dtype::F32)?)?;
        let flat = device.reshape(&squares, &[-1])?;
        sum = device.add(&sum, &device.sum(&flat, 0, false)?)?;
    }
    device.sqrt(&sum)
}
