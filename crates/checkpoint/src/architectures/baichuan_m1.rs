//! Baichuan M1: keys and values mixed with those of the token before, windows with heads of their own in some layers, a head of normed
//! rows.

use super::{Architecture, dense, rope};
use crate::config::{Config, ConfigError, missing, shown};
use crate::layout::HEAD;
use crate::spec::{Activation, AttentionSpec, ModelSpec};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("baichuan_m1", spec)
    .weights(weights)
    .names(&[("model.layers.{layer}.self_attn.W_pack", "model.layers.{layer}.self_attn.qkv_proj")]);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    if config.bool_or("tie_word_embeddings", false)? {
        let allowed = "false: mlx-lm 0.32.2 cannot run models of this family without a head of their own";
        return Err(config.refuse("tie_word_embeddings", "true", allowed));
    }
    let kernel = config.usize("conv_window", 1..=64)?;
    if kernel != 2 {
        return Err(config.refuse("conv_window", &kernel.to_string(), "2, the only one that mlx-lm runs"));
    }
    let sizes = dense::Sizes::read_with_shared_heads(config)?;
    let window = config.usize("sliding_window", dense::POSITIONS)?;
    let windowed = windowed(config, sizes.layers)?;
    // Layers with windows may have other numbers of heads.
    let other = |field: &str, own: usize| -> Result<usize, ConfigError> {
        Ok(config.optional_usize(field, 0..=4096)?.filter(|count| *count > 0).unwrap_or(own))
    };
    let heads = other("num_swa_attention_heads", sizes.heads)?;
    let kv_heads = other("num_swa_key_value_heads", sizes.kv_heads)?;
    let config_of_windows =
        config.with("num_attention_heads", heads.into()).with("num_key_value_heads", kv_heads.into());
    let near = dense::Sizes::read_with_shared_heads(&config_of_windows).map_err(|error| {
        error.in_words_of(&[
            ("num_swa_attention_heads", "num_attention_heads"),
            ("num_swa_key_value_heads", "num_key_value_heads"),
        ])
    });
    let near = if windowed.contains(&true) { near? } else { sizes.clone() };
    let base = rope::base(config, None)?;
    let attention = windowed.into_iter().map(|is_windowed| {
        let sizes = if is_windowed { &near } else { &sizes };
        AttentionSpec {
            fused: true,
            convolved: true,
            window: is_windowed.then_some(window),
            ..sizes.attention(Some(rope::plain(sizes.head_dim, base, false)))
        }
    });
    let network = sizes.gated(Activation::Silu, false);
    dense::model(config, "baichuan_m1", &sizes, attention.collect(), &network, false)
}

/// Which layers have windows, by their numbers in `sliding_window_layers`.
fn windowed(config: &Config, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let field = "sliding_window_layers";
    let mut windowed = vec![false; layers];
    for number in config.array(field)?.ok_or_else(|| missing(field))? {
        let index = number.as_u64().and_then(|number| usize::try_from(number).ok());
        match index.and_then(|index| windowed.get_mut(index)) {
            Some(windowed) => *windowed = true,
            None => {
                let allowed = format!("a list of layers from 0 to {}", layers - 1);
                return Err(config.refuse(field, &shown(number), &allowed));
            }
        }
    }
    Ok(windowed)
}

/// The head's rows get length one; those of a packed head have it.
fn weights(_: &Config, _: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    if weights.contains(&format!("{HEAD}.scales")) {
        return Ok(());
    }
    weights.map(&format!("{HEAD}.weight"), |head| head.transpose(&[1, 0])?.unit_columns()?.transpose(&[1, 0]))
}
