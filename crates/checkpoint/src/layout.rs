//! Which modules a spec has, by path, and which tensors each of them is stored as.
//!
//! One walk over the spec serves all: what a stage must load, what is missing, what a layer weighs.

use crate::quantization::QuantSetting;
use crate::spec::{Flow, LayerSpec, Logits, ModelSpec, NormKind};
use mlxnode_compute::LayerRange;
use std::collections::BTreeSet;

/// Path of the token embedding.
pub const EMBEDDING: &str = "model.embed_tokens";
/// Path of the table of positions.
pub const POSITIONS: &str = "model.embed_positions";
/// Path of the norm after the last layer.
pub const FINAL_NORM: &str = "model.norm";
/// Path of the head of a model whose embeddings are not tied.
pub const HEAD: &str = "lm_head";
/// Name of the learned factor on what the head gives, in a family that has one.
pub const HEAD_GAIN: &str = "lm_head_gain.w_g";
/// Name of the tensor with the signs of a map whose inputs are turned, behind the map's path.
pub const SIGNS: &str = "signs";

/// A module with weights of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its path, the prefix of its tensors ("model.layers.0.self_attn.q_proj").
    pub path: String,
    /// What it is.
    pub kind: ModuleKind,
}

/// Takes a layer's modules: their names in the layer ("self_attn.q_proj") and what they are.
pub(crate) type Push<'a> = dyn FnMut(&str, ModuleKind) + 'a;

/// What a module is. The weights of linear maps, experts and embeddings may be packed, nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// `weight` `[experts, outputs, inputs]`, and `bias` `[experts, outputs]` when there is one.
    Experts {
        /// How many matrices.
        experts: usize,
        /// Width of what goes in.
        inputs: usize,
        /// Width of what comes out.
        outputs: usize,
        /// Has a bias.
        bias: bool,
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
    /// A floating tensor of this shape that is called like the module itself ("mixer.A_log", "conv1d.weight"), never packed.
    Parameter {
        /// Its dimensions.
        shape: Vec<usize>,
    },
    /// The same, but the hidden vectors do not take on its element type: what is computed with it is made theirs again, or only
    /// decides something ("mlp.gate.e_score_correction_bias"). Such tensors stay in single precision when a model is rounded.
    SideParameter {
        /// Its dimensions.
        shape: Vec<usize>,
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
        let norm_of = |kind| {
            let bias = matches!(kind, NormKind::Layer { bias: true } | NormKind::LayerPlusOne);
            (kind != NormKind::RmsUnweighted).then_some(ModuleKind::Norm { width: self.hidden, bias })
        };
        let norm = norm_of(self.norm);
        let mut modules = Vec::new();
        if first || (last && self.tied_embeddings) {
            let kind = ModuleKind::Embedding { rows: self.vocabulary, width: self.hidden };
            modules.push(Module { path: EMBEDDING.into(), kind });
        }
        if let Some(rows) = self.positions.filter(|_| first) {
            let kind = ModuleKind::Embedding { rows, width: self.hidden };
            modules.push(Module { path: POSITIONS.into(), kind });
        }
        let mut push = |name: &str, kind| modules.push(Module { path: format!("model.{name}"), kind });
        if first {
            if let Some(ngrams) = self.ngrams {
                ngrams.modules(self.hidden, &mut push);
            }
            self.widening.entrance(self.hidden, self.layer_count(), &mut push);
        }
        if last {
            self.widening.exit(self.hidden, &mut push);
        }
        let mut layers = self.layers.iter().enumerate().take(range.end).skip(range.start);
        for (index, layer) in layers.clone() {
            push_layer(&mut modules, self.stored_layer(index), layer, self.hidden, norm.as_ref());
        }
        if last || layers.any(|(_, layer)| layer.flow == Flow::ThenLastNorm) {
            modules.extend(norm_of(self.last_norm()).map(|kind| Module { path: FINAL_NORM.into(), kind }));
        }
        if self.passes > 1 {
            // Layers of several passes have the same weights.
            let mut paths = BTreeSet::new();
            modules.retain(|module| paths.insert(module.path.clone()));
        }
        if last {
            if self.logits == Logits::Gained {
                let kind = ModuleKind::SideParameter { shape: vec![1] };
                modules.push(Module { path: HEAD_GAIN.into(), kind });
            }
            if !self.tied_embeddings {
                let (inputs, outputs, bias) = (self.hidden, self.vocabulary, self.head_bias);
                let kind = ModuleKind::Linear { inputs, outputs, bias };
                modules.push(Module { path: HEAD.into(), kind });
            }
        }
        let signs = |module: &Module| {
            let (_, width) = module.matrix().filter(|_| self.turned.contains_key(&module.path))?;
            let kind = ModuleKind::SideParameter { shape: vec![width] };
            Some(Module { path: format!("{}.{SIGNS}", module.path), kind })
        };
        let signs: Vec<Module> = modules.iter().filter_map(signs).collect();
        modules.extend(signs);
        modules
    }

    /// Names of the tensors whose element types the hidden vectors do not take on.
    pub(crate) fn side_parameters(&self) -> BTreeSet<String> {
        let modules = self.modules(LayerRange::new(0, self.layer_count())).into_iter();
        let aside = modules.filter(|module| matches!(module.kind, ModuleKind::SideParameter { .. }));
        aside.map(|module| module.path).collect()
    }
}

fn push_layer(
    modules: &mut Vec<Module>,
    index: usize,
    layer: &LayerSpec,
    hidden: usize,
    norm: Option<&ModuleKind>,
) {
    let mut push = |name: &str, kind: ModuleKind| {
        modules.push(Module { path: format!("model.layers.{index}.{name}"), kind });
    };
    if let Some(norm) = norm {
        layer.norms.names().for_each(|name| push(name, norm.clone()));
    }
    layer.mixer.modules(hidden, &mut push);
    layer.feed_forward.modules(hidden, &mut push);
    layer.flow.modules(hidden, norm, &mut push);
}

impl Module {
    /// The matrix `[rows, columns]` that may be packed, of experts one under the other; None for a norm.
    pub fn matrix(&self) -> Option<(usize, usize)> {
        match self.kind {
            ModuleKind::Linear { inputs, outputs, .. } => Some((outputs, inputs)),
            ModuleKind::Embedding { rows, width } => Some((rows, width)),
            ModuleKind::Experts { experts, inputs, outputs, .. } => Some((experts * outputs, inputs)),
            ModuleKind::Norm { .. }
            | ModuleKind::HeadNorms { .. }
            | ModuleKind::Parameter { .. }
            | ModuleKind::SideParameter { .. } => None,
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
        if let ModuleKind::Parameter { shape } | ModuleKind::SideParameter { shape } = &self.kind {
            let (name, shape) = (self.path.clone(), shape.clone());
            return Some(vec![ExpectedTensor { name, shape, elements: Elements::Floating }]);
        }
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
                    _ => return None,
                };
                tensors.push(tensor("weight", shape, Elements::Floating));
            }
        }
        match self.kind {
            ModuleKind::Linear { outputs: width, bias: true, .. }
            | ModuleKind::Norm { width, bias: true } => {
                tensors.push(tensor("bias", vec![width], Elements::Floating));
            }
            ModuleKind::Experts { experts, outputs, bias: true, .. } => {
                tensors.push(tensor("bias", vec![experts, outputs], Elements::Floating));
            }
            _ => {}
        }
        Some(tensors)
    }
}
