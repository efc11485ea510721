//! Muse Glimmer (Meta): gates on the results of attention, norms without weights on queries and keys, windows in most layers, only
//! those of which know positions. Only the text model of these repositories runs.

use super::{Architecture, dense, llama, rope};
use crate::config::{Config, ConfigError, shown};
use crate::spec::{
    Activation, AttentionGate, AttentionSpec, Flow, GateFunction, LayerNorms, Logits, ModelSpec, NormKind,
    QkNorm, QkNormKind, QueryFactor, Residual,
};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture = Architecture::new("muse_glimmer", spec).without_vision();

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    // Meta nests the text model's fields, conversions do not.
    let mut own = config.clone();
    for (field, value) in config.object("text_config")?.into_iter().flatten() {
        own = own.with(field, value.clone());
    }
    let config = &own.with_defaults(&[
        ("hidden_size", 6656.0),
        ("num_hidden_layers", 52.0),
        ("intermediate_size", 19_968.0),
        ("num_attention_heads", 32.0),
        ("num_key_value_heads", 2.0),
        ("head_dim", 128.0),
        ("vocab_size", 202_048.0),
        ("rms_norm_eps", 1e-5),
        ("post_norm_eps", 1e-8),
        ("sliding_window", 2048.0),
        ("qk_scale_factor", 3.87),
        ("max_position_embeddings", 131_072.0),
        ("final_logit_softcapping", 20.0),
        ("output_multiplier", 0.196_116_135_138_184_04),
    ]);
    let sizes = dense::Sizes::read(config)?;
    let base = match config.object("rope_parameters")?.and_then(|object| object.get("rope_theta")) {
        Some(base) => rope::base(&config.with("rope_theta", base.clone()), None)?,
        None => rope::base(config, Some(500_000.0))?,
    };
    let windows = windows(config, sizes.layers)?;
    let rotates = rotating(config, &windows)?;
    let qk_norm = QkNorm {
        kind: QkNormKind::PerHeadUnweighted { eps: dense::epsilon(config, "rms_norm_eps")? },
        query_factor: Some(QueryFactor::Number(config.f64("qk_scale_factor")? as f32)),
        ..QkNorm::PER_HEAD
    };
    let gate =
        AttentionGate { name: "gate_proj", per_head: false, function: GateFunction::Sigmoid, bias: false };
    let attention = windows
        .into_iter()
        .zip(rotates)
        .map(|(window, rotates)| AttentionSpec {
            window,
            qk_norm: Some(qk_norm),
            gate: Some(gate),
            ..sizes.attention(rotates.then(|| rope::plain(sizes.head_dim, base, false)))
        })
        .collect();
    let network = sizes.gated(Activation::Silu, false);
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let mut model = dense::model(config, "muse_glimmer", &sizes, attention, &network, tied)?;
    dense::arrange(&mut model, LayerNorms::AROUND, Flow::Sequential(Residual::Add));
    model.norm = NormKind::RmsPlusOne;
    model.own_last_norm = Some(NormKind::Rms);
    model.after_norm_eps = Some(dense::epsilon(config, "post_norm_eps")?);
    model.embedding_norm = true;
    model.logits = Logits::MultipliedThenCapped {
        factor: config.f64("output_multiplier")? as f32,
        cap: config.positive("final_logit_softcapping")? as f32,
    };
    Ok(model)
}

/// Without a list every fourth layer has no window.
fn windows(config: &Config, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    if config.array("layer_types")?.is_some() {
        return llama::windows(config, layers);
    }
    let window = config.usize("sliding_window", dense::POSITIONS)?;
    Ok((1..=layers).map(|layer| (!layer.is_multiple_of(4)).then_some(window)).collect())
}

/// Which layers rotate: those whose base in `layer_rope_theta` is not 0. What else it is does not count, as in mlx-lm. Without the
/// list those with windows rotate.
fn rotating(config: &Config, windows: &[Option<usize>]) -> Result<Vec<bool>, ConfigError> {
    let field = "layer_rope_theta";
    let Some(bases) = config.array(field)? else { return Ok(windows.iter().map(Option::is_some).collect()) };
    if bases.len() < windows.len() {
        let allowed = format!("one for each of num_hidden_layers, which is {}", windows.len());
        return Err(config.refuse(field, &format!("a list of {}", bases.len()), &allowed));
    }
    let rotates = |(index, base): (usize, &Value)| match base {
        Value::Null => Ok(false),
        base => match base.as_f64() {
            Some(base) => Ok(base != 0.0),
            None => Err(config.refuse(&format!("{field}[{index}]"), &shown(base), "a number")),
        },
    };
    bases.iter().take(windows.len()).enumerate().map(rotates).collect()
}
