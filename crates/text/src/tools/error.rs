//! Why text that should be a tool call is none.

/// What is wrong with a tool call. None of it repeats the model's words: answers do not belong into logs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    /// Markers with nothing between them that calls a function.
    #[error("the model marked a tool call but named no function to call")]
    NoCall,
    /// A call without its end, usually because the answer reached its limit.
    #[error("a tool call breaks off in the middle; allow the answer more tokens")]
    Unfinished,
    /// Something that must be JSON is not.
    #[error("a tool call is not valid JSON at line {line}, column {column}")]
    Json {
        /// From 1, within the JSON.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// A call whose function has no name.
    #[error("a tool call does not name its function")]
    NoName,
    /// Arguments that are a list or a plain value.
    #[error("the arguments of a tool call are not an object")]
    ArgumentsNotObject,
    /// An argument without a name.
    #[error("an argument of a tool call has no name")]
    NoArgumentName,
    /// An argument that its schema declares a number.
    #[error("an argument of a tool call is declared as {declared} and is none")]
    NotANumber {
        /// "integer" or "number".
        declared: &'static str,
    },
    /// Values nested deeper than any honest call.
    #[error("a tool call is nested more than {limit} levels deep")]
    TooDeep {
        /// The most levels that are read.
        limit: usize,
    },
    /// A call longer than is kept in memory.
    #[error("a tool call is longer than {limit} bytes; it is given back as text")]
    TooLong {
        /// The most bytes that are collected.
        limit: usize,
    },
    /// What whoever read the call said about it.
    #[error("{0}")]
    Told(String),
}

impl From<serde_json::Error> for ToolError {
    fn from(error: serde_json::Error) -> Self {
        if error.is_eof() {
            Self::Unfinished
        } else {
            Self::Json { line: error.line(), column: error.column() }
        }
    }
}
