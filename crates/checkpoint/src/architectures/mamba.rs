//! Mamba and Falcon Mamba: a selective state space in every layer, and nothing else.

use super::{Architecture, dense, recurrent};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{
    FeedForward, Flow, LayerNorms, LayerSpec, MambaNorms, MambaSpec, Mixer, ModelSpec, Residual,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("mamba", spec).aliases(&["falcon_mamba"]).weights(weights).without_keys();

/// Epsilon of the norms before the mixers and of the last one: MLX's default, whatever the config says.
const EPSILON: f64 = 1e-5;

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let hidden = dense::width(config, "hidden_size")?;
    let normed = config.model_type()? == "falcon_mamba" || config.bool_or("use_bcdt_rms", false)?;
    let norms = match normed {
        true => {
            let config = config.with_defaults(&[("mixer_rms_eps", 1e-6)]);
            MambaNorms::Unweighted { eps: dense::epsilon(&config, "mixer_rms_eps")? }
        }
        false => MambaNorms::Absent,
    };
    let mixer = MambaSpec {
        block: "mixer",
        width: dense::width(config, "intermediate_size")?,
        state: config.usize("state_size", recurrent::STATE)?,
        rank: rank(config, "time_step_rank", hidden)?.ok_or_else(|| missing("time_step_rank"))?,
        kernel: config.usize("conv_kernel", recurrent::KERNEL)?,
        conv_bias: config.bool("use_conv_bias")?,
        bias: config.bool("use_bias")?,
        norms,
        rounded_states: false,
    };
    let layer = LayerSpec {
        mixer: Mixer::Mamba(mixer),
        feed_forward: FeedForward::Absent,
        norms: LayerNorms { before_mixer: Some("norm"), before_feed_forward: None, ..LayerNorms::BEFORE },
        flow: Flow::Sequential(Residual::Add),
    };
    let layers = vec![layer; config.usize("num_hidden_layers", dense::LAYERS)?];
    let tied = config.bool_or("tie_word_embeddings", true)?;
    dense::of_layers(&config.with("rms_norm_eps", EPSILON.into()), "mamba", hidden, None, layers, tied)
}

/// How many numbers the steps are made from: a number, or "auto" for a sixteenth of the hidden vectors' width.
pub(super) fn rank(config: &Config, field: &str, hidden: usize) -> Result<Option<usize>, ConfigError> {
    match config.get(field) {
        Some(value) if value.as_str() == Some("auto") => Ok(Some(hidden.div_ceil(16))),
        Some(value) if value.is_string() => {
            Err(config.refuse(field, &crate::config::shown(value), "a number or \"auto\""))
        }
        _ => config.optional_usize(field, dense::WIDTH),
    }
}

/// Hugging Face stores convolutions transposed.
fn weights(_: &Config, _: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    recurrent::convolutions(weights).map(drop)
}
