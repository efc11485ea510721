//! Talkie: norms without weights everywhere, learned factors in their place, and the embedding added again in every layer.

use super::{Architecture, dense, rope};
use crate::config::{Config, ConfigError};
use crate::spec::{
    Activation, AttentionSpec, Flow, LayerNorms, Logits, ModelSpec, NormKind, QkNorm, QkNormKind,
    QueryFactor, RopeScaling, RopeSpec, Widening,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("talkie", spec).weights(weights).names(&[
    ("model.embed", "model.embed_tokens"),
    ("model.blocks.{layer}.attn", "model.layers.{layer}.self_attn"),
    ("model.blocks.{layer}", "model.layers.{layer}"),
    ("model.layers.{layer}.self_attn.attn_query", "model.layers.{layer}.self_attn.q_proj"),
    ("model.layers.{layer}.self_attn.attn_key", "model.layers.{layer}.self_attn.k_proj"),
    ("model.layers.{layer}.self_attn.attn_value", "model.layers.{layer}.self_attn.v_proj"),
    ("model.layers.{layer}.self_attn.attn_resid", "model.layers.{layer}.self_attn.o_proj"),
    ("model.layers.{layer}.mlp.mlp_gate", "model.layers.{layer}.mlp.gate_proj"),
    ("model.layers.{layer}.mlp.mlp_linear", "model.layers.{layer}.mlp.up_proj"),
    ("model.layers.{layer}.mlp.mlp_resid", "model.layers.{layer}.mlp.down_proj"),
]);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[
        ("hidden_size", 5120.0),
        ("num_hidden_layers", 40.0),
        ("num_attention_heads", 40.0),
        ("head_dim", 128.0),
        ("intermediate_size", 13_696.0),
        ("vocab_size", 65_540.0),
        ("rope_theta", 1_000_000.0),
        ("max_position_embeddings", 2048.0),
        ("rms_norm_eps", f64::from(f32::EPSILON)),
    ]);
    // Every head has keys of its own.
    let sizes = dense::Sizes::read(&config.with("num_key_value_heads", serde_json::Value::Null))?;
    let rope = RopeSpec {
        scaling: RopeScaling::ReversedByPowers,
        ..rope::plain(sizes.head_dim, rope::base(config, None)?, false)
    };
    let qk_norm = QkNorm {
        kind: QkNormKind::PerHeadUnweighted { eps: dense::epsilon(config, "rms_norm_eps")? },
        after_rope: true,
        query_factor: Some(QueryFactor::OfHeads("head_gain.head_g")),
        ..QkNorm::PER_HEAD
    };
    let attention = AttentionSpec { qk_norm: Some(qk_norm), ..sizes.attention(Some(rope)) };
    let network = sizes.gated(Activation::Silu, false);
    let mut model = dense::model(config, "talkie", &sizes, vec![attention; sizes.layers], &network, false)?;
    dense::arrange(&mut model, LayerNorms::BEFORE, Flow::WithEmbedding);
    model.norm = NormKind::RmsUnweighted;
    model.embedding_norm = true;
    model.widening = Widening { embedding: true, ..Widening::NONE };
    model.logits = Logits::Gained;
    Ok(model)
}

/// The head has no path of its own, and tables of the rotation are of no use.
fn weights(_: &Config, _: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    if let Some(head) = weights.take("lm_head") {
        weights.insert("lm_head.weight", head)?;
    }
    let is_table = |name: &str| name.contains("rotary") || name.ends_with("cos") || name.ends_with("sin");
    let tables: Vec<String> =
        weights.iter().map(|(name, _)| name).filter(|name| is_table(name)).map(str::to_owned).collect();
    for name in &tables {
        weights.take(name);
    }
    Ok(())
}
