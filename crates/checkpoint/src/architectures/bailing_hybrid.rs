//! Ling 2.5: lightning attention in most layers, latent attention in the last of every group, and experts. Repositories of Ling 3
//! have the same `model_type` and another architecture, see [`super::bailing_moe_v3`].

use super::{Architecture, bailing_moe, bailing_moe_linear, dense, latent, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{
    Activation, ExpertsSpec, Groups, LatentForm, LatentSpec, LightningSpec, Mixer, ModelSpec, Outside,
    Routing, SharedExpertSpec,
};
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("bailing_hybrid", spec).weights(weights).names(&bailing_moe_linear::NAMES);

/// Fields without defaults that are not read elsewhere, or have a default there.
const NEEDED: [&str; 7] = [
    "max_position_embeddings",
    "num_key_value_heads",
    "num_shared_experts",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "head_dim",
];

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in NEEDED {
        if config.get(field).is_none() {
            return Err(missing(field));
        }
    }
    // Every head has its own keys, whatever the config says.
    let config = &config.with("num_key_value_heads", Value::Null);
    let sizes = dense::Sizes::read(config)?;
    let qk_norm = config.bool_or("use_qk_norm", true)?;
    let rotation = bailing_moe_linear::rotation(config, &sizes, 0.5, false)?;
    let lightning = bailing_moe_linear::lightning(config, &sizes, rotation, qk_norm, false)?;
    let attention = attention(config, &sizes)?;
    let attends = bailing_moe_linear::attends(config, sizes.layers)?;
    let mixers = attends.into_iter().enumerate().map(|(index, attends)| match attends {
        true => Mixer::Latent(attention.clone()),
        false => Mixer::Lightning(LightningSpec {
            log_decay: bailing_moe_linear::log_decay(sizes.heads, sizes.layers, index),
            ..lightning.clone()
        }),
    });
    let bias = config.bool_or("use_bias", false)?;
    let network = sizes.gated(Activation::Silu, bias);
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let mut model = dense::of_mixers(config, "bailing_hybrid", &sizes, mixers.collect(), &network, tied)?;
    bailing_moe_linear::give_experts(config, &mut model, experts(config, bias)?)?;
    Ok(model)
}

/// The latent attention of a layer.
fn attention(config: &Config, sizes: &dense::Sizes) -> Result<LatentSpec, ConfigError> {
    let dims = config.usize("qk_rope_head_dim", dense::HEAD_DIM)?;
    if !dims.is_multiple_of(2) {
        return Err(config.refuse("qk_rope_head_dim", &dims.to_string(), "even"));
    }
    let traditional = config.bool_or("rope_interleave", true)?;
    let rope = rope::spec(config, dims, rope::base(config, None)?, traditional, sizes.context)?;
    let eps = dense::epsilon(config, "rms_norm_eps")?;
    let mut attention = latent::attention(config, rope, LatentForm::Absorbed, None, eps)?;
    attention.bias = config.bool_or("use_qkv_bias", false)?;
    attention.scale = latent::stretched_scale(&attention);
    Ok(attention)
}

fn experts(config: &Config, bias: bool) -> Result<ExpertsSpec, ConfigError> {
    let config = &match config.get("score_function") {
        Some(_) => config.clone(),
        None => config.with("score_function", "sigmoid".into()),
    };
    let config = &with_true(config, "norm_topk_prob");
    let config = &with_true(config, "moe_router_enable_expert_bias");
    let experts = bailing_moe::experts(config, bias)?;
    let groups = experts.routing.groups.map(|groups| Groups { outside: Outside::Never, ..groups });
    let intermediate = dense::width(config, "moe_intermediate_size")?;
    let own = config.optional_usize("moe_shared_expert_intermediate_size", 0..=1 << 20)?;
    let count = config.usize("num_shared_experts", 0..=1024)?;
    let shared = (count > 0).then(|| SharedExpertSpec {
        name: "shared_experts",
        intermediate: own.filter(|width| *width > 0).unwrap_or(intermediate * count),
        activation: Activation::Silu,
        gate: None,
    });
    Ok(ExpertsSpec { routing: Routing { groups, from_end: false, ..experts.routing }, shared, ..experts })
}

/// With a field that is true when it is absent.
fn with_true(config: &Config, field: &str) -> Config {
    match config.get(field) {
        Some(_) => config.clone(),
        None => config.with(field, true.into()),
    }
}

/// As in the models before, and the heads' matrices of latent attention as one.
fn weights(config: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    bailing_moe_linear::weights(config, spec, weights)?;
    latent::absorb(spec, weights)
}
