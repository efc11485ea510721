//! LongCat Flash: double layers of latent attention, with experts beside the second half, some of which pass their input on.

use super::{Architecture, dense, latent, mixture};
use crate::config::{Config, ConfigError, missing};
use crate::notes::Note;
use crate::spec::{
    Activation, Correction, ExpertNetworks, ExpertsSpec, FeedForward, Flow, LatentForm, LatentSpec,
    LayerNorms, Mixer, ModelSpec, Normalization, RouterSpec, Routing, Scores, ShortcutSpec, WeightPrecision,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("longcat_flash", spec).weights(weights);

/// Epsilon of the norms inside of the attention: MLX's default.
const EPSILON: f32 = 1e-5;

/// Fields without defaults.
const NEEDED: [&str; 13] = [
    "attention_method",
    "zero_expert_type",
    "max_position_embeddings",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "routed_scaling_factor",
    "rope_theta",
    "mla_scale_q_lora",
    "mla_scale_kv_lora",
    "attention_bias",
];

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in NEEDED {
        if config.get(field).is_none() {
            return Err(missing(field));
        }
    }
    mixture::one_of(config, "attention_method", &["MLA"])?;
    mixture::one_of(config, "zero_expert_type", &["identity"])?;
    // The family has names of its own for what others share.
    let layers = config.usize("num_layers", dense::LAYERS)?;
    let intermediate = dense::width(config, "ffn_hidden_size")?;
    let config =
        &config.with("num_hidden_layers", layers.into()).with("intermediate_size", intermediate.into());
    let sizes = latent::sizes(config)?;
    let shortcut = ShortcutSpec {
        attention: attention(config, &sizes)?,
        intermediate,
        activation: Activation::Silu,
        experts: experts(config)?,
    };
    let mixers = vec![Mixer::Shortcut(Box::new(shortcut)); layers];
    let mut model = dense::of_mixers(config, "longcat_flash", &sizes, mixers, &FeedForward::Absent, false)?;
    dense::arrange(&mut model, LayerNorms::NONE, Flow::Whole);
    Ok(model)
}

fn attention(config: &Config, sizes: &dense::Sizes) -> Result<LatentSpec, ConfigError> {
    let rope = latent::rope(config, sizes, true)?;
    let mut attention = latent::attention(config, rope, LatentForm::Absorbed, None, EPSILON)?;
    attention.scale = latent::stretched_scale(&attention);
    // Narrow vectors count as if they were as wide as the hidden ones.
    let factor = |width: usize| (sizes.hidden as f64 / width as f64).sqrt() as f32;
    if config.bool("mla_scale_q_lora")? {
        attention.query_factor = attention.query_latent.map(factor);
    }
    if config.bool("mla_scale_kv_lora")? {
        attention.latent_factor = Some(factor(attention.latent));
    }
    Ok(attention)
}

fn experts(config: &Config) -> Result<ExpertsSpec, ConfigError> {
    let experts = config.usize("n_routed_experts", 1..=4096)?;
    let identities = config.usize("zero_expert_num", 0..=4096)?;
    let normalization = match config.bool_or("norm_topk_prob", false)? {
        true => Normalization::SumPlus(1e-20),
        false => Normalization::None,
    };
    Ok(ExpertsSpec {
        block: "mlp",
        experts,
        per_token: config.usize("moe_topk", 1..=experts + identities)?,
        router: RouterSpec {
            name: "router.classifier",
            bias: config.bool_or("router_bias", false)?,
            single_precision: false,
        },
        routing: Routing {
            scores: Scores::RoundedSoftmax,
            correction: Some(Correction::named("router.e_score_correction_bias")),
            from_end: true,
            normalization,
            scale: Some(mixture::scale(config)?),
            precision: WeightPrecision::WeightsRounded,
            identities,
            ..Routing::ALL
        },
        networks: ExpertNetworks::gated(dense::width(config, "expert_ffn_hidden_size")?, Activation::Silu),
        shared: None,
    })
}

/// Hugging Face stores every expert alone and the heads' matrices as one, and has layers for further tokens.
pub(super) fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    weights.remove_noting("model.mtp", Note::FurtherTokensUnused);
    mixture::stack(spec, weights, "mlp.experts", mixture::MATRICES, "mlp.switch_mlp")?;
    latent::absorb(spec, weights)
}
