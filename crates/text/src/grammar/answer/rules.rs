//! A grammar that is being written in llguidance's Lark: marks, free text up to a mark, JSON by a schema.

use crate::Tokenizer;
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Any whitespace that a model may put between parts; bounded, so that it is no way never to end.
pub(super) const SPACE: &str = "/[ \\t\\r\\n]{0,4}/";

/// The rules so far.
pub(super) struct Rules<'a> {
    tokenizer: &'a Tokenizer,
    pub(super) text: String,
    made: usize,
    has_any: bool,
}

impl<'a> Rules<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, text: String::new(), made: 0, has_any: false }
    }

    pub(super) fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    /// A rule of this name.
    pub(super) fn add(&mut self, name: &str, body: &str) {
        let _ = writeln!(self.text, "{name}: {body}");
    }

    /// A rule with a name of its own, which is returned.
    pub(super) fn named(&mut self, body: &str) -> String {
        let name = self.fresh("r");
        self.add(&name, body);
        name
    }

    fn fresh(&mut self, prefix: &str) -> String {
        self.made += 1;
        format!("{prefix}{}", self.made)
    }

    /// Any text.
    pub(super) fn any(&mut self) -> &'static str {
        if !std::mem::replace(&mut self.has_any, true) {
            self.add("ANY", "/(?s:.*)/");
        }
        "ANY"
    }

    /// Any text up to the mark's first occurrence, with the mark.
    pub(super) fn until(&mut self, mark: &str) -> String {
        let parts = self.parts(mark);
        match parts.split_first() {
            None => self.any().to_owned(),
            // A special token is no text, so that no text can hold it.
            Some((Part::Special(_), _)) => format!("{} {}", self.any(), written(&parts)),
            Some((Part::Plain(text), rest)) => {
                let name = self.fresh("r");
                let _ = writeln!(self.text, "{name}[suffix={}]: /(?s:.*)/", quoted(text));
                format!("{name} {}", written(rest)).trim_end().to_owned()
            }
        }
    }

    /// JSON by a schema. It stands on one line, so that it cannot end where its author likes.
    pub(super) fn json(&mut self, schema: &Value) -> String {
        // `true` is a schema without wishes.
        let schema = if schema.is_object() { schema.to_string() } else { json!({}).to_string() };
        self.named(&format!("%json {schema}"))
    }

    /// A mark: special tokens by their ids, everything else by its text.
    pub(super) fn mark(&self, words: &str) -> String {
        written(&self.parts(words))
    }

    fn is_special(&self, words: &str) -> bool {
        self.tokenizer.token_to_id(words).is_some_and(|id| self.tokenizer.is_special(id))
    }

    fn parts(&self, words: &str) -> Vec<Part> {
        // Marks that follow each other without space are told apart by the longest token that fits.
        let mut rest = words;
        let mut parts = Vec::new();
        let mut plain = String::new();
        while let Some(first) = rest.chars().next() {
            let mut ends = rest.char_indices().map(|(at, character)| at + character.len_utf8()).rev();
            let special = ends.find(|end| self.is_special(&rest[..*end]));
            match special {
                Some(end) => {
                    if !plain.is_empty() {
                        parts.push(Part::Plain(std::mem::take(&mut plain)));
                    }
                    parts.extend(self.tokenizer.token_to_id(&rest[..end]).map(Part::Special));
                    rest = &rest[end..];
                }
                None => {
                    plain.push(first);
                    rest = &rest[first.len_utf8()..];
                }
            }
        }
        if !plain.is_empty() {
            parts.push(Part::Plain(plain));
        }
        parts
    }
}

/// A part of a mark.
enum Part {
    Plain(String),
    Special(u32),
}

fn written(parts: &[Part]) -> String {
    let written = parts.iter().map(|part| match part {
        Part::Plain(text) => quoted(text),
        Part::Special(id) => format!("<[{id}]>"),
    });
    written.collect::<Vec<_>>().join(" ")
}

/// A text as Lark writes it, which is JSON's way.
pub(super) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
