//! A decoder described by data: everything an engine must know to build and run it, and nothing about files.
//!
//! An architecture turns its config.json into a [`ModelSpec`]; the engine turns the spec into modules. A new family adds
//! a variant to one of the enums here when it computes something that no family before it did; most only fill in numbers.
//! Every layer has its own entry, so that layers of one model may differ (windows, experts, other mixers).

mod attention;
mod block_indexer;
mod convolved_keys;
mod dense_and_experts;
mod experts;
mod feed_forward;
mod flow;
mod gated_delta;
mod gated_recurrence;
mod latent;
mod lightning;
mod mamba;
mod mamba2;
mod ngrams;
mod plamo_mamba;
mod rope;
mod rwkv7;
mod short_convolution;
mod shortcut;
mod widening;

pub use attention::{
    AttentionGate, AttentionNames, AttentionSpec, GateFunction, QkNorm, QkNormKind, QueryFactor,
    SinglePrecision, Temperature, Values,
};
pub use block_indexer::BlockIndexerSpec;
pub use convolved_keys::ConvolvedKeysSpec;
pub use dense_and_experts::DenseAndExpertsSpec;
pub use experts::{
    Correction, ExpertForm, ExpertNetworks, ExpertsSpec, GroupScore, Groups, Normalization, Outside,
    RouterSpec, Routing, Scores, SharedExpertSpec, WeightPrecision,
};
pub use feed_forward::{Activation, FeedForward, GatedNames, XIELU};
pub use flow::{AlternatingUpdates, Flow, GAINS, ParallelSum, Residual};
pub use gated_delta::{DeltaForm, GatedDeltaSpec};
pub use gated_recurrence::GatedRecurrenceSpec;
pub use latent::{INDEXER_NORM_EPS, IndexerSpec, LatentForm, LatentSpec, QueryGrowth};
pub use lightning::LightningSpec;
pub use mamba::{MambaNorms, MambaSpec};
pub use mamba2::{Mamba2Spec, MambaGate};
pub use ngrams::NgramsSpec;
pub use plamo_mamba::PlamoMambaSpec;
pub use rope::{RopeScaling, RopeSpec};
pub use rwkv7::{Rwkv7Ranks, Rwkv7Spec};
pub use short_convolution::ShortConvolutionSpec;
pub use shortcut::ShortcutSpec;
pub use widening::{LayerInputs, Widening};

use crate::layout::{ModuleKind, Push};
use crate::quantization::Quantization;
use mlxnode_compute::Dtype;
use std::collections::BTreeMap;

/// A whole model. Sizes are in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family, as the registry of architectures calls it ("llama", "gemma3_text").
    pub architecture: &'static str,
    /// The layers, first to last; of a model that goes through its layers several times, those of each pass after the other.
    pub layers: Vec<LayerSpec>,
    /// How often the stored layers are gone through; divides the number of layers.
    pub passes: usize,
    /// Width of the hidden vectors.
    pub hidden: usize,
    /// Rows of the embedding and of the head; token ids are below it.
    pub vocabulary: usize,
    /// What every norm of the hidden vectors computes.
    pub norm: NormKind,
    /// What the last norm computes, where that is something else.
    pub own_last_norm: Option<NormKind>,
    /// Epsilon of every norm in the model.
    pub norm_eps: f32,
    /// Epsilon of the norms on what comes out of mixers and feed-forward networks, where it is another one.
    pub after_norm_eps: Option<f32>,
    /// Epsilon of the norm after the last layer, where it has one of its own.
    pub final_norm_eps: Option<f32>,
    /// Factor on the embedding's vectors, applied in their element type.
    pub embedding_scale: Option<f32>,
    /// The embedding's vectors are divided by their root mean square, without a weight.
    pub embedding_norm: bool,
    /// Groups of tokens are looked up in tables too, before the embedding's factor and norm.
    pub ngrams: Option<NgramsSpec>,
    /// Positions are looked up in a table of this many rows, whose vectors are added to the embedding's. No token can be beyond it.
    pub positions: Option<usize>,
    /// The head has a bias. Not with tied embeddings.
    pub head_bias: bool,
    /// What travels besides one hidden vector.
    pub widening: Widening,
    /// What the head's results go through.
    pub logits: Logits,
    /// The head is the embedding, transposed; there is no `lm_head`.
    pub tied_embeddings: bool,
    /// The config does not say whether the embeddings are tied: they are when the files have no `lm_head.weight`.
    pub tied_without_head: bool,
    /// Element type of the hidden vectors: what MLX's type promotion makes of the floating weights.
    /// Comes from the tensors; without tensors it is what config.json says.
    pub dtype: Dtype,
    /// Most positions that the model was made for, when the config says so.
    pub context: Option<usize>,
    /// Which weights are packed, and how.
    pub quantization: Quantization,
    /// Paths of packed maps and tables whose inputs, or whose vectors, are turned, and the sizes of the blocks that are turned: each
    /// element is multiplied by one of the signs in the tensor `PATH.signs`, each block goes through a Walsh-Hadamard transform.
    pub turned: BTreeMap<String, usize>,
}

