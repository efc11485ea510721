//! Mistral's tekken.json: tokens as bytes in the order of merging, a pattern that cuts text, and special tokens, whose ids come
//! before all others.
//!
//! The rules are those of transformers 5, with the names that mistral-common gives to the first tokens: without them nothing
//! would end an answer. Old files have no list of special tokens; mistral-common's of that time is used.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::json;
use tokenizers::{DecoderWrapper, PostProcessorWrapper, PreTokenizerWrapper};

use crate::{
    TextError,
    limits::{MAX_ADDED_TOKENS, MAX_MERGE_WORK, MAX_TOKEN_BYTES, MAX_VOCABULARY},
    special::{AddedToken, SpecialTokens},
    tiktoken,
    tokenizer::failed,
};

/// Its name.
pub(crate) const FILE: &str = "tekken.json";
/// Of files from before v11, by rank.
const FIRST_SPECIAL_TOKENS: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];
/// What they are for.
const NAMES: [(&str, &str); 4] =
    [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")];

#[derive(Deserialize)]
struct Tekken {
    config: Config,
    vocab: Vec<Token>,
    #[serde(default)]
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    /// With special tokens; the list may have more.
    #[serde(default)]
    default_vocab_size: Option<usize>,
    #[serde(default)]
    default_num_special_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Token {
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: u32,
    token_str: String,
}

/// Builds the tokenizer, and names its special tokens.
pub(crate) fn build(bytes: &[u8], special: &mut SpecialTokens) -> Result<tokenizers::Tokenizer, TextError> {
    let invalid = |reason: String| TextError::InvalidFile { file: FILE.to_owned(), reason };
    let tekken: Tekken = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
    let first = special_tokens(&tekken).map_err(invalid)?;
    let ranks = ranks(&tekken, first.len()).map_err(invalid)?;
    let model = tiktoken::model(&ranks, &first).map_err(invalid)?;
    let mut backend = tokenizers::Tokenizer::new(model);

    let level = |prefix: bool, trim: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": trim, "use_regex": regex});
    let split = json!({"type": "Split", "pattern": {"Regex": tekken.config.pattern}, "behavior": "Isolated", "invert": false});
    let cut = json!({"type": "Sequence", "pretokenizers": [split, level(false, true, false)]});
    let cut = serde_json::from_value::<PreTokenizerWrapper>(cut);
    backend.with_pre_tokenizer(Some(cut.map_err(|error| invalid(format!("config.pattern: {error}")))?));
    let part = |error: serde_json::Error| TextError::Tokenizer { reason: error.to_string() };
    let decoder = serde_json::from_value::<DecoderWrapper>(level(true, true, true)).map_err(part)?;
    backend.with_decoder(Some(decoder));
    let processor = serde_json::from_value::<PostProcessorWrapper>(level(true, false, true)).map_err(part)?;
    backend.with_post_processor(Some(processor));
    let added = first.iter().map(|token| AddedToken::special(token.clone()).to_library());
    backend.add_tokens(added).map_err(failed)?;
    for (key, token) in NAMES.into_iter().filter(|(_, token)| first.iter().any(|known| known == token)) {
        special.class_token(key, token);
    }
    Ok(backend)
}

/// The special tokens by id, placeholders for those that are only counted.
fn special_tokens(tekken: &Tekken) -> Result<Vec<String>, String> {
    let mut tokens: Vec<String> = match &tekken.special_tokens {
        None => FIRST_SPECIAL_TOKENS.map(str::to_owned).to_vec(),
        Some(listed) => {
            let mut listed: Vec<&Special> = listed.iter().collect();
            listed.sort_unstable_by_key(|token| token.rank);
            for (token, rank) in listed.iter().zip(0..) {
                if token.rank != rank {
                    return Err(format!(
                        "special_tokens: there is no token of rank {rank}, or there are two"
                    ));
                }
            }
            listed.into_iter().map(|token| token.token_str.clone()).collect()
        }
    };
    let count = tekken.config.default_num_special_tokens.unwrap_or(tokens.len());
    if count < tokens.len() || count > MAX_ADDED_TOKENS {
        return Err(format!(
            "config.default_num_special_tokens is {count}, but must be {} to {MAX_ADDED_TOKENS}",
            tokens.len()
        ));
    }
    tokens.extend((tokens.len()..count).map(|id| format!("<SPECIAL_{id}>")));
    let mut seen = HashMap::new();
    for (token, id) in tokens.iter().zip(0..) {
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
            return Err(format!(
                "special_tokens: token {id} has {} bytes, but must have 1 to {MAX_TOKEN_BYTES}",
                token.len()
            ));
        }
        if let Some(other) = seen.insert(token.as_str(), id) {
            return Err(format!("special_tokens: tokens {other} and {id} are both {token:?}"));
        }
    }
    Ok(tokens)
}

/// The other tokens by their ids among themselves: as many as the configuration counts.
fn ranks(tekken: &Tekken, special_tokens: usize) -> Result<HashMap<Vec<u8>, u32>, String> {
    let size = tekken.config.default_vocab_size.unwrap_or(special_tokens + tekken.vocab.len());
    let Some(count) = size.checked_sub(special_tokens).filter(|count| *count <= tekken.vocab.len()) else {
        return Err(format!(
            "config.default_vocab_size is {size}, but there are {special_tokens} special tokens and {} others",
            tekken.vocab.len()
        ));
    };
    if size > MAX_VOCABULARY {
        return Err(format!("config.default_vocab_size is {size}, more than {MAX_VOCABULARY}"));
    }
    let mut ranks = HashMap::new();
    let mut work = 0;
    for (token, rank) in tekken.vocab[..count].iter().zip(0..) {
        let bytes = data_encoding::BASE64.decode(token.token_bytes.as_bytes());
        let bytes = bytes.map_err(|error| format!("vocab: token {rank} is no base64: {error}"))?;
        if bytes.is_empty() || bytes.len() > MAX_TOKEN_BYTES {
            let length = bytes.len();
            return Err(format!(
                "vocab: token {rank} has {length} bytes, but must have 1 to {MAX_TOKEN_BYTES}"
            ));
        }
        work += bytes.len() * bytes.len();
        if work > MAX_MERGE_WORK {
            return Err(format!("vocab: the tokens up to {rank} are too long together"));
        }
        if ranks.insert(bytes, rank).is_some() {
            return Err(format!("vocab: token {rank} was there before"));
        }
    }
    match (0..=u8::MAX).find(|byte| !ranks.contains_key([*byte].as_slice())) {
        Some(missing) => Err(format!("vocab: there is no token for the byte 0x{missing:02X}")),
        None => Ok(ranks),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is different about a file.
    type Change = fn(&mut serde_json::Value);

    fn tekken(change: impl FnOnce(&mut serde_json::Value)) -> Tekken {
        let vocab: Vec<_> =
            (0..=u8::MAX).map(|byte| json!({"token_bytes": data_encoding::BASE64.encode(&[byte])})).collect();
        let specials = json!([{"rank": 1, "token_str": "<s>"}, {"rank": 0, "token_str": "<unk>"}]);
        let mut value = json!({"config": {"pattern": "."}, "vocab": vocab, "special_tokens": specials});
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn special_tokens_come_first_and_are_filled_up() {
        let of = |change: Change| special_tokens(&tekken(change));
        assert_eq!(of(|_| ()).unwrap(), ["<unk>", "<s>"]);
        let filled = of(|value| value["config"]["default_num_special_tokens"] = json!(4));
        assert_eq!(filled.unwrap(), ["<unk>", "<s>", "<SPECIAL_2>", "<SPECIAL_3>"]);
        let old = of(|value| value["special_tokens"] = json!(null));
        assert_eq!(old.unwrap()[11], "<pad>");
        let cases: [(Change, &str); 4] = [
            (
                |value| value["special_tokens"][0]["rank"] = json!(2),
                "special_tokens: there is no token of rank 1",
            ),
            (
                |value| value["special_tokens"][0]["token_str"] = json!("<unk>"),
                "tokens 0 and 1 are both \"<unk>\"",
            ),
            (|value| value["special_tokens"][0]["token_str"] = json!(""), "token 1 has 0 bytes"),
            (
                |value| value["config"]["default_num_special_tokens"] = json!(1),
                "config.default_num_special_tokens is 1",
            ),
        ];
        for (change, expected) in cases {
            let error = of(change).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn tokens_are_counted_and_measured() {
        let of = |change: Change| ranks(&tekken(change), 2);
        assert_eq!(of(|_| ()).unwrap().len(), 256);
        let cases: [(Change, &str); 5] = [
            (|value| value["config"]["default_vocab_size"] = json!(1), "config.default_vocab_size is 1"),
            (|value| value["config"]["default_vocab_size"] = json!(259), "config.default_vocab_size is 259"),
            (|value| value["config"]["default_vocab_size"] = json!(257), "no token for the byte 0xFF"),
            (|value| value["vocab"][7]["token_bytes"] = json!("!"), "vocab: token 7 is no base64"),
            (|value| value["vocab"][7]["token_bytes"] = json!("AA=="), "vocab: token 7 was there before"),
        ];
        for (change, expected) in cases {
            let error = of(change).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
