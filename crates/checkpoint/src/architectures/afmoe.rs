//! Trinity (Arcee): gates on the results of attention, windows in most layers, only those of which know positions, experts.

use super::{Architecture, dense, llama, mixture, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{
    Activation, AttentionGate, AttentionSpec, Correction, ExpertNetworks, ExpertsSpec, FeedForward, Flow,
    GateFunction, GroupScore, LayerNorms, ModelSpec, Normalization, QkNorm, Residual, RouterSpec, Routing,
    Scores,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("afmoe", spec).weights(weights);

const NORMS: LayerNorms = LayerNorms {
    before_mixer: Some("input_layernorm"),
    after_mixer: Some("post_attention_layernorm"),
    before_feed_forward: Some("pre_mlp_layernorm"),
    after_feed_forward: Some("post_mlp_layernorm"),
};

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[
        ("vocab_size", 200_192.0),
        ("hidden_size", 2048.0),
        ("intermediate_size", 6144.0),
        ("moe_intermediate_size", 1024.0),
        ("num_hidden_layers", 32.0),
        ("num_attention_heads", 32.0),
        ("num_key_value_heads", 4.0),
        ("head_dim", 64.0),
        ("max_position_embeddings", 131_072.0),
        ("rms_norm_eps", 1e-5),
        ("num_experts", 128.0),
        ("num_experts_per_tok", 8.0),
        ("num_shared_experts", 1.0),
        ("num_dense_layers", 2.0),
        ("route_scale", 2.826),
        ("sliding_window", 2048.0),
    ]);
    if config.array("layer_types")?.is_none() {
        return Err(missing("layer_types"));
    }
    let sizes = dense::Sizes::read(config)?;
    let base = rope::base(config, Some(10_000.0))?;
    let rope = rope::spec(config, sizes.head_dim, base, false, sizes.context)?;
    let gate =
        AttentionGate { name: "gate_proj", per_head: false, function: GateFunction::Sigmoid, bias: false };
    let attention = llama::windows(config, sizes.layers)?
        .into_iter()
        .map(|window| AttentionSpec {
            window,
            qk_norm: Some(QkNorm::PER_HEAD),
            gate: Some(gate),
            ..sizes.attention(window.map(|_| rope.clone()))
        })
        .collect();
    let network = sizes.gated(Activation::Silu, false);
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let mut model = dense::model(config, "afmoe", &sizes, attention, &network, tied)?;
    dense::arrange(&mut model, NORMS, Flow::Sequential(Residual::Add));
    let experts = FeedForward::Experts(experts(config)?);
    for layer in model.layers.iter_mut().skip(config.usize("num_dense_layers", 0..=sizes.layers)?) {
        layer.feed_forward = experts.clone();
    }
    if config.bool_or("mup_enabled", true)? {
        model.embedding_scale = Some((sizes.hidden as f64).sqrt() as f32);
    }
    Ok(model)
}

fn experts(config: &Config) -> Result<ExpertsSpec, ConfigError> {
    let (experts, per_token) = dense::experts(config, "num_experts")?;
    let intermediate = dense::width(config, "moe_intermediate_size")?;
    let scores = match config.str("score_func")? {
        None | Some("sigmoid") => Scores::Sigmoid,
        Some("softmax") => Scores::Softmax,
        Some(other) => {
            return Err(config.refuse("score_func", &format!("\"{other}\""), "sigmoid or softmax"));
        }
    };
    let normalization = match config.bool_or("route_norm", true)? && per_token > 1 {
        true => Normalization::Sum,
        false => Normalization::None,
    };
    Ok(ExpertsSpec {
        block: "mlp",
        experts,
        per_token,
        router: RouterSpec { name: "router.gate", ..RouterSpec::GATE },
        routing: Routing {
            scores,
            correction: Some(Correction::named("expert_bias")),
            groups: mixture::groups(config, experts, GroupScore::TwoLargest)?,
            normalization,
            scale: Some(config.f64("route_scale")? as f32),
            ..Routing::CORRECTED
        },
        networks: ExpertNetworks { name: "experts", ..ExpertNetworks::gated(intermediate, Activation::Silu) },
        shared: mixture::shared(config, "num_shared_experts", intermediate)?,
    })
}

/// Hugging Face stores every expert alone.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    mixture::stack(spec, weights, "mlp.experts", mixture::MATRICES, "mlp.experts")
}
