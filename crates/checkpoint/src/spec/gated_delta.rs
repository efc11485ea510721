//! Gated delta networks: linear attention whose memory is corrected by what it already says and fades by a learned gate
//! (Yang et al. 2024, "Gated Delta Networks"; with a gate for each channel: Kimi Team 2025, "Kimi Linear").

use crate::layout::{ModuleKind, Push};

/// A gated delta network: a short convolution over queries, keys and values, then a memory `[value_dim, key_dim]` for each head.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedDeltaSpec {
    /// Name of the block in the layer.
    pub block: &'static str,
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, each with a memory of its own; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Tokens that the convolution sees, the newest included. At least 2.
    pub kernel: usize,
    /// How the projections are stored.
    pub form: DeltaForm,
    /// Where decays are bounded, the logarithm of the fastest: theirs is this times a logistic function instead of a softplus.
    pub decay_bound: Option<f32>,
    /// A memory may also turn: what is written counts up to twice.
    pub negative_eigenvalues: bool,
    /// The gate comes from one matrix, `g_proj`, instead of two small ones. Only with [`DeltaForm::Channels`].
    pub full_gate: bool,
    /// In a form with three convolutions: files of caches have the last inputs of all three in one array (kimi_k3).
    pub inputs_together: bool,
    /// Epsilon of the norm on what is read.
    pub norm_eps: f32,
}

/// How a gated delta network's projections are stored, and what comes with the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaForm {
    /// `in_proj_qkvz` and `in_proj_ba`, both by heads of keys; one convolution; the gate goes through silu (qwen3_next).
    Grouped,
    /// `in_proj_qkv`, `in_proj_z`, `in_proj_b`, `in_proj_a`; one convolution; the gate goes through silu (qwen3_5).
    Flat,
    /// `q_proj`, `k_proj`, `v_proj`, `g_proj`, `b_proj`, `a_proj`; a convolution each; the gate goes through silu (olmo_hybrid).
    Apart,
    /// `q_proj`, `k_proj`, `v_proj`, `b_proj`, and two small matrices each for the gate and for the decay, which every channel of a
    /// key has for itself; a convolution each; the gate goes through a logistic function (kimi_linear).
    Channels,
    /// The same with one matrix each for the gate (`g_proj`) and for the decay (`f_proj`), and convolutions called as in `Apart`
    /// (bailing_moe_v3).
    BoundedChannels,
}

impl GatedDeltaSpec {
    /// Width of all queries, or of all keys.
    pub fn keys(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Width of all values.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Bytes of the memories (single precision) and of the convolution's inputs that one sequence keeps, `element` bytes each.
    pub(crate) fn state_bytes(&self, element: usize) -> usize {
        let inputs = (self.kernel - 1) * (2 * self.keys() + self.values()) * element;
        self.value_heads * self.value_dim * self.key_dim * size_of::<f32>() + inputs
    }

    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let (keys, values, heads) = (self.keys(), self.values(), self.value_heads);
        let linear = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias: false };
        let mut push = |name: &str, kind: ModuleKind| push(&format!("{}.{name}", self.block), kind);
        let conv = |channels| ModuleKind::Parameter { shape: vec![channels, self.kernel, 1] };
        let norm = ModuleKind::Norm { width: self.value_dim, bias: false };
        let per_head = || ModuleKind::SideParameter { shape: vec![heads] };
        match self.form {
            DeltaForm::Grouped => {
                push("in_proj_qkvz", linear(hidden, 2 * keys + 2 * values));
                push("in_proj_ba", linear(hidden, 2 * heads));
            }
            DeltaForm::Flat => {
                push("in_proj_qkv", linear(hidden, 2 * keys + values));
                push("in_proj_z", linear(hidden, values));
                push("in_proj_b", linear(hidden, heads));
                push("in_proj_a", linear(hidden, heads));
            }
            DeltaForm::Apart | DeltaForm::Channels | DeltaForm::BoundedChannels => {
                push("q_proj", linear(hidden, keys));
                push("k_proj", linear(hidden, keys));
                push("v_proj", linear(hidden, values));
                push("b_proj", linear(hidden, heads));
            }
        }
        match self.form {
            DeltaForm::Grouped | DeltaForm::Flat => {
                push("conv1d.weight", conv(2 * keys + values));
                push("norm", norm);
                push("out_proj", linear(values, hidden));
            }
            DeltaForm::Apart | DeltaForm::BoundedChannels => {
                match self.form {
                    DeltaForm::Apart => push("a_proj", linear(hidden, heads)),
                    _ => push("f_proj", linear(hidden, keys)),
                }
                push("g_proj", linear(hidden, values));
                for (name, channels) in [("q", keys), ("k", keys), ("v", values)] {
                    push(&format!("{name}_conv1d.weight"), conv(channels));
                }
                push("o_norm", norm);
                push("o_proj", linear(values, hidden));
            }
            DeltaForm::Channels => {
                push("f_a_proj", linear(hidden, self.key_dim));
                push("f_b_proj", linear(self.key_dim, keys));
                if self.full_gate {
                    push("g_proj", linear(hidden, values));
                } else {
                    push("g_a_proj", linear(hidden, self.key_dim));
                    push("g_b_proj", linear(self.key_dim, values));
                }
                for (name, channels) in [("q", keys), ("k", keys), ("v", values)] {
                    push(&format!("{name}_conv.conv.weight"), conv(channels));
                }
                push("o_norm", norm);
                push("o_proj", linear(values, hidden));
            }
        }
        match self.form {
            DeltaForm::Channels => {
                push("A_log", ModuleKind::SideParameter { shape: vec![1, 1, heads, 1] });
                push("dt_bias", ModuleKind::SideParameter { shape: vec![keys] });
            }
            DeltaForm::BoundedChannels => {
                push("A_log", per_head());
                push("dt_bias", ModuleKind::SideParameter { shape: vec![keys] });
            }
            _ => {
                push("A_log", per_head());
                push("dt_bias", per_head());
            }
        }
    }
}
