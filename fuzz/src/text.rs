//! Text files from the parts of an input, and tokenizers that need not be built for each input anew.

use mlxnode_text::{TextError, TextFiles, Tokenizer};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// A byte-level vocabulary of a few hundred tokens with ChatML's control tokens and marks of reasoning.
const TOKENIZER: &[u8] =
    include_bytes!("../../crates/text/tests/golden/tokenizers/byte_level/tokenizer.json");

/// Most ids in an input.
const MOST_IDS: usize = 2048;

/// The parts that are text files of a model, with the vocabulary above where they have none. Err when one is too large.
pub fn files(parts: &[(&str, &[u8])]) -> Result<TextFiles, TextError> {
    let mut files: BTreeMap<String, Vec<u8>> = parts
        .iter()
        .filter(|(name, _)| TextFiles::names().any(|known| known == *name))
        .map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()))
        .collect();
    let vocabularies =
        ["tokenizer.json", "tekken.json", "tokenizer.model", "tiktoken.model", "qwen.tiktoken", "vocab.json"];
    if !vocabularies.iter().any(|name| files.contains_key(*name)) {
        files.insert("tokenizer.json".to_owned(), TOKENIZER.to_vec());
    }
    TextFiles::from_map(files)
}

/// The tokenizer of these files. The usual one is built once.
pub fn tokenizer(files: &TextFiles) -> Result<Tokenizer, TextError> {
    static USUAL: OnceLock<Option<Tokenizer>> = OnceLock::new();
    let beside = files.iter().any(|(name, _)| name == "tokenizer_config.json" || name == "config.json");
    if beside || files.get("tokenizer.json") != Some(TOKENIZER) {
        return Tokenizer::from_files(files);
    }
    let usual = USUAL.get_or_init(|| Tokenizer::from_files(files).ok());
    usual
        .clone()
        .ok_or_else(|| TextError::Tokenizer { reason: "the fuzzer's own vocabulary is broken".to_owned() })
}

/// A part as text; what is not UTF-8 is replaced.
pub fn part(parts: &[(&str, &[u8])], name: &str) -> String {
    let found = parts.iter().find(|(known, _)| *known == name);
    found.map(|(_, bytes)| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default()
}

/// The part "ids": two bytes each, and the last two values for ids that no vocabulary has.
pub fn ids(parts: &[(&str, &[u8])]) -> Vec<u32> {
    let bytes = parts.iter().find(|(name, _)| *name == "ids").map_or(&[][..], |(_, bytes)| bytes);
    let wide = |id: u16| if id >= u16::MAX - 1 { u32::MAX - u32::from(u16::MAX - id) } else { id.into() };
    bytes.as_chunks().0.iter().take(MOST_IDS).map(|pair| wide(u16::from_le_bytes(*pair))).collect()
}

/// Does everything that is done with a vocabulary: text to ids and back, ids to text at once and one by one, special tokens.
pub fn use_up(tokenizer: &Tokenizer, text: &str, ids: &[u32]) {
    let _ = tokenizer.encode_prompt(text);
    if let Ok(own) = tokenizer.encode(text, false) {
        stream(tokenizer, &own);
    }
    let _ = tokenizer.decode(ids, false);
    let _ = tokenizer.decode(ids, true);
    stream(tokenizer, ids);
    let _ = tokenizer.xtc_special_tokens();
    let _ = tokenizer.parse_token(text);
    tokenizer.bos_token_id();
    tokenizer.has_thinking();
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) {
    let mut detokenizer = tokenizer.detokenizer();
    for id in ids {
        detokenizer.push(*id);
    }
    detokenizer.finish();
}
