//! A decoder described by data: everything an engine must know to build and run it, and nothing about files.
//!
//! An architecture turns its config.json into a [`ModelSpec`]; the engine turns the spec into modules. A new family adds
//! a variant to one of the enums here when it computes something that no family before it did; most only fill in numbers.
//! Every layer has its own entry, so that layers of one model may differ (windows, experts, other mixers).

use crate::quantization::Quantization;
use mlxnode_compute::Dtype;

/// A whole model. Sizes are in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family, as the registry of architectures calls it ("llama", "gemma3_text").
    pub architecture: &'static str,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// Width of the hidden vectors.
    pub hidden: usize,
    /// Rows of the embedding and of the head; token ids are below it.
    pub vocabulary: usize,
    /// What every norm of the hidden vectors computes.
    pub norm: NormKind,
    /// Epsilon of every norm in the model.
    pub norm_eps: f32,
    /// Factor on the embedding's vectors, applied in their element type.
    pub embedding_scale: Option<f32>,
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
}

/// What looks across tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention with grouped keys and values.
    Attention(AttentionSpec),
}

/// Softmax attention: projections `q_proj`, `k_proj`, `v_proj`, or all three in `qkv_proj`, and `o_proj`.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// q, k and v are the rows of one matrix, `qkv_proj`, in this order.
    pub fused: bool,
    /// The q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub out_bias: bool,
    /// Norm on queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Key j is visible to query i only when `i - window < j`; None: all of j <= i.
    pub window: Option<usize>,
    /// How positions enter; None: not at all.
    pub rope: Option<RopeSpec>,
    /// Factor on the scores before the softmax.
    pub scale: f32,
    /// The scores become `cap * tanh(score / cap)` before the softmax.
    pub score_cap: Option<f32>,
    /// Element types in which the attention itself is computed in single precision.
    pub single_precision: SinglePrecision,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QkNorm {
    /// What it computes.
    pub kind: QkNormKind,
    /// Names of the queries' and the keys' norm in the attention.
    pub names: [&'static str; 2],
    /// After the rotation instead of before.
    pub after_rope: bool,
}

/// What a norm on queries and keys computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNormKind {
    /// The model's RMS norm over each head by itself; weights `[head_dim]`.
    PerHead,
    /// RMS over the whole projection; weights `[heads * head_dim]`.
    Whole,
    /// Layer norm over each head, no bias, weights `[heads, head_dim]`.
    LayerPerHead,
}

impl QkNorm {
    /// The most common one: over each head, before the rotation.
    pub const PER_HEAD: Self =
        Self { kind: QkNormKind::PerHead, names: ["q_norm", "k_norm"], after_rope: false };
    /// Over the whole projection, before the rotation.
    pub const WHOLE: Self = Self { kind: QkNormKind::Whole, ..Self::PER_HEAD };
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// How many of the head's dimensions rotate, from the first on. Even.
    pub dims: usize,
    /// Base of the wavelengths ("theta").
    pub base: f64,
    /// Pairs are neighbours (2i, 2i+1) instead of halves (i, i + dims/2).
    pub traditional: bool,
    /// How the wavelengths are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How wavelengths are stretched, by mlx-lm's rules (`rope_utils.py`). Below, `freqs[i] = base^(2i/dims)`, the inverse of
/// the angular frequency, which is what MLX's rope takes. MLX computes them in single precision.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions are multiplied by `1 / factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// With T = max(tokens so far, max_positions), the base becomes
    /// `base * (factor * T / max_positions - (factor - 1))^(dims / (dims - 2))`.
    DynamicNtk {
        /// Stretch.
        factor: f64,
        /// The model's `max_position_embeddings`.
        max_positions: usize,
    },
    /// Long wavelengths are stretched by `factor`, short ones kept, those between smoothed.
    Llama3 {
        /// Stretch.
        factor: f64,
        /// Wavelengths above `original_max_positions / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_positions / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context before the stretch.
        original_max_positions: f64,
    },
    /// YaRN: a ramp between stretched and kept wavelengths, and a factor on the rotated dimensions of queries and keys.
    Yarn {
        /// Stretch.
        factor: f64,
        /// Context before the stretch.
        original_max_positions: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is stretched.
        beta_slow: f64,
        /// Numerator of the input factor: `m(mscale) / m(mscale_all_dim)`, `m(c) = 0.1 c ln(factor) + 1`, 1 for factor <= 1.
        mscale: f64,
        /// Denominator.
        mscale_all_dim: f64,
    },
    /// Every wavelength has its own stretch; the rotated dimensions of queries and keys are multiplied by `input_scale`.
    /// Ignores `traditional`: pairs are always halves. mlx-lm always takes the long factors.
    Longrope {
        /// One factor for each pair of dimensions, or a single one for all.
        long_factor: Vec<f64>,
        /// `sqrt(1 + ln(max / original) / ln(original))`, or 1 when nothing is stretched.
        input_scale: f64,
    },
    /// The base becomes `base * alpha^(dims / (dims - 2))`.
    NtkAlpha {
        /// Stretch.
        alpha: f64,
    },
    /// Exponents over all dimensions, but only the first `rotated_dims` rotate; the others have infinite wavelength.
    Proportional {
        /// How many dimensions rotate. Even.
        rotated_dims: usize,
        /// Stretch.
        factor: f64,
    },
}

