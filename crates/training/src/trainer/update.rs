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
    /// The length of the gradient comes in, because others have parts of it.
    given: bool,
}

/// What an update makes.
pub(super) struct Made {
    /// The parameters, then what the optimizer remembers.
    pub(super) arrays: Vec<Array>,
    pub(super) norm: f64,
}

impl Update {
    pub(super) fn new(optimizer: Optimizer, count: usize, clip: Option<f64>, compile: bool) -> Result<Self> {
        Self::of(optimizer, count, clip, compile, false)
    }

    /// With the length of the gradient given to [`Self::apply`].
    pub(super) fn of_part(
        optimizer: Optimizer,
        count: usize,
        clip: Option<f64>,
        compile: bool,
    ) -> Result<Self> {
        Self::of(optimizer, count, clip, compile, true)
    }

    fn of(optimizer: Optimizer, count: usize, clip: Option<f64>, compile: bool, given: bool) -> Result<Self> {
        let body =
            move |device: &Device, inputs: &[&Array]| next(device, optimizer, inputs, count, clip, given);
        let compiled = if compile { Some(Function::new(body)?) } else { None };
        Ok(Self { optimizer, clip, compiled, given })
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
        norm: Option<f32>,
    ) -> Result<Made> {
        let scalars = [number(divisor.max(1.0))?, number(learning_rate)?, number(step as f64)?];
        let norm = norm.map(|norm| Array::scalar(norm, Dtype::F32)).transpose()?;
        let mut inputs: Vec<&Array> = scalars.iter().chain(&norm).collect();
        inputs.extend(parameters.iter().chain(&sum.gradients).chain(memories));
        let mut made = match &self.compiled {
            Some(compiled) => compiled.apply(&inputs)?,
            None => next(device, self.optimizer, &inputs, parameters.len(), self.clip, self.given)?,
        };
        device.eval(&made)?;
        let norm = made.pop().ok_or_else(|| Error::Mlx("an update made nothing".to_owned()))?;
        let norm = f64::from(norm.to_f32()?.first().copied().unwrap_or(f32::NAN));
        Ok(Made { arrays: made, norm })
    }
}

/// Of the divisor, the learning rate and the number of the update, where it is given the length of the gradient, `count` parameters, their gradients, and memories: the next
/// parameters and memories, and the length of the gradient.
fn next(
    device: &Device,
    optimizer: Optimizer,
    inputs: &[&Array],
    count: usize,
    clip: Option<f64>,
    given: bool,
) -> Result<Vec<Array>> {
    let wrong = || Error::Mlx("an update has parameters and as many gradients".to_owned());
    let [divisor, rate, step, arrays @ ..] = inputs else { return Err(wrong()) };
    let (given, arrays) = match arrays {
        [norm, arrays @ ..] if given => (Some((*norm).clone()), arrays),
        arrays => (None, arrays),
    };
    if arrays.len() < 2 * count {
        return Err(wrong());
    }
    let (parameters, rest) = arrays.split_at(count);
    let (gradients, memories) = rest.split_at(count);
    let pairs = gradients.iter().zip(parameters);
    let means = pairs.map(|(gradient, parameter)| mean(device, gradient, parameter, divisor));
    let mut means = means.collect::<Result<Vec<_>>>()?;
    let norm = match given {
        Some(norm) => norm,
        None => length(device, &means)?,
    };
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

/// A gradient's mean, in the parameter's element type.
fn mean(device: &Device, gradient: &Array, parameter: &Array, divisor: &Array) -> Result<Array> {
    let mean = device.divide(gradient, &device.cast(divisor, gradient.dtype())?)?;
    device.cast(&mean, parameter.dtype())
}

/// Of all gradients together, in single precision and without dimensions.
fn length(device: &Device, gradients: &[Array]) -> Result<Array> {
    let mut sum = number(0.0)?;
    for gradient in gradients {
        sum = device.add(&sum, &squares(device, gradient)?)?;
    }
    device.sqrt(&sum)
}

/// The sum of an array's squares, in single precision and without dimensions.
fn squares(device: &Device, gradient: &Array) -> Result<Array> {
    let squares = device.square(&device.cast(gradient, Dtype::F32)?)?;
    device.sum(&device.reshape(&squares, &[-1])?, 0, false)
}

/// The sums of squares of the means of gradients, one after the other. Added up in this order they are the square of the length that [`next`] finds.
pub(super) fn squares_of_means(
    device: &Device,
    parameters: &[Array],
    gradients: &[Array],
    divisor: f64,
) -> Result<Vec<f32>> {
    let divisor = number(divisor.max(1.0))?;
    let pairs = gradients.iter().zip(parameters);
    let sums =
        pairs.map(|(gradient, parameter)| squares(device, &mean(device, gradient, parameter, &divisor)?));
    let sums = sums.collect::<Result<Vec<_>>>()?;
    device.eval(&sums)?;
    sums.iter().map(|sum| Ok(sum.to_f32()?.first().copied().unwrap_or(f32::NAN))).collect()
}
