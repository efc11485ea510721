//! What the dense families share: one kind of layer, repeated.

use crate::config::{Config, ConfigError};
use crate::quantization::Quantization;
use crate::spec::{Activation, AttentionSpec, FeedForward, LayerSpec, Mixer, ModelSpec, NormPlacement};
use mlxnode_compute::Dtype;
use std::ops::RangeInclusive;

// Far above any model there is, and low enough that no product of them overflows or allocates much.
const LAYERS: RangeInclusive<usize> = 1..=1024;
const HEADS: RangeInclusive<usize> = 1..=4096;
const HEAD_DIM: RangeInclusive<usize> = 2..=4096;
const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;
/// Positions: MLX counts them in 32 bits.
pub(super) const POSITIONS: RangeInclusive<usize> = 1..=i32::MAX as usize;

/// The sizes of a dense model.
pub(super) struct Sizes {
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) context: Option<usize>,
}

impl Sizes {
    /// Reads them. Without `num_key_value_heads` every head has its own keys; without `head_dim` the heads share `hidden_size`.
    pub(super) fn read(config: &Config) -> Result<Self, ConfigError> {
        let hidden = config.usize("hidden_size", WIDTH)?;
        let heads = config.usize("num_attention_heads", HEADS)?;
        let kv_heads = config.optional_usize("num_key_value_heads", HEADS)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let allowed = format!("a divisor of num_attention_heads, which is {heads}");
            return Err(config.refuse("num_key_value_heads", &kv_heads.to_string(), &allowed));
        }
        let head_dim = match config.optional_usize("head_dim", HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None => Self::shared_head_dim(config, hidden, heads)?,
        };
        Ok(Self {
            layers: config.usize("num_hidden_layers", LAYERS)?,
            hidden,
            intermediate: config.usize("intermediate_size", WIDTH)?,
            heads,
            kv_heads,
            head_dim: even(config, head_dim)?,
            context: config.optional_usize("max_position_embeddings", POSITIONS)?,
        })
    }

    /// The width of a head when the heads share `hidden_size`.
    pub(super) fn shared_head_dim(
        config: &Config,
        hidden: usize,
        heads: usize,
    ) -> Result<usize, ConfigError> {
        if !hidden.is_multiple_of(heads) || !HEAD_DIM.contains(&(hidden / heads)) {
            let allowed =
                format!("a divisor of hidden_size, which is {hidden}, with 2 or more left for each head");
            return Err(config.refuse("num_attention_heads", &heads.to_string(), &allowed));
        }
        even(config, hidden / heads)
    }

    /// The factor on the scores: one over the root of the head's width.
    pub(super) fn scale(&self) -> f32 {
        (self.head_dim as f64).powf(-0.5) as f32
    }
}

/// Rotation works on pairs of dimensions.
fn even(config: &Config, head_dim: usize) -> Result<usize, ConfigError> {
    match head_dim.is_multiple_of(2) {
        true => Ok(head_dim),
        false => Err(config.refuse("head_dim", &head_dim.to_string(), "even")),
    }
}

/// A model of dense layers with the norms before, one for each of `attention`.
pub(super) fn model(
    config: &Config,
    architecture: &'static str,
    sizes: &Sizes,
    attention: Vec<AttentionSpec>,
    mlp_bias: bool,
    tied_embeddings: bool,
) -> Result<ModelSpec, ConfigError> {
    let norm_eps = config.f64("rms_norm_eps")?;
    if !(0.0..1.0).contains(&norm_eps) {
        return Err(config.refuse("rms_norm_eps", &norm_eps.to_string(), "from 0 to below 1"));
    }
    match config.str("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => return Err(config.refuse("hidden_act", &format!("\"{other}\""), "silu")),
    }
    let layer = |attention| LayerSpec {
        mixer: Mixer::Attention(attention),
        feed_forward: FeedForward::Gated {
            intermediate: sizes.intermediate,
            activation: Activation::Silu,
            bias: mlp_bias,
        },
        norms: NormPlacement::Before,
    };
    Ok(ModelSpec {
        architecture,
        layers: attention.into_iter().map(layer).collect(),
        hidden: sizes.hidden,
        vocabulary: config.usize("vocab_size", VOCABULARY)?,
        norm_eps: norm_eps as f32,
        tied_embeddings,
        dtype: config.announced_dtype().unwrap_or(Dtype::F32),
        context: sizes.context,
        quantization: Quantization::from_config(config)?,
    })
}
