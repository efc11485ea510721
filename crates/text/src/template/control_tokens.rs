//! Control tokens that stand in the words of a user are words, not control tokens.
//!
//! A client that may only fill in messages could otherwise write `<|im_end|>` and go on as the system. So before rendering,
//! every control token in the request's strings is put between two private-use characters; after rendering they tell the
//! user's from the template's own, and the user's are encoded without looking at special tokens. (transformers 5 calls this
//! `sanitize_control_tokens`; mlx-lm does not use it.)

use std::collections::HashMap;

use serde_json::Value;

use crate::{TextError, Tokenizer};

/// From the last private-use plane, where no font and no vocabulary has anything.
const START: char = '\u{10FF00}';
const END: char = '\u{10FF01}';

/// The strings that mean something to the model beyond their letters.
#[derive(Debug, Default)]
pub(super) struct ControlTokens {
    /// By first character, longest first: a token takes priority over those it contains.
    by_first: HashMap<char, Vec<String>>,
}

impl ControlTokens {
    /// All special tokens, and the added ones that a template writes.
    pub(super) fn of<'a>(tokenizer: &Tokenizer, sources: impl Iterator<Item = &'a String> + Clone) -> Self {
        let mut by_first: HashMap<char, Vec<String>> = HashMap::new();
        for (token, special) in tokenizer.added_tokens() {
            let written = special || sources.clone().any(|source| source.contains(token.as_str()));
            if let (true, Some(first)) = (written, token.chars().next()) {
                by_first.entry(first).or_default().push(token);
            }
        }
        for tokens in by_first.values_mut() {
            tokens.sort_by_key(|token| std::cmp::Reverse(token.len()));
        }
        Self { by_first }
    }

    /// The text with its control tokens marked. Marks that it brings itself are dropped: they could forge one.
    pub(super) fn mark(&self, text: &str) -> String {
        let text: String = text.chars().filter(|character| !is_mark(*character)).collect();
        let mut marked = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(first) = rest.chars().next() {
            let found = self
                .by_first
                .get(&first)
                .and_then(|tokens| tokens.iter().find(|token| rest.starts_with(token.as_str())));
            let length = match found {
                Some(token) => {
                    marked.push(START);
                    marked.push_str(token);
                    marked.push(END);
                    token.len()
                }
                None => {
                    marked.push(first);
                    first.len_utf8()
                }
            };
            rest = &rest[length..];
        }
        marked
    }

    /// The same for every string in a value; keys are the request's grammar, not its words.
    pub(super) fn mark_all(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.mark(text),
            Value::Array(items) => items.iter_mut().for_each(|item| self.mark_all(item)),
            Value::Object(fields) => fields.values_mut().for_each(|field| self.mark_all(field)),
            _ => {}
        }
    }
}

/// Token ids of a rendered text with marks.
pub(super) fn encode_marked(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, TextError> {
    if !text.contains(is_mark) {
        return tokenizer.encode(text, false);
    }
    let newline = tokenizer.encode("\n", false)?;
    let mut ids = Vec::new();
    let mut rest = text;
    let mut as_words = false;
    let mut first = true;
    loop {
        let end = rest.find(is_mark).unwrap_or(rest.len());
        let piece = &rest[..end];
        let mark = rest[end..].chars().next();
        // A template's string methods may have torn a pair of marks apart: then what follows is ordinary text.
        let words = as_words && mark == Some(END);
        if first {
            ids.extend(tokenizer.encode(piece, false)?);
        } else if !piece.is_empty() {
            ids.extend(encode_inside(tokenizer, piece, words, &newline)?);
        }
        first = false;
        let Some(mark) = mark else { return Ok(ids) };
        as_words = mark == START;
        rest = &rest[end + mark.len_utf8()..];
    }
}

/// A piece from within a text. SentencePiece puts a space in front of every text it sees; behind a line break, which is
/// taken off again, it does not.
fn encode_inside(
    tokenizer: &Tokenizer,
    piece: &str,
    words: bool,
    newline: &[u32],
) -> Result<Vec<u32>, TextError> {
    let encode =
        |text: &str| if words { tokenizer.encode_words(text) } else { tokenizer.encode(text, false) };
    let with_newline = encode(&format!("\n{piece}"))?;
    let ids = match with_newline.strip_prefix(newline) {
        Some(ids) => ids.to_vec(),
        None => encode(piece)?,
    };
    if words && tokenizer.token_to_id(piece).is_some_and(|token| ids.contains(&token)) {
        let reason = format!("it has no other way to write {piece:?} than as a control token");
        return Err(TextError::Tokenizer { reason });
    }
    Ok(ids)
}

fn is_mark(character: char) -> bool {
    character == START || character == END
}
