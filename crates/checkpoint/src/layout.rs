//! Which modules a spec has, by path, and which tensors each of them is stored as.
//!
//! One walk over the spec serves all: what a stage must load, what is missing, what a layer weighs.

use crate::quantization::QuantSetting;
use crate::spec::{
    AttentionSpec, ExpertsSpec, FeedForward, LayerSpec, Mixer, ModelSpec, NormKind, QkNormKind,
};
use mlxnode_compute::LayerRange;

/// Path of the token embedding.
pub const EMBEDDING: &str = "model.embed_tokens";
/// Path of the norm after the last layer.
pub const FINAL_NORM: &str = "model.norm";
/// Path of the head of a model whose embeddings are not tied.
pub const HEAD: &str = "lm_head";

/// A module with weights of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its path, the prefix of its tensors ("model.layers.0.self_attn.q_proj").
    pub path: String,
    /// What it is.
    pub kind: ModuleKind,
}

/// What a module is. Weights may be packed unless it is a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// `weight` `[outputs, inputs]`, and `bias` `[outputs]` when there is one.
    Linear {
        /// Width of what goes in.
        inputs: usize,
        /// Width of what comes out.
        outputs: usize,
        /// Has a bias.
        bias: bool,
    },
    /// `weight` `[experts, outputs, inputs]`.
    Experts {
        /// How many matrices.
        experts: usize,
        /// Width of what goes in.
        inputs: usize,
        /// Width of what comes out.
        outputs: usize,
    },
    /// `weight` `[rows, width]`.
    Embedding {
        /// Vocabulary.
        rows: usize,
        /// Width of a vector.
        width: usize,
    },
    /// `weight` `[width]`, and `bias` `[width]` when there is one, never packed.
    Norm {
        /// Width of what it norms.
        width: usize,
        /// Has a bias.
        bias: bool,
    },
    /// `weight` `[heads, width]`, never packed.
    HeadNorms {
        /// Heads, each with weights of its own.
        heads: usize,
        /// Width of a head.
        width: usize,
    },
}

/// A tensor that a module needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Our name for it.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What its elements may be.
    pub elements: Elements,
}

/// What the elements of a tensor may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elements {
    /// F32, F16 or BF16.
    Floating,
    /// U32: packed weights.
    Packed,
    /// U8: the scales of the modes without biases.
    ByteScales,
}

impl ModelSpec {
    /// The modules of a layer range: the embedding for the first layer, norm and head for the last, and the embedding again
    /// for the last when it is the head.
    pub fn modules(&self, range: LayerRange) -> Vec<Module> {
        let (first, last) = (range.is_first(), range.is_last(self.layer_count()));
        let bias = matches!(self.norm, NormKind::Layer { bias: true } | NormKind::LayerPlusOne);
        let norm = ModuleKind::Norm { width: self.hidden, bias };
        let mut modules = Vec::new();
        if first || (last && self.tied_embeddings) {
            let kind = ModuleKind::Embedding { rows: self.vocabulary, width: self.hidden };
            modules.push(Module { path: EMBEDDING.into(), kind });
        }
        for (index, layer) in self.layers.iter().enumerate().take(range.end).skip(range.start) {
            push_layer(&mut modules, index, layer, self.hidden, norm);
        }
        if last {
            modules.push(Module { path: FINAL_NORM.into(), kind: norm });
            if !self.tied_embeddings {
                let kind = ModuleKind::Linear { inputs: self.hidden, outputs: self.vocabulary, bias: false };
                modules.push(Module { path: HEAD.into(), kind });
            }
        }
        modules
    }
}

fn push_layer(modules: &mut Vec<Module>, index: usize, layer: &LayerSpec, hidden: usize, norm: ModuleKind) {
    let mut push =
        |name: &str, kind| modules.push(Module { path: format!("model.layers.{index}.{name}"), kind });
    for name in layer.norms.names() {
        push(name, norm);
    }
    match &layer.mixer {
        Mixer::Attention(attention) => push_attention(&mut push, attention, hidden),
    }
    match layer.feed_forward {
        FeedForward::Gated { intermediate, bias, fused, .. } => {
            let up = |outputs| ModuleKind::Linear { inputs: hidden, outputs, bias };
            if fused {
                push("mlp.gate_up_proj", up(2 * intermediate));
            } else {
                push("mlp.gate_proj", up(intermediate));
                push("mlp.up_proj", up(intermediate));
            }
            push("mlp.down_proj", ModuleKind::Linear { inputs: intermediate, outputs: hidden, bias });
        }
        FeedForward::Plain { intermediate, bias, names: [up, down], .. } => {
            push(up, ModuleKind::Linear { inputs: hidden, outputs: intermediate, bias });
            push(down, ModuleKind::Linear { inputs: intermediate, outputs: hidden, bias });
        }
        FeedForward::Experts(spec) => push_experts(&mut push, &spec, hidden),
    }
}

