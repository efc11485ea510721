//! OLMo Hybrid: gated delta networks with norms before, attention with norms after in every fourth layer.

use super::{Architecture, dense, recurrent, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{
    AttentionSpec, DeltaForm, Flow, GatedDeltaSpec, LayerNorms, Mixer, ModelSpec, QkNorm, Residual,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("olmo_hybrid", spec).weights(weights);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let sizes = dense::Sizes::read(config)?;
    if sizes.context.is_none() {
        return Err(missing("max_position_embeddings"));
    }
    let bias = config.bool("attention_bias")?;
    let attention = AttentionSpec {
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: Some(QkNorm::WHOLE),
        ..sizes.attention(base(config)?.map(|base| rope::plain(sizes.head_dim, base, false)))
    };
    let tied = config.bool("tie_word_embeddings")?;
    let network = sizes.gated(dense::silu(config)?, false);
    let attention = vec![attention; sizes.layers];
    let mut model = dense::model(config, "olmo_hybrid", &sizes, attention, &network, tied)?;
    dense::arrange(&mut model, LayerNorms::AFTER, Flow::Sequential(Residual::Add));
    let norm = config.with_defaults(&[("layer_norm_epsilon", 1e-5)]);
    let delta = GatedDeltaSpec {
        decay_bound: None,
        negative_eigenvalues: config.bool("linear_allow_neg_eigval")?,
        ..recurrent::gated_delta(config, DeltaForm::Apart, dense::epsilon(&norm, "layer_norm_epsilon")?)?
    };
    let recurs = match config.get("layer_types") {
        None => (0..sizes.layers).map(|layer| layer % 4 != 3).collect(),
        Some(_) => {
            let kinds = [("linear_attention", true), ("full_attention", false)];
            recurrent::all_layer_kinds(config, "layer_types", &kinds, sizes.layers)?
        }
    };
    for (layer, _) in model.layers.iter_mut().zip(recurs).filter(|(_, recurs)| *recurs) {
        layer.mixer = Mixer::GatedDelta(delta.clone());
        layer.norms = LayerNorms::BEFORE;
    }
    Ok(model)
}

/// The base of the rotation: `rope_parameters.rope_theta`, or else `rope_theta`. One that is null means that nothing rotates.
fn base(config: &Config) -> Result<Option<f64>, ConfigError> {
    let nested = config.object("rope_parameters")?;
    let (field, value) = match nested {
        Some(object) => ("rope_parameters.rope_theta", object.get("rope_theta")),
        None => ("rope_theta", config.raw().get("rope_theta")),
    };
    match value {
        None => Ok(Some(10_000.0)),
        Some(value) if value.is_null() => Ok(None),
        Some(value) => match config.number(field, value)? {
            base if base > 1.0 => Ok(Some(base)),
            base => Err(config.refuse(field, &base.to_string(), "above 1")),
        },
    }
}

/// Hugging Face stores convolutions transposed.
fn weights(_: &Config, _: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    recurrent::convolutions(weights).map(drop)
}
