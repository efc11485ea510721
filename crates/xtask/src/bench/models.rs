//! The models that are measured: random weights of a fixed seed, made once by mlx-lm in the cache folder, in the shapes of families
//! that compute differently: dense, experts, windows, sinks, latent attention.
//!
//! They have no end-of-sequence token, so that every run has its full length, and a tokenizer of whole words (`w17` is
//! token 17), so that a prompt given as text has the same ids everywhere.

use crate::places::Places;
use crate::{command, setup};
use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Part of the folder's name; raised when the models change.
const RECIPE: u32 = 1;

/// Whose shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(super) enum Shape {
    /// Dense, grouped keys
    Llama,
    /// Experts
    Qwen3Moe,
    /// Windows, norms everywhere, a large vocabulary
    Gemma3,
    /// Experts with biases, sinks, windows
    GptOss,
    /// Latent attention, experts with a shared one
    DeepseekV3,
}

impl Shape {
    /// Has it experts?
    pub(super) fn has_experts(self) -> bool {
        matches!(self, Self::Qwen3Moe | Self::GptOss | Self::DeepseekV3)
    }
}

/// How large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Size {
    /// About 0.1 million parameters: the host is the limit
    T,
    /// About 30 million
    S,
    /// About 100 million, with room for a long prompt and its answer
    M,
    /// About 310 million
    L,
}

/// How the weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Dtype {
    F32,
    Bf16,
    /// Affine, 4 bits in groups of 64; activations in single precision, since MLX's CPU kernels take minutes otherwise
    Q4,
}

/// Which models, as arguments name them.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Named {
    /// Whose shape the model has; repeat for several [default: as the bench says]
    #[arg(long = "shape", value_enum, value_name = "FAMILY")]
    pub(super) shapes: Vec<Shape>,
    /// Size of the model; repeat for several [default: as the bench says]
    #[arg(long = "model", value_enum, value_name = "SIZE")]
    pub(super) sizes: Vec<Size>,
    /// How the weights are stored; repeat for several [default: as the bench says]
    #[arg(long = "dtype", value_enum, value_name = "DTYPE")]
    pub(super) dtypes: Vec<Dtype>,
}

/// What was named, or else what is usual.
pub(super) fn chosen<T: Copy>(named: &[T], usual: &[T]) -> Vec<T> {
    if named.is_empty() { usual.to_vec() } else { named.to_vec() }
}

/// A model folder.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) shape: Shape,
    pub(super) size: Size,
    pub(super) dtype: Dtype,
    pub(super) folder: PathBuf,
}

impl Model {
    /// Such as `t-f32` for Llama's shape and `gemma3-t-f32` for another.
    pub(super) fn name(&self) -> String {
        name(self.shape, self.size, self.dtype)
    }

    /// One of Llama's shape.
    pub(super) fn llama(places: &Places, oracle: &Path, size: Size, dtype: Dtype) -> Result<Self> {
        Self::provide(places, oracle, Shape::Llama, size, dtype)
    }

    /// Makes the model if it is not in the cache yet.
    pub(super) fn provide(
        places: &Places,
        oracle: &Path,
        shape: Shape,
        size: Size,
        dtype: Dtype,
    ) -> Result<Self> {
        let name = name(shape, size, dtype);
        let all = places.cache.join(format!("bench-models-{RECIPE}"));
        let folder = all.join(&name);
        if !folder.is_dir() {
            let _lock = setup::lock(&places.cache.join("bench-models.lock"), "making of a model")?;
            if !folder.is_dir() {
                make(places, oracle, &all, &name, (shape, size, dtype))
                    .with_context(|| format!("cannot make the model {name}"))?;
            }
        }
        Ok(Self { shape, size, dtype, folder })
    }
}

/// A model of Llama's shape and a draft model of its first layers that always agrees with it.
#[derive(Debug)]
pub(super) struct Pair {
    /// Such as `s-f32`.
    pub(super) name: String,
    pub(super) target: PathBuf,
    pub(super) draft: PathBuf,
}

