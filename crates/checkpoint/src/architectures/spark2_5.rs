//! Spark 2.5: queries, keys and values in one matrix, gates on whole heads, windows in most layers, a rotation for each kind of layer.

use super::{Architecture, dense, llama, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{
    Activation, AttentionGate, AttentionNames, AttentionSpec, GateFunction, ModelSpec, RopeSpec,
};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture = Architecture::new("spark2_5", spec).names(&[
    ("model.embedding", "model.embed_tokens"),
    ("model.layers.{layer}.self_attn.q_k_v_proj", "model.layers.{layer}.self_attn.qkv_proj"),
]);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[("rms_norm_eps", 1e-6), ("max_position_embeddings", 8192.0)]);
    for field in ["num_key_value_heads", "head_dim", "sliding_window", "rope_parameters"] {
        if config.get(field).is_none() {
            return Err(missing(field));
        }
    }
    only(config, "hidden_act", "gelu")?;
    only(config, "gate_attn_act_mode", "sigmoid")?;
    if !config.bool_or("headwise_attn_output_gate", true)? {
        return Err(config.refuse("headwise_attn_output_gate", "false", "true"));
    }
    let sizes = dense::Sizes::read(config)?;
    let bias = config.bool_or("attention_bias", false)?;
    let gate =
        AttentionGate { name: "g_proj", per_head: true, function: GateFunction::SigmoidInSingle, bias };
    let mut attention = Vec::with_capacity(sizes.layers);
    for window in windows(config, sizes.layers)? {
        let kind = if window.is_some() { "sliding_attention" } else { "full_attention" };
        attention.push(AttentionSpec {
            names: AttentionNames { output: "out_proj", ..AttentionNames::LLAMA },
            fused: true,
            qkv_bias: bias,
            out_bias: bias,
            gate: Some(gate),
            window,
            ..sizes.attention(Some(rotation(config, kind, &sizes)?))
        });
    }
    let network = sizes.gated(Activation::Gelu, config.bool_or("mlp_bias", false)?);
    let tied = config.bool_or("tie_word_embeddings", true)?;
    dense::model(config, "spark2_5", &sizes, attention, &network, tied)
}

/// Without a list every fourth layer has no window.
fn windows(config: &Config, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    if config.array("layer_types")?.is_some() {
        return llama::windows(config, layers);
    }
    let window = config.usize("sliding_window", dense::POSITIONS)?;
    Ok((1..=layers).map(|layer| (!layer.is_multiple_of(4)).then_some(window)).collect())
}

/// Base and rotating part of a kind of layer. The family knows no stretched rotation.
fn rotation(config: &Config, kind: &str, sizes: &dense::Sizes) -> Result<RopeSpec, ConfigError> {
    let field = format!("rope_parameters.{kind}");
    let object = config.object("rope_parameters")?.and_then(|kinds| kinds.get(kind));
    let object = object.and_then(Value::as_object).ok_or_else(|| missing(&field))?;
    let number = |name: &str, default: f64| match object.get(name) {
        None => Ok(default),
        Some(value) => config.number(&format!("{field}.{name}"), value),
    };
    let base = number("rope_theta", 10_000.0)?;
    if base <= 1.0 {
        return Err(config.refuse(&format!("{field}.rope_theta"), &base.to_string(), "above 1"));
    }
    Ok(rope::plain(sizes.rotated(config, number("partial_rotary_factor", 1.0)?)?, base, false))
}

/// A field that has one value in every model of the family.
fn only(config: &Config, field: &str, word: &str) -> Result<(), ConfigError> {
    match config.str(field)? {
        Some(other) if other != word => Err(config.refuse(field, &format!("\"{other}\""), word)),
        _ => Ok(()),
    }
}