/// One layer: a mixer that looks across tokens, then a feed-forward network for each token.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// What looks across tokens.
    pub mixer: Mixer,
    /// What works on each token.
    pub feed_forward: FeedForward,
    /// Where the norms are.
    pub norms: LayerNorms,
    /// How the two branches meet the hidden vectors.
    pub flow: Flow,
}

/// What a norm of the hidden vectors computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) * weight`.
    Rms,
    /// `x / rms(x) * (1 + weight)`.
    RmsPlusOne,
    /// `x / rms(x)`.
    RmsUnweighted,
    /// `(x - mean(x)) / deviation(x) * weight`, plus a bias.
    Layer {
        /// There is a bias.
        bias: bool,
    },
    /// `(x - mean(x)) / deviation(x) * (1 + weight) + bias`.
    LayerPlusOne,
}

/// What the head's results go through to become logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Logits {
    /// Nothing.
    Plain,
    /// Multiplied by a factor.
    Multiplied(f32),
    /// Divided by a number.
    Divided(f32),
    /// `cap * tanh(x / cap)`.
    Capped(f32),
    /// Multiplied by a factor, then capped.
    MultipliedThenCapped {
        /// The factor.
        factor: f32,
        /// The cap.
        cap: f32,
    },
    /// Multiplied by a learned number, the tensor `lm_head_gain.w_g`.
    Gained,
    /// Nothing, but the vectors that go into the head are divided by a number.
    OfDivided(f32),
}

/// What looks across tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention with grouped keys and values.
    Attention(AttentionSpec),
    /// A gated delta network.
    GatedDelta(GatedDeltaSpec),
    /// Griffin's recurrent block.
    GatedRecurrence(GatedRecurrenceSpec),
    /// Lightning attention.
    Lightning(LightningSpec),
    /// A Mamba mixer.
    Mamba(MambaSpec),
    /// A Mamba 2 mixer.
    Mamba2(Mamba2Spec),
    /// PLaMo 2's Mamba.
    PlamoMamba(PlamoMambaSpec),
    /// A short convolution.
    ShortConvolution(ShortConvolutionSpec),
    /// Keys and values that go through short convolutions instead of an attention.
    ConvolvedKeys(ConvolvedKeysSpec),
    /// A Mamba 2 mixer and an attention with the same input; the results are added to the hidden vectors in this order.
    Mamba2AndAttention(Box<(Mamba2Spec, AttentionSpec)>),
    /// A linear map `linear` in `self_attn`, in place of an attention that was found to be worth no more.
    Linear {
        /// It has a bias.
        bias: bool,
    },
    /// Nothing: the layer is a feed-forward network only.
    Absent,
    /// Latent attention.
    Latent(LatentSpec),
    /// A whole layer of RWKV-7; the flow is [`Flow::Whole`].
    Rwkv7(Rwkv7Spec),
    /// A whole layer of LongCat's; the flow is [`Flow::Whole`].
    Shortcut(Box<ShortcutSpec>),
}

