//! What a client writes, and what can be wrong with it.

use llguidance::api::TopLevelGrammar;
use mlxnode_compute::Grammar;
use serde_json::{Value, json};

/// A language as its author wrote it down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// Any JSON object.
    JsonObject,
    /// JSON by this JSON Schema (its text). References must stay inside of it.
    JsonSchema(&'a str),
    /// A regular expression that matches the whole answer, as the crate `regex` writes them.
    Regex(&'a str),
    /// A grammar in llguidance's dialect of Lark, with a rule `start`.
    Lark(&'a str),
}

/// Why a grammar cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is none, or it is larger than allowed.
    #[error("the {kind} cannot be used: {reason}")]
    Invalid {
        /// "JSON schema", "regular expression" or "grammar".
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Following it takes more work than a step may.
    #[error("the answer's grammar takes too much work: {reason}")]
    TooMuchWork {
        /// What gave out.
        reason: String,
    },
    /// A token came that it does not allow.
    #[error("token {token} is not allowed by the answer's grammar")]
    Token {
        /// Its id.
        token: u32,
    },
    /// The tokenizer has no tree of bytes to walk along.
    #[error("this model's vocabulary cannot be used with grammars: {reason}")]
    Vocabulary {
        /// Why.
        reason: String,
    },
}

/// Longest reason that a client is shown: the library quotes whole grammars.
const MAX_REASON: usize = 500;

impl<'a> From<&'a Grammar> for Source<'a> {
    fn from(grammar: &'a Grammar) -> Self {
        match grammar {
            Grammar::JsonObject => Self::JsonObject,
            Grammar::JsonSchema(text) => Self::JsonSchema(text),
            Grammar::Regex(text) => Self::Regex(text),
            Grammar::Lark(text) => Self::Lark(text),
        }
    }
}

impl Source<'_> {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::JsonObject | Self::JsonSchema(_) => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Lark(_) => "grammar",
        }
    }

    pub(super) fn invalid(&self, reason: impl std::fmt::Display) -> GrammarError {
        GrammarError::Invalid { kind: self.kind(), reason: shortened(&reason.to_string()) }
    }

    /// As the library takes it.
    pub(super) fn to_library(self) -> Result<TopLevelGrammar, GrammarError> {
        Ok(match self {
            Self::JsonObject => TopLevelGrammar::from_json_schema(json!({"type": "object"})),
            Self::JsonSchema(text) => {
                let schema: Value = serde_json::from_str(text).map_err(|error| self.invalid(error))?;
                if !schema.is_object() && !schema.is_boolean() {
                    return Err(self.invalid("it must be an object"));
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Lark(text) if text.trim().is_empty() => return Err(self.invalid("it is empty")),
            Self::Lark(text) => TopLevelGrammar::from_lark(text.to_owned()),
        })
    }
}

pub(super) fn shortened(text: &str) -> String {
    let line = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    match line.char_indices().nth(MAX_REASON) {
        None => line,
        Some((end, _)) => format!("{}…", &line[..end]),
    }
}
