//! What a node does with the files of jobs. Who has a store of them implements [`JobFiles`].

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use mlxnode_cluster::NodeId;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, ContentHash};

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

    /// Which of these files no node has that can be reached.
    fn missing(&self, hashes: Vec<ContentHash>) -> BoxFuture<'static, Vec<ContentHash>>;

    /// Has this file so many bytes? `None`: no node has it that can be reached.
    fn has_length(&self, hash: ContentHash, bytes: u64) -> BoxFuture<'static, Option<bool>>;

    /// The whole content of a small file, wherever it is.
    fn read(&self, hash: ContentHash, at_most: u64) -> BoxFuture<'static, Result<Bytes, Error>>;

    /// What a job made, or (`state`) all that it would go on from, from whichever node has it.
    fn download(
        &self,
        id: String,
        checkpoint: Checkpoint,
        state: bool,
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

    fn missing(&self, hashes: Vec<ContentHash>) -> BoxFuture<'static, Vec<ContentHash>> {
        async { hashes }.boxed()
    }

    fn has_length(&self, _: ContentHash, _: u64) -> BoxFuture<'static, Option<bool>> {
        async { None }.boxed()
    }

    fn read(&self, _: ContentHash, _: u64) -> BoxFuture<'static, Result<Bytes, Error>> {
        async { Err(none()) }.boxed()
    }

    fn download(&self, _: String, _: Checkpoint, _: bool) -> BoxStream<'static, Result<FilePiece, Error>> {
        futures::stream::once(async { Err(none()) }).boxed()
    }

    fn node_name(&self, node: NodeId) -> String {
        node.short()
    }
}
