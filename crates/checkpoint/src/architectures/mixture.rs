//! What the families with experts share: DeepSeek's routers, shared experts, and which layers have experts.

use super::{dense, latent};
use crate::config::{Config, ConfigError};
use crate::names::layer_of;
use crate::notes::Note;
use crate::spec::{
    Activation, ExpertNetworks, ExpertsSpec, FeedForward, GroupScore, Groups, ModelSpec, Normalization,
    Outside, RouterSpec, Routing, SharedExpertSpec,
};
use crate::weights::{Weights, WeightsError};

/// The experts of DeepSeek's layers and those like them: `mlp`, with `shared_experts` beside the chosen ones.
pub(super) fn experts(config: &Config, routing: Routing) -> Result<ExpertsSpec, ConfigError> {
    let (experts, per_token) = dense::experts(config, "n_routed_experts")?;
    let intermediate = dense::width(config, "moe_intermediate_size")?;
    Ok(ExpertsSpec {
        block: "mlp",
        experts,
        per_token,
        router: RouterSpec::GATE,
        routing,
        networks: ExpertNetworks::gated(intermediate, Activation::Silu),
        shared: shared(config, "n_shared_experts", intermediate)?,
    })
}

/// Experts that work on every token, together one network as wide as all of them; none when the config counts none.
pub(super) fn shared(
    config: &Config,
    count: &str,
    intermediate: usize,
) -> Result<Option<SharedExpertSpec>, ConfigError> {
    let count = config.optional_usize(count, 0..=1024)?.unwrap_or(0);
    let (name, activation) = ("shared_experts", Activation::Silu);
    let shared = SharedExpertSpec { name, intermediate: intermediate * count, activation, gate: None };
    Ok((count > 0).then_some(shared))
}

/// DeepSeek-V3's routing ("noaux_tc"): logistic scores in single precision, corrected for the choice, from the best groups.
/// The weights of several chosen experts are divided by their sum and `more`.
pub(super) fn corrected(config: &Config, more: Option<f32>) -> Result<Routing, ConfigError> {
    one_of(config, "topk_method", &["noaux_tc"])?;
    one_of(config, "scoring_func", &["sigmoid", "noaux_tc"])?;
    let (experts, per_token) = dense::experts(config, "n_routed_experts")?;
    let normalization = match (per_token > 1 && config.bool_or("norm_topk_prob", true)?, more) {
        (false, _) => Normalization::None,
        (true, None) => Normalization::Sum,
        (true, Some(more)) => Normalization::SumPlus(more),
    };
    Ok(Routing {
        groups: groups(config, experts, GroupScore::TwoLargest)?,
        normalization,
        scale: Some(scale(config)?),
        ..Routing::CORRECTED
    })
}

/// The factor on the weights.
pub(super) fn scale(config: &Config) -> Result<f32, ConfigError> {
    Ok(config.optional_f64("routed_scaling_factor")?.unwrap_or(1.0) as f32)
}

/// Groups from which experts are chosen, by `n_group` and `topk_group`; None for a single one.
pub(super) fn groups(
    config: &Config,
    experts: usize,
    score: GroupScore,
) -> Result<Option<Groups>, ConfigError> {
    let count = config.optional_usize("n_group", 1..=experts)?.unwrap_or(1);
    if count == 1 {
        return Ok(None);
    }
    let least = if score == GroupScore::TwoLargest { 2 } else { 1 };
    if !experts.is_multiple_of(count) || experts / count < least {
        let allowed = format!("a divisor of the {experts} experts with {least} or more in a group");
        return Err(config.refuse("n_group", &count.to_string(), &allowed));
    }
    let kept = config.optional_usize("topk_group", 1..=count)?.unwrap_or(1);
    Ok(Some(Groups { count, kept, score, outside: Outside::Zero }))
}

/// Gives experts to the layers from `first_k_dense_replace` on, of those to every `moe_layer_freq`-th of the model; to none when
/// the config counts no experts.
pub(super) fn deepseek_layers(
    config: &Config,
    model: &mut ModelSpec,
    experts: impl FnOnce() -> Result<ExpertsSpec, ConfigError>,
) -> Result<(), ConfigError> {
    if config.get("n_routed_experts").is_none() {
        return Ok(());
    }
    let first = config.optional_usize("first_k_dense_replace", 0..=usize::MAX)?.unwrap_or(0);
    let every = config.optional_usize("moe_layer_freq", 1..=1024)?.unwrap_or(1);
    let network = FeedForward::Experts(experts()?);
    for (index, layer) in model.layers.iter_mut().enumerate() {
        if index >= first && index.is_multiple_of(every) {
            layer.feed_forward = network.clone();
        }
    }
    Ok(())
}

/// A field that, when it is there, must be one of these words.
pub(super) fn one_of(config: &Config, field: &str, words: &[&str]) -> Result<(), ConfigError> {
    match config.str(field)? {
        Some(word) if !words.contains(&word) => {
            Err(config.refuse(field, &format!("\"{word}\""), &words.join(" or ")))
        }
        _ => Ok(()),
    }
}

/// The names of an expert's matrices.
pub(super) const MATRICES: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Hugging Face's DeepSeek and those like it: experts alone, or all in one tensor with gate and up joined; layers after the last
/// that predict further tokens; heads' matrices as one.
pub(super) fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    without_further_tokens(spec, weights);
    stack(spec, weights, "mlp.experts", MATRICES, "mlp.switch_mlp")?;
    let to = |name: &str| format!("model.layers.{{layer}}.mlp.switch_mlp.{name}.weight");
    let joined = "model.layers.{layer}.mlp.experts.gate_up_proj";
    weights.split_equally(joined, &[&to("gate_proj"), &to("up_proj")])?;
    weights.rename("model.layers.{layer}.mlp.experts.down_proj", &to("down_proj"))?;
    latent::absorb(spec, weights)
}

/// Stacks experts that are stored alone at `from` in each layer, gate, up and down by their stored names.
pub(super) fn stack(
    spec: &ModelSpec,
    weights: &mut Weights,
    from: &str,
    stored: [&str; 3],
    to: &str,
) -> Result<(), WeightsError> {
    for (stored, ours) in stored.into_iter().zip(MATRICES) {
        weights.stack_experts(
            &format!("model.layers.{{layer}}.{from}.{{expert}}.{stored}"),
            &format!("model.layers.{{layer}}.{to}.{ours}"),
            spec.expert_count(),
        )?;
    }
    Ok(())
}

/// Drops the layers after the model's last, which predict further tokens.
pub(super) fn without_further_tokens(spec: &ModelSpec, weights: &mut Weights) {
    let is_further = |name: &str| layer_of(name).is_some_and(|layer| layer >= spec.layer_count());
    let further: Vec<String> =
        weights.iter().map(|(name, _)| name).filter(|name| is_further(name)).map(str::to_owned).collect();
    for name in &further {
        weights.take(name);
    }
    if !further.is_empty() {
        weights.note(Note::FurtherTokensUnused);
    }
}
