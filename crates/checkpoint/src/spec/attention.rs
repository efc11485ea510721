//! Softmax attention with grouped keys and values.

use super::{BlockIndexerSpec, QueryGrowth, RopeSpec};
use crate::layout::{ModuleKind, Push};

/// Softmax attention: projections `q_proj`, `k_proj`, `v_proj`, or all three in `qkv_proj`, and one of the result.
///
/// Which projections for keys and values there are, [`AttentionSpec::values`], [`AttentionSpec::shares`] and
/// [`AttentionSpec::projected_by`] say.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// What it is called in the layer.
    pub names: AttentionNames,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head's query and key.
    pub head_dim: usize,
    /// Width of a head's value; other than `head_dim` only with projections of its own for each of q, k and v, and with keys and
    /// values of its own.
    pub value_dim: usize,
    /// Factor on the values.
    pub value_factor: Option<f32>,
    /// q, k and v are the rows of one matrix, `qkv_proj`, in this order.
    pub fused: bool,
    /// The q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub out_bias: bool,
    /// Norm on queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// RMS norm over what all heads give, before the output projection: its name in the attention.
    pub result_norm: Option<&'static str>,
    /// Where the values come from.
    pub values: Values,
    /// Values are divided by their root mean square, head by head, without a weight.
    pub value_norm: bool,
    /// Keys and values are those of this earlier layer of the model, which must be on the same stage; this one has no projections
    /// for them, no norm on keys and no cache.
    pub shares: Option<usize>,
    /// Keys and values are projected by this earlier layer of the model, which must be on the same stage and runs in the same step;
    /// norms, rotation and cache are the layer's own (Hunyuan's form of Brandon et al. 2024, "Reducing Transformer Key-Value Cache
    /// Size with Cross-Layer Attention").
    pub projected_by: Option<usize>,
    /// The layer has keys and values of its own, but its queries also see those of this earlier layer of the model, which must be on
    /// the same stage and runs in the same step: all of them, whatever the window. A gate for each query and head (`loop_gate`)
    /// decides between the two (IQuest-Coder's loops).
    pub beside: Option<usize>,
    /// What chooses the blocks of keys that a query sees; None: it sees all. Not with a window, sinks or a cap on scores.
    pub blocks: Option<Box<BlockIndexerSpec>>,
    /// Keys and values are sums of those projected of the token before and of the token itself, weighted head by head (`conv_k`, `conv_v`).
    /// Only with `fused`, and with none of the fields that change keys and values otherwise.
    pub convolved: bool,
    /// Keys, normed and rotated, and values are rounded to as many steps as 8 bits have (`quant_key_scale`, `quant_value_scale`).
    pub rounded_to_bytes: bool,
    /// What the projections give is kept within `-limit..=limit`. Not with a gate on the result.
    pub projection_limit: Option<f32>,
    /// Key j is visible to query i only when `i - window < j`; None: all of j <= i.
    pub window: Option<usize>,
    /// In a prompt that is computed together a query sees one key more than the window says, as far as it is kept: mlx-lm masks this
    /// family so (PLaMo 3), but keeps as many keys as the window says.
    pub wider_in_prompts: bool,
    /// Key j is visible to query i only when both are in the same chunk of this many tokens, counted from the first. Not with a
    /// window.
    pub chunk: Option<usize>,
    /// A number for each head (`sinks`) that joins the softmax as the score of a key without a value, so that a head may look at
    /// nothing (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks").
    pub sinks: bool,
    /// Queries grow with their position.
    pub temperature: Option<Temperature>,
    /// A projection of the layer's input decides how much of each result gets through.
    pub gate: Option<AttentionGate>,
    /// Queries grow with every context that their position is beyond.
    pub growth: Option<QueryGrowth>,
    /// How positions enter; None: not at all.
    pub rope: Option<RopeSpec>,
    /// Factor on the scores before the softmax.
    pub scale: f32,
    /// The scores become `cap * tanh(score / cap)` before the softmax.
    pub score_cap: Option<f32>,
    /// `q_proj` is twice as wide: each head's query is followed by a gate, whose logistic function multiplies the head's result.
    pub output_gate: bool,
    /// Element types in which the attention itself is computed in single precision.
    pub single_precision: SinglePrecision,
}

/// What an attention is called in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionNames {
    /// The block.
    pub block: &'static str,
    /// The output projection in it.
    pub output: &'static str,
}

impl AttentionNames {
    /// Llama's.
    pub const LLAMA: Self = Self { block: "self_attn", output: "o_proj" };
}

/// Where values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// A projection of their own.
    Projected,
    /// They are the keys as projected, before norm and rotation; there is no `v_proj`.
    Keys,
}

/// What multiplies the results of attention before the output projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionGate {
    /// Name of its projection in the attention.
    pub name: &'static str,
    /// One number for a whole head instead of one for each element.
    pub per_head: bool,
    /// What is made of the projection's results.
    pub function: GateFunction,
    /// The projection has a bias.
    pub bias: bool,
}

/// A function of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateFunction {
    /// Logistic function.
    Sigmoid,
    /// The same, in single precision.
    SigmoidInSingle,
    /// `ln(1 + e^x)`, in single precision.
    Softplus,
}

/// The query at position p (from 0) is multiplied by `ln(floor((p + 1) / floor) + 1) * scale + 1`: Llama 4's tuning for contexts
/// longer than those it was trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// Up to so many tokens nothing changes.
    pub floor: f32,
    /// How fast it grows.
    pub scale: f32,
}

