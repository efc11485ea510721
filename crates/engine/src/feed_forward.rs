//! Feed-forward networks: gated, `down(activation(gate(x)) * up(x))`, and plain, `down(activation(up(x)))`.

use crate::dense_and_experts::DenseAndExperts;
use crate::experts::Experts;
use crate::linear::{Linear, Stacked};
use crate::norm::{Norm, apply};
use mlxnode_checkpoint::Activation;
use mlxnode_mlx::{Array, Chain, Device, Dtype, Result};
use std::f64::consts::{PI, SQRT_2};

/// What works on each token in one layer.
pub(crate) enum FeedForward {
    Network(Network),
    Experts(Box<Experts>),
    DenseAndExperts(Box<DenseAndExperts>),
    Linear(Linear),
    Absent,
}

/// One network for all tokens.
pub(crate) struct Network {
    pub(crate) up: Up,
    pub(crate) activation: Activation,
    /// The numbers of [`Activation::Xielu`].
    pub(crate) xielu: Option<Box<Xielu>>,
    /// Only gates that lie so many deviations above their mean are let through: a number of their element type.
    pub(crate) deviations: Option<Array>,
    /// On what goes down.
    pub(crate) norm: Option<Norm>,
    pub(crate) down: Linear,
}

/// What a trained activation is made of. All numbers without a dimension.
pub(crate) struct Xielu {
    /// Of the square of what is above zero.
    pub(crate) above: Array,
    /// Of the exponential of what is below.
    pub(crate) below: Array,
    /// Of the number itself.
    pub(crate) slope: Array,
    /// The exponential is taken of at most this.
    pub(crate) most: Array,
}

/// What widens the vectors.
pub(crate) enum Up {
    Gated {
        /// gate and up, in this order.
        gate_up: Stacked,
        /// Width of each.
        intermediate: i32,
    },
    Plain(Linear),
}

impl FeedForward {
    /// `[1, tokens, hidden]` to the same.
    #[inline]
    pub(crate) fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        match self {
            Self::Network(network) => network.forward(device, x),
            Self::Experts(experts) => experts.forward(device, x),
            Self::DenseAndExperts(both) => both.forward(device, x),
            Self::Linear(linear) => linear.forward(device, x),
            Self::Absent => Err(mlxnode_mlx::Error::Mlx("this layer has no feed-forward network".to_owned())),
        }
    }
}

impl Network {
    /// `[1, tokens, hidden]` to the same.
    pub(crate) fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        let (gate_up, intermediate) = match &self.up {
            Up::Gated { gate_up, intermediate } => (gate_up, *intermediate),
            Up::Plain(up) => {
                let wide = up.forward(device, x)?;
                let activated = match &self.xielu {
                    Some(xielu) => xielu.forward(device, &wide)?,
                    None => activated(device, self.activation, &wide)?,
                };
                return self.down.forward(device, &activated);
            }
        };
        let (gate, up) = match (&gate_up.whole, gate_up.parts.as_slice()) {
            (Some(whole), _) if x.dim(1) == 1 => {
                let both = whole.forward(device, x)?;
                let [gate, up] = device.split(&both, &[intermediate], 2)?;
                (gate, up)
            }
            (_, [gate, up]) => (gate.forward(device, x)?, up.forward(device, x)?),
            _ => return Err(mlxnode_mlx::Error::Mlx("a gated network needs two projections".to_owned())),
        };
        let gate = match &self.deviations {
            Some(deviations) => above(device, &gate, deviations)?,
            None => gate,
        };
        let inner = gated(device, self.activation, &gate, &up)?;
        self.down.forward(device, &apply(device, self.norm.as_ref(), inner)?)
    }
}

impl Xielu {
    /// `[1, tokens, width]` to the same: one kernel on a GPU.
    fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        let inputs = [x, &self.above, &self.below, &self.slope, &self.most];
        if device.fuses() {
            device.fused(Self::by_single_operations, &inputs)
        } else {
            Self::by_single_operations(device, &inputs)
        }
    }

    /// In mlx-lm's order; what depends on the numbers only was computed at load.
    fn by_single_operations(device: &Device, inputs: &[&Array]) -> Result<Array> {
        let [x, above, below, slope, most] = inputs else {
            return Err(mlxnode_mlx::Error::Mlx("this activation has four numbers".to_owned()));
        };
        let linear = device.multiply(slope, x)?;
        let above = device.add(&device.multiply(above, &device.square(x)?)?, &linear)?;
        let bend = device.subtract(&device.expm1(&device.minimum(x, most)?)?, x)?;
        let below = device.add(&device.multiply(&bend, below)?, &linear)?;
        device.select(&device.greater(x, &Array::scalar(0.0, x.dtype())?)?, &above, &below)
    }
}

/// How far each element lies above the mean of its vector and so many deviations; 0 for one below.
fn above(device: &Device, x: &Array, deviations: &Array) -> Result<Array> {
    let reach = device.multiply(&device.deviation(x, -1)?, deviations)?;
    let cutoff = device.add(&device.mean(x, -1)?, &reach)?;
    device.maximum(&Array::scalar(0.0, x.dtype())?, &device.subtract(x, &cutoff)?)
}

