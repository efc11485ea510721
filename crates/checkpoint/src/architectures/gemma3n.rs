//! Gemma 3n: alternating updates of several hidden vectors, an input of its own for every layer, windows in most layers, late layers
//! that see the keys and values of earlier ones. Only the text model of these repositories runs.

use super::{Architecture, dense, llama, rope};
use crate::config::{Config, ConfigError, missing, shown};
use crate::spec::{
    Activation, AlternatingUpdates, AttentionSpec, FeedForward, Flow, GatedNames, LayerInputs, LayerNorms,
    Logits, ModelSpec, QkNorm, Widening,
};
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("gemma3n", spec).weights(weights).without_vision();

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let repository = ["quantization", "quantization_config", "torch_dtype", "dtype"];
    let config = &config.of_text_model("text_config", &repository)?;
    let widths = config.get("intermediate_size").ok_or_else(|| missing("intermediate_size"))?;
    let first = widths.as_array().and_then(|widths| widths.first()).unwrap_or(widths);
    let sizes = dense::Sizes::read(&config.with("intermediate_size", first.clone()))?;
    if config.array("layer_types")?.is_none() {
        return Err(missing("layer_types"));
    }
    let windows = llama::windows(config, sizes.layers)?;
    let owners = owners(config, &windows)?;
    // mlx-lm 0.32.2 ignores `rope_scaling` here; it is meant for the layers that see everything.
    let far = rope::spec(config, sizes.head_dim, rope::base(config, None)?, false, sizes.context)?;
    let near = rope::plain(sizes.head_dim, config.positive("rope_local_base_freq")?, false);
    let attention = windows
        .iter()
        .zip(&owners)
        .map(|(window, owner)| AttentionSpec {
            scale: 1.0,
            window: *window,
            qk_norm: Some(QkNorm::PER_HEAD),
            value_norm: true,
            shares: *owner,
            ..sizes.attention(Some(if window.is_some() { near.clone() } else { far.clone() }))
        })
        .collect();
    let network = sizes.gated(Activation::GeluTanh, false);
    let mut model = dense::model(config, "gemma3n", &sizes, attention, &network, true)?;
    let input = dense::width(config, "hidden_size_per_layer_input")?;
    let updates = updates(config, input)?;
    dense::arrange(&mut model, LayerNorms::AROUND, Flow::AlternatingUpdates(updates));
    for (index, layer) in model.layers.iter_mut().enumerate() {
        layer.feed_forward = FeedForward::Gated {
            intermediate: intermediate(config, sizes.layers, index)?,
            activation: activation(config, sizes.layers, index)?,
            bias: false,
            fused: false,
            names: GatedNames::LLAMA,
        };
    }
    let vocabulary = config.usize("vocab_size_per_layer_input", dense::VOCABULARY)?;
    model.widening = Widening {
        streams: updates.streams,
        layer_inputs: Some(LayerInputs { vocabulary, width: input }),
        ..Widening::NONE
    };
    model.logits = cap(config, None)?;
    model.embedding_scale = Some((sizes.hidden as f64).sqrt() as f32);
    Ok(model)
}

/// The layer whose keys and values each layer sees: for the last `num_kv_shared_layers` the last one before them that has or has no
/// window as they do.
pub(super) fn owners(config: &Config, windows: &[Option<usize>]) -> Result<Vec<Option<usize>>, ConfigError> {
    let layers = windows.len();
    let shared = config.usize("num_kv_shared_layers", 0..=layers - 1)?;
    let owning = &windows[..layers - shared];
    let owner = |(index, window): (usize, &Option<usize>)| {
        if index < owning.len() {
            return Ok(None);
        }
        owning.iter().rposition(|other| other.is_some() == window.is_some()).map(Some).ok_or_else(|| {
            let field = format!("layer_types[{index}]");
            let kind = if window.is_some() { "\"sliding_attention\"" } else { "\"full_attention\"" };
            let allowed = format!("the type of one of the first {} layers", owning.len());
            config.refuse(&field, kind, &allowed)
        })
    };
    windows.iter().enumerate().map(owner).collect()
}

/// `final_logit_softcapping`, where null means none; what it is when it is not there is the family's.
pub(super) fn cap(config: &Config, default: Option<f32>) -> Result<Logits, ConfigError> {
    let field = "final_logit_softcapping";
    match (config.raw().get(field), default) {
        (Some(Value::Null), _) => Ok(Logits::Plain),
        (None, Some(default)) => Ok(Logits::Capped(default)),
        _ => Ok(Logits::Capped(config.positive(field)? as f32)),
    }
}

/// Drops the projections of layers that see another one's keys and values: such files have them, and nobody uses them.
pub(super) fn drop_shared(spec: &ModelSpec, weights: &mut Weights) {
    for layer in (0..spec.layer_count()).filter(|layer| spec.shares(*layer).is_some()) {
        for name in ["k_proj", "v_proj", "k_norm"] {
            weights.remove(&format!("model.layers.{layer}.self_attn.{name}"));
        }
    }
}

