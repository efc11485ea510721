//! Which tokens mean beginning and end, as the model's configuration files tell it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    TextError, TextFiles,
    class::{TokenizerClass, tokenizer_class},
    limits,
};

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
    /// Tokens that tokenizer_config.json adds, by id: some models list them there only. Older ones have them in
    /// added_tokens.json.
    pub(crate) added: BTreeMap<u32, AddedToken>,
    /// Further special tokens that tokenizer_config.json lists; none if it says nothing about them.
    pub(crate) extra: Option<Vec<AddedToken>>,
    /// By which rules transformers builds a tokenizer from these files.
    pub(crate) class: TokenizerClass,
    /// How transformers would rebuild the tokenizer instead of taking tokenizer.json as it is.
    pub(crate) llama: Option<LlamaSpaces>,
    /// mlx-lm's own class: line breaks are written "<n>".
    pub(crate) newline_marks: bool,
    /// The Python class that the model's author brings along.
    pub(crate) remote_class: Option<String>,
    /// The class that tokenizer_config.json names, and the kind of model.
    pub(crate) declared_class: Option<String>,
    pub(crate) model_type: Option<String>,
    pub(crate) add_prefix_space: Option<bool>,
    /// Keys of special tokens that the model is said to have none of.
    pub(crate) not_there: Vec<&'static str>,
    /// Whether encoding adds bos and eos, where the configuration says so; of no effect beside a tokenizer.json.
    pub(crate) add_bos: Option<bool>,
    pub(crate) add_eos: Option<bool>,
    /// Decoding tidies spaces before punctuation.
    pub(crate) clean_up_spaces: bool,
    /// Even where the tokenizer is a BPE, for which Hugging Face otherwise ignores the wish.
    pub(crate) clean_up_spaces_for_bpe: bool,
}

/// An entry of `added_tokens_decoder`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub(crate) struct AddedToken {
    pub(crate) content: String,
    #[serde(default)]
    pub(crate) single_word: bool,
    #[serde(default)]
    pub(crate) lstrip: bool,
    #[serde(default)]
    pub(crate) rstrip: bool,
    #[serde(default)]
    pub(crate) normalized: Option<bool>,
    #[serde(default)]
    pub(crate) special: bool,
}

impl AddedToken {
    /// A special token that is known by its text only.
    pub(crate) fn special(content: impl Into<String>) -> Self {
        Self { content: content.into(), special: true, ..Self::default() }
    }

