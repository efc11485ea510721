//! How a layer's mixer and feed-forward network meet the hidden vectors.

use crate::layout::{ModuleKind, Push};

/// How a layer's branches meet the hidden vectors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Flow {
    /// The mixer's result is added, then the feed-forward network's, which sees the sum.
    Sequential(Residual),
    /// Both see the layer's input; rounding depends on the order of the sum.
    Parallel(ParallelSum),
    /// Sequential, then a gated projection of the layer's own input is added, of this width if there is one, and the result is
    /// multiplied by a number (`layer_scalar`).
    WithInput(Option<usize>),
    /// Sequential, then the model's last norm: the end of a pass through the layers that is not the last one.
    ThenLastNorm,
    /// Sequential, but both branches and the token's embedding, which is added last, are multiplied by a learned number each
    /// ([`GAINS`]).
    WithEmbedding,
    /// What each branch sees is a mixture of what blocks of layers before added and of what its own block has added so far; the branches
    /// add to the latter. The mixtures' weights are a softmax over depth of products with `…_res_proj` under the norm `…_res_norm`,
    /// for `self_attention` and `mlp` (Kimi K3).
    OverBlocks {
        /// The layer begins a block: what came before is kept as one more, and nothing has been added yet.
        first: bool,
    },
    /// On several hidden vectors in parallel.
    AlternatingUpdates(AlternatingUpdates),
    /// The mixer is the whole layer: it gets the hidden vectors and makes the next ones.
    Whole,
}

/// The numbers of [`Flow::WithEmbedding`] in a layer: on the mixer's result, on the feed-forward network's, on the embedding.
pub const GAINS: [&str; 3] = ["attn_gain.a_g", "mlp_gain.a_g", "embed_skip.a_g"];

/// A layer that works on one of several hidden vectors and corrects the others by what came out (Baykal et al. 2023), with a low-rank
/// branch beside the attention (Menghani et al. 2024, "LAuReL") and an input of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AlternatingUpdates {
    /// How many hidden vectors.
    pub streams: usize,
    /// Which of them the layer works on.
    pub active: usize,
    /// Bound on the coefficients' weights.
    pub clip: Option<f32>,
    /// The active vector is multiplied by `correct_output_scale` before it opens the gate of the layer's input.
    pub scaled: bool,
    /// Rank of the branch beside the attention.
    pub rank: usize,
    /// Width of the layer's own input.
    pub input: usize,
}

/// How a branch's result is added.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Residual {
    /// As it is.
    Add,
    /// Times a factor.
    Scaled(f32),
    /// As it is; in half precision the sum is kept within that type's range.
    Clipped,
}

/// The order in which a parallel layer adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParallelSum {
    /// `(mixed + fed) + hidden`.
    BranchesFirst,
    /// `(hidden + mixed) + fed`.
    HiddenFirst,
}

impl Flow {
    /// Its modules in a layer of hidden vectors of width `hidden`, whose norms are `norm`; None: they have no weights.
    pub(crate) fn modules(&self, hidden: usize, norm: Option<&ModuleKind>, push: &mut Push<'_>) {
        match *self {
            Self::Sequential(_) | Self::ThenLastNorm | Self::Parallel(_) | Self::Whole => {}
            Self::OverBlocks { .. } => {
                for name in ["self_attention_res", "mlp_res"] {
                    push_mixture(name, hidden, push);
                }
            }
            Self::WithEmbedding => {
                for name in GAINS {
                    push(name, ModuleKind::SideParameter { shape: vec![1] });
                }
            }
            Self::WithInput(width) => {
                if let Some(width) = width {
                    input_modules(hidden, width, norm, push);
                }
                push("layer_scalar", ModuleKind::Parameter { shape: vec![1] });
            }
            Self::AlternatingUpdates(AlternatingUpdates { streams, rank, input, .. }) => {
                let linear = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias: false };
                let coefficients = |rows| ModuleKind::Parameter { shape: vec![rows, streams] };
                push("altup.correct_output_scale", ModuleKind::Parameter { shape: vec![hidden] });
                push("altup.correction_coefs.weight", coefficients(streams));
                push("altup.prediction_coefs.weight", coefficients(streams * streams));
                push("altup.modality_router", linear(hidden, streams));
                norm.into_iter().for_each(|norm| push("altup.router_norm", norm.clone()));
                push("laurel.linear_left", linear(hidden, rank));
                push("laurel.linear_right", linear(rank, hidden));
                norm.into_iter().for_each(|norm| push("laurel.post_laurel_norm", norm.clone()));
                input_modules(hidden, input, norm, push);
            }
        }
    }
}

/// A mixture over blocks: the vector that weighs them and the norm on what it weighs.
pub(super) fn push_mixture(name: &str, hidden: usize, push: &mut Push<'_>) {
    push(&format!("{name}_proj"), ModuleKind::Linear { inputs: hidden, outputs: 1, bias: false });
    push(&format!("{name}_norm"), ModuleKind::Norm { width: hidden, bias: false });
}

fn input_modules(hidden: usize, width: usize, norm: Option<&ModuleKind>, push: &mut Push<'_>) {
    let linear = |inputs, outputs| ModuleKind::Linear { inputs, outputs, bias: false };
    push("per_layer_input_gate", linear(hidden, width));
    push("per_layer_projection", linear(width, hidden));
    norm.into_iter().for_each(|norm| push("post_per_layer_input_norm", norm.clone()));
}
