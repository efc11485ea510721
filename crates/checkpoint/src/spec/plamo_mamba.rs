//! PLaMo 2's Mamba 2: the state space of Mamba 2, but B, C and steps are projected from what the convolution gave, as in Mamba.

use crate::layout::{ModuleKind, Push};

/// `in_proj` to a gate and an input for each head; `bcdt_proj` of the convolved inputs to B, C and steps, each normed, of which
/// `dt_proj` makes one step for each head; a state `[head_dim, state]` for each head, B and C shared by all; `out_proj`.
#[derive(Clone, Debug, PartialEq)]
pub struct PlamoMambaSpec {
    /// Name of the block in the layer.
    pub block: &'static str,
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Numbers that a head keeps for each of its channels.
    pub state: usize,
    /// Tokens that the convolution sees, the newest included. At least 2.
    pub kernel: usize,
    /// Numbers from which the steps of all heads are made.
    pub rank: usize,
    /// Smallest and largest step.
    pub step_limits: (f32, f32),
}

impl PlamoMambaSpec {
    /// Names of the norms on steps, B and C: tensors themselves, with the model's epsilon.
    pub const NORMS: [&'static str; 3] = ["dt_norm_weight", "B_norm_weight", "C_norm_weight"];

    /// Width of all heads.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Bytes of the states (single precision) and of the convolution's inputs that one sequence keeps, `element` bytes each.
    pub(crate) fn state_bytes(&self, element: usize) -> usize {
        self.width() * self.state * size_of::<f32>() + (self.kernel - 1) * self.width() * element
    }

    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let (width, heads, state, rank) = (self.width(), self.heads, self.state, self.rank);
        let linear = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias: false };
        let mut push = |name: &str, kind: ModuleKind| push(&format!("{}.{name}", self.block), kind);
        push("in_proj", linear(hidden, 2 * width));
        push("conv1d.weight", ModuleKind::Parameter { shape: vec![width, self.kernel, 1] });
        push("bcdt_proj", linear(width, rank + 2 * state));
        push("dt_proj", linear(rank, heads));
        for name in ["A_log", "dt_bias"] {
            push(name, ModuleKind::SideParameter { shape: vec![heads] });
        }
        push("D", ModuleKind::Parameter { shape: vec![heads] });
        for (name, width) in Self::NORMS.into_iter().zip([rank, state, state]) {
            push(name, ModuleKind::Parameter { shape: vec![width] });
        }
        push("out_proj", linear(width, hidden));
    }
}
