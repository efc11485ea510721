//! The models that are measured: Llama's shape, random weights of a fixed seed, made once by mlx-lm in the cache folder.
//!
//! They have no end-of-sequence token, so that every run has its full length, and a tokenizer of whole words (`w17` is
//! token 17), so that a prompt given as text has the same ids everywhere.

use crate::places::Places;
use crate::{command, setup};
use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Part of the folder's name; raised when the models change.
const RECIPE: u32 = 1;

/// How large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Size {
    /// About 0.1 million parameters: the host is the limit
    T,
    /// About 30 million
    S,
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

/// A model folder.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) size: Size,
    pub(super) dtype: Dtype,
    pub(super) folder: PathBuf,
}

impl Model {
    /// Such as `t-f32`.
    pub(super) fn name(&self) -> String {
        name(self.size, self.dtype)
    }

    /// Makes the model if it is not in the cache yet.
    pub(super) fn provide(places: &Places, oracle: &Path, size: Size, dtype: Dtype) -> Result<Self> {
        let name = name(size, dtype);
        let all = places.cache.join(format!("bench-models-{RECIPE}"));
        let folder = all.join(&name);
        if !folder.is_dir() {
            let _lock = setup::lock(&places.cache.join("bench-models.lock"), "making of a model")?;
            if !folder.is_dir() {
                make(places, oracle, &all, &name, (size, dtype))
                    .with_context(|| format!("cannot make the model {name}"))?;
            }
        }
        Ok(Self { size, dtype, folder })
    }
}

fn name(size: Size, dtype: Dtype) -> String {
    let words = [size.to_possible_value(), dtype.to_possible_value()];
    words.iter().flatten().map(clap::builder::PossibleValue::get_name).collect::<Vec<_>>().join("-")
}

/// Text whose tokens are `length` different ids, others for another `seed`.
pub(super) fn prompt(length: usize, seed: usize) -> String {
    let words = (0..length).map(|index| format!("w{}", (index * 7919 + 13 + seed * 31) % 256));
    words.collect::<Vec<_>>().join(" ")
}

/// Written beside its place and renamed when it is whole.
fn make(places: &Places, oracle: &Path, all: &Path, name: &str, (size, dtype): (Size, Dtype)) -> Result<()> {
    eprintln!("making the model {name}");
    let unfinished = all.join(format!("{name}.unfinished"));
    setup::wheel::remove(&unfinished)?;
    std::fs::create_dir_all(&unfinished)?;
    let config = config(size);
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

fn config(size: Size) -> Value {
    let (hidden, layers, heads, kv_heads, intermediate, vocabulary) = match size {
        Size::T => (64, 2, 4, 2, 128, 256),
        Size::S => (512, 8, 8, 4, 1408, 8192),
        Size::L => (1280, 16, 20, 10, 3456, 8192),
    };
    json!({
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
        "max_position_embeddings": 4096,
        "tie_word_embeddings": false,
    })
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
            let config = config(size);
            let number = |name: &str| config[name].as_u64().unwrap();
            let hidden = number("hidden_size");
            let head = hidden / number("num_attention_heads");
            let attention = 2 * hidden * hidden + 2 * hidden * head * number("num_key_value_heads");
            let layer = attention + 3 * hidden * number("intermediate_size");
            (2 * hidden * number("vocab_size") + number("num_hidden_layers") * layer) as f64 / 1e6
        };
        assert!((0.08..0.13).contains(&parameters(Size::T)), "{}", parameters(Size::T));
        assert!((25.0..35.0).contains(&parameters(Size::S)), "{}", parameters(Size::S));
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
