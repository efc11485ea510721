//! Qwen3, dense: no biases, a norm on each head's queries and keys, heads of their own width.

use super::{Architecture, dense, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{AttentionSpec, ModelSpec, QkNorm};

pub(super) const ARCHITECTURE: Architecture = Architecture { name: "qwen3", aliases: &[], spec };

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in ["num_key_value_heads", "head_dim", "max_position_embeddings"] {
        if config.get(field).is_none() {
            return Err(missing(field));
        }
    }
    let sizes = dense::Sizes::read(config)?;
    let base = rope::base(config, None)?;
    let attention = AttentionSpec {
        heads: sizes.heads,
        kv_heads: sizes.kv_heads,
        head_dim: sizes.head_dim,
        qkv_bias: false,
        out_bias: false,
        qk_norm: Some(QkNorm::PerHead),
        window: None,
        rope: Some(rope::spec(config, sizes.head_dim, base, false, sizes.context)?),
        scale: sizes.scale(),
    };
    let tied = config.bool("tie_word_embeddings")?;
    dense::model(config, "qwen3", &sizes, vec![attention; sizes.layers], false, tied)
}
