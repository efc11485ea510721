//! PLaMo 2's Mamba: Mamba 2's states, with B, C and the steps made after the convolution as in the first Mamba.

use crate::layout::{ModuleKind, Push};

/// A mixer with `in_proj` to gate and channels, head by head; a convolution; `bcdt_proj` to B, C and what the steps are made from, each
/// normed; `dt_proj` to the steps; a state `[head_dim, state]` for each head; `out_proj`.
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
    /// Numbers that the steps of all heads are made from.
    pub rank: usize,
    /// Tokens that the convolution sees, the newest included. At least 2.
    pub kernel: usize,
    /// Smallest and largest step.
    pub step_limits: (f32, f32),
    /// Epsilon of the three norms.
    pub norm_eps: f32,
}

impl PlamoMambaSpec {
    /// The names of the norms' weights: of B, of C and of what the steps are made from.
    pub const NORMS: [&'static str; 3] = ["B_norm_weight", "C_norm_weight", "dt_norm_weight"];

    /// Width of all heads.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Bytes of the states (single precision) and of the convolution's inputs that one sequence keeps, `element` bytes each.
    pub(crate) fn state_bytes(&self, element: usize) -> usize {
        self.width() * (self.state * size_of::<f32>() + (self.kernel - 1) * element)
    }

    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let Self { heads, state, rank, .. } = *self;
        let width = self.width();
        let mut push = |name: &str, kind: ModuleKind| push(&format!("{}.{name}", self.block), kind);
        let linear = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias: false };
        push("in_proj", linear(hidden, 2 * width));
        push("conv1d.weight", ModuleKind::Parameter { shape: vec![width, self.kernel, 1] });
        push("bcdt_proj", linear(width, rank + 2 * state));
        push("dt_proj", linear(rank, heads));
        for name in ["A_log", "dt_bias"] {
            push(name, ModuleKind::SideParameter { shape: vec![heads] });
        }
        push("D", ModuleKind::Parameter { shape: vec![heads] });
        for (name, width) in Self::NORMS.into_iter().zip([state, state, rank]) {
            push(name, ModuleKind::Parameter { shape: vec![width] });
        }
        push("out_proj", linear(width, hidden));
    }
}