impl Pair {
    /// Makes the models if they are not in the cache yet.
    pub(super) fn provide(places: &Places, oracle: &Path, size: Size, dtype: Dtype) -> Result<Self> {
        let source = Model::llama(places, oracle, size, dtype)?;
        let folder = source.folder.with_file_name(format!("{}-pair", source.name()));
        let [target, draft] = ["target", "draft"].map(|part| folder.join(part));
        let _lock = setup::lock(&places.cache.join("bench-models.lock"), "making of a model")?;
        if !folder.is_dir() {
            let unfinished = folder.with_extension("unfinished");
            setup::wheel::remove(&unfinished)?;
            let script = places.repository.join("crates/testkit/oracle/draft_pair.py");
            let mut command = Command::new(oracle);
            command.arg(script).arg(&source.folder).arg(unfinished.join("target"));
            command::output(command.arg(unfinished.join("draft")).arg(DRAFT_LAYERS.to_string()))?;
            std::fs::rename(&unfinished, &folder)?;
        }
        Ok(Self { name: source.name(), target, draft })
    }
}

/// Layers of a draft model.
const DRAFT_LAYERS: usize = 1;

fn name(shape: Shape, size: Size, dtype: Dtype) -> String {
    let shape = if shape == Shape::Llama { None } else { shape.to_possible_value() };
    let words = [shape, size.to_possible_value(), dtype.to_possible_value()];
    words.iter().flatten().map(clap::builder::PossibleValue::get_name).collect::<Vec<_>>().join("-")
}

/// Text whose tokens are `length` different ids, others for another `seed`.
pub(super) fn prompt(length: usize, seed: usize) -> String {
    let words = (0..length).map(|index| format!("w{}", (index * 7919 + 13 + seed * 31) % 256));
    words.collect::<Vec<_>>().join(" ")
}

/// Written beside its place and renamed when it is whole.
fn make(
    places: &Places,
    oracle: &Path,
    all: &Path,
    name: &str,
    (shape, size, dtype): (Shape, Size, Dtype),
) -> Result<()> {
    eprintln!("making the model {name}");
    let unfinished = all.join(format!("{name}.unfinished"));
    setup::wheel::remove(&unfinished)?;
    std::fs::create_dir_all(&unfinished)?;
    let config = config(shape, size);
    let quantize = match dtype {
        Dtype::Q4 => json!({"group_size": 64, "bits": 4, "mode": "affine"}),
        Dtype::F32 | Dtype::Bf16 => Value::Null,
    };
    let dtype = if dtype == Dtype::Bf16 { "bfloat16" } else { "float32" };
    let request = json!({"models": [{
        "folder": unfinished, "config": config, "seed": 1, "dtype": dtype, "quantize": quantize, "runs": []}]});
    let request_file = all.join(format!("{name}.request.json"));
    std::fs::write(&request_file, request.to_string())?;
    let script = places.repository.join("crates/testkit/oracle/oracle.py");
    command::output(Command::new(oracle).arg(script).arg(&request_file))?;
    std::fs::remove_file(request_file)?;
    let vocabulary = config["vocab_size"].as_u64().context("the config has a vocabulary")?;
    std::fs::write(unfinished.join("tokenizer.json"), tokenizer(vocabulary).to_string())?;
    let settings =
        json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    std::fs::write(unfinished.join("tokenizer_config.json"), settings.to_string())?;
    std::fs::rename(&unfinished, all.join(name))?;
    Ok(())
}

/// What the shapes of one size share.
struct Sizes {
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    intermediate: usize,
    vocabulary: usize,
    experts: usize,
    /// Width of an expert.
    expert: usize,
}

