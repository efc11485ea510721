//! Kimi K3: Kimi Linear's gated delta networks with decays that are bounded, latent attention with a gate, experts that work on fewer
//! numbers, and residuals that each layer chooses among what blocks of layers before it added. The weights for images are not read.

use super::{Architecture, dense, kimi_linear, latent, mixture, rope};
use crate::config::{Config, ConfigError};
use crate::spec::{
    Activation, Correction, ExpertForm, ExpertNetworks, ExpertsSpec, FeedForward, Flow, GroupScore,
    LatentForm, LatentSpec, Mixer, ModelSpec, Normalization, RouterSpec, Routing, SharedExpertSpec,
    WeightPrecision, Widening,
};
use crate::tensor::Tensor;
use crate::weights::{Weights, WeightsError};

const DELTA: &str = "model.layers.{layer}.self_attn";

pub(super) const ARCHITECTURE: Architecture = Architecture::new("kimi_k3", spec)
    .weights(weights)
    .names(&[
        ("model.layers.{layer}.self_attn.qkv_proj", "model.layers.{layer}.self_attn.q_proj"),
        ("model.layers.{layer}.self_attn.qkv_proj", "model.layers.{layer}.self_attn.k_proj"),
        ("model.layers.{layer}.self_attn.qkv_proj", "model.layers.{layer}.self_attn.v_proj"),
    ])
    .without_vision();

/// Fields of the repository that count for its text model.
const REPOSITORY: [&str; 4] = ["quantization", "quantization_config", "torch_dtype", "dtype"];

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let text = match config.object("text_config")? {
        Some(_) => config.of_text_model("text_config", &REPOSITORY)?,
        None => config.clone(),
    };
    let config = &text.with_defaults(&[
        ("vocab_size", 163_840.0),
        ("hidden_size", 7168.0),
        ("num_hidden_layers", 93.0),
        ("num_attention_heads", 96.0),
        ("intermediate_size", 33_792.0),
        ("rms_norm_eps", 1e-5),
        ("max_position_embeddings", 1_048_576.0),
        ("num_experts_per_token", 16.0),
    ]);
    mixture::one_of(config, "hidden_act", &["situ"])?;
    mixture::one_of(config, "moe_router_activation_func", &["sigmoid"])?;
    if !config.bool_or("mla_use_nope", true)? {
        return Err(config.refuse("mla_use_nope", "false", "true"));
    }
    let activation = activation(config)?;
    let config = &config.with("attention_bias", false.into());
    let sizes = latent::sizes(config)?;
    let still = rope::plain(sizes.head_dim, 10_000.0, false);
    let attention = LatentSpec {
        unrotated: true,
        gate: config.bool_or("mla_use_output_gate", false)?,
        ..latent::attention(config, still, LatentForm::Absorbed, None, latent::EPSILON)?
    };
    let eps = dense::epsilon(config, "rms_norm_eps")?;
    let (mut delta, recurs) = kimi_linear::linear(config, sizes.layers, eps)?;
    let own = config.of_text_model("linear_attn_config", &[])?;
    delta.decay_bound = own.optional_f64("gate_lower_bound")?.map(|bound| bound as f32);
    delta.inputs_together = true;
    delta.full_gate = own.bool_or("use_full_rank_gate", false)?;
    let mixers = recurs.into_iter().map(|recurs| match recurs {
        true => Mixer::GatedDelta(delta.clone()),
        false => Mixer::Latent(attention.clone()),
    });
    let network = sizes.gated(activation, false);
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let mut model = dense::of_mixers(config, "kimi_k3", &sizes, mixers.collect(), &network, tied)?;
    if config.optional_usize("num_experts", 0..=4096)?.unwrap_or(0) > 0 {
        let experts = FeedForward::Experts(experts(config, activation)?);
        let first = config.optional_usize("first_k_dense_replace", 0..=1024)?.unwrap_or(0);
        let step = config.optional_usize("moe_layer_freq", dense::LAYERS)?.unwrap_or(1);
        for (_, layer) in
            model.layers.iter_mut().enumerate().skip(first).filter(|(index, _)| index % step == 0)
        {
            layer.feed_forward = experts.clone();
        }
    }
    if let Some(size) = config.optional_usize("attn_res_block_size", dense::LAYERS)? {
        model.widening = Widening { block: Some(size), ..Widening::NONE };
        for (index, layer) in model.layers.iter_mut().enumerate() {
            layer.flow = Flow::OverBlocks { first: index.is_multiple_of(size) };
        }
    }
    Ok(model)
}

