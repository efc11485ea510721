//! Step 3.5: gates on whole heads, windows with heads of their own number, experts with bounds on what goes through them.

use super::{Architecture, dense, llama, mixture, rope};
use crate::config::{Config, ConfigError, shown};
use crate::spec::{
    Activation, AttentionGate, AttentionSpec, Correction, ExpertNetworks, ExpertsSpec, FeedForward,
    GateFunction, GatedNames, ModelSpec, Normalization, QkNorm, RouterSpec, Routing, SharedExpertSpec,
};
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture = Architecture::new("step3p5", spec).weights(weights);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[
        ("rms_norm_eps", 1e-5),
        ("max_position_embeddings", 262_144.0),
        ("sliding_window", 512.0),
        ("moe_num_experts", 288.0),
        ("moe_top_k", 8.0),
        ("moe_intermediate_size", 1280.0),
        ("share_expert_dim", 1280.0),
        ("moe_router_scaling_factor", 3.0),
    ]);
    let groups = config.usize("num_attention_groups", dense::HEADS)?;
    let config = &config.with("num_key_value_heads", groups.into());
    let far = dense::Sizes::read(config)?;
    let near = match config.object("attention_other_setting")? {
        None => dense::Sizes::read(config)?,
        Some(other) => {
            let field = |name: &str| other.get(name).cloned().unwrap_or(Value::Null);
            let near = config.with("num_attention_heads", field("num_attention_heads"));
            dense::Sizes::read(&near.with("num_key_value_heads", field("num_attention_groups")))?
        }
    };
    let windows = windows(config, far.layers)?;
    let gate = AttentionGate { name: "g_proj", per_head: true, function: GateFunction::Sigmoid, bias: false };
    let gate = config.bool_or("use_head_wise_attn_gate", true)?.then_some(gate);
    let mut attention = Vec::with_capacity(far.layers);
    for (index, window) in windows.iter().enumerate() {
        let sizes = if window.is_some() { &near } else { &far };
        let rope = rotation(config, sizes, index)?;
        let qk_norm = Some(QkNorm::PER_HEAD);
        attention.push(AttentionSpec { window: *window, qk_norm, gate, ..sizes.attention(Some(rope)) });
    }
    let network = far.gated(Activation::Silu, false);
    let mut model = dense::model(config, "step3p5", &far, attention, &network, false)?;
    let with_experts = layers_with_experts(config, far.layers)?;
    for (index, layer) in model.layers.iter_mut().enumerate() {
        let shared = activation(config, "swiglu_limits_shared", index)?;
        layer.feed_forward = match with_experts.contains(&index) {
            true => {
                FeedForward::Experts(experts(config, activation(config, "swiglu_limits", index)?, shared)?)
            }
            false => FeedForward::Gated {
                intermediate: far.intermediate,
                activation: shared,
                bias: false,
                fused: false,
                names: GatedNames::LLAMA,
            },
        };
    }
    Ok(model)
}

/// `layer_types` also counts layers that predict further tokens; without it every other layer has a window.
fn windows(config: &Config, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let types: Value = match config.array("layer_types")? {
        Some(types) if !types.is_empty() => types.iter().take(layers).cloned().collect(),
        _ => {
            let types = ["sliding_attention", "full_attention"].into_iter().cycle().take(layers);
            types.map(Value::from).collect()
        }
    };
    llama::windows(&config.with("layer_types", types), layers)
}

