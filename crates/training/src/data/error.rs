//! What can be wrong with data: always with the file, and the line or row.

use mlxnode_text::TextError;
use std::path::PathBuf;

/// Data that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Nothing there.
    #[error("there is no file or folder {}", path.display())]
    NotThere {
        /// What was asked for.
        path: PathBuf,
    },
    /// The disk says no.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file of a kind that is not read.
    #[error("{} is no data that can be read: .jsonl and .parquet files are", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// A damaged Parquet file, or one of a kind that is not read.
    #[error("{}: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// A row that cannot be learned from.
    #[error("{place}: {problem}")]
    Row {
        /// File and line or row.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A row that the chat template or the tokenizer refuses.
    #[error("{place}: it cannot be made into tokens")]
    Encode {
        /// File and line or row.
        place: String,
        /// Why.
        #[source]
        source: TextError,
    },
    /// A folder without data.
    #[error("{} holds no data: no .jsonl or .parquet file", path.display())]
    NoData {
        /// The folder.
        path: PathBuf,
    },
    /// A split that the data does not have.
    #[error("{} has no split {name:?}; it has {}", path.display(), known.join(", "))]
    NoSplit {
        /// The folder.
        path: PathBuf,
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// Several configurations of one data set and none named.
    #[error("{} has several configurations ({}); {}", path.display(), known.join(", "), match name {
        Some(name) => format!("none is named {name:?}"),
        None => "name one of them with config.name of hf_dataset".to_owned(),
    })]
    Subset {
        /// The folder.
        path: PathBuf,
        /// What was asked for.
        name: Option<String>,
        /// What there is.
        known: Vec<String>,
    },
    /// Nothing to learn from, or to measure on.
    #[error("the {set} set has no rows{}", if *set == "training" { ": there is nothing to learn from" } else { ": there is nothing to measure on" })]
    Empty {
        /// "training" or "test".
        set: &'static str,
    },
    /// More rows than can be numbered.
    #[error("{} and what comes before have more rows than can be trained on at once", path.display())]
    TooMany {
        /// The file.
        path: PathBuf,
    },
}
