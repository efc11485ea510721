//! Ling ("Bailing") with experts: queries, keys and values in one matrix, DeepSeek-V3's routing with either kind of scores, and in
//! the first generation a head of normed columns.

use super::{Architecture, dense, mixture, rope};
use crate::config::{Config, ConfigError, missing};
use crate::layout::HEAD;
use crate::spec::{
    Activation, AttentionSpec, Correction, ExpertNetworks, ExpertsSpec, FeedForward, GroupScore, ModelSpec,
    Normalization, QkNorm, RouterSpec, Routing, Scores, SharedExpertSpec, WeightPrecision,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("bailing_moe", spec).weights(weights);

/// Fields without defaults that are not read elsewhere, or have a default there.
const NEEDED: [&str; 3] = ["max_position_embeddings", "num_key_value_heads", "num_shared_experts"];

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in NEEDED {
        if config.get(field).is_none() {
            return Err(missing(field));
        }
    }
    let tied = config.bool_or("tie_word_embeddings", false)?;
    if tied && config.bool_or("norm_head", false)? {
        return Err(config.refuse("norm_head", "true", "false, as tie_word_embeddings is true"));
    }
    let sizes = dense::Sizes::read_with_shared_heads(config)?;
    let dims = match config.optional_usize("rotary_dim", 2..=sizes.head_dim)? {
        Some(dims) if dims.is_multiple_of(2) => dims,
        Some(dims) => return Err(config.refuse("rotary_dim", &dims.to_string(), "even")),
        None => sizes.rotated(config, config.optional_f64("partial_rotary_factor")?.unwrap_or(1.0))?,
    };
    let rope = rope::spec(config, dims, rope::base(config, None)?, false, sizes.context)?;
    let norm = QkNorm { names: ["query_layernorm", "key_layernorm"], ..QkNorm::PER_HEAD };
    let bias = config.bool_or("use_bias", false)?;
    let attention = AttentionSpec {
        fused: true,
        qkv_bias: config.bool_or("use_qkv_bias", false)?,
        out_bias: bias,
        qk_norm: config.bool_or("use_qk_norm", false)?.then_some(norm),
        ..sizes.attention(Some(rope))
    };
    let network = sizes.gated(Activation::Silu, bias);
    let attention = vec![attention; sizes.layers];
    let mut model = dense::model(config, "bailing_moe", &sizes, attention, &network, tied)?;
    let experts = FeedForward::Experts(experts(config, bias)?);
    let first = config.usize("first_k_dense_replace", 0..=usize::MAX)?;
    for layer in model.layers.iter_mut().skip(first) {
        layer.feed_forward = experts.clone();
    }
    Ok(model)
}

pub(super) fn experts(config: &Config, bias: bool) -> Result<ExpertsSpec, ConfigError> {
    let (experts, per_token) = dense::experts(config, "num_experts")?;
    let intermediate = dense::width(config, "moe_intermediate_size")?;
    let networks = ExpertNetworks::gated(intermediate, Activation::Silu);
    mixture::one_of(config, "score_function", &["softmax", "sigmoid"])?;
    let scores = match config.str("score_function")? {
        Some("sigmoid") => Scores::Sigmoid,
        _ => Scores::Softmax,
    };
    let normalization = match config.bool("norm_topk_prob")? && per_token > 1 {
        true => Normalization::SumPlus(1e-20),
        false => Normalization::None,
    };
    let corrected = config.bool_or("moe_router_enable_expert_bias", false)?;
    let grouped = &config.with_defaults(&[("topk_group", 4.0)]);
    Ok(ExpertsSpec {
        block: "mlp",
        experts,
        per_token,
        router: RouterSpec { name: "gate.gate_proj", ..RouterSpec::GATE },
        routing: Routing {
            scores,
            single_precision: true,
            correction: corrected.then_some(Correction::named("gate.expert_bias")),
            groups: mixture::groups(grouped, experts, GroupScore::TwoLargest)?,
            from_end: true,
            normalization,
            scale: Some(mixture::scale(config)?),
            precision: WeightPrecision::WeightsRounded,
            ..Routing::ALL
        },
        networks: ExpertNetworks { bias, ..networks },
        shared: shared(config, intermediate)?,
    })
}

pub(super) fn shared(config: &Config, of_experts: usize) -> Result<Option<SharedExpertSpec>, ConfigError> {
    let own = config.optional_usize("moe_shared_expert_intermediate_size", 0..=1 << 20)?;
    let width = own.filter(|width| *width > 0).unwrap_or(of_experts);
    let enabled = config.bool_or("moe_router_enable_shared_expert", true)?;
    Ok(mixture::shared(config, "num_shared_experts", width)?.filter(|_| enabled))
}

/// The family has names of its own. Hugging Face stores every expert alone and the router without a name for its matrix.
fn weights(config: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    const LAYER: &str = "model.layers.{layer}";
    weights.rename("model.word_embeddings", "model.embed_tokens")?;
    for (stored, ours) in [
        ("attention.query_key_value", "self_attn.qkv_proj"),
        ("attention.dense", "self_attn.o_proj"),
        ("attention", "self_attn"),
        ("mlp.gate.weight", "mlp.gate.gate_proj.weight"),
    ] {
        weights.rename(&format!("{LAYER}.{stored}"), &format!("{LAYER}.{ours}"))?;
    }
    mixture::without_further_tokens(spec, weights);
    mixture::stack(spec, weights, "mlp.experts", mixture::MATRICES, "mlp.switch_mlp")?;
    norm_head(config, weights)
}

/// In some models the head's columns have length one.
pub(super) fn norm_head(config: &Config, weights: &mut Weights) -> Result<(), WeightsError> {
    // mlx-lm norms the head of a packed folder too, whose numbers it destroys; there it was normed before it was packed.
    let is_packed = weights.contains(&format!("{HEAD}.scales"));
    if config.bool_or("norm_head", false).unwrap_or(false) && !is_packed {
        weights.map(&format!("{HEAD}.weight"), |head| head.unit_columns())?;
    }
    Ok(())
}
