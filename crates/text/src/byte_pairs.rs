//! GPT-2's pair of files: vocab.json (ids by token) and merges.txt (two tokens on each line, in the order of merging).
//!
//! How text is cut before merging they do not say; transformers' tokenizer classes know it, so the class decides, or the kind
//! of model where no class is named. Others are refused: cut in another way, the model would read nonsense.

use std::collections::HashMap;

use serde_json::{Value, json};
use tokenizers::{
    DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper,
    models::bpe::{BPE, Vocab},
};

use crate::{
    TextError, TextFiles,
    limits::{MAX_TOKEN_BYTES, MAX_VOCABULARY},
    special::SpecialTokens,
    tiktoken::QWEN,
    tokenizer::failed,
};

const VOCABULARY: &str = "vocab.json";
const MERGES: &str = "merges.txt";
/// What all of them call the end of a text when nobody says otherwise.
const END_OF_TEXT: &str = "<|endoftext|>";

/// The rules of a class of transformers 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rules {
    /// GPT2Tokenizer, CodeGenTokenizer.
    Gpt2,
    /// GPTNeoXTokenizer: the same on composed characters.
    GptNeoX,
    /// Qwen2Tokenizer: digits one by one, on composed characters.
    Qwen2,
}

impl Rules {
    /// The class that files name, or that the kind of model has.
    fn of(class: Option<&str>, model_type: Option<&str>) -> Option<Self> {
        let by_kind = match model_type {
            Some("gpt2" | "gptj" | "dbrx" | "phi" | "starcoder2") => Some(Self::Gpt2),
            Some("gpt_neox" | "mamba" | "mamba2" | "olmo" | "olmoe") => Some(Self::GptNeoX),
            Some(
                "qwen2" | "qwen2_moe" | "qwen2_vl" | "qwen3" | "qwen3_moe" | "qwen3_next" | "qwen3_vl"
                | "qwen3_vl_moe",
            ) => Some(Self::Qwen2),
            _ => None,
        };
        match class.map(|class| class.strip_suffix("Fast").unwrap_or(class)) {
            // Its files name other classes; transformers knows better.
            _ if model_type == Some("qwen2") => by_kind,
            Some("GPT2Tokenizer" | "CodeGenTokenizer") => Some(Self::Gpt2),
            Some("GPTNeoXTokenizer") => Some(Self::GptNeoX),
            Some("Qwen2Tokenizer") => Some(Self::Qwen2),
            Some(_) => None,
            None => by_kind,
        }
    }

