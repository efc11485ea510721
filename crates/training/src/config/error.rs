//! What can be wrong with a configuration: always with the file, the line and the key.

/// A configuration that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The text is no YAML, or YAML beyond what a configuration needs.
    #[error("{origin} line {line}: {reason}")]
    Syntax {
        /// The file.
        origin: String,
        /// From 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A key that nothing knows.
    #[error("{place}: there is no key {key:?}{}", near.as_ref().map_or_else(String::new, |near| format!("; did you mean {near:?}?")))]
    Unknown {
        /// File and line, or the flag.
        place: String,
        /// The key with what it lies in: "lora_parameters.rnak".
        key: String,
        /// The known key that is spelled most like it.
        near: Option<String>,
    },
    /// A value that cannot be.
    #[error("{place}: {key} {problem}")]
    Value {
        /// File and line, or the flag.
        place: String,
        /// The key.
        key: String,
        /// What is wrong, as the end of a sentence that begins with the key.
        problem: String,
    },
}
