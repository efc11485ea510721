//! What an answer has to look like, as data. `text` compiles it for a tokenizer; the last stage follows it token by token.

/// A language that the answer is a sentence of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON by this JSON Schema (its text).
    JsonSchema(String),
    /// A regular expression that matches the whole answer.
    Regex(String),
    /// A grammar in Lark's notation, with a rule `start`.
    Lark(String),
}

impl Grammar {
    /// Longest text of a schema, expression or grammar, in bytes.
    pub const MAX_BYTES: usize = 256 << 10;

    /// Its text; empty for [`Grammar::JsonObject`].
    pub fn text(&self) -> &str {
        match self {
            Self::JsonObject => "",
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text,
        }
    }
}
