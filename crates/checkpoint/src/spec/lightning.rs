//! Lightning attention: linear attention whose memory fades by a constant of the head and the layer (Qin et al. 2024, "Lightning
//! Attention-2"), with a gate and a norm on what is read as in Ling 2.5.

use super::RopeSpec;
use crate::layout::{ModuleKind, Push};

/// Linear attention in `self_attn`: `qkv_proj`, norms on queries and keys, rotation, a memory `[head_dim, head_dim]` for each head, a
/// norm of groups (`g_norm`), times the logistic function of `g_proj`, then `o_proj`.
#[derive(Clone, Debug, PartialEq)]
pub struct LightningSpec {
    /// Heads, of queries, keys and values alike.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// `qkv_proj` has a bias.
    pub qkv_bias: bool,
    /// `o_proj` has a bias.
    pub out_bias: bool,
    /// There are norms on queries and keys, head by head (`query_layernorm`, `key_layernorm`).
    pub qk_norm: bool,
    /// Groups of channels of which each is normed by itself; divides all heads' width.
    pub groups: usize,
    /// How positions enter.
    pub rope: RopeSpec,
    /// For each head the logarithm of what is left of a memory after a token; not above 0.
    pub log_decay: Vec<f32>,
    /// Memories have the model's element type and are rounded after each token; otherwise they are single precision.
    pub rounded: bool,
}

impl LightningSpec {
    /// Width of all heads.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Bytes of the memories that one sequence keeps in a model whose elements have `element` bytes.
    pub(crate) fn state_bytes(&self, element: usize) -> usize {
        let element = if self.rounded { element } else { size_of::<f32>() };
        self.width() * self.head_dim * element
    }

    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let width = self.width();
        let linear = |inputs, outputs, bias| ModuleKind::Linear { inputs, outputs, bias };
        let norm = |width| ModuleKind::Norm { width, bias: false };
        push("self_attn.qkv_proj", linear(hidden, 3 * width, self.qkv_bias));
        push("self_attn.o_proj", linear(width, hidden, self.out_bias));
        push("self_attn.g_proj", linear(hidden, width, false));
        push("self_attn.g_norm", norm(width));
        if self.qk_norm {
            push("self_attn.query_layernorm", norm(self.head_dim));
            push("self_attn.key_layernorm", norm(self.head_dim));
        }
    }
}
