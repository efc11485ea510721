//! AFM 7B (Apple's foundation model on servers): norms on heads after the rotation, keys and values rounded to 8 bits, and last layers
//! that see the keys and values of the last layer before them.

use super::{Architecture, dense, rope, spelling};
use crate::config::{Config, ConfigError};
use crate::spec::{
    Activation, AttentionNames, AttentionSpec, FeedForward, GatedNames, Mixer, ModelSpec, QkNorm,
};
use crate::weights::{Weights, WeightsError};

pub(super) const ARCHITECTURE: Architecture = Architecture::new("afm7", spec).weights(weights).names(&[
    ("model.embedding", "model.embed_tokens"),
    ("model.output_norm", "model.norm"),
    ("model.layers.{layer}.self_attn.out_proj", "model.layers.{layer}.self_attn.o_proj"),
]);

/// The family's names for fields.
const FIELDS: [(&str, &str); 4] = [
    ("hidden_dim", "hidden_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("num_kv_heads", "num_key_value_heads"),
];

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&[
        ("hidden_dim_scale_factor", 3.25),
        ("rope_theta", 50_000.0),
        ("rms_norm_eps", 1e-5),
    ]);
    spelling::spelled(config, &FIELDS, model)
}

fn model(config: &Config) -> Result<ModelSpec, ConfigError> {
    let hidden = dense::width(config, "hidden_size")?;
    let width = hidden as f64 * config.positive("hidden_dim_scale_factor")?;
    if !(1.0..=f64::from(1 << 20)).contains(&width) {
        let factor = config.f64("hidden_dim_scale_factor")?.to_string();
        return Err(config.refuse(
            "hidden_dim_scale_factor",
            &factor,
            "what gives networks of 1 to 1048576 numbers",
        ));
    }
    let sizes =
        dense::Sizes::read_with_shared_heads(&config.with("intermediate_size", (width as usize).into()))?;
    let reusing = config.usize("num_kv_reuse_layers", 0..=sizes.layers - 1)?;
    let owner = sizes.layers - reusing - 1;
    let rope = rope::plain(sizes.head_dim, rope::base(config, None)?, true);
    let attention = AttentionSpec {
        names: AttentionNames::LLAMA,
        fused: true,
        rounded_to_bytes: true,
        // Their epsilon is MLX's default whatever the config says, which is the same for the published model.
        qk_norm: Some(QkNorm { after_rope: true, ..QkNorm::PER_HEAD }),
        ..sizes.attention(Some(rope))
    };
    let again =
        AttentionSpec { fused: false, rounded_to_bytes: false, shares: Some(owner), ..attention.clone() };
    let mixers = (0..sizes.layers)
        .map(|layer| Mixer::Attention(if layer > owner { again.clone() } else { attention.clone() }));
    let network = FeedForward::Gated {
        intermediate: sizes.intermediate,
        activation: Activation::Silu,
        bias: false,
        fused: false,
        names: GatedNames::LLAMA,
    };
    dense::of_mixers(config, "afm7", &sizes, mixers.collect(), &network, true)
}

/// Layers without keys of their own are numbered by themselves.
fn weights(_: &Config, spec: &ModelSpec, weights: &mut Weights) -> Result<(), WeightsError> {
    let owned = spec
        .layers
        .iter()
        .filter(|layer| layer.mixer.attention().is_some_and(|attention| attention.shares.is_none()));
    let owned = owned.count();
    for layer in owned..spec.layer_count() {
        let from = format!("model.kv_reuse_layers.{}", layer - owned);
        weights.rename(&from, &format!("model.layers.{layer}"))?;
    }
    Ok(())
}
