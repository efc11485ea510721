//! MiniMax M3, of which only the text model runs: attention to the best blocks of keys, norms that count from one, experts with a bound
//! on what goes through them. The weights for images are not read.

use super::{Architecture, dense, mixture, rope};
use crate::config::{Config, ConfigError, shown};
use crate::spec::{
    Activation, AttentionSpec, BlockIndexerSpec, Correction, ExpertNetworks, ExpertsSpec, FeedForward,
    GatedNames, ModelSpec, NormKind, Normalization, QkNorm, RopeSpec, RouterSpec, Routing, SharedExpertSpec,
    WeightPrecision,
};
use crate::tensor::Tensor;
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("minimax_m3_vl", spec).weights(weights).without_vision();

/// Fields of the repository that count for its text model.
const REPOSITORY: [&str; 4] = ["quantization", "quantization_config", "torch_dtype", "dtype"];

/// What the published config nests, and what a config that transformers 5 wrote calls it.
const SPARSE: [(&str, &str); 6] = [
    ("sparse_num_index_heads", "index_n_heads"),
    ("sparse_index_dim", "index_head_dim"),
    ("sparse_block_size", "index_block_size"),
    ("sparse_topk_blocks", "index_topk_blocks"),
    ("sparse_local_block", "index_local_blocks"),
    ("sparse_attention_freq", "sparse_attention_freq"),
];

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &text_model(config)?;
    let sizes = dense::Sizes::read(config)?;
    let rope = rotation(config, &sizes)?;
    let qk_norm = config.bool_or("use_qk_norm", true)?.then_some(QkNorm::PER_HEAD);
    let plain = AttentionSpec { qk_norm, ..sizes.attention(Some(rope.clone())) };
    let sparse = layers(config, "layer_types", "sparse_attention_freq", sizes.layers, |kind| {
        kind != "full_attention"
    })?;
    let blocks = match config.get("index_block_size") {
        Some(_) if sparse.contains(&true) => Some(Box::new(indexer(config, &sizes, &rope)?)),
        _ => None,
    };
    let attention = sparse
        .into_iter()
        .map(|sparse| AttentionSpec { blocks: blocks.clone().filter(|_| sparse), ..plain.clone() })
        .collect();
    let activation = Activation::ClippedSwiglu {
        alpha: config.f64("swiglu_alpha")? as f32,
        limit: config.positive("swiglu_limit")? as f32,
    };
    let network = FeedForward::Gated {
        intermediate: dense::width(config, "dense_intermediate_size")?,
        activation,
        bias: false,
        fused: false,
        names: GatedNames::LLAMA,
    };
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let mut model = dense::model(config, "minimax_m3_vl", &sizes, attention, &network, tied)?;
    if config.bool_or("use_gemma_norm", true)? {
        model.norm = NormKind::RmsPlusOne;
    }
    let with_experts =
        layers(config, "mlp_layer_types", "moe_layer_freq", sizes.layers, |kind| kind == "sparse")?;
    if with_experts.contains(&true) {
        let experts = FeedForward::Experts(experts(config, sizes.intermediate, activation)?);
        for (layer, _) in model.layers.iter_mut().zip(with_experts).filter(|(_, with_experts)| *with_experts)
        {
            layer.feed_forward = experts.clone();
        }
    }
    Ok(model)
}

/// The text model's config, with the fields of its sparse attention at the top and defaults for those that are not there.
fn text_model(config: &Config) -> Result<Config, ConfigError> {
    let mut text = config.of_text_model("text_config", &REPOSITORY)?;
    let nested: Vec<(String, Value)> = match text.object("sparse_attention_config")? {
        None => Vec::new(),
        Some(object) => SPARSE
            .into_iter()
            .filter_map(|(theirs, ours)| Some((ours.to_owned(), object.get(theirs)?.clone())))
            .collect(),
    };
    for (field, value) in nested {
        text = text.with(&field, value);
    }
    Ok(text.with_defaults(&[
        ("hidden_size", 6144.0),
        ("intermediate_size", 3072.0),
        ("dense_intermediate_size", 12_288.0),
        ("shared_intermediate_size", 3072.0),
        ("num_attention_heads", 64.0),
        ("num_key_value_heads", 4.0),
        ("num_hidden_layers", 60.0),
        ("num_local_experts", 128.0),
        ("num_experts_per_tok", 4.0),
        ("max_position_embeddings", 1_048_576.0),
        ("rms_norm_eps", 1e-6),
        ("head_dim", 128.0),
        ("vocab_size", 200_064.0),
        ("routed_scaling_factor", 2.0),
        ("swiglu_alpha", 1.702),
        ("swiglu_limit", 7.0),
        ("index_local_blocks", 1.0),
    ]))
}

/// What `rope_parameters` says counts more than what stands beside it, and `rotary_dim` more than the part that rotates.
fn rotation(config: &Config, sizes: &dense::Sizes) -> Result<RopeSpec, ConfigError> {
    let nested = |name: &str| -> Result<Option<Value>, ConfigError> {
        Ok(config.object("rope_parameters")?.and_then(|object| object.get(name)).cloned())
    };
    let part = match nested("partial_rotary_factor")? {
        Some(part) => config.number("rope_parameters.partial_rotary_factor", &part)?,
        None => config.optional_f64("partial_rotary_factor")?.unwrap_or(0.5),
    };
    let dims = match config.optional_usize("rotary_dim", 2..=sizes.head_dim)? {
        None => sizes.rotated(config, part)?,
        Some(dims) if dims.is_multiple_of(2) => dims,
        Some(dims) => return Err(config.refuse("rotary_dim", &dims.to_string(), "even")),
    };
    let own = match nested("rope_theta")? {
        Some(base) => config.with("rope_theta", base),
        None => config.clone(),
    };
    // Nothing but `rope_parameters` stretches here.
    let own = own.with("rope_scaling", Value::Null);
    rope::spec(&own, dims, rope::base(&own, Some(5_000_000.0))?, false, sizes.context)
}

