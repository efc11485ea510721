//! What travels with a token besides one hidden vector: several vectors in parallel, and inputs of its own for each layer.

use crate::layout::{ModuleKind, Push};

/// What the first stage makes of a token's embedding before the layers, or its first layer does. All of it goes from stage to stage, one part after the
/// other, so that later stages need neither token ids nor the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widening {
    /// Hidden vectors in parallel, each of the model's width; one in most families. The first is the embedding, the others are
    /// projections of it (`altup_projections`); after the last layer they are projected back (`altup_unembed_projections`) and
    /// averaged. From Baykal et al. 2023, "Alternating Updates for Efficient Transformers".
    pub streams: usize,
    /// A further input of every layer.
    pub layer_inputs: Option<LayerInputs>,
    /// The embedding travels along as it was, behind the hidden vector. Not with several of them or inputs of layers.
    pub embedding: bool,
    /// What blocks of so many layers added travels along, one vector for each block, zeros for those to come; before the head all are
    /// mixed once more (`output_attn_res`). Not with any of the above.
    pub block: Option<usize>,
    /// Elements that the first layer hands on to all later ones (RWKV-7's values); 0 for none. Not with other inputs, nor with several
    /// hidden vectors.
    pub handed: usize,
}

/// An input that every layer gets for each token: from a table by token id (`embed_tokens_per_layer`), added to a projection of the
/// embedding (`per_layer_model_projection`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerInputs {
    /// Rows of the table; tokens beyond it get row 0.
    pub vocabulary: usize,
    /// Width for one layer.
    pub width: usize,
}

impl Widening {
    /// One hidden vector and nothing else.
    pub const NONE: Self = Self { streams: 1, layer_inputs: None, embedding: false, block: None, handed: 0 };

    /// Elements that travel for each token of a model of `layers` layers with hidden vectors of width `hidden`.
    pub(crate) fn width(&self, hidden: usize, layers: usize) -> usize {
        let embedding = if self.embedding { hidden } else { 0 };
        let blocks = self.block.map_or(0, |block| layers.div_ceil(block.max(1)) * hidden);
        let inputs = self.layer_inputs.map_or(0, |inputs| inputs.width * layers);
        self.streams * hidden + embedding + blocks + inputs + self.handed
    }

    /// The modules that make it, on the first stage.
    pub(crate) fn entrance(&self, hidden: usize, layers: usize, push: &mut Push<'_>) {
        if let Some(LayerInputs { vocabulary, width }) = self.layer_inputs {
            let all = width * layers;
            push("embed_tokens_per_layer", ModuleKind::Embedding { rows: vocabulary, width: all });
            push(
                "per_layer_model_projection",
                ModuleKind::Linear { inputs: hidden, outputs: all, bias: false },
            );
            push("per_layer_projection_norm", ModuleKind::Norm { width, bias: false });
        }
        self.projections("altup_projections", hidden, push);
    }

    /// The modules that make one hidden vector of it again, on the last stage.
    pub(crate) fn exit(&self, hidden: usize, push: &mut Push<'_>) {
        self.projections("altup_unembed_projections", hidden, push);
        if self.block.is_some() {
            super::flow::push_mixture("output_attn_res", hidden, push);
        }
    }

    fn projections(&self, name: &str, hidden: usize, push: &mut Push<'_>) {
        for stream in 1..self.streams {
            let kind = ModuleKind::Linear { inputs: hidden, outputs: hidden, bias: false };
            push(&format!("{name}.{}", stream - 1), kind);
        }
    }
}
