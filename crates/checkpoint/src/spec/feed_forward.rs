//! What works on each token by itself.

use super::{DenseAndExpertsSpec, ExpertsSpec};
use crate::layout::{ModuleKind, Push};

/// What works on each token.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForward {
    /// `down_proj(activation(gate_proj(x)) * up_proj(x))`.
    Gated {
        /// Width between the projections.
        intermediate: usize,
        /// The function on the gate.
        activation: Activation,
        /// The projections have biases.
        bias: bool,
        /// gate and up are the rows of one matrix, in this order.
        fused: bool,
        /// What the projections are called in the layer.
        names: GatedNames,
    },
    /// `down_proj(norm(activation(gate_proj(x)) * up_proj(x)))`, an RMS norm (BitNet).
    GatedThenNorm {
        /// Width between the projections.
        intermediate: usize,
        /// The function on the gate.
        activation: Activation,
        /// The projections have biases.
        bias: bool,
        /// What the projections are called in the layer.
        names: GatedNames,
        /// What the norm is called in the layer.
        norm: &'static str,
    },
    /// `down(activation(up(x)))`.
    Plain {
        /// Width between the projections.
        intermediate: usize,
        /// The function between them.
        activation: Activation,
        /// The projections have biases.
        bias: bool,
        /// Names of the two projections in the layer.
        names: [&'static str; 2],
    },
    /// A few of many gated networks for each token, chosen by a router.
    Experts(ExpertsSpec),
    /// A dense network and experts side by side.
    DenseAndExperts(DenseAndExpertsSpec),
    /// A linear map `linear` in `mlp`, in place of a network that was found to be worth no more.
    Linear {
        /// It has a bias.
        bias: bool,
    },
    /// Nothing: the layer is a mixer only.
    Absent,
}

/// What a gated network's projections are called in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedNames {
    /// The gate; or gate and up where they are one matrix.
    pub gate: &'static str,
    /// Up, where it is a matrix of its own.
    pub up: &'static str,
    /// Down.
    pub down: &'static str,
}

impl GatedNames {
    /// Llama's.
    pub const LLAMA: Self = Self { gate: "mlp.gate_proj", up: "mlp.up_proj", down: "mlp.down_proj" };
    /// Those of a family that has gate and up in one matrix.
    pub const FUSED: Self = Self { gate: "mlp.gate_up_proj", ..Self::LLAMA };
}

/// Functions in a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * (1 + erf(x / sqrt 2)) / 2`.
    Gelu,
    /// Gelu by way of tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// The same of the part of a vector that stands out: `gelu(max(0, x - c))`, where c is the value that this share of normally
    /// distributed elements stays below. Only in a gated network.
    GeluTanhOfLargest {
        /// The share that becomes zero, above 0 and below 1.
        sparsity: f32,
    },
    /// `max(x, 0)^2`.
    SquaredRelu,
    /// Of the gate g and the other projection u: `min(silu(g), limit) * u`, with u within `-limit..=limit` (Step 3.5).
    ClampedSwiglu {
        /// Bound.
        limit: f32,
    },
    /// With four learned numbers that stand in `mlp.act_fn`, p = softplus(alpha_p) and n = beta + softplus(alpha_n):
    /// `p x^2 + beta x` above 0, `(exp(min(x, eps)) - 1 - x) n + beta x` below (Huang 2024, "Deriving Activation Functions Using
    /// Integration"). In plain networks only.
    Xielu,
    /// Of the gate g and the other projection u, in single precision: `beta tanh(g / beta) sigmoid(g) * u`, with u bounded likewise
    /// (Kimi K3).
    Situ {
        /// Bound of the gate.
        gate: f32,
        /// Bound of the other.
        up: Option<f32>,
    },
    /// Of the gate g and the other projection u: `(u + 1) * g * sigmoid(alpha g)`, with g at most `limit` and u within `-limit..=limit`
    /// (gpt-oss).
    ClippedSwiglu {
        /// Slope of the logistic function.
        alpha: f32,
        /// Bound.
        limit: f32,
    },
}

/// The numbers of [`Activation::Xielu`] in a layer: alpha_p, alpha_n, beta, eps.
pub const XIELU: [&str; 4] =
    ["mlp.act_fn.alpha_p", "mlp.act_fn.alpha_n", "mlp.act_fn.beta", "mlp.act_fn.eps"];

impl FeedForward {
    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        match self {
            Self::Gated { intermediate, bias, fused, names, .. } => {
                let up = |outputs| ModuleKind::Linear { inputs: hidden, outputs, bias: *bias };
                if *fused {
                    push(names.gate, up(2 * intermediate));
                } else {
                    push(names.gate, up(*intermediate));
                    push(names.up, up(*intermediate));
                }
                push(names.down, ModuleKind::Linear { inputs: *intermediate, outputs: hidden, bias: *bias });
            }
            Self::GatedThenNorm { intermediate, activation, bias, names, norm } => {
                let (intermediate, activation, bias, names) = (*intermediate, *activation, *bias, *names);
                Self::Gated { intermediate, activation, bias, fused: false, names }.modules(hidden, push);
                push(norm, ModuleKind::Norm { width: intermediate, bias: false });
            }
            Self::Plain { intermediate, activation, bias, names: [up, down] } => {
                if *activation == Activation::Xielu {
                    for name in XIELU {
                        push(name, ModuleKind::Parameter { shape: Vec::new() });
                    }
                }
                push(up, ModuleKind::Linear { inputs: hidden, outputs: *intermediate, bias: *bias });
                push(down, ModuleKind::Linear { inputs: *intermediate, outputs: hidden, bias: *bias });
            }
            Self::Experts(experts) => experts.modules(hidden, push),
            Self::DenseAndExperts(both) => both.modules(hidden, push),
            Self::Linear { bias } => {
                push("mlp.linear", ModuleKind::Linear { inputs: hidden, outputs: hidden, bias: *bias });
            }
            Self::Absent => {}
        }
    }
}
