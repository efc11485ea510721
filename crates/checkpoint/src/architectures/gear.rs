//! Gear: Gemma 3's attention and norms, but layers may convolve keys and values instead of attending to them.

use super::{Architecture, dense, recurrent, rope};
use crate::config::{Config, ConfigError};
use crate::spec::{
    Activation, AttentionSpec, ConvolvedKeysSpec, Flow, LayerNorms, Logits, Mixer, ModelSpec, NormKind,
    QkNorm, Residual,
};
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture = Architecture::new("gear", spec).weights(weights);

/// What a layer does.
#[derive(Clone, Copy)]
enum Kind {
    Full,
    Window,
    Convolved,
}

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    if config.bool_or("use_bidirectional_attention", false)? {
        return Err(config.refuse("use_bidirectional_attention", "true", "false: only decoders run"));
    }
    let config = &config.with_defaults(&[
        ("sliding_window", 512.0),
        ("conv_L_cache", 3.0),
        ("rope_theta", 1_000_000.0),
        ("rope_local_base_freq", 10_000.0),
    ]);
    let config = &config.with("head_dim", config.usize("head_dim", dense::HEAD_DIM)?.into());
    let sizes = dense::Sizes::read(config)?;
    let bias = config.bool_or("attention_bias", false)?;
    // Only what is called rope_scaling counts here.
    let scaled = &config.with("rope_parameters", Value::Null);
    let far = rope::spec(scaled, sizes.head_dim, rope::base(config, None)?, false, sizes.context)?;
    let near = rope::plain(sizes.head_dim, config.positive("rope_local_base_freq")?, false);
    let scale = match config.optional_f64("query_pre_attn_scalar")? {
        Some(_) => config.positive("query_pre_attn_scalar")?.powf(-0.5) as f32,
        None => sizes.scale(),
    };
    let attention = |window: Option<usize>| AttentionSpec {
        scale,
        window,
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: Some(QkNorm::PER_HEAD),
        ..sizes.attention(Some(if window.is_some() { near.clone() } else { far.clone() }))
    };
    let score_cap = cap(config, "attn_logit_softcapping")?;
    let kernel = config.usize("conv_L_cache", recurrent::KERNEL)?;
    let window = config.usize("sliding_window", dense::POSITIONS)?;
    let mixers = kinds(config, sizes.layers)?
        .into_iter()
        .map(|kind| match kind {
            Kind::Full => Mixer::Attention(AttentionSpec { score_cap, ..attention(None) }),
            Kind::Window => Mixer::Attention(AttentionSpec { score_cap, ..attention(Some(window)) }),
            Kind::Convolved => Mixer::ConvolvedKeys(ConvolvedKeysSpec {
                heads: sizes.heads,
                kv_heads: sizes.kv_heads,
                head_dim: sizes.head_dim,
                kernel,
                bias,
            }),
        })
        .collect();
    let network = sizes.gated(activation(config)?, false);
    let tied = config.bool_or("tie_word_embeddings", true)?;
    let mut model = dense::of_mixers(config, "gear", &sizes, mixers, &network, tied)?;
    dense::arrange(&mut model, LayerNorms::AROUND, Flow::Sequential(Residual::Add));
    model.norm = NormKind::RmsPlusOne;
    model.embedding_scale = Some((sizes.hidden as f64).sqrt() as f32);
    if let Some(cap) = cap(config, "final_logit_softcapping")? {
        model.logits = Logits::Capped(cap);
    }
    Ok(model)
}

/// Without a list every layer attends to everything.
fn kinds(config: &Config, layers: usize) -> Result<Vec<Kind>, ConfigError> {
    if config.array("layer_types")?.is_none() {
        return Ok(vec![Kind::Full; layers]);
    }
    let kinds = [
        ("full_attention", Kind::Full),
        ("sliding_attention", Kind::Window),
        ("conv_mixer", Kind::Convolved),
    ];
    recurrent::all_layer_kinds(config, "layer_types", &kinds, layers)
}

/// A cap; 0 and null mean none.
fn cap(config: &Config, field: &str) -> Result<Option<f32>, ConfigError> {
    match config.optional_f64(field)? {
        None => Ok(None),
        Some(0.0) => Ok(None),
        Some(_) => Ok(Some(config.positive(field)? as f32)),
    }
}

fn activation(config: &Config) -> Result<Activation, ConfigError> {
    match config.str("hidden_activation")? {
        None | Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
        Some("gelu") => Ok(Activation::Gelu),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => {
            let allowed = "gelu_pytorch_tanh, gelu_new, gelu_fast, gelu, silu or swish";
            Err(config.refuse("hidden_activation", &format!("\"{other}\""), allowed))
        }
    }
}

/// Hugging Face stores convolutions transposed, and the embedding's factor.
fn weights(_: &Config, _: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    for name in weights.ending_with("embed_scale") {
        weights.take(&name);
    }
    recurrent::convolutions(weights).map(drop)
}
