//! Ling 2.0 linear ("Ring linear"): lightning attention in most layers, attention as in Ling's dense-attention models in the last of
//! every group.

use super::{Architecture, bailing_moe, dense, mixture, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{
    Activation, AttentionSpec, ExpertsSpec, FeedForward, LightningSpec, Mixer, ModelSpec, Normalization,
    QkNorm, RopeSpec, Routing,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("bailing_moe_linear", spec).weights(weights).names(&NAMES);

/// The family's names.
pub(super) const NAMES: [(&str, &str); 4] = [
    ("model.word_embeddings", "model.embed_tokens"),
    ("model.layers.{layer}.attention.query_key_value", "model.layers.{layer}.self_attn.qkv_proj"),
    ("model.layers.{layer}.attention.dense", "model.layers.{layer}.self_attn.o_proj"),
    ("model.layers.{layer}.attention", "model.layers.{layer}.self_attn"),
];

/// Fields without defaults that are not read elsewhere, or have a default there.
const NEEDED: [&str; 4] =
    ["max_position_embeddings", "num_key_value_heads", "num_shared_experts", "norm_topk_prob"];

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in NEEDED {
        if config.get(field).is_none() {
            return Err(missing(field));
        }
    }
    let tied = config.bool_or("tie_word_embeddings", false)?;
    if tied && config.bool_or("norm_head", false)? {
        return Err(config.refuse("norm_head", "true", "false, as tie_word_embeddings is true"));
    }
    let sizes = dense::Sizes::read(config)?;
    let traditional = config.bool_or("rope_traditional", false)?;
    let bias = config.bool_or("use_bias", false)?;
    let norm = QkNorm { names: ["query_layernorm", "key_layernorm"], ..QkNorm::PER_HEAD };
    let qk_norm = config.bool_or("use_qk_norm", false)?;
    let attention = AttentionSpec {
        fused: true,
        qkv_bias: config.bool_or("use_qkv_bias", false)?,
        out_bias: bias,
        qk_norm: qk_norm.then_some(norm),
        ..sizes.attention(Some(rotation(config, &sizes, 1.0, traditional)?))
    };
    // The heads of lightning attention share the hidden vectors' width whatever `head_dim` says.
    let shared = dense::Sizes::read_with_shared_heads(config)?;
    let lightning = lightning(config, &shared, rotation(config, &shared, 1.0, traditional)?, qk_norm, true)?;
    let mixers =
        attends(config, sizes.layers)?.into_iter().enumerate().map(|(index, attends)| match attends {
            true => Mixer::Attention(attention.clone()),
            false => Mixer::Lightning(LightningSpec {
                log_decay: log_decay(sizes.heads, sizes.layers, index.saturating_sub(1)),
                ..lightning.clone()
            }),
        });
    let network = sizes.gated(Activation::Silu, bias);
    let mut model = dense::of_mixers(config, "bailing_moe_linear", &sizes, mixers.collect(), &network, tied)?;
    let experts = bailing_moe::experts(config, bias)?;
    let normalization = match experts.routing.normalization {
        Normalization::None => Normalization::None,
        _ => Normalization::Sum,
    };
    let routing = Routing { from_end: false, normalization, ..experts.routing };
    let shared = bailing_moe::shared(config, dense::width(config, "moe_intermediate_size")?)?;
    give_experts(config, &mut model, ExpertsSpec { routing, shared, ..experts })?;
    Ok(model)
}

/// Which layers attend: the last of every `layer_group_size`, and what is left after the last whole group.
pub(super) fn attends(config: &Config, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let group = config.usize("layer_group_size", dense::LAYERS)?;
    Ok((0..layers).map(|layer| (layer + 1) % group == 0 || layer >= layers / group * group).collect())
}

/// The rotation of a part of each head.
pub(super) fn rotation(
    config: &Config,
    sizes: &dense::Sizes,
    part: f64,
    traditional: bool,
) -> Result<RopeSpec, ConfigError> {
    let part = config.optional_f64("partial_rotary_factor")?.unwrap_or(part);
    let dims = sizes.rotated(config, part)?;
    rope::spec(config, dims, rope::base(config, None)?, traditional, sizes.context)
}

/// Lightning attention, of which the decays are to be filled in.
pub(super) fn lightning(
    config: &Config,
    sizes: &dense::Sizes,
    rope: RopeSpec,
    qk_norm: bool,
    rounded: bool,
) -> Result<LightningSpec, ConfigError> {
    let width = sizes.heads * sizes.head_dim;
    let groups = config.usize("group_norm_size", dense::WIDTH)?;
    if !width.is_multiple_of(groups) {
        let allowed = format!("a divisor of the heads' width, which is {width}");
        return Err(config.refuse("group_norm_size", &groups.to_string(), &allowed));
    }
    Ok(LightningSpec {
        heads: sizes.heads,
        head_dim: sizes.head_dim,
        qkv_bias: config.bool_or("use_qkv_bias", false)?,
        out_bias: config.bool_or("use_bias", false)?,
        qk_norm,
        groups,
        rope,
        log_decay: Vec::new(),
        rounded,
    })
}

/// The logarithms of what is left of heads' memories in the layer that counts as number `layer`: ALiBi's slopes (Press et al. 2022),
/// less in later layers.
pub(super) fn log_decay(heads: usize, layers: usize, layer: usize) -> Vec<f32> {
    let of_power = |count: usize| {
        let slope = -(2.0_f64.powf(3.0 - (count as f64).log2()));
        (1..=count).map(move |head| 2.0_f64.powf(slope * head as f64))
    };
    let whole = 1 << heads.max(1).ilog2();
    // The heads beyond a power of two get every second slope of the next one.
    let slopes = of_power(whole).chain(of_power(2 * whole).step_by(2)).take(heads);
    let factor = 1.0 - layer as f64 / layers.saturating_sub(1).max(1) as f64 + 1e-5;
    slopes.map(|slope| -(slope as f32) * factor as f32).collect()
}

/// Gives experts to the layers from `first_k_dense_replace` on.
pub(super) fn give_experts(
    config: &Config,
    model: &mut ModelSpec,
    experts: ExpertsSpec,
) -> Result<(), ConfigError> {
    let first = config.usize("first_k_dense_replace", 0..=usize::MAX)?;
    for layer in model.layers.iter_mut().skip(first) {
        layer.feed_forward = FeedForward::Experts(experts);
    }
    Ok(())
}

/// Hugging Face stores every expert alone and the router without a name for its matrix.
pub(super) fn weights(config: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    named(weights)?;
    const GATE: &str = "model.layers.{layer}.mlp.gate";
    weights.rename(&format!("{GATE}.weight"), &format!("{GATE}.gate_proj.weight"))?;
    mixture::without_further_tokens(spec, weights);
    mixture::stack(spec, weights, "mlp.experts", mixture::MATRICES, "mlp.switch_mlp")?;
    bailing_moe::norm_head(config, weights)
}

/// The family has names of its own.
pub(super) fn named(weights: &mut Weights) -> Result<(), WeightsError> {
    NAMES.iter().try_for_each(|(theirs, ours)| weights.rename(theirs, ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decays_are_alibis_slopes() {
        let close = |actual: Vec<f32>, expected: &[f32]| {
            assert_eq!(actual.len(), expected.len());
            for (actual, expected) in actual.iter().zip(expected) {
                assert!((actual - expected).abs() < 1e-6, "{actual} instead of {expected}");
            }
        };
        let whole = 1.0 + 1e-5;
        close(
            log_decay(4, 3, 0),
            &[-0.25 * whole, -0.0625 * whole, -0.015_625 * whole, -0.003_906_25 * whole],
        );
        close(log_decay(3, 3, 1), &[-0.0625 * 0.50001, -0.003_906_25 * 0.50001, -0.25 * 0.50001]);
        close(log_decay(1, 1, 0), &[-0.003_906_25 * whole]);
    }
}