fn sizes(size: Size) -> Sizes {
    let (hidden, layers, heads, kv_heads, intermediate, vocabulary, experts, expert) = match size {
        Size::T => (64, 2, 4, 2, 128, 256, 8, 64),
        Size::S => (512, 8, 8, 4, 1408, 8192, 16, 256),
        Size::M => (768, 14, 12, 4, 2048, 8192, 16, 320),
        Size::L => (1280, 16, 20, 10, 3456, 8192, 16, 448),
    };
    Sizes { hidden, layers, heads, kv_heads, intermediate, vocabulary, experts, expert }
}

fn config(shape: Shape, size: Size) -> Value {
    let Sizes { hidden, layers, heads, kv_heads, intermediate, vocabulary, experts, expert } = sizes(size);
    let mut config = json!({
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": if size == Size::M { 8192 } else { 4096 },
        "tie_word_embeddings": false,
    });
    let head_dim = hidden / heads;
    let other = match shape {
        Shape::Llama => json!({}),
        Shape::Qwen3Moe => json!({
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": head_dim,
            "num_experts": experts, "num_experts_per_tok": 4, "moe_intermediate_size": expert,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": true,
        }),
        Shape::Gemma3 => json!({
            "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": head_dim,
            "query_pre_attn_scalar": head_dim, "sliding_window": 128, "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000.0, "rope_theta": 1_000_000.0,
        }),
        Shape::GptOss => json!({
            "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "head_dim": head_dim,
            "num_local_experts": experts, "num_experts_per_tok": 4, "intermediate_size": expert,
            "sliding_window": 128, "rope_theta": 150_000.0,
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
                "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false},
            "layer_types": (0..layers).map(|layer| ["sliding_attention", "full_attention"][layer % 2])
                .collect::<Vec<_>>(),
        }),
        Shape::DeepseekV3 => json!({
            "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
            "num_key_value_heads": heads, "n_routed_experts": experts, "n_shared_experts": 1,
            "num_experts_per_tok": 4, "moe_intermediate_size": expert, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
            "norm_topk_prob": true, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "q_lora_rank": hidden / 2, "kv_lora_rank": hidden / 4,
            "qk_rope_head_dim": head_dim / 2, "qk_nope_head_dim": head_dim, "v_head_dim": head_dim,
            "attention_bias": false, "rope_scaling": null,
        }),
    };
    for (field, value) in other.as_object().into_iter().flatten() {
        config[field] = value.clone();
    }
    config
}

fn tokenizer(vocabulary: u64) -> Value {
    let words: BTreeMap<String, u64> = (0..vocabulary).map(|id| (format!("w{id}"), id)).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_their_lines_say() {
        let parameters = |size| {
            let config = config(Shape::Llama, size);
            let number = |name: &str| config[name].as_u64().unwrap();
            let hidden = number("hidden_size");
            let head = hidden / number("num_attention_heads");
            let attention = 2 * hidden * hidden + 2 * hidden * head * number("num_key_value_heads");
            let layer = attention + 3 * hidden * number("intermediate_size");
            (2 * hidden * number("vocab_size") + number("num_hidden_layers") * layer) as f64 / 1e6
        };
        assert!((0.08..0.13).contains(&parameters(Size::T)), "{}", parameters(Size::T));
        assert!((25.0..35.0).contains(&parameters(Size::S)), "{}", parameters(Size::S));
        assert!((100.0..110.0).contains(&parameters(Size::M)), "{}", parameters(Size::M));
        assert!((300.0..330.0).contains(&parameters(Size::L)), "{}", parameters(Size::L));
    }

    #[test]
    fn prompts_are_words_of_the_vocabulary_and_differ() {
        let tokenizer = tokenizer(256);
        for word in prompt(300, 3).split(' ') {
            assert!(tokenizer["model"]["vocab"][word].is_u64(), "{word}");
        }
        assert_ne!(prompt(8, 0), prompt(8, 1));
        assert_eq!(prompt(8, 0).split(' ').count(), 8);
    }
}
