//! Griffin's recurrent block: a real-gated linear recurrent unit behind a short convolution (De et al. 2024, "Griffin: Mixing Gated
//! Linear Recurrences with Local Attention for Efficient Language Models").

use crate::layout::{ModuleKind, Push};

/// A recurrence of `width` channels: `linear_x`, a convolution and the recurrence (`rg_lru`), times gelu of `linear_y`, then
/// `linear_out`. What of a state is left and what of an input gets in, two gates decide, linear maps of each head by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedRecurrenceSpec {
    /// Name of the block in the layer.
    pub block: &'static str,
    /// Channels.
    pub width: usize,
    /// Heads of the gates; divides `width`.
    pub heads: usize,
    /// Tokens that the convolution sees, the newest included. At least 2.
    pub kernel: usize,
}

impl GatedRecurrenceSpec {
    /// Bytes of the states and of the convolution's inputs that one sequence keeps, `element` bytes each.
    pub(crate) fn state_bytes(&self, element: usize) -> usize {
        self.width * self.kernel * element
    }

    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let Self { width, heads, .. } = *self;
        let head_dim = width / heads;
        let mut push = |name: &str, kind: ModuleKind| push(&format!("{}.{name}", self.block), kind);
        let linear = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias: true };
        push("linear_y", linear(hidden, width));
        push("linear_x", linear(hidden, width));
        push("linear_out", linear(width, hidden));
        push("conv_1d.weight", ModuleKind::Parameter { shape: vec![width, self.kernel, 1] });
        push("conv_1d.bias", ModuleKind::Parameter { shape: vec![width] });
        push("rg_lru.recurrent_param", ModuleKind::Parameter { shape: vec![width] });
        for gate in ["input_gate", "recurrent_gate"] {
            let shape = vec![heads, head_dim, head_dim];
            push(&format!("rg_lru.{gate}_weight"), ModuleKind::Parameter { shape });
            push(&format!("rg_lru.{gate}_bias"), ModuleKind::Parameter { shape: vec![heads, head_dim] });
        }
    }
}