fn push_experts(push: &mut impl FnMut(&str, ModuleKind), spec: &ExpertsSpec, hidden: usize) {
    let ExpertsSpec { block, experts, intermediate, .. } = *spec;
    let linear = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias: false };
    let stacked = |inputs, outputs| ModuleKind::Experts { experts, inputs, outputs };
    push(&format!("{block}.gate"), linear(hidden, experts));
    push(&format!("{block}.switch_mlp.gate_proj"), stacked(hidden, intermediate));
    push(&format!("{block}.switch_mlp.up_proj"), stacked(hidden, intermediate));
    push(&format!("{block}.switch_mlp.down_proj"), stacked(intermediate, hidden));
    let Some(shared) = spec.shared else { return };
    push(&format!("{block}.shared_expert_gate"), linear(hidden, 1));
    push(&format!("{block}.shared_expert.gate_proj"), linear(hidden, shared));
    push(&format!("{block}.shared_expert.up_proj"), linear(hidden, shared));
    push(&format!("{block}.shared_expert.down_proj"), linear(shared, hidden));
}

fn push_attention(push: &mut impl FnMut(&str, ModuleKind), attention: &AttentionSpec, hidden: usize) {
    let AttentionSpec { heads, kv_heads, head_dim, qkv_bias, out_bias, .. } = *attention;
    let projection =
        |heads: usize| ModuleKind::Linear { inputs: hidden, outputs: heads * head_dim, bias: qkv_bias };
    if attention.fused {
        push("self_attn.qkv_proj", projection(heads + 2 * kv_heads));
    } else {
        push("self_attn.q_proj", projection(heads));
        push("self_attn.k_proj", projection(kv_heads));
        push("self_attn.v_proj", projection(kv_heads));
    }
    push(
        "self_attn.o_proj",
        ModuleKind::Linear { inputs: heads * head_dim, outputs: hidden, bias: out_bias },
    );
    let Some(norm) = attention.qk_norm else { return };
    for (name, heads) in norm.names.into_iter().zip([heads, kv_heads]) {
        let kind = match norm.kind {
            QkNormKind::PerHead => ModuleKind::Norm { width: head_dim, bias: false },
            QkNormKind::Whole => ModuleKind::Norm { width: heads * head_dim, bias: false },
            QkNormKind::LayerPerHead => ModuleKind::HeadNorms { heads, width: head_dim },
        };
        push(&format!("self_attn.{name}"), kind);
    }
}

impl Module {
    /// The matrix `[rows, columns]` that may be packed, of experts one under the other; None for a norm.
    pub fn matrix(&self) -> Option<(usize, usize)> {
        match self.kind {
            ModuleKind::Linear { inputs, outputs, .. } => Some((outputs, inputs)),
            ModuleKind::Embedding { rows, width } => Some((rows, width)),
            ModuleKind::Experts { experts, inputs, outputs } => Some((experts * outputs, inputs)),
            ModuleKind::Norm { .. } | ModuleKind::HeadNorms { .. } => None,
        }
    }

    /// The tensors it is stored as, packed by `setting` or not. None when its rows cannot be packed like that.
    pub fn tensors(&self, setting: Option<QuantSetting>) -> Option<Vec<ExpectedTensor>> {
        let tensor = |suffix: &str, shape: Vec<usize>, elements| ExpectedTensor {
            name: format!("{}.{suffix}", self.path),
            shape,
            elements,
        };
        let shape = |rows, columns| match self.kind {
            ModuleKind::Experts { experts, outputs, .. } => vec![experts, outputs, columns],
            _ => vec![rows, columns],
        };
        let mut tensors = Vec::with_capacity(4);
        match (self.matrix(), setting) {
            (Some((rows, columns)), Some(setting)) => {
                tensors.push(tensor(
                    "weight",
                    shape(rows, setting.packed_columns(columns)?),
                    Elements::Packed,
                ));
                let scales = shape(rows, setting.scale_columns(columns));
                if setting.has_biases() {
                    tensors.push(tensor("scales", scales.clone(), Elements::Floating));
                    tensors.push(tensor("biases", scales, Elements::Floating));
                } else {
                    tensors.push(tensor("scales", scales, Elements::ByteScales));
                }
            }
            (Some((rows, columns)), None) => {
                tensors.push(tensor("weight", shape(rows, columns), Elements::Floating));
            }
            (None, _) => {
                let shape = match self.kind {
                    ModuleKind::Norm { width, .. } => vec![width],
                    ModuleKind::HeadNorms { heads, width } => vec![heads, width],
                    ModuleKind::Linear { .. } | ModuleKind::Embedding { .. } | ModuleKind::Experts { .. } => {
                        return None;
                    }
                };
                tensors.push(tensor("weight", shape, Elements::Floating));
            }
        }
        match self.kind {
            ModuleKind::Linear { outputs: width, bias: true, .. }
            | ModuleKind::Norm { width, bias: true } => {
                tensors.push(tensor("bias", vec![width], Elements::Floating));
            }
            _ => {}
        }
        Some(tensors)
    }
}
