//! Kimi Linear: gated delta networks whose channels fade by themselves, latent attention without positions in every fourth layer,
//! experts.

use super::{Architecture, dense, latent, mixture, recurrent, rope};
use crate::config::{Config, ConfigError, missing, shown};
use crate::spec::{
    Activation, Correction, DeltaForm, ExpertNetworks, ExpertsSpec, FeedForward, GatedDeltaSpec, GroupScore,
    Groups, LatentForm, LatentSpec, Mixer, ModelSpec, Normalization, Outside, RouterSpec, Routing, Scores,
    WeightPrecision,
};
use crate::weights::{Weights, WeightsError};
use serde_json::Value;

pub(super) const ARCHITECTURE: Architecture = Architecture::new("kimi_linear", spec).weights(weights);

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    // Parts of heads without a width of their own are as wide as `head_dim`.
    let mut filled = config.clone();
    for field in ["qk_nope_head_dim", "v_head_dim"] {
        if config.get(field).is_none() {
            filled = filled.with(field, config.usize("head_dim", dense::HEAD_DIM)?.into());
        }
    }
    let config = &filled.with("q_lora_rank", Value::Null).with("attention_bias", false.into());
    let mut sizes = latent::sizes(config)?;
    sizes.context = config.optional_usize("model_max_length", dense::POSITIONS)?;
    let eps = dense::epsilon(config, "rms_norm_eps")?;
    let still = rope::plain(sizes.head_dim, 10_000.0, false);
    let attention =
        LatentSpec { unrotated: true, ..latent::attention(config, still, LatentForm::Absorbed, None, eps)? };
    let (delta, recurs) = linear(config, sizes.layers, eps)?;
    let mixers = recurs.into_iter().map(|recurs| match recurs {
        true => Mixer::GatedDelta(delta.clone()),
        false => Mixer::Latent(attention.clone()),
    });
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let network = sizes.gated(dense::silu(config)?, false);
    let mut model = dense::of_mixers(config, "kimi_linear", &sizes, mixers.collect(), &network, tied)?;
    if config.usize("num_experts", 0..=4096)? > 0 {
        let experts = experts(config)?;
        let first = config.optional_usize("first_k_dense_replace", 0..=1024)?.unwrap_or(0);
        let step = config.optional_usize("moe_layer_freq", dense::LAYERS)?.unwrap_or(1);
        for (_, layer) in
            model.layers.iter_mut().enumerate().skip(first).filter(|(index, _)| index % step == 0)
        {
            layer.feed_forward = experts.clone();
        }
    }
    Ok(model)
}

/// The delta network, and which layers have it: `linear_attn_config`, which counts layers from 1.
pub(super) fn linear(
    config: &Config,
    layers: usize,
    norm_eps: f32,
) -> Result<(GatedDeltaSpec, Vec<bool>), ConfigError> {
    let field = "linear_attn_config";
    let own = config.of_text_model(field, &[])?;
    let own = own.with_defaults(&[("short_conv_kernel_size", 4.0)]);
    let (heads, width) = (own.usize("num_heads", dense::HEADS)?, own.usize("head_dim", dense::HEAD_DIM)?);
    let delta = GatedDeltaSpec {
        block: "self_attn",
        key_heads: heads,
        value_heads: heads,
        key_dim: width,
        value_dim: width,
        kernel: own.usize("short_conv_kernel_size", recurrent::KERNEL)?,
        form: DeltaForm::Channels,
        decay_bound: None,
        negative_eigenvalues: false,
        full_gate: false,
        inputs_together: false,
        norm_eps,
    };
    let listed = own.array("kda_layers")?.ok_or_else(|| missing("linear_attn_config.kda_layers"))?;
    let mut recurs = vec![false; layers];
    for number in listed {
        let index = number.as_u64().and_then(|number| usize::try_from(number).ok()?.checked_sub(1));
        match index.and_then(|index| recurs.get_mut(index)) {
            Some(recurs) => *recurs = true,
            None => {
                let allowed = format!("a list of layers from 1 to {layers}");
                return Err(config.refuse("linear_attn_config.kda_layers", &shown(number), &allowed));
            }
        }
    }
    Ok((delta, recurs))
}

fn experts(config: &Config) -> Result<FeedForward, ConfigError> {
    let experts = config.usize("num_experts", 1..=4096)?;
    let per_token = config.optional_usize("num_experts_per_token", 1..=experts)?.unwrap_or(1);
    let intermediate = dense::width(config, "moe_intermediate_size")?;
    let scores = match config.str("moe_router_activation_func")? {
        None | Some("sigmoid") => Scores::Sigmoid,
        Some("softmax") => Scores::Softmax,
        Some(other) => {
            let other = format!("\"{other}\"");
            return Err(config.refuse("moe_router_activation_func", &other, "sigmoid or softmax"));
        }
    };
    let count = config.optional_usize("num_expert_group", 1..=experts)?.unwrap_or(1);
    let groups = match count {
        1 => None,
        _ if experts.is_multiple_of(count) && experts / count >= 2 => {
            let kept = config.optional_usize("topk_group", 1..=count)?.unwrap_or(1);
            Some(Groups { count, kept, score: GroupScore::TwoLargest, outside: Outside::Zero })
        }
        _ => {
            let allowed = format!("a divisor of the {experts} experts with 2 or more in a group");
            return Err(config.refuse("num_expert_group", &count.to_string(), &allowed));
        }
    };
    let normalization = match per_token > 1 && config.bool_or("moe_renormalize", true)? {
        true => Normalization::SumPlus(1e-20),
        false => Normalization::None,
    };
    Ok(FeedForward::Experts(ExpertsSpec {
        block: "mlp",
        experts,
        per_token,
        router: RouterSpec::GATE,
        routing: Routing {
            scores,
            correction: Some(Correction { name: "e_score_correction_bias", in_type_of_scores: true }),
            groups,
            normalization,
            scale: Some(mixture::scale(config)?),
            precision: WeightPrecision::SumAsIs,
            ..Routing::ALL
        },
        networks: ExpertNetworks::gated(intermediate, Activation::Silu),
        shared: mixture::shared(config, "num_shared_experts", intermediate)?,
    }))
}

/// Hugging Face stores experts one by one under Mixtral's names, the router's correction with the router, convolutions transposed
/// and the heads' matrices of latent attention as one.
pub(super) fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    mixture::without_further_tokens(spec, weights);
    weights.remove_noting("model.mtp", crate::notes::Note::FurtherTokensUnused);
    mixture::stack(spec, weights, "block_sparse_moe.experts", ["w1", "w3", "w2"], "mlp.switch_mlp")?;
    let (from, to) = ("model.layers.{layer}.block_sparse_moe", "model.layers.{layer}.mlp");
    weights
        .rename(&format!("{from}.gate.e_score_correction_bias"), &format!("{to}.e_score_correction_bias"))?;
    for name in ["gate", "shared_experts"] {
        weights.rename(&format!("{from}.{name}"), &format!("{to}.{name}"))?;
    }
    recurrent::convolutions(weights)?;
    let block = "model.layers.{layer}.self_attn";
    for name in ["q", "k", "v"] {
        weights.rename(&format!("{block}.{name}_conv1d"), &format!("{block}.{name}_conv.conv"))?;
    }
    weights.map(&format!("{block}.dt_bias"), |tensor| match tensor.shape() {
        [_] => Ok(tensor.clone()),
        shape => tensor.reshape(&[shape.iter().product()]),
    })?;
    latent::absorb(spec, weights)
}
