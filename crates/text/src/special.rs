//! Which tokens mean beginning and end, as the model's configuration files tell it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{TextError, TextFiles};

/// The keys under which Hugging Face keeps special tokens, in the order in which templates get them.
const TOKEN_KEYS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the files beside tokenizer.json declare.
#[derive(Debug, Default)]
pub(crate) struct SpecialTokens {
    /// Text of the special tokens by key ("bos_token" …), as templates see them.
    pub(crate) named: Map<String, Value>,
    /// End-of-sequence ids of generation_config.json, or else of config.json.
    pub(crate) eos_ids: Vec<u32>,
    /// Tokens that tokenizer_config.json adds, by id: some models list them there only.
    pub(crate) added: BTreeMap<u32, AddedToken>,
    /// How transformers would rebuild the tokenizer instead of taking tokenizer.json as it is.
    pub(crate) llama: Option<LlamaSpaces>,
    /// Decoding tidies spaces before punctuation.
    pub(crate) clean_up_spaces: bool,
    /// Even where the tokenizer is a BPE, for which Hugging Face otherwise ignores the wish.
    pub(crate) clean_up_spaces_for_bpe: bool,
}

/// An entry of `added_tokens_decoder`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct AddedToken {
    pub(crate) content: String,
    #[serde(default)]
    pub(crate) single_word: bool,
    #[serde(default)]
    pub(crate) lstrip: bool,
    #[serde(default)]
    pub(crate) rstrip: bool,
    #[serde(default)]
    pub(crate) normalized: bool,
    #[serde(default)]
    pub(crate) special: bool,
}

/// The part of tokenizer_config.json that matters here; the chat template is read elsewhere.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, AddedToken>,
    #[serde(default)]
    tokenizer_class: Option<String>,
    #[serde(default)]
    legacy: Option<bool>,
    #[serde(default)]
    add_prefix_space: Option<bool>,
    #[serde(default)]
    clean_up_tokenization_spaces: Option<bool>,
    #[serde(default)]
    clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output: Option<bool>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Default, Deserialize)]
struct ModelConfig {
    #[serde(default)]
    eos_token_id: Option<Value>,
    #[serde(default)]
    model_type: Option<String>,
}

/// Where transformers' LlamaTokenizer puts the space that SentencePiece adds in front of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LlamaSpaces {
    /// In front of the text only.
    First,
    /// Also behind every special token.
    Always,
    Never,
}

impl SpecialTokens {
    pub(crate) fn from_files(files: &TextFiles) -> Result<Self, TextError> {
        let config: TokenizerConfig = files.json("tokenizer_config.json")?.unwrap_or_default();
        let map: Map<String, Value> = files.json("special_tokens_map.json")?.unwrap_or_default();
        let model: ModelConfig = files.json("config.json")?.unwrap_or_default();
        let llama = llama_spaces(&config, model.model_type.as_deref());
        let mut named = Map::new();
        if llama.is_some() {
            for (key, text) in [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")] {
                named.insert(key.to_owned(), Value::String(text.to_owned()));
            }
        }
        for key in TOKEN_KEYS {
            // The configuration is the newer place; the map remains from older ones.
            if let Some(text) = token_text(config.rest.get(key)).or_else(|| token_text(map.get(key))) {
                named.insert(key.to_owned(), Value::String(text.to_owned()));
            }
        }
        if let Some(Value::Array(extra)) =
            config.rest.get("additional_special_tokens").or_else(|| map.get("additional_special_tokens"))
        {
            let texts = extra.iter().filter_map(|token| token_text(Some(token)));
            named.insert(
                "additional_special_tokens".to_owned(),
                texts.map(|text| Value::String(text.to_owned())).collect(),
            );
        }
        Ok(Self {
            named,
            eos_ids: eos_ids(files, model)?,
            added: config.added_tokens_decoder,
            llama,
            clean_up_spaces: config.clean_up_tokenization_spaces.unwrap_or(false),
            clean_up_spaces_for_bpe: config
                .clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
                .unwrap_or(false),
        })
    }

    /// Text of one special token.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.named.get(key).and_then(Value::as_str)
    }
}

/// transformers 5 builds its LlamaTokenizer anew from the vocabulary, with its own idea of spaces, and mlx-lm runs on
/// that. Models of the Mistral family are spared by it, and so are tokenizers of bytes (see the caller).
fn llama_spaces(config: &TokenizerConfig, model_type: Option<&str>) -> Option<LlamaSpaces> {
    const SPARED: [&str; 7] =
        ["mistral", "mistral3", "mixtral", "ministral", "ministral3", "pixtral", "voxtral"];
    let is_llama = matches!(config.tokenizer_class.as_deref(), Some("LlamaTokenizer" | "LlamaTokenizerFast"));
    let spared = model_type.is_some_and(|model_type| SPARED.contains(&model_type));
    (is_llama && !spared).then_some(match (config.add_prefix_space, config.legacy) {
        (Some(false), _) => LlamaSpaces::Never,
        (_, Some(true)) => LlamaSpaces::Always,
        _ => LlamaSpaces::First,
    })
}

/// A token is written as its text or as an object with the text and how it is matched.
fn token_text(token: Option<&Value>) -> Option<&str> {
    match token? {
        Value::String(text) => Some(text),
        Value::Object(object) => object.get("content")?.as_str(),
        _ => None,
    }
}

/// generation_config.json wins over config.json, and a broken generation_config.json is as good as none (mlx-lm).
fn eos_ids(files: &TextFiles, config: ModelConfig) -> Result<Vec<u32>, TextError> {
    let generation: ModelConfig = files.json("generation_config.json").ok().flatten().unwrap_or_default();
    if let Some(ids) = generation.eos_token_id.as_ref().and_then(as_ids)
        && !ids.is_empty()
    {
        return Ok(ids);
    }
    match config.eos_token_id {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(value) => as_ids(&value).ok_or_else(|| TextError::InvalidFile {
            file: "config.json".to_owned(),
            reason: format!("eos_token_id is {value}, but must be a token id or a list of token ids"),
        }),
    }
}

fn as_ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().map(id).collect(),
        single => id(single).map(|id| vec![id]),
    }
}
