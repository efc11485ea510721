//! StableLM: layer norms, part of each head rotating, attention in single precision, in some models both parts side by side.

use super::{Architecture, dense, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{
    AttentionSpec, Flow, LayerNorms, Mixer, ModelSpec, NormKind, ParallelSum, QkNorm, QkNormKind, Residual,
    SinglePrecision,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("stablelm", spec).weights(weights);

const QK_NORM: QkNorm =
    QkNorm { kind: QkNormKind::LayerPerHead, names: ["q_layernorm", "k_layernorm"], ..QkNorm::PER_HEAD };

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    if config.get("num_key_value_heads").is_none() {
        return Err(missing("num_key_value_heads"));
    }
    let sizes = dense::Sizes::read_with_shared_heads(config)?;
    let dims = sizes.rotated(config, config.f64("partial_rotary_factor")?)?;
    let attention = AttentionSpec {
        qkv_bias: config.bool("use_qkv_bias")?,
        qk_norm: config.bool_or("qk_layernorm", false)?.then_some(QK_NORM),
        single_precision: SinglePrecision::Always,
        ..sizes.attention(Some(rope::plain(dims, rope::base(config, None)?, false)))
    };
    let feed_forward = sizes.gated(dense::silu(config)?, false);
    let parallel = config.bool_or("use_parallel_residual", false)?;
    dense::epsilon(config, "layer_norm_eps")?;
    let config = &config.with("rms_norm_eps", config.f64("layer_norm_eps")?.into());
    let attention = vec![attention; sizes.layers];
    let mut model = dense::model(config, "stablelm", &sizes, attention, &feed_forward, false)?;
    let (norms, flow) = match parallel {
        true => (LayerNorms::SHARED, Flow::Parallel(ParallelSum::HiddenFirst)),
        false => (LayerNorms::BEFORE, Flow::Sequential(Residual::Add)),
    };
    dense::arrange(&mut model, norms, flow);
    model.norm = NormKind::Layer { bias: true };
    Ok(model)
}

/// The norms of the heads are stored one by one.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    let Some(Mixer::Attention(attention)) = spec.layers.first().map(|layer| &layer.mixer) else {
        return Ok(());
    };
    for (name, heads) in QK_NORM.names.into_iter().zip([attention.heads, attention.kv_heads]) {
        let path = format!("model.layers.{{layer}}.self_attn.{name}");
        weights.stack_experts(&format!("{path}.norms.{{expert}}"), &path, heads)?;
    }
    Ok(())
}