fn updates(config: &Config, input: usize) -> Result<AlternatingUpdates, ConfigError> {
    let streams = config.usize("altup_num_inputs", 2..=64)?;
    Ok(AlternatingUpdates {
        streams,
        active: config.usize("altup_active_idx", 0..=streams - 1)?,
        clip: config.optional_f64("altup_coef_clip")?.map(|clip| clip as f32),
        scaled: config.bool("altup_correct_scale")?,
        rank: dense::width(config, "laurel_rank")?,
        input,
    })
}

/// One width for all layers, or a list of them.
fn intermediate(config: &Config, layers: usize, index: usize) -> Result<usize, ConfigError> {
    let field = "intermediate_size";
    let Some(Value::Array(widths)) = config.get(field) else { return dense::width(config, field) };
    let width = of_layer(config, field, widths, layers, index)?;
    dense::width(&config.with(field, width.clone()), field)
}

/// `activation_sparsity_pattern` says which share of a layer's activations becomes zero.
fn activation(config: &Config, layers: usize, index: usize) -> Result<Activation, ConfigError> {
    let field = "activation_sparsity_pattern";
    let Some(shares) = config.array(field)? else { return Ok(Activation::GeluTanh) };
    let share = of_layer(config, field, shares, layers, index)?;
    match share.as_f64() {
        Some(0.0) => Ok(Activation::GeluTanh),
        Some(sparsity) if sparsity > 0.0 && sparsity < 1.0 => {
            Ok(Activation::GeluTanhOfLargest { sparsity: sparsity as f32 })
        }
        _ => Err(config.refuse(&format!("{field}[{index}]"), &shown(share), "from 0 to below 1")),
    }
}

fn of_layer<'a>(
    config: &Config,
    field: &str,
    values: &'a [Value],
    layers: usize,
    index: usize,
) -> Result<&'a Value, ConfigError> {
    match values.get(index) {
        Some(value) if values.len() == layers => Ok(value),
        _ => {
            let allowed = format!("one for each of num_hidden_layers, which is {layers}");
            Err(config.refuse(field, &format!("a list of {}", values.len()), &allowed))
        }
    }
}

fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    drop_shared(spec, weights);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(changes: &[(&str, Value)]) -> Config {
        let mut text = json!({
            "hidden_size": 8, "num_hidden_layers": 5, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 4, "num_kv_shared_layers": 2, "sliding_window": 12, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "final_logit_softcapping": 30.0, "vocab_size": 20,
            "vocab_size_per_layer_input": 16, "hidden_size_per_layer_input": 6, "altup_num_inputs": 4, "altup_coef_clip": 120.0,
            "altup_correct_scale": true, "altup_active_idx": 0, "laurel_rank": 2,
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
        });
        for (field, value) in changes {
            text[*field] = value.clone();
        }
        let config = json!({ "model_type": "gemma3n", "text_config": text });
        Config::from_json(config.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn late_layers_see_what_the_last_early_one_of_their_kind_sees() {
        let model = spec(&config(&[])).unwrap();
        let shares: Vec<_> = (0..5).map(|layer| model.shares(layer)).collect();
        assert_eq!(shares, [None, None, None, Some(2), Some(1)]);
        let cuts: Vec<_> = (0..5).filter(|layer| model.can_split_before(*layer)).collect();
        assert_eq!(cuts, [0, 1]);
        // Four hidden vectors and five layers' inputs.
        assert_eq!(model.activation_width(), 4 * 8 + 5 * 6);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let cases = [
            ("num_kv_shared_layers", json!(5), "num_kv_shared_layers is 5"),
            ("num_kv_shared_layers", json!(4), "layer_types[1] is \"full_attention\""),
            ("layer_types", json!(null), "layer_types is missing"),
            ("layer_types", json!(["full_attention"]), "layer_types is a list of 1"),
            ("intermediate_size", json!([12, 12]), "intermediate_size is a list of 2"),
            ("intermediate_size", json!([]), "intermediate_size"),
            ("activation_sparsity_pattern", json!([0.5]), "activation_sparsity_pattern is a list of 1"),
            (
                "activation_sparsity_pattern",
                json!([1.0, 0, 0, 0, 0]),
                "activation_sparsity_pattern[0] is 1.0",
            ),
            ("altup_num_inputs", json!(1), "altup_num_inputs is 1"),
            ("altup_active_idx", json!(4), "altup_active_idx is 4"),
            ("final_logit_softcapping", json!(0.0), "final_logit_softcapping is 0"),
            ("hidden_size_per_layer_input", json!(0), "hidden_size_per_layer_input is 0"),
        ];
        for (field, value, part) in cases {
            let message = spec(&config(&[(field, value)])).unwrap_err().to_string();
            assert!(message.contains(part), "{part}: {message}");
        }
    }
}
