//! RWKV-7: a matrix of memory for each head that fades by channel, is corrected along a direction and written to, between mixes of each
//! token with the one before it (Peng et al. 2025, "RWKV-7 'Goose' with Expressive Dynamic State Evolution").

use crate::layout::{ModuleKind, Push};

/// A whole layer: `attn`, which mixes tokens by memories `[head_dim, head_dim]`, and `ffn`, each after a norm and added. The values of
/// the first layer reach all later ones, which mix them with their own ([`super::Widening::handed`]).
#[derive(Clone, Debug, PartialEq)]
pub struct Rwkv7Spec {
    /// Width of a head; the heads fill the hidden vectors.
    pub head_dim: usize,
    /// Width between the projections of `ffn`.
    pub intermediate: usize,
    /// Widths between the two maps that the decay, the learning rates, the mix of values and the gate are made by.
    pub ranks: Rwkv7Ranks,
    /// The model's first layer: it has a norm before everything, and its values are its own.
    pub is_first: bool,
}

/// Widths between the two matrices of low-rank maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rwkv7Ranks {
    /// `w_lora`: how fast memories fade.
    pub decay: usize,
    /// `a_lora`: how much of the old value is taken back.
    pub rate: usize,
    /// `v_lora`: how much of the first layer's value is taken; not in the first layer.
    pub value: usize,
    /// `g_lora`: how much of the result gets through.
    pub gate: usize,
}

impl Rwkv7Spec {
    /// The mixes of `attn`: what each token takes of the one before it, for each projection.
    pub const MIXES: [&'static str; 6] = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g"];

    /// Bytes of what one sequence keeps: memories, and the last input of both parts.
    pub(crate) fn state_bytes(&self, hidden: usize, element: usize) -> usize {
        (hidden * self.head_dim + 2 * hidden) * element
    }

    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let linear = |inputs, outputs, bias| ModuleKind::Linear { inputs, outputs, bias };
        let norms = if self.is_first {
            &["pre_norm", "attn_norm", "ffn_norm"][..]
        } else {
            &["attn_norm", "ffn_norm"]
        };
        for norm in norms {
            push(norm, ModuleKind::Norm { width: hidden, bias: true });
        }
        for name in Self::MIXES {
            push(&format!("attn.{name}"), ModuleKind::Parameter { shape: vec![1, 1, hidden] });
        }
        let by_head = || ModuleKind::Parameter { shape: vec![hidden / self.head_dim, self.head_dim] };
        for name in ["k_k", "k_a", "r_k", "g_norm.weight", "g_norm.bias"] {
            push(&format!("attn.{name}"), by_head());
        }
        for name in ["r_proj", "k_proj", "v_proj", "o_proj"] {
            push(&format!("attn.{name}"), linear(hidden, hidden, false));
        }
        let Rwkv7Ranks { decay, rate, value, gate } = self.ranks;
        let mut low_rank = |name: &str, rank, bias| {
            push(&format!("attn.{name}.lora.0"), linear(hidden, rank, false));
            push(&format!("attn.{name}.lora.2"), linear(rank, hidden, bias));
        };
        low_rank("w_lora", decay, true);
        if !self.is_first {
            low_rank("v_lora", value, true);
        }
        low_rank("a_lora", rate, true);
        low_rank("g_lora", gate, false);
        push("ffn.x_k", ModuleKind::Parameter { shape: vec![hidden] });
        push("ffn.key", linear(hidden, self.intermediate, false));
        push("ffn.value", linear(self.intermediate, hidden, false));
    }
}
