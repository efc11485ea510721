//! PLaMo 2: a Mamba of its own in most layers and attention in the others, with PLaMo's norms around both parts.

use super::{Architecture, dense, plamo3, recurrent, rope, spelling};
use crate::config::{Config, ConfigError};
use crate::spec::{
    Activation, AttentionNames, AttentionSpec, FeedForward, Flow, GatedNames, Mixer, ModelSpec,
    PlamoMambaSpec, QkNorm, QkNormKind, Residual,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("plamo2", spec).weights(weights).names(&plamo3::NAMES);

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
    spelling::spelled(config, &[("hidden_size_per_head", "head_dim")], model)
}

fn model(config: &Config) -> Result<ModelSpec, ConfigError> {
    let sizes = dense::Sizes::read(config)?;
    // The rotation's base is MLX's default, whatever the config says.
    let rope = rope::plain(sizes.head_dim, 10_000.0, false);
    let norm = QkNorm { kind: QkNormKind::RmsPerHead { eps: 1e-6 }, ..QkNorm::PER_HEAD };
    let attention = AttentionSpec {
        names: AttentionNames { block: "mixer", ..AttentionNames::LLAMA },
        fused: true,
        qk_norm: Some(norm),
        ..sizes.attention(Some(rope))
    };
    let mamba = PlamoMambaSpec {
        block: "mixer",
        heads: config.usize("mamba_num_heads", dense::HEADS)?,
        head_dim: sizes.head_dim,
        state: config.usize("mamba_d_state", recurrent::STATE)?,
        rank: (sizes.hidden / 16).max(64),
        kernel: config.usize("mamba_d_conv", recurrent::KERNEL)?,
        // What mlx-lm's recurrence takes when a family does not say.
        step_limits: (0.001, 100.0),
        norm_eps: dense::epsilon(config, "rms_norm_eps")?,
    };
    let mixers = attends(config, sizes.layers)?.into_iter().map(|attends| match attends {
        true => Mixer::Attention(attention.clone()),
        false => Mixer::PlamoMamba(mamba.clone()),
    });
    let feed_forward = FeedForward::Gated {
        intermediate: sizes.intermediate,
        activation: Activation::Silu,
        bias: false,
        fused: true,
        names: GatedNames::FUSED,
    };
    let tied = config.bool_or("tie_word_embeddings", true)?;
    let mut model = dense::of_mixers(config, "plamo2", &sizes, mixers.collect(), &feed_forward, tied)?;
    dense::arrange(&mut model, plamo3::NORMS, Flow::Sequential(Residual::Add));
    Ok(model)
}

/// Which layers attend: the middle one of every `mamba_step`, or the last of a model that has no more than half a step.
fn attends(config: &Config, layers: usize) -> Result<Vec<bool>, ConfigError> {
    if !config.bool_or("mamba_enabled", true)? {
        return Ok(vec![true; layers]);
    }
    let step = config.usize("mamba_step", 2..=1024)?;
    let attends = |layer: usize| match layers <= step / 2 {
        true => layer + 1 == layers,
        false => layer % step == step / 2,
    };
    Ok((0..layers).map(attends).collect())
}

/// Hugging Face stores convolutions transposed. Weights of norms become factors; those on queries and keys get names of modules.
fn weights(_: &Config, _: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    recurrent::convolutions(weights)?;
    for part in ["q", "k"] {
        let path = format!("model.layers.layers.{{layer}}.mixer.{part}");
        weights.rename(&format!("{path}_weight"), &format!("{path}_norm.weight"))?;
    }
    plamo3::factors(weights, &plamo3::ORIGINS[..4])
}
