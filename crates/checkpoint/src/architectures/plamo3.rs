//! PLaMo 3: norms around both parts whose weights count from numbers of their own, norms on each head, windows in most layers, two
//! rotations.

use super::{Architecture, dense, gemma, rope};
use crate::config::{Config, ConfigError};
use crate::expression::Function;
use crate::spec::{
    Activation, AttentionNames, AttentionSpec, FeedForward, Flow, GatedNames, LayerNorms, ModelSpec, QkNorm,
    Residual,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("plamo3", spec).weights(weights).names(&NAMES);

/// The layers lie one path deeper.
pub(super) const NAMES: [(&str, &str); 1] = [("model.layers.layers.{layer}", "model.layers.{layer}")];

pub(super) const NORMS: LayerNorms = LayerNorms {
    before_mixer: Some("pre_mixer_norm"),
    after_mixer: Some("post_mixer_norm"),
    before_feed_forward: Some("pre_mlp_norm"),
    after_feed_forward: Some("post_mlp_norm"),
};

/// What the weights of the norms in a layer count from; the last is 5 to the power of -1.5.
pub(super) const ORIGINS: [(&str, f32); 6] = [
    ("pre_mixer_norm", 1.0),
    ("post_mixer_norm", 0.2),
    ("pre_mlp_norm", 1.0),
    ("post_mlp_norm", 0.089_442_72),
    ("mixer.q_norm", 1.0),
    ("mixer.k_norm", 1.0),
];

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[
        ("hidden_size", 4096.0),
        ("num_hidden_layers", 32.0),
        ("rms_norm_eps", 1e-6),
        ("num_attention_heads", 32.0),
        ("num_key_value_heads", 4.0),
        ("head_dim", 128.0),
        ("max_position_embeddings", 2048.0),
        ("window_size", 2048.0),
        ("sliding_window_pattern", 8.0),
        ("rope_local_theta", 10_000.0),
        ("intermediate_size", 13_312.0),
        ("vocab_size", 32_000.0),
    ]);
    let config = &match config.get("sliding_window") {
        Some(_) => config.clone(),
        None => config.with("sliding_window", config.usize("window_size", dense::POSITIONS)?.into()),
    };
    let sizes = gemma::sizes(config)?;
    let far = rope::plain(sizes.head_dim, rope::base(config, Some(1_000_000.0))?, false);
    let near = rope::plain(sizes.head_dim, config.positive("rope_local_theta")?, false);
    let layer = |window: Option<usize>| AttentionSpec {
        names: AttentionNames { block: "mixer", ..AttentionNames::LLAMA },
        fused: true,
        qk_norm: Some(QkNorm::PER_HEAD),
        window,
        wider_in_prompts: window.is_some(),
        ..sizes.attention(Some(if window.is_some() { near.clone() } else { far.clone() }))
    };
    let attention = dense::every_nth_full(config, sizes.layers)?.into_iter().map(layer).collect();
    let feed_forward = FeedForward::Gated {
        intermediate: sizes.intermediate,
        activation: Activation::Silu,
        bias: false,
        fused: true,
        names: GatedNames::FUSED,
    };
    let tied = config.bool_or("tie_word_embeddings", true)?;
    let mut model = dense::model(config, "plamo3", &sizes, attention, &feed_forward, tied)?;
    dense::arrange(&mut model, NORMS, Flow::Sequential(Residual::Add));
    Ok(model)
}

/// Weights of norms become factors.
fn weights(_: &Config, _: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    factors(weights, &ORIGINS)
}

/// Adds what they count from to the weights of the last norm and of these in the layers.
pub(super) fn factors(weights: &mut Weights, origins: &[(&str, f32)]) -> Result<(), WeightsError> {
    weights.map("model.norm", |weight| weight.add_one())?;
    origins.iter().try_for_each(|(name, origin)| {
        let path = format!("model.layers.layers.{{layer}}.{name}");
        weights.map(&path, |weight| weight.apply(Function::Add(*origin)))
    })
}
