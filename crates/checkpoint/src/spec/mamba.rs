//! Mamba: a state for each channel that fades by an input-dependent step (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling
//! with Selective State Spaces").

use crate::layout::{ModuleKind, Push};

/// A Mamba mixer: `in_proj` to convolved inputs and gate; `x_proj` of the convolved inputs to steps, B and C, of which `dt_proj`
/// widens the steps; a state `[width, state]`; `out_proj`.
#[derive(Clone, Debug, PartialEq)]
pub struct MambaSpec {
    /// Name of the block in the layer.
    pub block: &'static str,
    /// Channels.
    pub width: usize,
    /// Numbers that a channel keeps.
    pub state: usize,
    /// Tokens that the convolution sees, the newest included. At least 2.
    pub kernel: usize,
    /// Numbers from which the steps of all channels are made.
    pub rank: usize,
    /// The convolution has a bias.
    pub conv_bias: bool,
    /// `in_proj` and `out_proj` have biases.
    pub bias: bool,
    /// What steps, B and C go through before they are used.
    pub norms: MambaNorms,
    /// States are rounded to the element type of the inputs, whatever that of the decay is.
    pub rounded_states: bool,
}

/// Norms on steps, B and C.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MambaNorms {
    /// None.
    Absent,
    /// RMS norms without weights (Falcon Mamba).
    Unweighted {
        /// Added to the mean of squares.
        eps: f32,
    },
    /// RMS norms `dt_layernorm`, `b_layernorm` and `c_layernorm` with the model's epsilon (Jamba).
    Weighted,
}

impl MambaSpec {
    /// Names of the norms on steps, B and C.
    pub const NORMS: [&'static str; 3] = ["dt_layernorm", "b_layernorm", "c_layernorm"];

    /// Bytes of the states and of the convolution's inputs that one sequence keeps, `element` bytes each. States in single precision
    /// are counted: some checkpoints store the decay so.
    pub(crate) fn state_bytes(&self, element: usize) -> usize {
        let state = if self.rounded_states { element } else { size_of::<f32>() };
        self.width * self.state * state + (self.kernel - 1) * self.width * element
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
        if self.norms == MambaNorms::Weighted {
            for (name, width) in Self::NORMS.into_iter().zip([rank, state, state]) {
                push(name, ModuleKind::Norm { width, bias: false });
            }
        }
        push("out_proj", ModuleKind::Linear { inputs: width, outputs: hidden, bias });
    }
}
