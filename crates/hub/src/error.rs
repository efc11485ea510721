//! Why a model could not be had.

use crate::source::DATASETS;
use std::io;
use std::path::{Path, PathBuf};

/// Why a model could not be had. The text says what to try.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The hub has no such repository, or hides it.
    #[error("{endpoint} has no {} {}; check the spelling, or set HF_TOKEN if it is private", if id.starts_with(DATASETS) { "data set" } else { "model" }, id.trim_start_matches(DATASETS))]
    NotFound {
        /// What was asked for.
        id: String,
        /// Which hub.
        endpoint: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{id} has no revision {revision}")]
    NoRevision {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
    },
    /// The repository lacks a file that its own list names.
    #[error("{id} lists {file} but does not have it; try again later")]
    NoFile {
        /// The repository.
        id: String,
        /// The file.
        file: String,
    },
    /// Someone must accept the model's terms first.
    #[error(
        "{id} is gated: accept its terms at {endpoint}/{id}, then set HF_TOKEN to a token that may read it"
    )]
    Gated {
        /// The repository.
        id: String,
        /// Which hub.
        endpoint: String,
    },
    /// The hub refuses, with or without a token.
    #[error("{endpoint} refuses access to {id} (status {status}); set HF_TOKEN to a token that may read it{}", if *had_token { " (the present one may not)" } else { "" })]
    Unauthorised {
        /// The repository.
        id: String,
        /// Which hub.
        endpoint: String,
        /// HTTP status.
        status: u16,
        /// Was a token sent?
        had_token: bool,
    },
    /// The repository has no weights that we can read.
    #[error("{id} has no model*.safetensors; take a repository with weights in that format")]
    NoWeights {
        /// The repository.
        id: String,
    },
    /// The data set has no rows that we can read.
    #[error("{id} has no .jsonl or .parquet file; take a data set in one of these formats")]
    NoData {
        /// The repository.
        id: String,
    },
    /// The repository holds no adapter.
    #[error("{id} is no adapter: it has neither adapters.safetensors nor adapter_model.safetensors")]
    NotAnAdapter {
        /// What was named.
        id: String,
    },
    /// The hub cannot be reached, or connections keep breaking.
    #[error("{url} cannot be reached; check the network, or HF_ENDPOINT")]
    Network {
        /// What was asked for.
        url: String,
        /// Why.
        #[source]
        source: ureq::Error,
    },
    /// The connection broke again and again while a file came.
    #[error(
        "the download of {file} broke off after {received} of {total} bytes; run it again to go on from there"
    )]
    Interrupted {
        /// The file.
        file: String,
        /// Bytes kept.
        received: u64,
        /// Bytes of the whole.
        total: u64,
        /// The last failure.
        #[source]
        source: io::Error,
    },
    /// The hub answers with something other than a file or a refusal.
    #[error("{url} answers with status {status}; try again later")]
    Status {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// The hub's answer makes no sense.
    #[error("{url} does not answer as a Hugging Face hub does: {reason}")]
    Protocol {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// What came is not what the hub announced.
    #[error(
        "{file} arrived damaged: its SHA-256 is not the one the hub announced; it was deleted, run it again"
    )]
    Corrupt {
        /// The file.
        file: String,
    },
    /// Offline, and the cache lacks something.
    #[error("{id} is not complete in {}: it lacks {}; unset HF_HUB_OFFLINE to download it", cache.display(), missing.join(", "))]
    Offline {
        /// The model.
        id: String,
        /// The cache.
        cache: PathBuf,
        /// What is missing, by file name.
        missing: Vec<String>,
    },
    /// The disk fails us: full, read-only, no permission.
    #[error("{} cannot be written", path.display())]
    Disk {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The disk is too full for the model.
    #[error("{} has {:.2} GB free, but the download needs {:.2} GB; free some space or set HF_HUB_CACHE to another disk", folder.display(), gigabytes(*free), gigabytes(*needed))]
    NoSpace {
        /// A folder on the disk.
        folder: PathBuf,
        /// Bytes that would have to come.
        needed: u64,
        /// Bytes that there is room for.
        free: u64,
    },
    /// A folder that was there when it was named is gone.
    #[error("there is no folder {}", .0.display())]
    NoFolder(PathBuf),
    /// This program was built without the demo model's files.
    #[error("this program was built without the demo model; name another with --model")]
    NoDemo,
}

impl HubError {
    /// May the same come to a good end later, or on another machine: the network, the hub or the disk fails us now?
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Network { .. }
            | Self::Interrupted { .. }
            | Self::Status { .. }
            | Self::Protocol { .. }
            | Self::NoFile { .. }
            | Self::Corrupt { .. }
            | Self::Disk { .. }
            | Self::NoSpace { .. } => true,
            Self::NotFound { .. }
            | Self::NoRevision { .. }
            | Self::Gated { .. }
            | Self::Unauthorised { .. }
            | Self::NoWeights { .. }
            | Self::NoData { .. }
            | Self::NotAnAdapter { .. }
            | Self::Offline { .. }
            | Self::NoFolder(_)
            | Self::NoDemo => false,
        }
    }

    /// Is the hub merely out of reach, so that a cached copy is better than none?
    pub(crate) fn is_out_of_reach(&self) -> bool {
        match self {
            Self::Network { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 429,
            _ => false,
        }
    }
}

fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// For `map_err`.
pub(crate) fn disk(path: &Path) -> impl FnOnce(io::Error) -> HubError {
    move |source| HubError::Disk { path: path.into(), source }
}
