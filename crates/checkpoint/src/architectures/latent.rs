//! What the families with latent attention share: how their configs describe it.

use super::{dense, rope};
use crate::config::{Config, ConfigError};
use crate::expression::QuantizedPart;
use crate::quantization::QuantSetting;
use crate::spec::{LatentForm, LatentSpec, Mixer, ModelSpec, RopeScaling, RopeSpec};
use crate::tensor::Tensor;
use crate::weights::{Weights, WeightsError};

/// Epsilon of the norms inside of DeepSeek's attention, whatever the config says of the others.
pub(super) const EPSILON: f32 = 1e-6;

/// The sizes of a model whose heads have no `head_dim` of their own.
pub(super) fn sizes(config: &Config) -> Result<dense::Sizes, ConfigError> {
    let heads = config.usize("num_attention_heads", dense::HEADS)?;
    Ok(dense::Sizes {
        layers: config.usize("num_hidden_layers", dense::LAYERS)?,
        hidden: config.usize("hidden_size", dense::WIDTH)?,
        intermediate: config.usize("intermediate_size", dense::WIDTH)?,
        heads,
        kv_heads: heads,
        head_dim: config.usize("qk_rope_head_dim", dense::HEAD_DIM)?,
        context: config.optional_usize("max_position_embeddings", dense::POSITIONS)?,
    })
}

/// The rotation of the rotated parts.
pub(super) fn rope(
    config: &Config,
    sizes: &dense::Sizes,
    traditional: bool,
) -> Result<RopeSpec, ConfigError> {
    if !sizes.head_dim.is_multiple_of(2) {
        return Err(config.refuse("qk_rope_head_dim", &sizes.head_dim.to_string(), "even"));
    }
    rope::spec(config, sizes.head_dim, rope::base(config, Some(10_000.0))?, traditional, sizes.context)
}

/// Attention without an indexer and without factors of its own. `query_latent` is what an absent `q_lora_rank` means; a null one
/// means a single projection.
pub(super) fn attention(
    config: &Config,
    rope: RopeSpec,
    form: LatentForm,
    query_latent: Option<usize>,
    norm_eps: f32,
) -> Result<LatentSpec, ConfigError> {
    let query_latent = match config.raw().contains_key("q_lora_rank") {
        true => config.optional_usize("q_lora_rank", dense::WIDTH)?,
        false => query_latent,
    };
    let still_dims = config.usize("qk_nope_head_dim", dense::HEAD_DIM)?;
    Ok(LatentSpec {
        heads: config.usize("num_attention_heads", dense::HEADS)?,
        still_dims,
        rotated_dims: rope.dims,
        value_dims: config.usize("v_head_dim", dense::HEAD_DIM)?,
        latent: config.usize("kv_lora_rank", dense::WIDTH)?,
        query_latent,
        bias: config.bool_or("attention_bias", false)?,
        norm_eps,
        query_factor: None,
        latent_factor: None,
        growth: None,
        unrotated: false,
        gate: false,
        head_gate: false,
        scale: ((still_dims + rope.dims) as f64).powf(-0.5) as f32,
        rope,
        form,
        indexer: None,
    })
}

/// The scale with YaRN's magnitude in it twice, for queries and keys: `(0.1 mscale_all_dim ln(factor) + 1)^2`.
pub(super) fn stretched_scale(attention: &LatentSpec) -> f32 {
    let scale = (attention.query_dims() as f64).powf(-0.5);
    match attention.rope.scaling {
        RopeScaling::Yarn { factor, mscale_all_dim, .. } if factor > 1.0 => {
            let magnitude = 0.1 * mscale_all_dim * factor.ln() + 1.0;
            (scale * magnitude * magnitude) as f32
        }
        _ => scale as f32,
    }
}

/// Hugging Face, and older MLX folders, store the heads' matrices as one, `kv_b_proj`: for each head the rows that make the still
/// part of its key, then those that make its value. The first are turned, so that a query goes through them.
pub(super) fn absorb(spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    for (index, layer) in spec.layers.iter().enumerate() {
        match &layer.mixer {
            Mixer::Latent(latent) if latent.form != LatentForm::Expanded => {
                absorb_at(&format!("model.layers.{index}.self_attn"), latent, weights)?;
            }
            Mixer::Shortcut(shortcut) => {
                for half in 0..2 {
                    let path = format!("model.layers.{index}.self_attn.{half}");
                    absorb_at(&path, &shortcut.attention, weights)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn absorb_at(path: &str, latent: &LatentSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    let mut take = |part: &str| weights.take(&format!("{path}.kv_b_proj.{part}"));
    let Some(weight) = take("weight") else { return Ok(()) };
    let (matrix, setting) = match (take("scales"), take("biases")) {
        (None, _) => (weight, None),
        (Some(scales), biases) => {
            let columns = |tensor: &Tensor| tensor.shape().last().copied().unwrap_or(0);
            let (packed, groups) = (columns(&weight), columns(&scales));
            let setting = QuantSetting::infer(latent.latent, packed, groups, scales.dtype())
                .ok_or_else(|| weight.unfit(format!("rows of {} packed weights", latent.latent)))?;
            (Tensor::dequantize(&weight, &scales, biases.as_ref(), None, setting)?, Some(setting))
        }
    };
    let (still, rows) = (latent.still_dims, latent.still_dims + latent.value_dims);
    if matrix.shape() != [latent.heads * rows, latent.latent] {
        return Err(matrix.unfit(format!("[{}, {}]", latent.heads * rows, latent.latent)).into());
    }
    let of_heads = matrix.reshape(&[latent.heads, rows, latent.latent])?;
    let embed = of_heads.slice(1, 0, still)?.transpose_last()?;
    for (name, tensor) in [("embed_q", embed), ("unembed_out", of_heads.slice(1, still, rows)?)] {
        let Some(setting) = setting else {
            weights.insert(format!("{path}.{name}.weight"), tensor)?;
            continue;
        };
        let biases = setting.has_biases().then_some(("biases", QuantizedPart::Biases));
        for (part, which) in
            [("weight", QuantizedPart::Weight), ("scales", QuantizedPart::Scales)].into_iter().chain(biases)
        {
            weights.insert(format!("{path}.{name}.{part}"), tensor.quantize(setting, which)?)?;
        }
    }
    Ok(())
}