/// What a gate lets through of `up`: one kernel on a GPU.
pub(crate) fn gated(device: &Device, activation: Activation, gate: &Array, up: &Array) -> Result<Array> {
    if !device.fuses() {
        return gated_by(device, activation, gate, up);
    }
    let chain: Chain = match activation {
        Activation::Silu => |device, inputs| gated_pair(device, Activation::Silu, inputs),
        Activation::Gelu => |device, inputs| gated_pair(device, Activation::Gelu, inputs),
        Activation::GeluTanh | Activation::GeluTanhOfLargest { .. } => {
            |device, inputs| gated_pair(device, Activation::GeluTanh, inputs)
        }
        Activation::SquaredRelu => |device, inputs| gated_pair(device, Activation::SquaredRelu, inputs),
        clipped if clipped == GPT_OSS_GATE => |device, inputs| gated_pair(device, GPT_OSS_GATE, inputs),
        _ => return gated_by(device, activation, gate, up),
    };
    device.fused(chain, &[gate, up])
}

/// The numbers that every gpt_oss has.
const GPT_OSS_GATE: Activation = Activation::ClippedSwiglu { alpha: 1.702, limit: 7.0 };

fn gated_pair(device: &Device, activation: Activation, inputs: &[&Array]) -> Result<Array> {
    match inputs {
        [gate, up] => gated_by(device, activation, gate, up),
        _ => Err(mlxnode_mlx::Error::Mlx("a gate has two inputs".to_owned())),
    }
}

/// The same as single operations. An activation that changes both has its arithmetic here.
fn gated_by(device: &Device, activation: Activation, gate: &Array, up: &Array) -> Result<Array> {
    if let Activation::ClampedSwiglu { limit } = activation {
        let number = |value: f32| Array::scalar(value, gate.dtype());
        let gate = device.minimum(&activate(device, Activation::Silu, gate)?, &number(limit)?)?;
        let up = device.minimum(&device.maximum(up, &number(-limit)?)?, &number(limit)?)?;
        return device.multiply(&gate, &up);
    }
    if let Activation::Situ { gate: bound, up: up_bound } = activation {
        let number = |value: f32| Array::scalar(value, Dtype::F32);
        let bounded = |x: &Array, bound: f32| {
            let within = device.tanh(&device.divide(x, &number(bound)?)?)?;
            device.multiply(&number(bound)?, &within)
        };
        let (open, wide) = (device.cast(gate, Dtype::F32)?, device.cast(up, Dtype::F32)?);
        let open = device.multiply(&bounded(&open, bound)?, &device.sigmoid(&open)?)?;
        let wide = match up_bound {
            Some(bound) => bounded(&wide, bound)?,
            None => wide,
        };
        return device.cast(&device.multiply(&open, &wide)?, up.dtype());
    }
    if let Activation::ClippedSwiglu { alpha, limit } = activation {
        let number = |value: f32| Array::scalar(value, gate.dtype());
        let gate = device.minimum(gate, &number(limit)?)?;
        let up = device.minimum(&device.maximum(up, &number(-limit)?)?, &number(limit)?)?;
        let open = device.sigmoid(&device.multiply(&number(alpha)?, &gate)?)?;
        let up = device.add(&up, &number(1.0)?)?;
        return device.multiply(&up, &device.multiply(&gate, &open)?);
    }
    device.multiply(&activate(device, activation, gate)?, up)
}

/// An activation without a gate: one kernel on a GPU.
pub(crate) fn activated(device: &Device, activation: Activation, x: &Array) -> Result<Array> {
    if !device.fuses() {
        return activate(device, activation, x);
    }
    let chain: Chain = match activation {
        Activation::Silu => |device, inputs| activate_one(device, Activation::Silu, inputs),
        Activation::Gelu => |device, inputs| activate_one(device, Activation::Gelu, inputs),
        Activation::GeluTanh => |device, inputs| activate_one(device, Activation::GeluTanh, inputs),
        Activation::SquaredRelu => |device, inputs| activate_one(device, Activation::SquaredRelu, inputs),
        _ => return activate(device, activation, x),
    };
    device.fused(chain, &[x])
}

fn activate_one(device: &Device, activation: Activation, inputs: &[&Array]) -> Result<Array> {
    match inputs {
        [x] => activate(device, activation, x),
        _ => Err(mlxnode_mlx::Error::Mlx("an activation has one input".to_owned())),
    }
}

/// In mlx-lm's order of operations, so that half precision rounds as it does there.
pub(crate) fn activate(device: &Device, activation: Activation, x: &Array) -> Result<Array> {
    let number = |value: f64| Array::scalar(value as f32, x.dtype());
    match activation {
        Activation::Silu => device.multiply(x, &device.sigmoid(x)?),
        Activation::Gelu => {
            let erf = device.erf(&device.divide(x, &number(SQRT_2)?)?)?;
            let twice = device.multiply(x, &device.add(&number(1.0)?, &erf)?)?;
            device.divide(&twice, &number(2.0)?)
        }
        Activation::GeluTanh | Activation::GeluTanhOfLargest { .. } => {
            let cubed = device.multiply(&number(0.044_715)?, &device.cube(x)?)?;
            let inner = device.multiply(&number((2.0 / PI).sqrt())?, &device.add(x, &cubed)?)?;
            let tanh = device.add(&number(1.0)?, &device.tanh(&inner)?)?;
            device.multiply(&device.multiply(&number(0.5)?, x)?, &tanh)
        }
        Activation::Situ { .. } | Activation::ClippedSwiglu { .. } | Activation::ClampedSwiglu { .. } => {
            Err(mlxnode_mlx::Error::Mlx("a clipped gate needs a second projection".to_owned()))
        }
        Activation::Relu => device.maximum(x, &number(0.0)?),
        Activation::Xielu => {
            Err(mlxnode_mlx::Error::Mlx("a trained activation needs its numbers".to_owned()))
        }
        Activation::SquaredRelu => {
            let positive = device.maximum(x, &number(0.0)?)?;
            device.multiply(&positive, &positive)
        }
    }
}
