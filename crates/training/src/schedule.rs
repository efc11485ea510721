//! How the learning rate goes: the schedules of mlx.optimizers, with a warm-up in front, as mlx-lm puts them together.
//!
//! MLX computes them in single precision from the number of updates done, so this does too.

use std::f64::consts::PI;

/// The learning rate as a function of the updates done so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    shape: Shape,
    warmup: Option<Warmup>,
}

/// How it goes behind the warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// The same all the time.
    Constant {
        /// The rate.
        rate: f64,
    },
    /// `init * decay_rate^step`
    ExponentialDecay {
        /// At the beginning.
        init: f64,
        /// Factor of one step.
        decay_rate: f64,
    },
    /// `init * decay_rate^(step / step_size)`, the exponent whole.
    StepDecay {
        /// At the beginning.
        init: f64,
        /// Factor after each `step_size`.
        decay_rate: f64,
        /// At least 1.
        step_size: u64,
    },
    /// Half a wave down to `end` (Loshchilov and Hutter 2017), then flat.
    CosineDecay {
        /// At the beginning.
        init: f64,
        /// How many steps it takes; at least 1.
        decay_steps: u64,
        /// At the end.
        end: f64,
    },
    /// A straight line to `end`, then flat.
    Linear {
        /// At the beginning.
        init: f64,
        /// At the end.
        end: f64,
        /// How many steps it takes; at least 1.
        steps: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Warmup {
    line: Shape,
    steps: u64,
}

impl Schedule {
    /// The same rate all the time.
    pub fn constant(rate: f64) -> Self {
        Self { shape: Shape::Constant { rate }, warmup: None }
    }

    /// A shape, and before it a straight line from `init` to its beginning over `steps` updates; 0: no line. The line's last value is
    /// there once more as the shape's first, as in mlx-lm.
    pub fn new(shape: Shape, steps: u64, init: f64) -> Self {
        let line = Shape::Linear { init, end: shape.beginning(), steps };
        Self { shape, warmup: (steps > 0).then_some(Warmup { line, steps }) }
    }

    /// The rate of the update before which there were `updates` others.
    pub fn at(&self, updates: u64) -> f64 {
        f64::from(match &self.warmup {
            Some(warmup) if updates <= warmup.steps => warmup.line.at(updates),
            Some(warmup) => self.shape.at(updates - warmup.steps - 1),
            None => self.shape.at(updates),
        })
    }
}

impl Shape {
    /// The first argument: what a warm-up ends with.
    fn beginning(self) -> f64 {
        match self {
            Self::Constant { rate } => rate,
            Self::ExponentialDecay { init, .. }
            | Self::StepDecay { init, .. }
            | Self::CosineDecay { init, .. }
            | Self::Linear { init, .. } => init,
        }
    }

    fn at(self, step: u64) -> f32 {
        match self {
            Self::Constant { rate } => rate as f32,
            Self::ExponentialDecay { init, decay_rate } => {
                init as f32 * (decay_rate as f32).powf(step as f32)
            }
            Self::StepDecay { init, decay_rate, step_size } => {
                init as f32 * (decay_rate as f32).powf((step / step_size.max(1)) as f32)
            }
            Self::CosineDecay { init, decay_steps, end } => {
                let angle = (PI / decay_steps as f64) as f32 * step.min(decay_steps) as f32;
                let decay = 0.5 * (1.0 + angle.cos());
                end as f32 + decay * (init - end) as f32
            }
            Self::Linear { init, end, steps } => {
                step.min(steps) as f32 * ((end - init) / steps as f64) as f32 + init as f32
            }
        }
    }
}
