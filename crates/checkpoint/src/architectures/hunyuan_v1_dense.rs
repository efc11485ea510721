//! Hunyuan, dense: Llama with norms on queries and keys after the rotation, whose base is stretched by `alpha`.

use super::{Architecture, dense, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{AttentionSpec, ModelSpec, QkNorm, QkNormKind, RopeScaling, RopeSpec};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("hunyuan_v1_dense", spec);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    if config.get("num_key_value_heads").is_none() {
        return Err(missing("num_key_value_heads"));
    }
    let config = &config.with_defaults(&[("max_position_embeddings", 32_768.0)]);
    let sizes = dense::Sizes::read(config)?;
    let attention = attention(config, &sizes)?;
    let feed_forward = sizes.gated(dense::silu(config)?, false);
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let attention = vec![attention; sizes.layers];
    dense::model(config, "hunyuan_v1_dense", &sizes, attention, &feed_forward, tied)
}

/// The attention of both families' layers.
pub(super) fn attention(config: &Config, sizes: &dense::Sizes) -> Result<AttentionSpec, ConfigError> {
    if sizes.head_dim <= 2 {
        return Err(config.refuse("head_dim", &sizes.head_dim.to_string(), "above 2"));
    }
    let alpha = match config.object("rope_scaling")? {
        None => 1.0,
        Some(scaling) => {
            let value = scaling.get("alpha").ok_or_else(|| missing("rope_scaling.alpha"))?;
            let alpha = config.number("rope_scaling.alpha", value)?;
            if alpha <= 0.0 {
                return Err(config.refuse("rope_scaling.alpha", &alpha.to_string(), "above 0"));
            }
            alpha
        }
    };
    let rope = RopeSpec {
        dims: sizes.head_dim,
        base: rope::base(config, Some(10_000.0))?,
        traditional: false,
        scaling: RopeScaling::NtkAlpha { alpha },
    };
    let bias = config.bool_or("attention_bias", false)?;
    let norm = QkNorm {
        kind: QkNormKind::PerHead,
        names: ["query_layernorm", "key_layernorm"],
        after_rope: true,
        ..QkNorm::PER_HEAD
    };
    Ok(AttentionSpec {
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: config.bool_or("use_qk_norm", true)?.then_some(norm),
        ..sizes.attention(Some(rope))
    })
}
