//! What the dense families share: one kind of layer, repeated.

use crate::config::{Config, ConfigError};
use crate::quantization::Quantization;
use crate::spec::{
    Activation, AttentionNames, AttentionSpec, FeedForward, Flow, GatedNames, LayerNorms, LayerSpec, Logits,
    Mixer, ModelSpec, NormKind, Residual, RopeSpec, SinglePrecision, Values, Widening,
};
use mlxnode_compute::Dtype;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

// Far above any model there is, and low enough that no product of them overflows or allocates much.
pub(super) const LAYERS: RangeInclusive<usize> = 1..=1024;
pub(super) const HEADS: RangeInclusive<usize> = 1..=4096;
pub(super) const HEAD_DIM: RangeInclusive<usize> = 2..=4096;
pub(super) const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
pub(super) const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;
/// Positions: MLX counts them in 32 bits.
pub(super) const POSITIONS: RangeInclusive<usize> = 1..=i32::MAX as usize;

/// The sizes of a dense model.
#[derive(Clone)]
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

    /// Those of a family that has no `head_dim` of its own; one in the config is ignored, as in mlx-lm.
    pub(super) fn read_with_shared_heads(config: &Config) -> Result<Self, ConfigError> {
        let mut sizes = Self::read(&config.with("head_dim", serde_json::Value::Null))?;
        sizes.head_dim = Self::shared_head_dim(config, sizes.hidden, sizes.heads)?;
        Ok(sizes)
    }

    /// How many dimensions of a head rotate when `partial_rotary_factor` is `part`.
    pub(super) fn rotated(&self, config: &Config, part: f64) -> Result<usize, ConfigError> {
        let dims = (self.head_dim as f64 * part) as usize;
        match (2..=self.head_dim).contains(&dims) && dims.is_multiple_of(2) {
            true => Ok(dims),
            false => {
                let allowed =
                    format!("a part that rotates an even number of the {} dimensions", self.head_dim);
                Err(config.refuse("partial_rotary_factor", &part.to_string(), &allowed))
            }
        }
    }

    /// Attention over everything, without biases and norms.
    pub(super) fn attention(&self, rope: Option<RopeSpec>) -> AttentionSpec {
        AttentionSpec {
            names: AttentionNames::LLAMA,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            value_dim: self.head_dim,
            value_factor: None,
            fused: false,
            qkv_bias: false,
            out_bias: false,
            qk_norm: None,
            result_norm: None,
            values: Values::Projected,
            value_norm: false,
            shares: None,
            projected_by: None,
            beside: None,
            blocks: None,
            convolved: false,
            rounded_to_bytes: false,
            projection_limit: None,
            window: None,
            wider_in_prompts: false,
            chunk: None,
            sinks: false,
            temperature: None,
            gate: None,
            growth: None,
            rope,
            scale: self.scale(),
            score_cap: None,
            output_gate: false,
            single_precision: SinglePrecision::Never,
        }
    }

    /// A gated feed-forward network of separate projections.
    pub(super) fn gated(&self, activation: Activation, bias: bool) -> FeedForward {
        let names = GatedNames::LLAMA;
        FeedForward::Gated { intermediate: self.intermediate, activation, bias, fused: false, names }
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

/// How many experts there are and how many work on a token.
pub(super) fn experts(config: &Config, count: &str) -> Result<(usize, usize), ConfigError> {
    let experts = config.usize(count, 1..=4096)?;
    Ok((experts, config.usize("num_experts_per_tok", 1..=experts)?))
}

/// The width of a feed-forward network under another name than `intermediate_size`.
pub(super) fn width(config: &Config, field: &str) -> Result<usize, ConfigError> {
    config.usize(field, WIDTH)
}

/// The only activation of most families.
pub(super) fn silu(config: &Config) -> Result<Activation, ConfigError> {
    match config.str("hidden_act")? {
        None | Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => Err(config.refuse("hidden_act", &format!("\"{other}\""), "silu")),
    }
}

/// A family that has only one variant of gelu, which mlx-lm runs whichever of them the config names.
pub(super) fn gelu(config: &Config, variant: Activation) -> Result<Activation, ConfigError> {
    for field in ["hidden_act", "hidden_activation"] {
        match config.str(field)? {
            None | Some("gelu" | "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh") => {}
            Some(other) => {
                return Err(config.refuse(field, &format!("\"{other}\""), "gelu or gelu_pytorch_tanh"));
            }
        }
    }
    Ok(variant)
}

/// The epsilon of norms.
pub(super) fn epsilon(config: &Config, field: &str) -> Result<f32, ConfigError> {
    let eps = config.f64(field)?;
    match (0.0..1.0).contains(&eps) {
        true => Ok(eps as f32),
        false => Err(config.refuse(field, &eps.to_string(), "from 0 to below 1")),
    }
}

/// Which layers have windows when every `sliding_window_pattern`-th does not.
pub(super) fn every_nth_full(config: &Config, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = config.usize("sliding_window", POSITIONS)?;
    let pattern = config.usize("sliding_window_pattern", LAYERS)?;
    Ok((1..=layers).map(|layer| (!layer.is_multiple_of(pattern)).then_some(window)).collect())
}

/// A model of dense layers, one for each of `attention`, with Llama's RMS norms before. Families with others change the result.
pub(super) fn model(
    config: &Config,
    architecture: &'static str,
    sizes: &Sizes,
    attention: Vec<AttentionSpec>,
    feed_forward: &FeedForward,
    tied_embeddings: bool,
) -> Result<ModelSpec, ConfigError> {
    let mixers = attention.into_iter().map(Mixer::Attention).collect();
    of_mixers(config, architecture, sizes, mixers, feed_forward, tied_embeddings)
}

/// A model of layers with these mixers and Llama's RMS norms before. Families with others change the result.
pub(super) fn of_mixers(
    config: &Config,
    architecture: &'static str,
    sizes: &Sizes,
    mixers: Vec<Mixer>,
    feed_forward: &FeedForward,
    tied_embeddings: bool,
) -> Result<ModelSpec, ConfigError> {
    let layer = |mixer| LayerSpec {
        mixer,
        feed_forward: feed_forward.clone(),
        norms: LayerNorms::BEFORE,
        flow: Flow::Sequential(Residual::Add),
    };
    let layers = mixers.into_iter().map(layer).collect();
    of_layers(config, architecture, sizes.hidden, sizes.context, layers, tied_embeddings)
}

/// A model of these layers, with RMS norms.
pub(super) fn of_layers(
    config: &Config,
    architecture: &'static str,
    hidden: usize,
    context: Option<usize>,
    layers: Vec<LayerSpec>,
    tied_embeddings: bool,
) -> Result<ModelSpec, ConfigError> {
    Ok(ModelSpec {
        architecture,
        layers,
        passes: 1,
        hidden,
        vocabulary: config.usize("vocab_size", VOCABULARY)?,
        norm: NormKind::Rms,
        own_last_norm: None,
        after_norm_eps: None,
        norm_eps: epsilon(config, "rms_norm_eps")?,
        final_norm_eps: None,
        embedding_scale: None,
        embedding_norm: false,
        ngrams: None,
        positions: None,
        head_bias: false,
        widening: Widening::NONE,
        logits: Logits::Plain,
        tied_embeddings,
        tied_without_head: false,
        dtype: config.announced_dtype().unwrap_or(Dtype::F32),
        context,
        quantization: Quantization::from_config(config)?,
        turned: BTreeMap::new(),
    })
}

/// Gives every layer these norms and this flow.
pub(super) fn arrange(model: &mut ModelSpec, norms: LayerNorms, flow: Flow) {
    for layer in &mut model.layers {
        (layer.norms, layer.flow) = (norms, flow);
    }
}
