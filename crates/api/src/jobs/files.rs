//! What a node does with the files of jobs. Who has a store of them implements [`JobFiles`].

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use mlxnode_cluster::NodeId;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, ContentHash, InputFile, TrainingDemand};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// How much of a file is here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Bytes.
    pub bytes: u64,
    /// All, and they have the hash.
    pub is_complete: bool,
}

/// A file on its way in. Dropping it keeps what has come, for a later call.
pub trait Receiving: Send {
    /// Takes the next bytes.
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), Error>>;

    /// No more come in this call: is it all?
    ///
    /// Refused when all bytes are here and do not have the hash; then none is kept.
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<Received, Error>>;
}

/// A file on its way in whose content is not known before. Dropping it leaves nothing.
pub trait TakingIn: Send {
    /// Takes the next bytes.
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), Error>>;

    /// No more come: what it is called by its content, and its bytes.
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<(ContentHash, u64), Error>>;
}

/// A file that somebody gave a name, and that stays until it is forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedFile {
    /// "file-" and 24 letters and digits.
    pub id: String,
    /// What it holds.
    pub hash: ContentHash,
    /// How much.
    pub bytes: u64,
    /// For people; no path.
    pub name: String,
    /// Name of the key that it came with; empty: this cluster's own people.
    pub owner: String,
    /// When it came, in seconds since 1970.
    pub created_unix: u64,
}

/// Is this an id of a [`NamedFile`]? It is part of paths.
///
/// # Errors
/// [`Error::Invalid`]
pub fn check_file_id(id: &str) -> Result<(), Error> {
    let rest = id.strip_prefix("file-").unwrap_or_default();
    if rest.len() == 24 && rest.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase()) {
        return Ok(());
    }
    let shown: String = id.chars().take(64).collect();
    Err(Error::Invalid(format!("{shown:?} is no id of a file; upload it to /v1/files first")))
}

/// A fine-tuning's configuration and rows, looked through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examined {
    /// Rows to learn from.
    pub rows: u64,
    /// Keys that the configuration gives.
    pub keys: BTreeSet<String>,
    /// Rows of a micro-batch.
    pub batch_size: u64,
    /// What a run takes of memory, for how the layers are divided.
    pub demand: TrainingDemand,
    /// Short rows are put together: how many batches there are depends on their tokens.
    pub packing: bool,
    /// A checkpoint after so many steps, and seconds, when it says so.
    pub save_steps: Option<u32>,
    /// See `save_steps`.
    pub save_seconds: Option<u32>,
    /// So many of the newest checkpoints are kept.
    pub keep_checkpoints: u32,
}

/// Why nothing can be learned as somebody wishes.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Unfit {
    /// The configuration is wrong: the text names line and key.
    #[error("{0}")]
    Configuration(String),
    /// A row is wrong, or there are none.
    #[error("{text}")]
    Rows {
        /// Begins with file and line.
        text: String,
    },
    /// A file that no node has that can be reached.
    #[error("{0}")]
    NotHere(String),
    /// It could not be found out.
    #[error(transparent)]
    Failed(Error),
}

/// Which files of a checkpoint are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DownloadPart {
    /// What the job made.
    Result,
    /// One file of that, if there is such.
    One(String),
    /// All that it would go on from too.
    All,
}

/// A part of a job's result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FilePiece {
    /// A file begins.
    File {
        /// Relative, at most one folder.
        name: String,
        /// All its bytes.
        bytes: u64,
        /// Of them.
        hash: ContentHash,
    },
    /// Its next bytes, at most 1 MiB.
    Data(Bytes),
}

