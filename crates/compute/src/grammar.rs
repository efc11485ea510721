//! What an answer has to look like: as data, and as the seam between those who know grammars and those who draw tokens.
//!
//! `text` compiles a [`Grammar`] for a tokenizer; the last stage follows it token by token through a [`TokenConstraint`] and knows
//! neither grammars nor tokenizers.

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

/// Which tokens may come next in one sequence.
pub trait TokenConstraint {
    /// Bit `token % 32` of word `token / 32` is set for each token that may come next. Never empty before the end.
    ///
    /// # Errors
    /// When the grammar cannot be followed any further, for example because it grew beyond its limits.
    fn mask(&mut self) -> Result<&[u32], GrammarError>;

    /// The token that came. True: the sentence is complete, and nothing may follow.
    ///
    /// # Errors
    /// When the token was not among those of the mask.
    fn accept(&mut self, token: u32) -> Result<bool, GrammarError>;
}

/// Makes constraints for one model's tokenizer.
pub trait Grammars {
    /// A constraint at the beginning of the answer.
    ///
    /// # Errors
    /// A grammar that cannot be read, or that needs more than the limits allow.
    fn constraint(&mut self, grammar: &Grammar) -> Result<Box<dyn TokenConstraint>, GrammarError>;
}

/// Why a grammar cannot be followed, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);