/// When attention is computed in single precision whatever the model's element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SinglePrecision {
    /// Never.
    Never,
    /// For F16 only.
    ForF16,
    /// Always.
    Always,
}

/// Norm on queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkNorm {
    /// What it computes.
    pub kind: QkNormKind,
    /// Names of the queries' and the keys' norm in the attention.
    pub names: [&'static str; 2],
    /// After the rotation instead of before.
    pub after_rope: bool,
    /// Factor on the queries after their norm.
    pub query_factor: Option<QueryFactor>,
}

/// A factor on normed queries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QueryFactor {
    /// A number.
    Number(f32),
    /// A learned number for each head: a tensor of this name in the attention. Only after the rotation.
    OfHeads(&'static str),
}

/// What a norm on queries and keys computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QkNormKind {
    /// The model's RMS norm over each head by itself; weights `[head_dim]`.
    PerHead,
    /// RMS over the whole projection; weights `[heads * head_dim]`.
    Whole,
    /// Layer norm over each head, no bias, weights `[heads, head_dim]`.
    LayerPerHead,
    /// RMS over each head by itself, weights `[heads, head_dim]`.
    RmsPerHead {
        /// Added to the mean of squares.
        eps: f32,
    },
    /// RMS over each head by itself, without weights.
    PerHeadUnweighted {
        /// Added to the mean of squares.
        eps: f32,
    },
}

impl QkNorm {
    /// The most common one: over each head, before the rotation.
    pub const PER_HEAD: Self = Self {
        kind: QkNormKind::PerHead,
        names: ["q_norm", "k_norm"],
        after_rope: false,
        query_factor: None,
    };
    /// Over the whole projection, before the rotation.
    pub const WHOLE: Self = Self { kind: QkNormKind::Whole, ..Self::PER_HEAD };
}

impl AttentionSpec {
    /// Tokens that [`Self::convolved`] takes.
    pub const TAPS: usize = 2;
    /// The steps of [`Self::rounded_to_bytes`], of keys and of values.
    pub const BYTE_SCALES: [&'static str; 2] = ["quant_key_scale", "quant_value_scale"];

    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let Self { heads, kv_heads, head_dim, value_dim, qkv_bias, out_bias, .. } = *self;
        let AttentionNames { block, output } = self.names;
        let projection =
            |heads: usize| ModuleKind::Linear { inputs: hidden, outputs: heads * head_dim, bias: qkv_bias };
        if self.fused {
            push(&format!("{block}.qkv_proj"), projection(heads + 2 * kv_heads));
        } else {
            push(&format!("{block}.q_proj"), projection(if self.output_gate { 2 * heads } else { heads }));
            let own = self.shares.is_none() && self.projected_by.is_none();
            if own {
                push(&format!("{block}.k_proj"), projection(kv_heads));
            }
            if own && self.values == Values::Projected {
                let (outputs, bias) = (kv_heads * value_dim, qkv_bias);
                push(&format!("{block}.v_proj"), ModuleKind::Linear { inputs: hidden, outputs, bias });
            }
        }
        push(
            &format!("{block}.{output}"),
            ModuleKind::Linear { inputs: heads * value_dim, outputs: hidden, bias: out_bias },
        );
        if let Some(gate) = self.gate {
            let outputs = if gate.per_head { heads } else { heads * value_dim };
            let kind = ModuleKind::Linear { inputs: hidden, outputs, bias: gate.bias };
            push(&format!("{block}.{}", gate.name), kind);
        }
        if let Some(norm) = self.result_norm {
            push(&format!("{block}.{norm}"), ModuleKind::Norm { width: heads * value_dim, bias: false });
        }
        if self.beside.is_some() {
            let parameter = |shape| ModuleKind::Parameter { shape };
            push(&format!("{block}.loop_gate.weight"), parameter(vec![heads, head_dim]));
            push(&format!("{block}.loop_gate.bias"), parameter(vec![heads]));
        }
        if let Some(blocks) = &self.blocks {
            blocks.modules(block, hidden, push);
        }
        if self.sinks {
            push(&format!("{block}.sinks"), ModuleKind::Parameter { shape: vec![heads] });
        }
        if self.convolved {
            for name in ["conv_k", "conv_v"] {
                let shape = vec![1, 1, kv_heads, 1, Self::TAPS];
                push(&format!("{block}.{name}"), ModuleKind::Parameter { shape });
            }
        }
        if self.rounded_to_bytes {
            for name in Self::BYTE_SCALES {
                push(&format!("{block}.{name}"), ModuleKind::SideParameter { shape: Vec::new() });
            }
        }
        let Some(norm) = self.qk_norm else { return };
        if let Some(QueryFactor::OfHeads(name)) = norm.query_factor {
            push(&format!("{block}.{name}"), ModuleKind::SideParameter { shape: vec![heads] });
        }
        let normed = if self.shares.is_none() { 2 } else { 1 };
        for (name, heads) in norm.names.into_iter().zip([heads, kv_heads]).take(normed) {
            let kind = match norm.kind {
                QkNormKind::PerHeadUnweighted { .. } => return,
                QkNormKind::PerHead => ModuleKind::Norm { width: head_dim, bias: false },
                QkNormKind::Whole => ModuleKind::Norm { width: heads * head_dim, bias: false },
                QkNormKind::LayerPerHead | QkNormKind::RmsPerHead { .. } => {
                    ModuleKind::HeadNorms { heads, width: head_dim }
                }
            };
            push(&format!("{block}.{name}"), kind);
        }
    }
}