impl Mixer {
    /// Its modules in a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        match self {
            Self::Attention(attention) => attention.modules(hidden, push),
            Self::GatedDelta(delta) => delta.modules(hidden, push),
            Self::GatedRecurrence(recurrence) => recurrence.modules(hidden, push),
            Self::Lightning(lightning) => lightning.modules(hidden, push),
            Self::Mamba(mamba) => mamba.modules(hidden, push),
            Self::Mamba2(mamba) => mamba.modules(hidden, push),
            Self::PlamoMamba(mamba) => mamba.modules(hidden, push),
            Self::ShortConvolution(convolution) => convolution.modules(hidden, push),
            Self::ConvolvedKeys(mixer) => mixer.modules(hidden, push),
            Self::Latent(latent) => latent.modules("self_attn", hidden, push),
            Self::Mamba2AndAttention(both) => {
                both.0.modules(hidden, push);
                both.1.modules(hidden, push);
            }
            Self::Linear { bias } => {
                push("self_attn.linear", ModuleKind::Linear { inputs: hidden, outputs: hidden, bias: *bias });
            }
            Self::Absent => {}
            Self::Rwkv7(layer) => layer.modules(hidden, push),
            Self::Shortcut(shortcut) => shortcut.modules(hidden, push),
        }
    }

    /// Does what it makes of a token depend on which tokens go through together with it? It does where wavelengths follow the length of
    /// the text so far.
    pub fn depends_on_step(&self) -> bool {
        let latent = match self {
            Self::Latent(latent) => Some(latent),
            Self::Shortcut(shortcut) => Some(&shortcut.attention),
            _ => None,
        };
        let rope = self.attention().and_then(|attention| attention.rope.as_ref());
        let ropes = rope.into_iter().chain(latent.map(|latent| &latent.rope));
        ropes.into_iter().any(|rope| matches!(rope.scaling, RopeScaling::DynamicNtk { .. }))
    }

    /// The softmax attention in it, if there is one.
    pub fn attention(&self) -> Option<&AttentionSpec> {
        match self {
            Self::Attention(attention) => Some(attention),
            Self::Mamba2AndAttention(both) => Some(&both.1),
            _ => None,
        }
    }

    /// Bytes of what one sequence keeps whatever its length, in a model of hidden vectors of width `hidden` whose elements have
    /// `element` bytes.
    pub(crate) fn state_bytes(&self, hidden: usize, element: usize) -> usize {
        match self {
            Self::GatedDelta(delta) => delta.state_bytes(element),
            Self::GatedRecurrence(recurrence) => recurrence.state_bytes(element),
            Self::Lightning(lightning) => lightning.state_bytes(element),
            Self::Mamba(mamba) => mamba.state_bytes(element),
            Self::Mamba2(mamba) => mamba.state_bytes(element),
            Self::PlamoMamba(mamba) => mamba.state_bytes(element),
            Self::Rwkv7(layer) => layer.state_bytes(hidden, element),
            Self::ShortConvolution(convolution) => convolution.state_bytes(hidden, element),
            Self::ConvolvedKeys(mixer) => mixer.state_bytes(element),
            Self::Mamba2AndAttention(both) => both.0.state_bytes(element),
            Self::Attention(attention) if attention.convolved => {
                (AttentionSpec::TAPS - 1) * 2 * attention.kv_heads * attention.head_dim * element
            }
            Self::Attention(_) | Self::Latent(_) | Self::Linear { .. } | Self::Shortcut(_) | Self::Absent => {
                0
            }
        }
    }

    /// How wide the vectors are that its cache keeps for each head and token; none for a mixer whose cache does not grow.
    pub fn kept_widths(&self) -> Vec<usize> {
        match self {
            Self::Latent(latent) => latent.kept_widths().to_vec(),
            Self::Shortcut(shortcut) => shortcut.attention.kept_widths().to_vec(),
            _ => {
                let own = self.attention().filter(|attention| attention.shares.is_none());
                match own {
                    None => Vec::new(),
                    Some(attention) if attention.value_dim == attention.head_dim => vec![attention.head_dim],
                    Some(attention) => vec![attention.head_dim, attention.value_dim],
                }
            }
        }
    }
}