/// The files of jobs on a node and, where it says so, on all nodes.
pub trait JobFiles: Send + Sync + 'static {
    /// How much of a file this node has.
    fn received(&self, hash: ContentHash) -> BoxFuture<'static, Result<Received, Error>>;

    /// Takes bytes of a file in, from `offset` on. Refused when that is not what is missing, or there is no room.
    fn receive(
        &self,
        hash: ContentHash,
        bytes: u64,
        offset: u64,
    ) -> BoxFuture<'static, Result<Box<dyn Receiving>, Error>>;

    /// Takes in a file whose content is not known before. Refused when there is no room.
    fn take_in(&self) -> BoxFuture<'static, Result<Box<dyn TakingIn>, Error>>;

    /// Keeps a file that this node has until it is forgotten.
    fn keep(&self, file: NamedFile) -> BoxFuture<'static, Result<(), Error>>;

    /// The files that this node and all that can be reached keep.
    fn kept(&self) -> BoxFuture<'static, Result<Vec<NamedFile>, Error>>;

    /// A file need not be kept any longer, on any node. Jobs that name its content have it still.
    fn forget(&self, id: String) -> BoxFuture<'static, Result<(), Error>>;

    /// What a file holds, in pieces of at most 1 MiB, wherever it is.
    fn content(&self, file: InputFile) -> BoxStream<'static, Result<Bytes, Error>>;

    /// Looks through a fine-tuning's configuration and rows.
    fn check(
        &self,
        configuration: String,
        model: String,
        inputs: Vec<InputFile>,
    ) -> BoxFuture<'static, Result<Examined, Unfit>>;

    /// Which of these files no node has that can be reached.
    fn missing(&self, hashes: Vec<ContentHash>) -> BoxFuture<'static, Vec<ContentHash>>;

    /// Has this file so many bytes? `None`: no node has it that can be reached.
    fn has_length(&self, hash: ContentHash, bytes: u64) -> BoxFuture<'static, Option<bool>>;

    /// What a checkpoint of a job holds, from whichever node has it.
    fn download(
        &self,
        id: String,
        checkpoint: Checkpoint,
        part: DownloadPart,
    ) -> BoxStream<'static, Result<FilePiece, Error>>;

    /// What people call a node.
    fn node_name(&self, node: NodeId) -> String;
}

/// For services without a store.
#[derive(Clone, Copy, Debug)]
pub struct NoJobFiles;

fn none() -> Error {
    Error::Unavailable("this node keeps no files of jobs".into())
}

impl JobFiles for NoJobFiles {
    fn received(&self, _: ContentHash) -> BoxFuture<'static, Result<Received, Error>> {
        async { Err(none()) }.boxed()
    }

    fn receive(
        &self,
        _: ContentHash,
        _: u64,
        _: u64,
    ) -> BoxFuture<'static, Result<Box<dyn Receiving>, Error>> {
        async { Err(none()) }.boxed()
    }

    fn take_in(&self) -> BoxFuture<'static, Result<Box<dyn TakingIn>, Error>> {
        async { Err(none()) }.boxed()
    }

    fn has_length(&self, _: ContentHash, _: u64) -> BoxFuture<'static, Option<bool>> {
        async { None }.boxed()
    }

    fn keep(&self, _: NamedFile) -> BoxFuture<'static, Result<(), Error>> {
        async { Err(none()) }.boxed()
    }

    fn kept(&self) -> BoxFuture<'static, Result<Vec<NamedFile>, Error>> {
        async { Err(none()) }.boxed()
    }

    fn forget(&self, _: String) -> BoxFuture<'static, Result<(), Error>> {
        async { Err(none()) }.boxed()
    }

    fn content(&self, _: InputFile) -> BoxStream<'static, Result<Bytes, Error>> {
        futures::stream::once(async { Err(none()) }).boxed()
    }

    fn check(&self, _: String, _: String, _: Vec<InputFile>) -> BoxFuture<'static, Result<Examined, Unfit>> {
        async { Err(Unfit::NotHere(none().to_string())) }.boxed()
    }

    fn missing(&self, hashes: Vec<ContentHash>) -> BoxFuture<'static, Vec<ContentHash>> {
        async { hashes }.boxed()
    }

    fn download(
        &self,
        _: String,
        _: Checkpoint,
        _: DownloadPart,
    ) -> BoxStream<'static, Result<FilePiece, Error>> {
        futures::stream::once(async { Err(none()) }).boxed()
    }

    fn node_name(&self, node: NodeId) -> String {
        node.short()
    }
}
