//! Laguna: gates on whole heads, head counts and rotations that differ from layer to layer, windows in some, experts with a capped
//! router.

use super::{Architecture, dense, llama, mixture, rope};
use crate::config::{Config, ConfigError, shown};
use crate::spec::{
    Activation, AttentionGate, AttentionSpec, ExpertNetworks, ExpertsSpec, FeedForward, GateFunction,
    ModelSpec, Normalization, QkNorm, RopeSpec, RouterSpec, Routing, Scores, SharedExpertSpec,
};
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture = Architecture::new("laguna", spec).weights(weights);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[
        ("vocab_size", 100_352.0),
        ("hidden_size", 2048.0),
        ("intermediate_size", 8192.0),
        ("num_hidden_layers", 40.0),
        ("num_attention_heads", 48.0),
        ("num_key_value_heads", 8.0),
        ("head_dim", 128.0),
        ("max_position_embeddings", 262_144.0),
        ("rms_norm_eps", 1e-6),
        ("num_experts", 256.0),
        ("num_experts_per_tok", 8.0),
        ("moe_intermediate_size", 512.0),
        ("shared_expert_intermediate_size", 512.0),
        ("moe_routed_scaling_factor", 1.0),
        ("moe_router_logit_softcapping", 0.0),
    ]);
    // A null window is no window, but an absent one is the family's own.
    let config = &match config.raw().contains_key("sliding_window") {
        true => config.clone(),
        false => config.with("sliding_window", 512.into()),
    };
    let sizes = dense::Sizes::read(config)?;
    let heads = heads(config, &sizes)?;
    let gate =
        AttentionGate { name: "g_proj", per_head: true, function: GateFunction::Softplus, bias: false };
    let gate = config.bool_or("gating", true)?.then_some(gate);
    let (qkv_bias, out_bias) = (config.bool_or("qkv_bias", false)?, config.bool_or("attention_bias", false)?);
    let mut attention = Vec::with_capacity(sizes.layers);
    for (window, heads) in llama::windows(config, sizes.layers)?.into_iter().zip(heads) {
        let kind = if window.is_some() { "sliding_attention" } else { "full_attention" };
        let rope = rotation(config, kind, &sizes)?;
        let sizes = dense::Sizes { heads, ..sizes.clone() };
        let qk_norm = Some(QkNorm::PER_HEAD);
        attention.push(AttentionSpec {
            window,
            qkv_bias,
            out_bias,
            qk_norm,
            gate,
            ..sizes.attention(Some(rope))
        });
    }
    let network = sizes.gated(Activation::Silu, false);
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let mut model = dense::model(config, "laguna", &sizes, attention, &network, tied)?;
    let experts = FeedForward::Experts(experts(config)?);
    for (layer, with_experts) in model.layers.iter_mut().zip(with_experts(config, sizes.layers)?) {
        if with_experts {
            layer.feed_forward = experts.clone();
        }
    }
    Ok(model)
}

/// How many query heads each layer has.
fn heads(config: &Config, sizes: &dense::Sizes) -> Result<Vec<usize>, ConfigError> {
    let field = "num_attention_heads_per_layer";
    let Some(listed) = config.array(field)? else { return Ok(vec![sizes.heads; sizes.layers]) };
    if listed.len() < sizes.layers {
        let allowed = format!("one for each of num_hidden_layers, which is {}", sizes.layers);
        return Err(config.refuse(field, &format!("a list of {}", listed.len()), &allowed));
    }
    let heads = |(index, value): (usize, &Value)| {
        let heads = value.as_u64().and_then(|heads| usize::try_from(heads).ok());
        let fits = |heads: &usize| dense::HEADS.contains(heads) && heads.is_multiple_of(sizes.kv_heads);
        heads.filter(fits).ok_or_else(|| {
            let allowed = format!("a multiple of num_key_value_heads, which is {}", sizes.kv_heads);
            config.refuse(&format!("{field}[{index}]"), &shown(value), &allowed)
        })
    };
    listed.iter().take(sizes.layers).enumerate().map(heads).collect()
}

/// How the layers of a kind rotate. Each kind has a part of `rope_parameters` of its own, and says how much of a head rotates.
fn rotation(config: &Config, kind: &str, sizes: &dense::Sizes) -> Result<RopeSpec, ConfigError> {
    let object = config.object("rope_parameters")?.and_then(|kinds| kinds.get(kind));
    let field = "partial_rotary_factor";
    let part = match object.and_then(|object| object.get(field)).filter(|part| !part.is_null()) {
        Some(part) => config.number(&format!("rope_parameters.{kind}.{field}"), part)?,
        None => config.optional_f64(field)?.unwrap_or(1.0),
    };
    let dims = sizes.rotated(config, part)?;
    rope::of_kind(config, "rope_parameters", object, dims, false, sizes.context)
}

/// Which layers have experts: without a list all but the first.
fn with_experts(config: &Config, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let field = "mlp_layer_types";
    let Some(types) = config.array(field)? else { return Ok((0..layers).map(|layer| layer > 0).collect()) };
    if types.len() < layers {
        let allowed = format!("one for each of num_hidden_layers, which is {layers}");
        return Err(config.refuse(field, &format!("a list of {}", types.len()), &allowed));
    }
    Ok(types.iter().take(layers).map(|kind| kind.as_str() == Some("sparse")).collect())
}

fn experts(config: &Config) -> Result<ExpertsSpec, ConfigError> {
    let (experts, per_token) = dense::experts(config, "num_experts")?;
    let scores = match config.str("moe_router_score_func")? {
        None | Some("sigmoid") => Scores::Sigmoid,
        Some("sqrtsoftplus") => Scores::RootOfSoftplus,
        Some(other) => {
            let allowed = "sigmoid or sqrtsoftplus";
            return Err(config.refuse("moe_router_score_func", &format!("\"{other}\""), allowed));
        }
    };
    let cap = config.f64("moe_router_logit_softcapping")?;
    let scale = config.f64("moe_routed_scaling_factor")?;
    Ok(ExpertsSpec {
        block: "mlp",
        experts,
        per_token,
        router: RouterSpec { name: "gate.proj", ..RouterSpec::GATE },
        routing: Routing {
            scores,
            cap: (cap > 0.0).then_some(cap as f32),
            normalization: Normalization::Sum,
            result_scale: (scale != 1.0).then_some(scale as f32),
            ..Routing::CORRECTED
        },
        networks: ExpertNetworks::gated(dense::width(config, "moe_intermediate_size")?, Activation::Silu),
        shared: Some(SharedExpertSpec {
            name: "shared_expert",
            intermediate: dense::width(config, "shared_expert_intermediate_size")?,
            activation: Activation::Silu,
            gate: None,
        }),
    })
}

/// As published, every expert is alone, the correction is theirs, and the router has no path of its own.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    let layer = |name: &str| format!("model.layers.{{layer}}.mlp.{name}");
    weights.rename(&layer("gate.weight"), &layer("gate.proj.weight"))?;
    let correction = "e_score_correction_bias";
    weights.rename(&layer(&format!("experts.{correction}")), &layer(&format!("gate.{correction}")))?;
    mixture::stack(spec, weights, "mlp.experts", mixture::MATRICES, "mlp.switch_mlp")
}
