//! RWKV-7: no attention at all, memories of a fixed size in every layer.

use super::{Architecture, dense};
use crate::config::{Config, ConfigError};
use crate::spec::{
    FeedForward, Flow, LayerNorms, LayerSpec, Mixer, ModelSpec, NormKind, Rwkv7Ranks, Rwkv7Spec,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("rwkv7", spec)
    .weights(weights)
    .names(&[("model.embeddings", "model.embed_tokens")])
    .without_keys();

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let hidden = dense::width(config, "hidden_size")?;
    let head_dim = config.usize("head_dim", dense::HEAD_DIM)?;
    if !hidden.is_multiple_of(head_dim) {
        let allowed = format!("a divisor of hidden_size, which is {hidden}");
        return Err(config.refuse("head_dim", &head_dim.to_string(), &allowed));
    }
    let ranks = Rwkv7Ranks {
        decay: dense::width(config, "decay_low_rank_dim")?,
        rate: dense::width(config, "a_low_rank_dim")?,
        value: dense::width(config, "v_low_rank_dim")?,
        gate: dense::width(config, "gate_low_rank_dim")?,
    };
    let intermediate = dense::width(config, "intermediate_size")?;
    let layer = |index: usize| LayerSpec {
        mixer: Mixer::Rwkv7(Rwkv7Spec { head_dim, intermediate, ranks, is_first: index == 0 }),
        feed_forward: FeedForward::Absent,
        norms: LayerNorms::NONE,
        flow: Flow::Whole,
    };
    let layers = (0..config.usize("num_hidden_layers", dense::LAYERS)?).map(layer).collect();
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let eps = dense::epsilon(config, "norm_eps")?;
    let config = &config.with("rms_norm_eps", f64::from(eps).into());
    let mut model = dense::of_layers(config, "rwkv7", hidden, None, layers, tied)?;
    model.norm = NormKind::Layer { bias: true };
    model.widening.handed = hidden;
    Ok(model)
}

/// Hugging Face stores some parameters of heads as one row.
fn weights(config: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    let head_dim = config.usize("head_dim", dense::HEAD_DIM).unwrap_or(spec.hidden);
    for name in ["k_k", "k_a", "g_norm"] {
        weights.map(&format!("model.layers.{{layer}}.attn.{name}"), |tensor| match tensor.shape() {
            [width] if *width == spec.hidden => tensor.reshape(&[spec.hidden / head_dim, head_dim]),
            _ => Ok(tensor.clone()),
        })?;
    }
    Ok(())
}