fn activation(config: &Config) -> Result<Activation, ConfigError> {
    let bound = |field: &str| match config.optional_f64(field)? {
        None | Some(0.0) => Ok(None),
        Some(bound) => Ok(Some(bound as f32)),
    };
    let up = match config.optional_f64("activation_situ_linear_beta")? {
        Some(0.0) => {
            return Err(config.refuse("activation_situ_linear_beta", "0", "another number, or absent"));
        }
        up => up.map(|up| up as f32),
    };
    Ok(Activation::Situ { gate: bound("activation_situ_beta")?.unwrap_or(1.0), up })
}

fn experts(config: &Config, activation: Activation) -> Result<ExpertsSpec, ConfigError> {
    let experts = config.usize("num_experts", 1..=4096)?;
    let per_token = config.usize("num_experts_per_token", 1..=experts)?;
    let intermediate = dense::width(config, "moe_intermediate_size")?;
    let normalization = match per_token > 1 && config.bool_or("moe_renormalize", true)? {
        true => Normalization::SumPlus(1e-20),
        false => Normalization::None,
    };
    let groups = config.with_names(&[("num_expert_group", "n_group"), ("topk_group", "topk_group")]);
    let groups = mixture::groups(&groups, experts, GroupScore::TwoLargest)
        .map_err(|error| error.in_words_of(&[("num_expert_group", "n_group")]))?;
    let form = match config.optional_usize("routed_expert_hidden_size", dense::WIDTH)? {
        Some(width) => ExpertForm::GatedLatent { width, norm: config.bool_or("latent_moe_use_norm", false)? },
        None => ExpertForm::Gated,
    };
    let count = config.optional_usize("num_shared_experts", 0..=1024)?.unwrap_or(0);
    let shared = SharedExpertSpec {
        name: "shared_experts",
        intermediate: intermediate * count,
        activation,
        gate: None,
    };
    Ok(ExpertsSpec {
        block: "mlp",
        experts,
        per_token,
        router: RouterSpec::GATE,
        routing: Routing {
            correction: Some(Correction::named("e_score_correction_bias")),
            groups,
            normalization,
            scale: Some(mixture::scale(config)?),
            precision: WeightPrecision::WeightsRounded,
            ..Routing::CORRECTED
        },
        networks: ExpertNetworks { form, ..ExpertNetworks::gated(intermediate, activation) },
        shared: (count > 0).then_some(shared),
    })
}

/// As published, residuals' choices and the experts' maps have other names; conversions join the delta networks' projections.
fn weights(config: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    let choices = ["self_attention_res", "mlp_res"];
    let paths = choices.map(|name| format!("model.layers.{{layer}}.{name}"));
    for path in paths.iter().map(String::as_str).chain(["model.output_attn_res"]) {
        weights.rename(&format!("{path}.proj_weight"), &format!("{path}_proj.weight"))?;
        weights.rename(&format!("{path}.norm_weight"), &format!("{path}_norm.weight"))?;
    }
    for name in ["routed_expert_down_proj", "routed_expert_up_proj", "routed_expert_norm", "switch_mlp"] {
        let (from, to) = (format!("block_sparse_moe.{name}"), format!("mlp.{name}"));
        weights.rename(&format!("model.layers.{{layer}}.{from}"), &format!("model.layers.{{layer}}.{to}"))?;
    }
    weights.rename(
        "model.layers.{layer}.block_sparse_moe.e_score_correction_bias",
        "model.layers.{layer}.mlp.e_score_correction_bias",
    )?;
    kimi_linear::weights(config, spec, weights)?;
    let part = |name: &str| format!("{DELTA}.{name}_proj");
    weights.split_equally(&part("qkv"), &[&part("q"), &part("k"), &part("v")])?;
    for (index, layer) in spec.layers.iter().enumerate() {
        let Mixer::GatedDelta(delta) = &layer.mixer else { continue };
        let path = format!("model.layers.{index}.self_attn");
        if let Some(joined) = weights.take(&format!("{path}.qkv_conv.conv.weight")) {
            let keys = delta.keys();
            if joined.shape().first() != Some(&(3 * keys)) {
                return Err(joined.unfit(format!("[{}, {}, 1]", 3 * keys, delta.kernel)).into());
            }
            for (place, name) in ["q", "k", "v"].into_iter().enumerate() {
                let part = joined.slice(0, place * keys, (place + 1) * keys)?;
                weights.insert(format!("{path}.{name}_conv.conv.weight"), part)?;
            }
        }
        let heads = delta.value_heads;
        // Published with more numbers than heads, the first of which count.
        weights.map(&format!("{path}.A_log"), |tensor: &Tensor| {
            let all: usize = tensor.shape().iter().product();
            let flat = tensor.reshape(&[all])?;
            let own = if all > heads { flat.slice(0, 0, heads)? } else { flat };
            match all < heads {
                true => Ok(own),
                false => own.reshape(&[1, 1, heads, 1]),
            }
        })?;
    }
    Ok(())
}
