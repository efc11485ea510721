//! Nanbeige: Llama's layers, gone through several times with the same weights. Each pass has keys and values of its own.

use super::{Architecture, dense, rope};
use crate::config::{Config, ConfigError};
use crate::spec::{Activation, AttentionSpec, Flow, ModelSpec};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("nanbeige", spec);

/// Far above any model there is, and low enough that all passes together are not too many layers.
const PASSES: usize = 64;

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in ["enable_double_loop_split", "loop_share_kv", "enable_depth_attention"] {
        if config.bool_or(field, false)? {
            return Err(config.refuse(
                field,
                "true",
                "false: nobody has published such a model's arithmetic",
            ));
        }
    }
    let sizes = dense::Sizes::read(config)?;
    let base = rope::base(config, Some(10_000.0))?;
    let rope = rope::spec(config, sizes.head_dim, base, false, sizes.context)?;
    let bias = config.bool_or("attention_bias", false)?;
    let attention = AttentionSpec { qkv_bias: bias, out_bias: bias, ..sizes.attention(Some(rope)) };
    let network = sizes.gated(Activation::Silu, config.bool_or("mlp_bias", false)?);
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let passes = passes(config)?;
    let attention = vec![attention; passes * sizes.layers];
    let mut model = dense::model(config, "nanbeige", &sizes, attention, &network, tied)?;
    model.passes = passes;
    if !config.bool_or("skip_loop_final_norm", false)? {
        // After the last pass it is the norm before the head.
        for pass in 1..passes {
            model.layers[pass * sizes.layers - 1].flow = Flow::ThenLastNorm;
        }
    }
    Ok(model)
}

/// A model that was trained with a loss for each pass has a weight for each but the last.
fn passes(config: &Config) -> Result<usize, ConfigError> {
    match config.array("loop_loss_weights")? {
        Some(weights) if weights.len() >= PASSES => {
            let found = format!("a list of {}", weights.len());
            Err(config.refuse("loop_loss_weights", &found, &format!("a list of fewer than {PASSES}")))
        }
        Some(weights) if !weights.is_empty() => Ok(weights.len() + 1),
        _ => Ok(config.optional_usize("num_loops", 1..=PASSES)?.unwrap_or(1)),
    }
}
