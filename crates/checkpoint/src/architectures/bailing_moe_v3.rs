//! Ling 3: gated delta networks whose channels fade by themselves, within a bound; latent attention with a gate for each head in the
//! last layer of every group; experts. Its repositories call themselves `bailing_hybrid` with the architecture `BailingMoeV3ForCausalLM`.

use super::{Architecture, bailing_moe_linear, dense, latent, mixture, recurrent, rope};
use crate::config::{Config, ConfigError};
use crate::spec::{
    Activation, Correction, DeltaForm, ExpertNetworks, ExpertsSpec, GatedDeltaSpec, GroupScore, Groups,
    LatentForm, LatentSpec, Mixer, ModelSpec, Normalization, Outside, RouterSpec, Routing, Scores,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture =
    Architecture::new("bailing_moe_v3", spec).weights(weights).names(&bailing_moe_linear::NAMES);

/// What the family is called in `architectures` under another `model_type`.
pub(super) const REMAPPED: (&str, &str) = ("bailing_hybrid", "BailingMoeV3ForCausalLM");

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[
        ("vocab_size", 157_184.0),
        ("hidden_size", 1536.0),
        ("intermediate_size", 4608.0),
        ("moe_intermediate_size", 512.0),
        ("moe_shared_expert_intermediate_size", 512.0),
        ("num_hidden_layers", 24.0),
        ("num_attention_heads", 16.0),
        ("num_experts", 128.0),
        ("num_experts_per_tok", 8.0),
        ("num_shared_experts", 1.0),
        ("first_k_dense_replace", 1.0),
        ("n_group", 8.0),
        ("topk_group", 4.0),
        ("routed_scaling_factor", 2.5),
        ("layer_group_size", 4.0),
        ("head_dim", 128.0),
        ("kv_lora_rank", 512.0),
        ("qk_nope_head_dim", 128.0),
        ("qk_rope_head_dim", 64.0),
        ("v_head_dim", 128.0),
        ("short_conv_kernel_size", 4.0),
        ("kda_lower_bound", -5.0),
        ("rms_norm_eps", 1e-6),
        ("rope_theta", 6_000_000.0),
        ("max_position_embeddings", 131_072.0),
    ]);
    for field in ["kda_safe_gate", "no_kda_lora", "rope_interleave"] {
        if !config.bool_or(field, true)? {
            return Err(config.refuse(field, "false", "true: mlx-lm runs no other models of this family"));
        }
    }
    let sizes = latent::sizes(config)?;
    let eps = dense::epsilon(config, "rms_norm_eps")?;
    let delta = GatedDeltaSpec {
        block: "self_attn",
        key_heads: sizes.heads,
        value_heads: sizes.heads,
        key_dim: config.usize("head_dim", dense::HEAD_DIM)?,
        value_dim: config.usize("head_dim", dense::HEAD_DIM)?,
        kernel: config.usize("short_conv_kernel_size", recurrent::KERNEL)?,
        form: DeltaForm::BoundedChannels,
        decay_bound: Some(bound(config)?),
        full_gate: false,
        inputs_together: false,
        negative_eigenvalues: false,
        norm_eps: eps,
    };
    let attention = attention(config, &sizes, eps)?;
    let attends = bailing_moe_linear::attends(config, sizes.layers)?;
    let mixers = attends.into_iter().map(|attends| match attends {
        true => Mixer::Latent(attention.clone()),
        false => Mixer::GatedDelta(delta.clone()),
    });
    let network = sizes.gated(Activation::Silu, false);
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let mut model = dense::of_mixers(config, "bailing_moe_v3", &sizes, mixers.collect(), &network, tied)?;
    bailing_moe_linear::give_experts(config, &mut model, experts(config)?)?;
    Ok(model)
}

/// The logarithm of the fastest decay.
fn bound(config: &Config) -> Result<f32, ConfigError> {
    let bound = config.f64("kda_lower_bound")?;
    match (-1e3..=0.0).contains(&bound) {
        true => Ok(bound as f32),
        false => Err(config.refuse("kda_lower_bound", &bound.to_string(), "from -1000 to 0")),
    }
}

fn attention(config: &Config, sizes: &dense::Sizes, eps: f32) -> Result<LatentSpec, ConfigError> {
    if !sizes.head_dim.is_multiple_of(2) {
        return Err(config.refuse("qk_rope_head_dim", &sizes.head_dim.to_string(), "even"));
    }
    let rope = rope::spec(config, sizes.head_dim, rope::base(config, None)?, true, sizes.context)?;
    let config = &config.with("attention_bias", false.into());
    let mut attention = latent::attention(config, rope, LatentForm::Absorbed, Some(256), eps)?;
    attention.head_gate = true;
    attention.scale = latent::stretched_scale(&attention);
    Ok(attention)
}

fn experts(config: &Config) -> Result<ExpertsSpec, ConfigError> {
    let (experts, per_token) = dense::experts(config, "num_experts")?;
    let intermediate = dense::width(config, "moe_intermediate_size")?;
    let groups = mixture::groups(config, experts, GroupScore::TwoLargest)?;
    let shared = dense::width(config, "moe_shared_expert_intermediate_size")?;
    Ok(ExpertsSpec {
        block: "mlp",
        experts,
        per_token,
        router: RouterSpec { single_precision: true, ..RouterSpec::GATE },
        routing: Routing {
            scores: Scores::Sigmoid,
            single_precision: true,
            correction: Some(Correction::named("gate.expert_bias")),
            groups: groups.map(|groups| Groups { outside: Outside::Never, ..groups }),
            normalization: Normalization::SumPlus(1e-20),
            scale: Some(mixture::scale(config)?),
            ..Routing::ALL
        },
        networks: ExpertNetworks::gated(intermediate, Activation::Silu),
        shared: mixture::shared(config, "num_shared_experts", shared)?,
    })
}

/// Hugging Face stores every expert alone, convolutions transposed and the heads' matrices of latent attention as one.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    bailing_moe_linear::named(weights)?;
    mixture::without_further_tokens(spec, weights);
    mixture::stack(spec, weights, "mlp.experts", mixture::MATRICES, "mlp.switch_mlp")?;
    recurrent::convolutions(weights)?;
    latent::absorb(spec, weights)
}