    /// As the tokenizers library takes it. Plain tokens are looked for in normalized text unless they say otherwise.
    pub(crate) fn to_library(&self) -> tokenizers::AddedToken {
        tokenizers::AddedToken::from(self.content.clone(), self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

/// The part of tokenizer_config.json that matters here; the chat template is read elsewhere.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    added_tokens_decoder: Option<BTreeMap<u32, AddedToken>>,
    #[serde(default)]
    additional_special_tokens: Option<Vec<ExtraToken>>,
    #[serde(default)]
    extra_special_tokens: Option<ExtraTokens>,
    #[serde(default)]
    add_bos_token: Option<bool>,
    #[serde(default)]
    add_eos_token: Option<bool>,
    #[serde(default)]
    auto_map: Option<Value>,
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

/// A special token is written as its text or with all its properties.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum ExtraToken {
    Text(String),
    Whole(AddedToken),
}

impl From<ExtraToken> for AddedToken {
    fn from(token: ExtraToken) -> Self {
        match token {
            ExtraToken::Text(text) => Self::special(text),
            ExtraToken::Whole(token) => token,
        }
    }
}

/// In a list, or each under a name of its own.
#[derive(Deserialize)]
#[serde(untagged)]
enum ExtraTokens {
    List(Vec<ExtraToken>),
    Named(BTreeMap<String, ExtraToken>),
}

#[derive(Default, Deserialize)]
struct ModelConfig {
    #[serde(default)]
    eos_token_id: Option<Value>,
    #[serde(default)]
    model_type: Option<String>,
    #[serde(default)]
    tokenizer_class: Option<String>,
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

impl LlamaSpaces {
    /// As Metaspace's `prepend_scheme` is written.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

impl SpecialTokens {
    pub(crate) fn from_files(files: &TextFiles) -> Result<Self, TextError> {
        let config: TokenizerConfig = files.json("tokenizer_config.json")?.unwrap_or_default();
        let map: Map<String, Value> = files.json("special_tokens_map.json")?.unwrap_or_default();
        let model: ModelConfig = files.json("config.json")?.unwrap_or_default();
        let remote_class = remote_class(config.auto_map.as_ref());
        let declared = config.tokenizer_class.as_deref().or(model.tokenizer_class.as_deref());
        let class = tokenizer_class(declared, model.model_type.as_deref(), remote_class.is_some());
        let declared_class = declared.map(str::to_owned);
        let model_type = model.model_type.clone();
        let llama =
            (class == TokenizerClass::Llama).then_some(match (config.add_prefix_space, config.legacy) {
                (Some(false), _) => LlamaSpaces::Never,
                (_, Some(true)) => LlamaSpaces::Always,
                _ => LlamaSpaces::First,
            });

        let mut named = Map::new();
        for (key, text) in class.defaults() {
            if config.rest.get(*key) != Some(&Value::Null) {
                named.insert((*key).to_owned(), Value::String((*text).to_owned()));
            }
        }
        for key in TOKEN_KEYS {
            // The configuration is the newer place; the map remains from older ones.
            if let Some(text) = token_text(config.rest.get(key)).or_else(|| token_text(map.get(key))) {
                named.insert(key.to_owned(), Value::String(text.to_owned()));
            }
        }
        let is_null = |key: &&str| config.rest.get(*key) == Some(&Value::Null);
        let not_there = TOKEN_KEYS.into_iter().filter(is_null).collect();
        let extra: Option<Vec<AddedToken>> =
            match (config.additional_special_tokens, config.extra_special_tokens) {
                (_, Some(ExtraTokens::List(list))) if !list.is_empty() => {
                    Some(list.into_iter().map(AddedToken::from).collect())
                }
                (_, Some(ExtraTokens::Named(list))) if !list.is_empty() => {
                    Some(list.into_values().map(AddedToken::from).collect())
                }
                (list, _) => list.map(|list| list.into_iter().map(AddedToken::from).collect()),
            };
        let listed = match (&extra, map.get("additional_special_tokens")) {
            (Some(extra), _) => Some(extra.iter().map(|token| token.content.clone()).collect::<Vec<_>>()),
            (None, Some(Value::Array(extra))) => {
                Some(extra.iter().filter_map(|token| token_text(Some(token))).map(str::to_owned).collect())
            }
            _ => None,
        };
        if let Some(listed) = listed {
            named.insert("additional_special_tokens".to_owned(), listed.into());
        }

        let added = match config.added_tokens_decoder {
            Some(added) => added,
            None => from_added_tokens_json(files, &named, extra.as_deref())?,
        };
        limits::check_added(
            "tokenizer_config.json",
            "added_tokens_decoder",
            added.values().chain(extra.iter().flatten()).map(|token| token.content.as_str()),
        )?;
        Ok(Self {
            named,
            eos_ids: eos_ids(files, model)?,
            added,
            extra,
            class,
            llama,
            newline_marks: config.tokenizer_class.as_deref() == Some("NewlineTokenizer"),
            remote_class,
            declared_class,
            model_type,
            add_prefix_space: config.add_prefix_space,
            not_there,
            add_bos: config.add_bos_token,
            add_eos: config.add_eos_token,
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

    /// What a tokenizer's class says about a special token, unless the configuration says that there is none.
    pub(crate) fn class_token(&mut self, key: &str, text: &str) {
        if !self.not_there.contains(&key) {
            self.default_token(key, text);
        }
    }

    /// What a vocabulary file says about a special token that the configuration is silent about.
    pub(crate) fn default_token(&mut self, key: &str, text: &str) {
        if !self.named.contains_key(key) {
            self.named.insert(key.to_owned(), Value::String(text.to_owned()));
        }
    }
}

/// The older place for tokens beyond the vocabulary: their ids by their texts.
fn from_added_tokens_json(
    files: &TextFiles,
    named: &Map<String, Value>,
    extra: Option<&[AddedToken]>,
) -> Result<BTreeMap<u32, AddedToken>, TextError> {
    let listed: BTreeMap<String, u32> = files.json("added_tokens.json")?.unwrap_or_default();
    let is_special = |text: &str| {
        named.values().any(|value| value.as_str() == Some(text))
            || extra.is_some_and(|extra| extra.iter().any(|token| token.content == text))
    };
    let token =
        |content: String| AddedToken { special: is_special(&content), content, ..AddedToken::default() };
    Ok(listed.into_iter().map(|(content, id)| (id, token(content))).collect())
}

/// The class in `auto_map`: a list of class names, or the entry "AutoTokenizer" with such a list or one name.
fn remote_class(auto_map: Option<&Value>) -> Option<String> {
    let names = match auto_map? {
        Value::Object(fields) => fields.get("AutoTokenizer")?,
        other => other,
    };
    match names {
        Value::Array(names) => names.iter().rev().find_map(Value::as_str).map(str::to_owned),
        other => other.as_str().map(str::to_owned),
    }
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
