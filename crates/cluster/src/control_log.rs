//! The durable, ordered record of the coordinator's decisions.
//!
//! [`ControlLog`] is the seam: today one voter writes to SQLite on its own disk, [`SqliteControlLog`]; replication comes
//! behind the same trait. What a decision means is the coordinator's business, here it is bytes with an index and an
//! epoch. An entry whose index was answered is on disk and survives a crash of the process or the machine.

mod sqlite;

pub use sqlite::SqliteControlLog;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// Longest record, in bytes: decisions are small, and the log is replicated.
pub const MAX_RECORD: usize = 64 * 1024;
/// Longest snapshot, in bytes: the whole log shall stay below it.
pub const MAX_SNAPSHOT: usize = 64 * 1024 * 1024;

/// Who decided: compared in order. A generation begins when a standby takes over without the old coordinator's
/// agreement, a term when one is elected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ControlEpoch {
    /// Raised by a forced promotion.
    pub generation: u64,
    /// Raised by an election within the generation.
    pub term: u64,
}

impl fmt::Display for ControlEpoch {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}", self.generation, self.term)
    }
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlEntry {
    /// Counts from 1, without gaps.
    pub index: u64,
    /// Under whom it was decided.
    pub epoch: ControlEpoch,
    /// The decision, as the coordinator wrote it.
    pub record: Vec<u8>,
}

/// The state after all decisions up to `index`, in their place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSnapshot {
    /// The last decision that is in it.
    pub index: u64,
    /// Under whom that was decided.
    pub epoch: ControlEpoch,
    /// The state, as the coordinator wrote it.
    pub state: Vec<u8>,
}

/// Why the log could not do it.
#[derive(Debug, thiserror::Error)]
pub enum ControlLogError {
    /// A later coordinator has written already: this one must step down.
    #[error("the log is at epoch {newest}, this coordinator at {given}: another one has taken over")]
    StaleEpoch {
        /// The caller's.
        given: ControlEpoch,
        /// The newest in the log.
        newest: ControlEpoch,
    },
    /// Over [`MAX_RECORD`] or [`MAX_SNAPSHOT`].
    #[error("a record or snapshot of {bytes} bytes is too long: at most {limit}")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// What is allowed.
        limit: usize,
    },
    /// There are no such entries to fold into a snapshot.
    #[error("the log has no entry {index}: it goes from {first} to {last}")]
    NoSuchIndex {
        /// What was asked for.
        index: u64,
        /// The first that is there.
        first: u64,
        /// The last that is there.
        last: u64,
    },
    /// The file is damaged: an entry is not what was written, is missing, or SQLite finds the file broken.
    #[error("the control log {} is damaged: {what}; restore it from a backup, or move it away to begin with an empty one", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// Another process has it open.
    #[error("the control log {} is in use: is another mlxnode running with this data directory", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// SQLite or the disk failed.
    #[error("cannot use the control log {}", path.display())]
    Storage {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The log, whoever keeps it.
#[async_trait]
pub trait ControlLog: Send + Sync + 'static {
    /// Adds a decision and answers with its index once it is durable.
    ///
    /// # Errors
    /// [`ControlLogError::StaleEpoch`], [`ControlLogError::TooLong`], [`ControlLogError::Storage`].
    async fn append(&self, epoch: ControlEpoch, record: Vec<u8>) -> Result<u64, ControlLogError>;

    /// The decisions with an index above `index`, in order; those folded into the snapshot are gone.
    ///
    /// # Errors
    /// [`ControlLogError::Storage`].
    async fn entries_after(&self, index: u64) -> Result<Vec<ControlEntry>, ControlLogError>;

    /// The newest snapshot.
    ///
    /// # Errors
    /// [`ControlLogError::Storage`].
    async fn snapshot(&self) -> Result<Option<ControlSnapshot>, ControlLogError>;

    /// Puts `state` in the place of all decisions up to `index`.
    ///
    /// # Errors
    /// [`ControlLogError::NoSuchIndex`], [`ControlLogError::TooLong`], [`ControlLogError::Storage`].
    async fn compact(&self, index: u64, state: Vec<u8>) -> Result<(), ControlLogError>;

    /// The newest epoch that wrote.
    ///
    /// # Errors
    /// [`ControlLogError::Storage`].
    async fn epoch(&self) -> Result<ControlEpoch, ControlLogError>;
}