    /// Special tokens that the class has when its files do not name them.
    fn defaults(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Gpt2 => {
                &[("bos_token", END_OF_TEXT), ("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT)]
            }
            Self::GptNeoX => &[
                ("bos_token", END_OF_TEXT),
                ("eos_token", END_OF_TEXT),
                ("unk_token", END_OF_TEXT),
                ("pad_token", "<|padding|>"),
            ],
            Self::Qwen2 => {
                &[("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT), ("pad_token", END_OF_TEXT)]
            }
        }
    }
}

/// Builds the tokenizer of the two files, and names the special tokens of its class.
pub(crate) fn build(
    vocabulary: &[u8],
    files: &TextFiles,
    special: &mut SpecialTokens,
) -> Result<tokenizers::Tokenizer, TextError> {
    let class = special.declared_class.as_deref();
    let rules = Rules::of(class, special.model_type.as_deref()).ok_or_else(|| TextError::InvalidFile {
        file: VOCABULARY.to_owned(),
        reason: format!(
            "tokenizer_config.json must name by tokenizer_class how text is cut (GPT2Tokenizer, CodeGenTokenizer, \
             GPTNeoXTokenizer or Qwen2Tokenizer), but it says {}; a tokenizer.json would say it, too",
            class.map_or("nothing".to_owned(), |class| format!("{class:?}"))
        ),
    })?;
    let merges = files.text(MERGES)?.ok_or(TextError::MissingFile { file: MERGES })?;
    let invalid = |file: &str, reason: String| TextError::InvalidFile { file: file.to_owned(), reason };
    let vocabulary = parse_vocabulary(vocabulary).map_err(|reason| invalid(VOCABULARY, reason))?;
    let merges = parse_merges(merges, &vocabulary).map_err(|reason| invalid(MERGES, reason))?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix(String::new())
        .build()
        .map_err(|error| invalid(MERGES, error.to_string()))?;
    let mut backend = tokenizers::Tokenizer::new(model);

    let level = |prefix: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex});
    let prefix = special.add_prefix_space.unwrap_or(false);
    let cut = match rules {
        Rules::Gpt2 | Rules::GptNeoX => level(prefix, true),
        Rules::Qwen2 => {
            let split =
                json!({"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, level(prefix, false)]})
        }
    };
    let part = |error: serde_json::Error| TextError::Tokenizer { reason: error.to_string() };
    backend.with_pre_tokenizer(Some(serde_json::from_value::<PreTokenizerWrapper>(cut).map_err(part)?));
    backend.with_decoder(Some(serde_json::from_value::<DecoderWrapper>(level(true, true)).map_err(part)?));
    if rules != Rules::Gpt2 {
        let composed = serde_json::from_value::<NormalizerWrapper>(json!({"type": "NFC"})).map_err(part)?;
        backend.with_normalizer(Some(composed)).map_err(failed)?;
    }
    for (key, token) in rules.defaults() {
        special.class_token(key, token);
    }
    Ok(backend)
}

fn parse_vocabulary(json: &[u8]) -> Result<Vocab, String> {
    let ids: HashMap<String, Value> = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if ids.len() > MAX_VOCABULARY {
        return Err(format!("it has {} tokens, more than {MAX_VOCABULARY}", ids.len()));
    }
    let mut vocabulary = Vocab::default();
    let mut seen = HashMap::new();
    for (token, id) in ids {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let number = number.filter(|id| (*id as usize) < MAX_VOCABULARY);
        let number =
            number.ok_or_else(|| format!("{token:?} has the id {id}, but ids are below {MAX_VOCABULARY}"))?;
        if token.len() > MAX_TOKEN_BYTES {
            return Err(format!("token {number} has {} bytes, more than {MAX_TOKEN_BYTES}", token.len()));
        }
        if let Some(other) = seen.insert(number, token.clone()) {
            return Err(format!("{token:?} and {other:?} both have the id {number}"));
        }
        vocabulary.insert(token, number);
    }
    Ok(vocabulary)
}

fn parse_merges(text: &str, vocabulary: &Vocab) -> Result<Vec<(String, String)>, String> {
    let mut merges = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        if line.starts_with("#version") {
            continue;
        }
        let Some((left, right)) = line.split_once(' ').filter(|(_, right)| !right.contains(' ')) else {
            return Err(format!("line {number}: it must have two tokens with one space between them"));
        };
        for token in [left, right, &format!("{left}{right}")] {
            if !vocabulary.contains_key(token) {
                return Err(format!("line {number}: {token:?} is not in {VOCABULARY}"));
            }
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_decides_how_text_is_cut() {
        let cases = [
            (Some("GPT2TokenizerFast"), Some("llama"), Some(Rules::Gpt2)),
            (Some("CodeGenTokenizer"), None, Some(Rules::Gpt2)),
            (Some("GPT2Tokenizer"), Some("qwen2"), Some(Rules::Qwen2)),
            (Some("GPT2Tokenizer"), Some("qwen3"), Some(Rules::Gpt2)),
            (Some("GPT2Tokenizer"), Some("granite"), Some(Rules::Gpt2)),
            (Some("Qwen2Tokenizer"), Some("gpt2"), Some(Rules::Qwen2)),
            (None, Some("qwen3_moe"), Some(Rules::Qwen2)),
            (None, Some("olmo"), Some(Rules::GptNeoX)),
            (None, Some("llama"), None),
            (Some("CohereTokenizer"), Some("gpt2"), None),
            (None, None, None),
        ];
        for (class, model_type, rules) in cases {
            assert_eq!(Rules::of(class, model_type), rules, "{class:?} {model_type:?}");
        }
    }

    #[test]
    fn broken_files_are_named_by_line_and_token() {
        for (json, expected) in [
            ("[]", "invalid type"),
            (r#"{"a": -1}"#, "\"a\" has the id -1"),
            (r#"{"a": 4294967295}"#, "\"a\" has the id 4294967295"),
            (r#"{"a": 1, "b": 1}"#, "both have the id 1"),
        ] {
            let error = parse_vocabulary(json.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let vocabulary = parse_vocabulary(br#"{"a": 0, "b": 1, "ab": 2}"#).unwrap();
        assert_eq!(parse_merges("#version: 0.2\na b\n", &vocabulary).unwrap(), [("a".into(), "b".into())]);
        for (text, expected) in [
            ("a b\na", "line 2: it must have two tokens"),
            ("a b c", "line 1: it must have two tokens"),
            ("a b\n\n", "line 2: it must have two tokens"),
            ("a c", "line 1: \"c\" is not in vocab.json"),
            ("b a", "line 1: \"ba\" is not in vocab.json"),
        ] {
            let error = parse_merges(text, &vocabulary).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
