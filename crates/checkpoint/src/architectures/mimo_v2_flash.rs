//! MiMo-V2-Flash (Xiaomi): heads whose values are narrower than their keys, windows in most layers, with sinks and heads of their own
//! number, DeepSeek-V3's routing.

use super::{Architecture, dense, mixture, rope};
use crate::config::{Config, ConfigError, missing, shown};
use crate::spec::{Activation, AttentionSpec, ExpertsSpec, FeedForward, ModelSpec, Normalization, Routing};
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture = Architecture::new("mimo_v2_flash", spec)
    .weights(weights)
    .names(&[("model.layers.{layer}.self_attn.attention_sink_bias", "model.layers.{layer}.self_attn.sinks")]);

/// What one of the two kinds of layers calls its fields.
struct Fields {
    heads: &'static str,
    kv_heads: &'static str,
    head_dim: &'static str,
    value_dim: &'static str,
    base: &'static str,
    sinks: &'static str,
}

const FULL: Fields = Fields {
    heads: "num_attention_heads",
    kv_heads: "num_key_value_heads",
    head_dim: "head_dim",
    value_dim: "v_head_dim",
    base: "rope_theta",
    sinks: "add_full_attention_sink_bias",
};

const WINDOW: Fields = Fields {
    heads: "swa_num_attention_heads",
    kv_heads: "swa_num_key_value_heads",
    head_dim: "swa_head_dim",
    value_dim: "swa_v_head_dim",
    base: "swa_rope_theta",
    sinks: "add_swa_attention_sink_bias",
};

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in ["norm_topk_prob", "n_group", "topk_group", "max_position_embeddings", "topk_method"] {
        if config.get(field).is_none() {
            return Err(missing(field));
        }
    }
    let sizes = dense::Sizes::read(config)?;
    let window = config.usize("sliding_window_size", dense::POSITIONS)?;
    let (far, near) = (attention(config, &FULL)?, attention(config, &WINDOW)?);
    let near = AttentionSpec { window: Some(window), ..near };
    let has_window = flags(config, "hybrid_layer_pattern", sizes.layers)?;
    let attention = has_window.into_iter().map(|window| if window { near.clone() } else { far.clone() });
    let eps = config.f64("layernorm_epsilon")?;
    let config = &config.with("rms_norm_eps", eps.into());
    dense::epsilon(config, "rms_norm_eps").map_err(|error| error.in_words_of(&EPSILON))?;
    let network = sizes.gated(Activation::Silu, false);
    let mut model = dense::model(config, "mimo_v2_flash", &sizes, attention.collect(), &network, false)?;
    let with_experts = flags(config, "moe_layer_freq", sizes.layers)?;
    let experts = match with_experts.contains(&true) {
        true => Some(FeedForward::Experts(experts(config)?)),
        false => None,
    };
    for (layer, with_experts) in model.layers.iter_mut().zip(with_experts) {
        if let Some(experts) = experts.as_ref().filter(|_| with_experts) {
            layer.feed_forward = experts.clone();
        }
    }
    Ok(model)
}

const EPSILON: [(&str, &str); 1] = [("layernorm_epsilon", "rms_norm_eps")];

/// One of the two kinds of attention, without a window.
fn attention(config: &Config, fields: &Fields) -> Result<AttentionSpec, ConfigError> {
    let names = [
        (fields.heads, "num_attention_heads"),
        (fields.kv_heads, "num_key_value_heads"),
        (fields.head_dim, "head_dim"),
        (fields.base, "rope_theta"),
    ];
    let own = &config.with_names(&names);
    let read = || {
        let sizes = dense::Sizes::read(own)?;
        let dims = sizes.rotated(own, config.f64("partial_rotary_factor")?)?;
        let rope = rope::plain(dims, rope::base(own, None)?, false);
        Ok(AttentionSpec {
            value_dim: config.usize(fields.value_dim, dense::HEAD_DIM)?,
            value_factor: config.optional_f64("attention_value_scale")?.map(|factor| factor as f32),
            sinks: config.bool(fields.sinks)?,
            ..sizes.attention(Some(rope))
        })
    };
    read().map_err(|error: ConfigError| error.in_words_of(&names))
}

/// A list with a 1 for each layer that has something, and another number for one that does not.
fn flags(config: &Config, field: &str, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let flags = config.array(field)?.ok_or_else(|| missing(field))?;
    if flags.len() < layers {
        let allowed = format!("one for each of num_hidden_layers, which is {layers}");
        return Err(config.refuse(field, &format!("a list of {}", flags.len()), &allowed));
    }
    let flag = |(index, value): (usize, &Value)| {
        value.as_i64().map(|flag| flag == 1).ok_or_else(|| {
            config.refuse(&format!("{field}[{index}]"), &shown(value), "1, or 0 for a layer without")
        })
    };
    flags.iter().take(layers).enumerate().map(flag).collect()
}

/// The config's `scoring_func` is ignored, as in mlx-lm: scores are always logistic.
fn experts(config: &Config) -> Result<ExpertsSpec, ConfigError> {
    let config = &config.with("scoring_func", Value::Null);
    let corrected = mixture::corrected(config, Some(1e-20))?;
    let experts = mixture::experts(config, corrected)?;
    let normalization = match config.bool("norm_topk_prob")? {
        true => experts.routing.normalization,
        false => Normalization::None,
    };
    Ok(ExpertsSpec { routing: Routing { normalization, ..experts.routing }, ..experts })
}

/// Hugging Face stores every expert alone, and layers that predict further tokens.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    if weights.remove("model.mtp") {
        weights.note(crate::notes::Note::FurtherTokensUnused);
    }
    mixture::stack(spec, weights, "mlp.experts", mixture::MATRICES, "mlp.switch_mlp")
}
