//! IQuest-Coder's loops: Llama's layers, gone through twice with the same weights. In the second pass queries see what the first one's
//! keys and values say of everything and what the pass's own say of the last tokens; a gate decides between the two.

use super::{Architecture, dense, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{Activation, AttentionSpec, ModelSpec};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("iquestloopcoder", spec)
    .names(&[("model.gate_projections.{layer}", "model.layers.{layer}.self_attn.loop_gate")])
    .in_one_piece();

/// The family knows no other number.
const PASSES: usize = 2;

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in ["head_dim", "num_key_value_heads"] {
        if config.get(field).is_none() {
            return Err(missing(field));
        }
    }
    let config = &config.with_defaults(&[("max_position_embeddings", 131_072.0), ("loop_window_size", 64.0)]);
    if let Some(passes) = config.optional_usize("loop_num", 0..=usize::MAX)?
        && passes != PASSES
    {
        return Err(config.refuse("loop_num", &passes.to_string(), "2"));
    }
    let sizes = dense::Sizes::read(config)?;
    let rope =
        rope::spec(config, sizes.head_dim, rope::base(config, Some(500_000.0))?, false, sizes.context)?;
    let bias = config.bool_or("attention_bias", false)?;
    let window = Some(config.usize("loop_window_size", dense::POSITIONS)?);
    let first = AttentionSpec { qkv_bias: bias, out_bias: bias, ..sizes.attention(Some(rope)) };
    let second = |layer| AttentionSpec { window, beside: Some(layer), ..first.clone() };
    let attention =
        std::iter::repeat_n(first.clone(), sizes.layers).chain((0..sizes.layers).map(second)).collect();
    let network = sizes.gated(Activation::Silu, config.bool_or("mlp_bias", false)?);
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let mut model = dense::model(config, "iquestloopcoder", &sizes, attention, &network, tied)?;
    model.passes = PASSES;
    Ok(model)
}
