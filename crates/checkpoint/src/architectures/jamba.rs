//! Jamba: Mamba layers, now and then an attention without positions, and experts in some layers.

use super::mamba::rank;
use super::{Architecture, dense, mixture, recurrent};
use crate::config::{Config, ConfigError};
use crate::spec::{
    Activation, ExpertNetworks, ExpertsSpec, FeedForward, Flow, GatedNames, LayerNorms, LayerSpec,
    MambaNorms, MambaSpec, Mixer, ModelSpec, Residual, RouterSpec, Routing,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("jamba", spec).weights(weights);

const NORMS: LayerNorms = LayerNorms { before_feed_forward: Some("pre_ff_layernorm"), ..LayerNorms::BEFORE };

const NETWORK: GatedNames =
    GatedNames { gate: "feed_forward.gate_proj", up: "feed_forward.up_proj", down: "feed_forward.down_proj" };

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let sizes = dense::Sizes::read_with_shared_heads(config)?;
    let network = FeedForward::Gated {
        intermediate: sizes.intermediate,
        activation: Activation::Silu,
        bias: false,
        fused: false,
        names: NETWORK,
    };
    let mamba = mamba(config, sizes.hidden)?;
    let experts = experts(config, sizes.intermediate)?;
    let (offset, period) = place(config, "expert_layer_offset", "expert_layer_period")?;
    let layer = |(index, attends): (usize, bool)| LayerSpec {
        mixer: match attends {
            true => Mixer::Attention(sizes.attention(None)),
            false => Mixer::Mamba(mamba.clone()),
        },
        // As the family means it. mlx-lm asks for `(index + offset) % period == 0`, which is the same for the published models.
        feed_forward: match &experts {
            Some(experts) if index % period == offset % period => FeedForward::Experts(*experts),
            _ => network.clone(),
        },
        norms: NORMS,
        flow: Flow::Sequential(Residual::Add),
    };
    let layers = attending(config, sizes.layers)?.into_iter().enumerate().map(layer).collect();
    let tied = config.bool_or("tie_word_embeddings", true)?;
    dense::of_layers(config, "jamba", sizes.hidden, sizes.context, layers, tied)
}

/// Which layers attend: those that `layers_block_type` says, or else every so many.
fn attending(config: &Config, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let field = "layers_block_type";
    if config.get(field).is_some() {
        return recurrent::all_layer_kinds(config, field, &[("attention", true), ("mamba", false)], layers);
    }
    let (offset, period) = place(config, "attn_layer_offset", "attn_layer_period")?;
    Ok((0..layers).map(|layer| layer % period == offset).collect())
}

fn place(config: &Config, offset: &str, period: &str) -> Result<(usize, usize), ConfigError> {
    Ok((config.usize(offset, 0..=*dense::LAYERS.end())?, config.usize(period, dense::LAYERS)?))
}

fn mamba(config: &Config, hidden: usize) -> Result<MambaSpec, ConfigError> {
    let expand = config.usize("mamba_expand", 1..=64)?;
    Ok(MambaSpec {
        block: "mamba",
        width: expand * hidden,
        state: config.usize("mamba_d_state", recurrent::STATE)?,
        kernel: config.usize("mamba_d_conv", recurrent::KERNEL)?,
        rank: rank(config, "mamba_dt_rank", hidden)?.unwrap_or_else(|| hidden.div_ceil(16)),
        conv_bias: config.bool_or("mamba_conv_bias", true)?,
        bias: config.bool_or("mamba_proj_bias", false)?,
        norms: MambaNorms::Weighted,
        rounded_states: true,
    })
}

/// None in a model with one expert, which is a dense network.
fn experts(config: &Config, intermediate: usize) -> Result<Option<ExpertsSpec>, ConfigError> {
    let (experts, per_token) = dense::experts(config, "num_experts")?;
    Ok((experts > 1).then(|| ExpertsSpec {
        block: "feed_forward",
        experts,
        per_token,
        router: RouterSpec { name: "router", ..RouterSpec::GATE },
        routing: Routing::CHOSEN,
        networks: ExpertNetworks::gated(intermediate, Activation::Silu),
        shared: None,
    }))
}

/// Hugging Face stores convolutions transposed and experts one by one.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    recurrent::convolutions(weights)?;
    mixture::stack(spec, weights, "feed_forward.experts", mixture::MATRICES, "feed_forward.switch_mlp")
}
