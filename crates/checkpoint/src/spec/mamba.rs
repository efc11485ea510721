//! Mamba: a state for each channel that fades by an input-dependent step (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling
//! with Selective State Spaces").

use crate::layout::{ModuleKind, Push};

/// A Mamba mixer: `in_proj` to channels and gate, a convolution, `x_proj` to what makes the steps and to B and C, `dt_proj` to the
/// steps; a state of `state` numbers for each channel; `out_proj`.
#[derive(Clone, Debug, PartialEq)]
pub struct MambaSpec {
    /// Name of the block in the layer.
    pub block: &'static str,
    /// Channels.
    pub width: usize,
    /// Numbers that a channel keeps.
    pub state: usize,
    /// Numbers that the steps of all channels are made from.
    pub rank: usize,
    /// Tokens that the convolution sees, the newest included. At least 2.
    pub kernel: usize,
    /// The convolution has a bias.
    pub conv_bias: bool,
    /// `in_proj` and `out_proj` have biases.
    pub bias: bool,
    /// The norms on what `x_proj` gives.
    pub norms: MambaNorms,
    /// States are rounded to the model's element type after each token; otherwise they take on the type of `A_log`.
    pub rounded_states: bool,
}

/// RMS norms on what the steps are made from, on B and on C.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MambaNorms {
    /// None.
    Absent,
    /// Without weights (Falcon Mamba).
    Unweighted {
        /// Added to the mean of squares.
        eps: f32,
    },
    /// The model's RMS norm, `dt_layernorm`, `b_layernorm` and `c_layernorm` (Jamba).
    Weighted,
}

impl MambaSpec {
    /// The names of the weighted norms.
    pub const NORMS: [&'static str; 3] = ["dt_layernorm", "b_layernorm", "c_layernorm"];

    /// Bytes of the states and of the convolution's inputs that one sequence keeps, `element` bytes each.
    pub(crate) fn state_bytes(&self, element: usize) -> usize {
        self.width * (self.state + self.kernel - 1) * element
    }

    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let Self { width, state, rank, bias, .. } = *self;
        let mut push = |name: &str, kind: ModuleKind| push(&format!("{}.{name}", self.block), kind);
        push("in_proj", ModuleKind::Linear { inputs: hidden, outputs: 2 * width, bias });
        push("conv1d.weight", ModuleKind::Parameter { shape: vec![width, self.kernel, 1] });
        if self.conv_bias {
            push("conv1d.bias", ModuleKind::Parameter { shape: vec![width] });
        }
        push("x_proj", ModuleKind::Linear { inputs: width, outputs: rank + 2 * state, bias: false });
        if self.norms == MambaNorms::Weighted {
            for (name, width) in Self::NORMS.into_iter().zip([rank, state, state]) {
                push(name, ModuleKind::Norm { width, bias: false });
            }
        }
        push("dt_proj", ModuleKind::Linear { inputs: rank, outputs: width, bias: true });
        let shape = vec![width, state];
        push(
            "A_log",
            match self.rounded_states {
                true => ModuleKind::SideParameter { shape },
                false => ModuleKind::Parameter { shape },
            },
        );
        push("D", ModuleKind::Parameter { shape: vec![width] });
        push("out_proj", ModuleKind::Linear { inputs: width, outputs: hidden, bias });
    }
}
