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
    /// The family, as the registry of architectures calls it ("llama", "mistral", "qwen2", "qwen3").
    pub architecture: &'static str,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// Width of the hidden vectors.
    pub hidden: usize,
    /// Rows of the embedding and of the head; token ids are below it.
    pub vocabulary: usize,
    /// Epsilon of every norm in the model.
    pub norm_eps: f32,
    /// The head is the embedding, transposed; there is no `lm_head`.
    pub tied_embeddings: bool,
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
    pub norms: NormPlacement,
}

/// What looks across tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention with grouped keys and values.
    Attention(AttentionSpec),
}

/// Softmax attention: projections `q_proj`, `k_proj`, `v_proj`, `o_proj`.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub out_bias: bool,
    /// Norm on queries and keys before the rotation.
    pub qk_norm: Option<QkNorm>,
    /// Key j is visible to query i only when `i - window < j`; None: all of j <= i.
    pub window: Option<usize>,
    /// How positions enter; None: not at all.
    pub rope: Option<RopeSpec>,
    /// Factor on the scores before the softmax.
    pub scale: f32,
}

/// Norm on queries and keys, weights `q_norm.weight` and `k_norm.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// RMS over each head by itself; weights `[head_dim]`.
    PerHead,
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
    },
}

/// Functions on a feed-forward network's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
}

/// Where a layer's norms are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// RMS norm before the mixer (`input_layernorm`) and before the feed-forward (`post_attention_layernorm`);
    /// both results are added to the unnormed input.
    Before,
}

impl ModelSpec {
    /// How many layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }
}
