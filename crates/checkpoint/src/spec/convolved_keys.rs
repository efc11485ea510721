//! Gear's local mixer: queries, keys and values as in attention, but each token's key and value are what a short convolution makes of
//! those of the last few tokens, and a logistic function of query times key is a gate on the value.

use crate::layout::{ModuleKind, Push};

/// `o_proj(sigmoid(q * conv(k)) * conv(v))`, in `local_mixer`, with an RMS norm on the heads of q and k.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvolvedKeysSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens that the convolutions see, the newest included. At least 1.
    pub kernel: usize,
    /// Projections and convolutions have biases.
    pub bias: bool,
}

impl ConvolvedKeysSpec {
    /// Width of all keys, or of all values.
    pub fn keys(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes of the convolutions' inputs that one sequence keeps, `element` bytes each.
    pub(crate) fn state_bytes(&self, element: usize) -> usize {
        2 * (self.kernel - 1) * self.keys() * element
    }

    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let (queries, keys) = (self.heads * self.head_dim, self.keys());
        let linear = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias: self.bias };
        push("local_mixer.q_proj", linear(hidden, queries));
        push("local_mixer.k_proj", linear(hidden, keys));
        push("local_mixer.v_proj", linear(hidden, keys));
        push("local_mixer.o_proj", linear(queries, hidden));
        for name in ["q_norm", "k_norm"] {
            push(&format!("local_mixer.{name}"), ModuleKind::Norm { width: self.head_dim, bias: false });
        }
        for name in ["key_conv", "value_conv"] {
            let weight = ModuleKind::Parameter { shape: vec![keys, self.kernel, 1] };
            push(&format!("local_mixer.{name}.weight"), weight);
            if self.bias {
                push(&format!("local_mixer.{name}.bias"), ModuleKind::Parameter { shape: vec![keys] });
            }
        }
    }
}