fn indexer(config: &Config, sizes: &dense::Sizes, rope: &RopeSpec) -> Result<BlockIndexerSpec, ConfigError> {
    let heads = config.usize("index_n_heads", dense::HEADS)?;
    if !sizes.heads.is_multiple_of(heads) {
        let allowed = format!("a divisor of num_attention_heads, which is {}", sizes.heads);
        return Err(config.refuse("index_n_heads", &heads.to_string(), &allowed));
    }
    let head_dim = config.usize("index_head_dim", dense::HEAD_DIM)?;
    if !head_dim.is_multiple_of(2) {
        return Err(config.refuse("index_head_dim", &head_dim.to_string(), "even"));
    }
    Ok(BlockIndexerSpec {
        heads,
        head_dim,
        block: config.usize("index_block_size", dense::POSITIONS)?,
        blocks: config.usize("index_topk_blocks", dense::POSITIONS)?,
        local: config.usize("index_local_blocks", 0..=*dense::POSITIONS.end())?,
        rope: RopeSpec { dims: rope.dims.min(head_dim), ..rope.clone() },
    })
}

/// Which layers have something: by the names of their kinds, by the numbers of the older list, or all.
fn layers(
    config: &Config,
    kinds: &str,
    numbers: &str,
    count: usize,
    has: impl Fn(&str) -> bool,
) -> Result<Vec<bool>, ConfigError> {
    let (field, list) = match (config.array(kinds)?, config.array(numbers)?) {
        (Some(list), _) => (kinds, list),
        (None, Some(list)) => (numbers, list),
        (None, None) => return Ok(vec![true; count]),
    };
    if list.len() < count {
        let allowed = format!("one for each of num_hidden_layers, which is {count}");
        return Err(config.refuse(field, &format!("a list of {}", list.len()), &allowed));
    }
    let of_layer = |(index, value): (usize, &Value)| match value {
        Value::String(kind) if field == kinds => Ok(has(kind)),
        Value::Number(number) if field == numbers => Ok(number.as_f64() != Some(0.0)),
        Value::Bool(flag) if field == numbers => Ok(*flag),
        _ => {
            let allowed = if field == kinds { "a kind of layer" } else { "0 or 1" };
            Err(config.refuse(&format!("{field}[{index}]"), &shown(value), allowed))
        }
    };
    list.iter().take(count).enumerate().map(of_layer).collect()
}

fn experts(config: &Config, intermediate: usize, activation: Activation) -> Result<ExpertsSpec, ConfigError> {
    let (experts, per_token) = dense::experts(config, "num_local_experts")?;
    Ok(ExpertsSpec {
        block: "block_sparse_moe",
        experts,
        per_token,
        router: RouterSpec::GATE,
        routing: Routing {
            correction: Some(Correction::named("e_score_correction_bias")),
            normalization: Normalization::SumPlus(1e-20),
            scale: Some(mixture::scale(config)?),
            precision: WeightPrecision::WeightsRounded,
            ..Routing::CORRECTED
        },
        networks: ExpertNetworks::gated(intermediate, activation),
        shared: Some(SharedExpertSpec {
            name: "shared_experts",
            intermediate: dense::width(config, "shared_intermediate_size")?,
            activation,
            gate: None,
        }),
    })
}

/// Experts alone, a dense layer's network where experts should be, the shared expert as one more of the others, gate and up joined:
/// conversions differ.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    let moe = "model.layers.{layer}.block_sparse_moe";
    for name in mixture::MATRICES {
        weights.rename(&format!("{moe}.{name}"), &format!("model.layers.{{layer}}.mlp.{name}"))?;
    }
    let experts = spec.expert_count();
    for name in ["gate_up_proj", "gate_proj", "up_proj", "down_proj"] {
        for layer in 0..spec.layer_count() {
            for part in ["weight", "scales", "biases"] {
                fold_out(
                    &format!("model.layers.{layer}.block_sparse_moe"),
                    &format!("{name}.{part}"),
                    experts,
                    weights,
                )?;
            }
        }
    }
    for owner in ["switch_mlp", "shared_experts"] {
        let within = |name: &str| format!("{moe}.{owner}.{name}");
        weights.split_equally(&within("gate_up_proj"), &[&within("gate_proj"), &within("up_proj")])?;
    }
    let to = "block_sparse_moe.switch_mlp";
    mixture::stack(spec, weights, "block_sparse_moe.experts", ["w1", "w3", "w2"], to)
}

/// Takes the shared expert out of a stack in which it is the last.
fn fold_out(block: &str, tensor: &str, experts: usize, weights: &mut Weights) -> Result<(), WeightsError> {
    let name = format!("{block}.switch_mlp.{tensor}");
    let has_one_more = |tensor: &Tensor| tensor.shape().first() == Some(&(experts + 1));
    if !weights.get(&name).is_some_and(has_one_more) {
        return Ok(());
    }
    let Some(stack) = weights.take(&name) else { return Ok(()) };
    let last = stack.slice(0, experts, experts + 1)?;
    let shape = last.shape().get(1..).unwrap_or_default().to_vec();
    weights.insert(name, stack.slice(0, 0, experts)?)?;
    weights.insert(format!("{block}.shared_experts.{tensor}"), last.reshape(&shape)?)
}