/// Base and rotating part may differ from layer to layer; `yarn_only_types` says which layers `rope_scaling` is for.
fn rotation(
    config: &Config,
    sizes: &dense::Sizes,
    index: usize,
) -> Result<crate::spec::RopeSpec, ConfigError> {
    let mut own = config.clone();
    if let Some(Value::Array(bases)) = config.get("rope_theta") {
        let base = bases.get(index).cloned().ok_or_else(|| {
            let allowed =
                format!("a number, or one for each of num_hidden_layers, which is {}", sizes.layers);
            config.refuse("rope_theta", &format!("a list of {}", bases.len()), &allowed)
        })?;
        own = own.with("rope_theta", base);
    }
    let field = "partial_rotary_factors";
    let part = match config.array(field)?.and_then(|parts| parts.get(index)) {
        None => 1.0,
        Some(part) => config.number(&format!("{field}[{index}]"), part)?,
    };
    let dims = sizes.rotated(config, part)?;
    let kind = config.array("layer_types")?.and_then(|types| types.get(index)).and_then(Value::as_str);
    let only = config.array("yarn_only_types")?.unwrap_or_default();
    let is_stretched =
        only.is_empty() || only.iter().any(|only| only.as_str() == Some(kind.unwrap_or("full_attention")));
    let base = rope::base(&own, Some(10_000.0))?;
    match is_stretched {
        true => rope::spec(&own, dims, base, false, sizes.context),
        false => Ok(rope::plain(dims, base, false)),
    }
}

/// `moe_layers_enum` lists them with commas; without it all but the first have experts.
fn layers_with_experts(config: &Config, layers: usize) -> Result<Vec<usize>, ConfigError> {
    let field = "moe_layers_enum";
    match config.str(field)? {
        None | Some("") => Ok((1..layers).collect()),
        Some(list) => list
            .split(',')
            .map(|index| {
                let allowed = "numbers of layers with commas between them";
                index.trim().parse().map_err(|_| config.refuse(field, &format!("\"{list}\""), allowed))
            })
            .collect(),
    }
}

/// The bound on a layer's gates; 0, null or an absent entry mean none.
fn activation(config: &Config, field: &str, index: usize) -> Result<Activation, ConfigError> {
    match config.array(field)?.and_then(|limits| limits.get(index)) {
        None | Some(Value::Null) => Ok(Activation::Silu),
        Some(limit) => match limit.as_f64() {
            Some(limit) if limit > 0.0 => Ok(Activation::ClampedSwiglu { limit: limit as f32 }),
            Some(_) => Ok(Activation::Silu),
            None => Err(config.refuse(&format!("{field}[{index}]"), &shown(limit), "a number")),
        },
    }
}

fn experts(config: &Config, own: Activation, shared: Activation) -> Result<ExpertsSpec, ConfigError> {
    let experts = config.usize("moe_num_experts", 1..=4096)?;
    let normalization = match config.bool_or("norm_expert_weight", true)? {
        true => Normalization::SumPlus(1e-20),
        false => Normalization::None,
    };
    Ok(ExpertsSpec {
        block: "mlp",
        experts,
        per_token: config.usize("moe_top_k", 1..=experts)?,
        router: RouterSpec { name: "gate.gate", ..RouterSpec::GATE },
        routing: Routing {
            correction: Some(Correction::named("gate.router_bias")),
            normalization,
            scale: Some(config.f64("moe_router_scaling_factor")? as f32),
            ..Routing::CORRECTED
        },
        networks: ExpertNetworks::gated(dense::width(config, "moe_intermediate_size")?, own),
        shared: Some(SharedExpertSpec {
            name: "share_expert",
            intermediate: dense::width(config, "share_expert_dim")?,
            activation: shared,
            gate: None,
        }),
    })
}

/// As published, experts have other names and norms count from one.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    mixture::without_further_tokens(spec, weights);
    let layer = |name: &str| format!("model.layers.{{layer}}.{name}");
    let is_published = weights.any(&layer("moe")) || weights.any(&layer("share_expert"));
    for (stored, ours) in [
        ("moe.gate_proj", "mlp.switch_mlp.gate_proj"),
        ("moe.up_proj", "mlp.switch_mlp.up_proj"),
        ("moe.down_proj", "mlp.switch_mlp.down_proj"),
        ("moe.gate", "mlp.gate.gate"),
        ("moe.router_bias", "mlp.gate.router_bias"),
        ("share_expert", "mlp.share_expert"),
    ] {
        weights.rename(&layer(stored), &layer(ours))?;
    }
    if is_published {
        weights.map_ending("norm.weight", |weight| weight.add_one())?;
    }
    Ok(())
}