/// What works on each token.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForward {
    /// `down_proj(activation(gate_proj(x)) * up_proj(x))`.
    Gated {
        /// Width between the projections.
        intermediate: usize,
        /// The function on the gate.
        activation: Activation,
        /// The projections have biases.
        bias: bool,
        /// gate and up are the rows of one matrix, `gate_up_proj`, in this order.
        fused: bool,
    },
    /// `down(activation(up(x)))`.
    Plain {
        /// Width between the projections.
        intermediate: usize,
        /// The function between them.
        activation: Activation,
        /// The projections have biases.
        bias: bool,
        /// Names of the two projections in the layer.
        names: [&'static str; 2],
    },
    /// A few of many gated networks for each token, chosen by a router.
    Experts(ExpertsSpec),
}

/// Gated networks of which a router chooses a few for each token, stored as matrices stacked in `switch_mlp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsSpec {
    /// Name of the block in the layer.
    pub block: &'static str,
    /// How many there are.
    pub experts: usize,
    /// How many work on a token.
    pub per_token: usize,
    /// Width between an expert's projections.
    pub intermediate: usize,
    /// The function on the experts' gates.
    pub activation: Activation,
    /// How the router's results become weights of the experts.
    pub routing: Routing,
    /// Width of the expert that works on every token, under a gate of its own (`shared_expert`).
    pub shared: Option<usize>,
}

/// How a router's results become weights of the chosen experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// Softmax over all experts.
    All {
        /// The weights of the chosen are made to sum to 1.
        normalized: bool,
        /// The chosen are the end of a partition of the weights instead of the start of one of their negatives. Which of equal
        /// weights are chosen, and the order in which results are added, depend on it.
        from_end: bool,
    },
    /// Softmax over the chosen.
    Chosen,
}

/// Functions in a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * (1 + erf(x / sqrt 2)) / 2`.
    Gelu,
    /// Gelu by way of tanh.
    GeluTanh,
    /// `max(x, 0)^2`.
    SquaredRelu,
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

    /// Those that there are.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        [self.before_mixer, self.after_mixer, self.before_feed_forward, self.after_feed_forward]
            .into_iter()
            .flatten()
    }
}

/// How a layer's branches meet the hidden vectors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Flow {
    /// The mixer's result is added, then the feed-forward network's, which sees the sum.
    Sequential(Residual),
    /// Both see the layer's input; rounding depends on the order of the sum.
    Parallel(ParallelSum),
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

impl ModelSpec {
    /// How many layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }
}
