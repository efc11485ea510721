//! What families with recurrent layers share.

use super::dense;
use crate::config::{Config, ConfigError, missing, shown};
use crate::spec::{DeltaForm, GatedDeltaSpec};
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

/// Tokens that a convolution sees. With one token there would be nothing to remember.
pub(super) const KERNEL: std::ops::RangeInclusive<usize> = 2..=64;
/// Numbers in a head's state for each channel.
pub(super) const STATE: std::ops::RangeInclusive<usize> = 1..=4096;

/// A gated delta network whose sizes stand under the names of Qwen3-Next.
pub(super) fn gated_delta(
    config: &Config,
    form: DeltaForm,
    norm_eps: f32,
) -> Result<GatedDeltaSpec, ConfigError> {
    let key_heads = config.usize("linear_num_key_heads", dense::HEADS)?;
    let value_heads = config.usize("linear_num_value_heads", dense::HEADS)?;
    if !value_heads.is_multiple_of(key_heads) {
        let allowed = format!("a multiple of linear_num_key_heads, which is {key_heads}");
        return Err(config.refuse("linear_num_value_heads", &value_heads.to_string(), &allowed));
    }
    Ok(GatedDeltaSpec {
        block: "linear_attn",
        key_heads,
        value_heads,
        key_dim: config.usize("linear_key_head_dim", dense::HEAD_DIM)?,
        value_dim: config.usize("linear_value_head_dim", dense::HEAD_DIM)?,
        kernel: config.usize("linear_conv_kernel_dim", KERNEL)?,
        form,
        decay_bound: None,
        negative_eigenvalues: false,
        full_gate: false,
        inputs_together: false,
        norm_eps,
    })
}

/// A number of heads that is shared by `groups` groups.
pub(super) fn groups(config: &Config, field: &str, heads: usize) -> Result<usize, ConfigError> {
    let groups = config.usize(field, dense::HEADS)?;
    match heads.is_multiple_of(groups) {
        true => Ok(groups),
        false => Err(config.refuse(field, &groups.to_string(), &format!("a divisor of the {heads} heads"))),
    }
}

/// The smallest and the largest step of a state-space model: a list of two, in which the second may be infinite.
pub(super) fn step_limits(
    config: &Config,
    field: &str,
    default: Option<(f32, f32)>,
) -> Result<(f32, f32), ConfigError> {
    let Some(value) = config.get(field) else { return default.ok_or_else(|| missing(field)) };
    let refuse =
        || config.refuse(field, &shown(value), "a list of the smallest and the largest step, from 0 on");
    let number = |value: &Value| match value.get("__float__").and_then(Value::as_str) {
        Some("Infinity") => Some(f32::INFINITY),
        _ => value.as_f64().map(|number| number as f32),
    };
    let Some([smallest, largest]) = value.as_array().map(Vec::as_slice) else { return Err(refuse()) };
    match (number(smallest), number(largest)) {
        (Some(smallest), Some(largest)) if (0.0..=largest).contains(&smallest) => Ok((smallest, largest)),
        _ => Err(refuse()),
    }
}

/// The kinds of the layers by their names in the list `field`, which has one of `known` for each.
pub(super) fn layer_kinds<T: Copy>(
    config: &Config,
    field: &str,
    known: &[(&str, T)],
) -> Result<Vec<T>, ConfigError> {
    let kinds = config.array(field)?.ok_or_else(|| missing(field))?;
    let layers = kinds.len();
    if !dense::LAYERS.contains(&layers) {
        let allowed = format!("a list of {} to {} layers", dense::LAYERS.start(), dense::LAYERS.end());
        return Err(config.refuse(field, &format!("a list of {layers}"), &allowed));
    }
    let find = |(index, kind): (usize, &Value)| {
        let found = known.iter().find(|(name, _)| kind.as_str() == Some(name)).map(|(_, found)| *found);
        found.ok_or_else(|| {
            let names: Vec<_> = known.iter().map(|(name, _)| format!("\"{name}\"")).collect();
            config.refuse(&format!("{field}[{index}]"), &shown(kind), &names.join(" or "))
        })
    };
    kinds.iter().enumerate().map(find).collect()
}

/// The same, which must be as many as `num_hidden_layers`.
pub(super) fn all_layer_kinds<T: Copy>(
    config: &Config,
    field: &str,
    known: &[(&str, T)],
    layers: usize,
) -> Result<Vec<T>, ConfigError> {
    let kinds = layer_kinds(config, field, known)?;
    if kinds.len() != layers {
        let allowed = format!("one for each of num_hidden_layers, which is {layers}");
        return Err(config.refuse(field, &format!("a list of {}", kinds.len()), &allowed));
    }
    Ok(kinds)
}

/// Brings convolutions from Hugging Face's `[channels, 1, kernel]` to `[channels, kernel, 1]`. Says whether there were any, which
/// is how a repository that nobody converted is told from an MLX folder.
pub(super) fn convolutions(weights: &mut Weights) -> Result<bool, WeightsError> {
    let names: Vec<String> = ["conv1d.weight", "conv_1d.weight", "conv.weight"]
        .into_iter()
        .flat_map(|suffix| weights.ending_with(suffix))
        .filter(|name| {
            weights.get(name).is_some_and(|tensor| matches!(tensor.shape(), [_, 1, kernel] if *kernel > 1))
        })
        .collect();
    for name in &names {
        weights.map(name, |tensor| tensor.transpose(&[0, 2, 1]))?;
    }
    Ok(!names.is_empty())
}
