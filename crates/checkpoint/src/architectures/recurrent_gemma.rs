//! RecurrentGemma: Griffin's recurrent blocks, and attention within a window in every third layer.

use super::{Architecture, dense, recurrent, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{
    Activation, AttentionNames, AttentionSpec, FeedForward, GatedNames, GatedRecurrenceSpec, LayerNorms,
    Logits, Mixer, ModelSpec, NormKind,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("recurrent_gemma", spec).weights(weights).names(&[("model.final_norm", "model.norm")]);

/// Epsilon of the norms in the layers, whatever the config says of the last one.
const EPSILON: f32 = 1e-5;
/// Tokens that the convolution sees, whatever the config says.
const KERNEL: usize = 4;
/// Base of the rotation: MLX's default, whatever the config says.
const ROPE_BASE: f64 = 10_000.0;
/// Fields without defaults that mlx-lm does not use.
const NEEDED: [&str; 4] = ["attention_bias", "conv1d_width", "num_key_value_heads", "rope_theta"];

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in NEEDED {
        if config.get(field).is_none() {
            return Err(missing(field));
        }
    }
    // One head of keys, whatever the config says.
    let config = &config.with("num_key_value_heads", 1.into());
    let sizes = dense::Sizes::read_with_shared_heads(config)?;
    if !sizes.head_dim.is_multiple_of(4) {
        let (heads, hidden) = (sizes.heads, sizes.hidden);
        let allowed =
            format!("a divisor of hidden_size, which is {hidden}, with a multiple of 4 left for each head");
        return Err(config.refuse("num_attention_heads", &heads.to_string(), &allowed));
    }
    let attention = AttentionSpec {
        names: AttentionNames { block: "temporal_block", ..AttentionNames::LLAMA },
        out_bias: true,
        window: Some(config.usize("attention_window_size", dense::POSITIONS)?),
        ..sizes.attention(Some(rope::plain(sizes.head_dim / 2, ROPE_BASE, false)))
    };
    let recurrence = GatedRecurrenceSpec {
        block: "temporal_block",
        width: sizes.hidden,
        heads: sizes.heads,
        kernel: KERNEL,
    };
    let kinds = kinds(config)?;
    let mixers = kinds.iter().cycle().take(sizes.layers).map(|attends| match attends {
        true => Mixer::Attention(attention.clone()),
        false => Mixer::GatedRecurrence(recurrence.clone()),
    });
    let network = FeedForward::Gated {
        intermediate: sizes.intermediate / 2,
        activation: Activation::GeluTanh,
        bias: true,
        fused: false,
        names: GatedNames {
            gate: "mlp_block.gate_proj",
            up: "mlp_block.up_proj",
            down: "mlp_block.down_proj",
        },
    };
    let mut model = dense::of_mixers(config, "recurrent_gemma", &sizes, mixers.collect(), &network, false)?;
    for layer in &mut model.layers {
        layer.norms = LayerNorms {
            before_mixer: Some("temporal_pre_norm"),
            before_feed_forward: Some("channel_pre_norm"),
            ..LayerNorms::BEFORE
        };
    }
    (model.norm, model.final_norm_eps, model.norm_eps) =
        (NormKind::RmsPlusOne, Some(model.norm_eps), EPSILON);
    if config.bool_or("embeddings_scale_by_sqrt_dim", true)? {
        model.embedding_scale = Some((sizes.hidden as f64).sqrt() as f32);
    }
    let cap = config.f64("logits_soft_cap")?;
    if cap != 0.0 {
        model.logits = Logits::Capped(cap as f32);
    }
    model.tied_without_head = true;
    Ok(model)
}

/// What the layers are, again and again: does each attend? The two published sizes call the list differently.
fn kinds(config: &Config) -> Result<Vec<bool>, ConfigError> {
    let field = if config.get("block_types").is_some() { "block_types" } else { "_block_types" };
    recurrent::layer_kinds(config, field, &[("recurrent", false), ("attention", true)]).map_err(|error| {
        match error {
            ConfigError::Missing { .. } => missing("block_types"),
            other => other,
        }
    })
}

/// Hugging Face stores convolutions transposed.
fn weights(_: &Config, _: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    recurrent::convolutions(weights).map(drop)
}
