//! PLaMo 2: the norms of PLaMo 3 around Mamba layers and attentions over everything.

use super::{Architecture, dense, gemma, plamo3, recurrent, rope};
use crate::config::{Config, ConfigError};
use crate::spec::{
    Activation, AttentionNames, AttentionSpec, FeedForward, Flow, GatedNames, Mixer, ModelSpec,
    PlamoMambaSpec, QkNorm, QkNormKind, Residual,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("plamo2", spec)
    .weights(weights)
    .names(&[("model.layers.layers.{layer}", "model.layers.{layer}")]);

/// Epsilon of the norm on heads.
const HEAD_EPSILON: f32 = 1e-6;

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[
        ("hidden_size", 4096.0),
        ("num_hidden_layers", 32.0),
        ("rms_norm_eps", 1e-6),
        ("num_attention_heads", 32.0),
        ("num_key_value_heads", 4.0),
        ("hidden_size_per_head", 128.0),
        ("max_position_embeddings", 2048.0),
        ("mamba_d_state", 64.0),
        ("mamba_d_conv", 4.0),
        ("mamba_num_heads", 64.0),
        ("mamba_step", 2.0),
        ("intermediate_size", 13_312.0),
        ("vocab_size", 32_000.0),
    ]);
    let head_dim = config.usize("hidden_size_per_head", dense::HEAD_DIM)?;
    let sizes = gemma::sizes(&config.with("head_dim", head_dim.into()))?;
    let attention = AttentionSpec {
        names: AttentionNames { block: "mixer", ..AttentionNames::LLAMA },
        fused: true,
        qk_norm: Some(QkNorm { kind: QkNormKind::RmsOfHeads { eps: HEAD_EPSILON }, ..QkNorm::PER_HEAD }),
        ..sizes.attention(Some(rope::plain(head_dim, 10_000.0, false)))
    };
    let mamba = PlamoMambaSpec {
        block: "mixer",
        heads: config.usize("mamba_num_heads", dense::HEADS)?,
        head_dim,
        state: config.usize("mamba_d_state", recurrent::STATE)?,
        kernel: config.usize("mamba_d_conv", recurrent::KERNEL)?,
        rank: (sizes.hidden / 16).max(64),
        step_limits: (0.001, 100.0),
    };
    let mixer = |recurs: bool| match recurs {
        true => Mixer::PlamoMamba(mamba.clone()),
        false => Mixer::Attention(attention.clone()),
    };
    let mixers = recurring(config, sizes.layers)?.into_iter().map(mixer).collect();
    let network = FeedForward::Gated {
        intermediate: sizes.intermediate,
        activation: Activation::Silu,
        bias: false,
        fused: true,
        names: GatedNames::FUSED,
    };
    let tied = config.bool_or("tie_word_embeddings", true)?;
    let mut model = dense::of_mixers(config, "plamo2", &sizes, mixers, &network, tied)?;
    dense::arrange(&mut model, plamo3::NORMS, Flow::Sequential(Residual::Add));
    Ok(model)
}

/// Which layers have states: all but one of every `mamba_step`; in a model too small for that all but the last.
fn recurring(config: &Config, layers: usize) -> Result<Vec<bool>, ConfigError> {
    if !config.bool_or("mamba_enabled", true)? {
        return Ok(vec![false; layers]);
    }
    let step = config.usize("mamba_step", 2..=*dense::LAYERS.end())?;
    let attends = |layer: usize| match layers <= step / 2 {
        true => layer + 1 == layers,
        false => layer % step == step / 2,
    };
    Ok((0..layers).map(|layer| !attends(layer)).collect())
}

/// Weights of norms become factors; Hugging Face stores convolutions transposed.
fn weights(_: &Config, _: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    recurrent::convolutions(weights)?;
    let mixer = "model.layers.layers.{layer}.mixer";
    for (stored, name) in [("q_weight", "q_norm"), ("k_weight", "k_norm")] {
        weights.rename(&format!("{mixer}.{stored}"), &format!("{mixer}.{name}.weight"))?;
    }
    plamo3::count_from_origins(weights, &plamo3::ORIGINS[..4])
}