/// A layer's norms by their names in the layer; None for one that the family does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerNorms {
    /// On what goes into the mixer.
    pub before_mixer: Option<&'static str>,
    /// On what comes out of it, before it is added.
    pub after_mixer: Option<&'static str>,
    /// On what goes into the feed-forward network. Without it a parallel network gets what the mixer gets.
    pub before_feed_forward: Option<&'static str>,
    /// On what comes out of it, before it is added.
    pub after_feed_forward: Option<&'static str>,
}

impl LayerNorms {
    /// Llama's: before both.
    pub const BEFORE: Self = Self {
        before_mixer: Some("input_layernorm"),
        after_mixer: None,
        before_feed_forward: Some("post_attention_layernorm"),
        after_feed_forward: None,
    };
    /// After both.
    pub const AFTER: Self = Self {
        before_mixer: None,
        after_mixer: Some("post_attention_layernorm"),
        before_feed_forward: None,
        after_feed_forward: Some("post_feedforward_layernorm"),
    };
    /// Gemma's: before and after both.
    pub const AROUND: Self = Self {
        before_mixer: Some("input_layernorm"),
        after_mixer: Some("post_attention_layernorm"),
        before_feed_forward: Some("pre_feedforward_layernorm"),
        after_feed_forward: Some("post_feedforward_layernorm"),
    };
    /// One for both branches of a parallel layer.
    pub const SHARED: Self = Self {
        before_mixer: Some("input_layernorm"),
        after_mixer: None,
        before_feed_forward: None,
        after_feed_forward: None,
    };

    /// None at all.
    pub const NONE: Self =
        Self { before_mixer: None, after_mixer: None, before_feed_forward: None, after_feed_forward: None };

    /// Those that there are.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        [self.before_mixer, self.after_mixer, self.before_feed_forward, self.after_feed_forward]
            .into_iter()
            .flatten()
    }
}

impl ModelSpec {
    /// How many layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Elements that travel from stage to stage for each token.
    pub fn activation_width(&self) -> usize {
        self.widening.width(self.hidden, self.layer_count())
    }

    /// The earlier layer that makes keys and values for layer `layer`, or projects them for it.
    pub fn shares(&self, layer: usize) -> Option<usize> {
        let attention = self.layers.get(layer)?.mixer.attention()?;
        attention.shares.or(attention.projected_by).or(attention.beside)
    }

    /// The layer whose weights layer `layer` has, by its number in the files.
    pub fn stored_layer(&self, layer: usize) -> usize {
        layer % (self.layer_count() / self.passes.max(1)).max(1)
    }

    /// What the last norm computes.
    pub fn last_norm(&self) -> NormKind {
        self.own_last_norm.unwrap_or(self.norm)
    }

    /// May a stage begin with layer `layer`? Not when a layer from it on needs keys and values of one before it.
    pub fn can_split_before(&self, layer: usize) -> bool {
        (layer..self.layer_count()).all(|later| self.shares(later).is_none_or(|owner| owner >= layer))
    }

    /// How many experts the layers have that have any; 0 for a dense model.
    pub fn expert_count(&self) -> usize {
        let experts = |layer: &LayerSpec| match (&layer.feed_forward, &layer.mixer) {
            (FeedForward::Experts(experts), _) => experts.experts,
            (_, Mixer::Shortcut(shortcut)) => shortcut.experts.experts,
            _ => 0,
        };
        self.layers.iter().map(experts).max().unwrap_or(0)
    }
}
