//! Jamba: Mamba with norms on what selects, an attention without positions now and then, and experts in some layers.

use super::{Architecture, dense, mamba, mixture, recurrent};
use crate::config::{Config, ConfigError};
use crate::spec::{
    Activation, ExpertNetworks, ExpertsSpec, FeedForward, GatedNames, LayerNorms, MambaNorms, MambaSpec,
    Mixer, ModelSpec, RouterSpec, Routing,
};
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture = Architecture::new("jamba", spec).weights(weights);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let sizes = dense::Sizes::read_with_shared_heads(config)?;
    let attends = attends(config, sizes.layers)?;
    let mamba = mamba(config, sizes.hidden)?;
    let attention = sizes.attention(None);
    let mixers = attends.into_iter().map(|attends| match attends {
        true => Mixer::Attention(attention.clone()),
        false => Mixer::Mamba(mamba.clone()),
    });
    let network = FeedForward::Gated {
        intermediate: sizes.intermediate,
        activation: Activation::Silu,
        bias: false,
        fused: false,
        names: GatedNames {
            gate: "feed_forward.gate_proj",
            up: "feed_forward.up_proj",
            down: "feed_forward.down_proj",
        },
    };
    let tied = config.bool_or("tie_word_embeddings", true)?;
    let mut model = dense::of_mixers(config, "jamba", &sizes, mixers.collect(), &network, tied)?;
    let (experts, per_token) = dense::experts(config, "num_experts")?;
    let experts = ExpertsSpec {
        block: "feed_forward",
        experts,
        per_token,
        router: RouterSpec { name: "router", ..RouterSpec::GATE },
        routing: Routing::CHOSEN,
        networks: ExpertNetworks::gated(sizes.intermediate, Activation::Silu),
        shared: None,
    };
    let offset = config.usize("expert_layer_offset", 0..=1024)?;
    let period = config.usize("expert_layer_period", dense::LAYERS)?;
    for (index, layer) in model.layers.iter_mut().enumerate() {
        layer.norms = LayerNorms { before_feed_forward: Some("pre_ff_layernorm"), ..LayerNorms::BEFORE };
        if experts.experts > 1 && (index + offset).is_multiple_of(period) {
            layer.feed_forward = FeedForward::Experts(experts);
        }
    }
    Ok(model)
}

/// Which layers attend: by name in `layers_block_type`, or else one in each period.
fn attends(config: &Config, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let period = config.usize("attn_layer_period", dense::LAYERS)?;
    let offset = config.usize("attn_layer_offset", 0..=1024)?;
    match config.get("layers_block_type") {
        None | Some(Value::Null) => Ok((0..layers).map(|layer| layer % period == offset).collect()),
        Some(_) => {
            let known = [("attention", true), ("mamba", false)];
            recurrent::all_layer_kinds(config, "layers_block_type", &known, layers)
        }
    }
}

fn mamba(config: &Config, hidden: usize) -> Result<MambaSpec, ConfigError> {
    let times = config.usize("mamba_expand", 1..=64)?;
    Ok(MambaSpec {
        block: "mamba",
        width: times * hidden,
        state: config.usize("mamba_d_state", recurrent::STATE)?,
        rank: mamba::rank(config, "mamba_dt_rank", hidden)?.unwrap_or(hidden.div_ceil(16)),
        kernel: config.usize("mamba_d_conv", recurrent::KERNEL)?,
        conv_bias: config.bool_or("mamba_conv_bias", true)?,
        bias: config.bool_or("mamba_proj_bias", false)?,
        norms: MambaNorms::Weighted,
        rounded_states: true,
    })
}

/// Hugging Face stores convolutions transposed and every expert alone.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    recurrent::convolutions(weights)?;
    mixture::stack(spec, weights, "feed_forward.experts", mixture::MATRICES, "feed_forward.switch_mlp")
}
