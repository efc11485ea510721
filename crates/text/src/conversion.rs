//! A tokenizer from files other than tokenizer.json: sentencepiece's tokenizer.model, one of tiktoken's, Mistral's tekken.json, or
//! GPT-2's vocab.json and merges.txt.
//!
//! transformers 5 first builds the model and its rules, then adds the tokens that the configuration names (in this order:
//! `added_tokens_decoder`, the named special tokens, the further ones), and then decides on bos and eos. New tokens get the
//! next free ids, whatever id the configuration gives them.

use std::collections::HashSet;

use serde_json::{Value, json};
use tokenizers::PostProcessorWrapper;

use crate::{
    TextError, TextFiles, byte_pairs,
    files::VOCABULARIES,
    sentencepiece,
    special::{AddedToken, SpecialTokens},
    tekken, tiktoken,
    tokenizer::failed,
};

/// Builds the tokenizer from whichever of the files there is; gives its name too.
pub(crate) fn build(
    files: &TextFiles,
    special: &mut SpecialTokens,
) -> Result<(tokenizers::Tokenizer, &'static str), TextError> {
    let found = VOCABULARIES.iter().find_map(|name| files.get(name).map(|bytes| (*name, bytes)));
    let (name, bytes) = found.ok_or(TextError::MissingFile { file: "tokenizer.json" })?;
    let (mut backend, declared) = match name {
        tekken::FILE => (tekken::build(bytes, special)?, Vec::new()),
        "vocab.json" => (byte_pairs::build(bytes, files, special)?, Vec::new()),
        "tokenizer.model" if !tiktoken::looks_like(bytes) => sentencepiece::build(name, bytes, special)?,
        _ => (tiktoken::build(name, bytes, special)?, Vec::new()),
    };
    add_tokens(&mut backend, special, declared)?;
    if backend.get_post_processor().is_none() || special.add_bos.is_some() || special.add_eos.is_some() {
        let around = bos_and_eos(&backend, special)?;
        backend.with_post_processor(Some(around));
    }
    Ok((backend, name))
}

fn add_tokens(
    backend: &mut tokenizers::Tokenizer,
    special: &SpecialTokens,
    declared: Vec<AddedToken>,
) -> Result<(), TextError> {
    let named: Vec<&str> = special.named.values().filter_map(Value::as_str).collect();
    let mut known: HashSet<String> =
        backend.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
    let mut tokens: Vec<AddedToken> = Vec::new();
    for token in special.added.values() {
        // What the vocabulary has added already keeps its properties.
        if !token.content.is_empty() && known.insert(token.content.clone()) {
            tokens.push(AddedToken {
                special: token.special || named.contains(&token.content.as_str()),
                normalized: Some(token.normalized.unwrap_or(!token.special)),
                ..token.clone()
            });
        }
    }
    let further = special.extra.clone().unwrap_or(declared);
    for token in named.into_iter().map(AddedToken::special).chain(further) {
        if !token.content.is_empty() && known.insert(token.content.clone()) {
            tokens.push(token);
        }
    }
    backend.add_tokens(tokens.iter().map(AddedToken::to_library)).map_err(failed)?;
    Ok(())
}

/// Puts bos in front and eos behind, where the configuration wants them.
fn bos_and_eos(
    backend: &tokenizers::Tokenizer,
    special: &SpecialTokens,
) -> Result<PostProcessorWrapper, TextError> {
    let token = |wanted: Option<bool>, key: &str| {
        let text = special.text(key).filter(|_| wanted == Some(true))?;
        Some((text.to_owned(), backend.token_to_id(text)?))
    };
    let bos = token(special.add_bos, "bos_token");
    let eos = token(special.add_eos, "eos_token");
    let around = |sequence: &str, kind: u32| {
        let marker = |token: &Option<(String, u32)>| {
            token.iter().map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": kind}})).next()
        };
        let middle = json!({"Sequence": {"id": sequence, "type_id": kind}});
        marker(&bos).into_iter().chain([middle]).chain(marker(&eos)).collect::<Vec<Value>>()
    };
    let special_tokens: serde_json::Map<String, Value> = bos
        .iter()
        .chain(&eos)
        .map(|(text, id)| (text.clone(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let (single, second) = (around("A", 0), around("B", 1));
    let template = json!({
        "type": "TemplateProcessing",
        "pair": single.iter().chain(&second).collect::<Vec<_>>(),
        "single": single,
        "special_tokens": special_tokens,
    });
    serde_json::from_value(template).map_err(|error| TextError::Tokenizer { reason: error.to_string() })
}
