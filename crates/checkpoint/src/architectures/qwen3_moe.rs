//! Qwen3 with experts in some or all layers.
//!
//! mlx-lm 0.32.2 ignores `rope_scaling` here, which breaks long contexts; we do not.

use super::{Architecture, dense, gemma, qwen2_moe, rope};
use crate::config::{Config, ConfigError, missing};
use crate::spec::{
    AttentionSpec, ExpertNetworks, ExpertsSpec, FeedForward, ModelSpec, Normalization, QkNorm, RouterSpec,
    Routing,
};

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("qwen3_moe", spec).weights(qwen2_moe::weights);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    model(config, "qwen3_moe")
}

/// A model of this build in another family's repository.
pub(super) fn model(config: &Config, architecture: &'static str) -> Result<ModelSpec, ConfigError> {
    let sizes = gemma::sizes(config)?;
    if sizes.context.is_none() {
        return Err(missing("max_position_embeddings"));
    }
    let base = rope::base(config, None)?;
    let rope = rope::spec(config, sizes.head_dim, base, false, sizes.context)?;
    let attention = AttentionSpec { qk_norm: Some(QkNorm::PER_HEAD), ..sizes.attention(Some(rope)) };
    let activation = dense::silu(config)?;
    let (tied, attention) = (config.bool("tie_word_embeddings")?, vec![attention; sizes.layers]);
    let dense_network = sizes.gated(activation, false);
    let mut model = dense::model(config, architecture, &sizes, attention, &dense_network, tied)?;
    // transformers 5 saves it by another name than it reads.
    let is_saved_again = config.get("num_experts").is_none() && config.get("num_local_experts").is_some();
    let count = if is_saved_again { "num_local_experts" } else { "num_experts" };
    let (experts, per_token) = dense::experts(config, count)?;
    let normalization = match config.bool("norm_topk_prob")? {
        true => Normalization::Sum,
        false => Normalization::None,
    };
    let network = FeedForward::Experts(ExpertsSpec {
        block: "mlp",
        experts,
        per_token,
        router: RouterSpec::GATE,
        routing: Routing { from_end: true, normalization, ..Routing::ALL },
        networks: ExpertNetworks::gated(dense::width(config, "moe_intermediate_size")?, activation),
        shared: None,
    });
    sparse_layers(config, &mut model, &network)?;
    Ok(model)
}

/// Gives experts to every `decoder_sparse_step`-th layer that `mlp_only_layers` does not list.
pub(super) fn sparse_layers(
    config: &Config,
    model: &mut ModelSpec,
    network: &FeedForward,
) -> Result<(), ConfigError> {
    let step = config.usize("decoder_sparse_step", 1..=1024)?;
    let without = config.array("mlp_only_layers")?.unwrap_or_default();
    for (index, layer) in model.layers.iter_mut().enumerate() {
        let listed = without.iter().any(|listed| listed.as_u64() == Some(index as u64));
        if !listed && (index + 1).is_multiple_of(step) {
            layer.feed_forward = network.clone();
        }
    }
    Ok(())
}
