//! Fetches files and checkpoints from whichever node has them.

use super::bundle::{self, Manifest};
use super::store::{Store, copy_name};
use futures::StreamExt as _;
use mlxnode_cluster::{MeshHandle, NodeId, RosterStore};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, ContentHash, InputFile};
use mlxnode_proto::internal::v1::job_runner_client::JobRunnerClient;
use mlxnode_proto::internal::v1::{ContentPiece, ReadCheckpointRequest, ReadContentRequest};
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Nothing comes for so long: the other node is gone or stuck.
const STANDSTILL: Duration = Duration::from_secs(30);
/// For an answer whether something is there.
const ANSWER: Duration = Duration::from_secs(5);

/// This node's store and the others'. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Peers {
    pub(crate) store: Store,
    pub(crate) mesh: MeshHandle,
    pub(crate) roster: Arc<RosterStore>,
    /// Checkpoints are fetched one at a time: who waits for the same one finds it here then.
    pub(crate) fetching: Arc<tokio::sync::Mutex<()>>,
}

/// A disk that failed, in words for whoever waits.
pub(super) fn disk(what: &str) -> impl FnOnce(io::Error) -> Error {
    let what = what.to_owned();
    move |error| match error.kind() {
        io::ErrorKind::InvalidInput => Error::Invalid(error.to_string()),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::TooMany(format!("{what}: {error}"))
        }
        io::ErrorKind::NotFound => Error::Unavailable(format!("{what}: {error}")),
        _ => Error::Failed(format!("{what}: {error}")),
    }
}

/// Disk work on a thread that may wait.
pub(super) async fn on_disk<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(disk(what)),
        Err(error) => Err(Error::Failed(format!("{what}: {error}"))),
    }
}

impl Peers {
    /// What people call a node.
    pub(crate) fn name(&self, node: NodeId) -> String {
        let roster = self.roster.current();
        let entry = roster.as_ref().and_then(|signed| signed.roster().get(&node));
        entry.map_or_else(|| node.short(), |entry| entry.name.clone())
    }

    /// The nodes of the cluster, whether they are there or not; empty when that is not known.
    pub(super) fn members(&self) -> BTreeSet<NodeId> {
        let roster = self.roster.current();
        roster
            .map(|signed| signed.roster().nodes().iter().map(|entry| entry.node_id).collect())
            .unwrap_or_default()
    }

    fn clients(&self) -> Vec<(NodeId, JobRunnerClient<Channel>)> {
        let peers = self.mesh.peers();
        let reached = peers.iter().filter_map(|peer| {
            let channel = self.mesh.channel(&peer.node_id)?;
            Some((peer.node_id, JobRunnerClient::new(channel)))
        });
        reached.collect()
    }

    /// Which of these files no node has that can be reached.
    pub(super) async fn missing(&self, hashes: Vec<ContentHash>) -> Vec<ContentHash> {
        let mut missing = Vec::new();
        for hash in hashes {
            let mut is_there = self.store.find(hash).is_some();
            for (_, mut client) in self.clients() {
                is_there = is_there || content(&mut client, hash, 0).await.is_some();
            }
            if !is_there {
                missing.push(hash);
            }
        }
        missing
    }

    /// Is this the length of a file, as the first node says that has it? `None`: no node has it that can be reached.
    pub(super) async fn has_length(&self, hash: ContentHash, bytes: u64) -> Option<bool> {
        if let (here, true) = self.store.received(hash) {
            return Some(here == bytes);
        }
        for (_, mut client) in self.clients() {
            // Its last byte, after which nothing comes.
            let Some((last, mut pieces)) = content(&mut client, hash, bytes.saturating_sub(1)).await else {
                continue;
            };
            return Some(match last {
                None => bytes == 0,
                Some(piece) if bytes == 0 || piece.data.len() != 1 => false,
                Some(_) => matches!(tokio::time::timeout(ANSWER, pieces.message()).await, Ok(Ok(None))),
            });
        }
        None
    }

    /// Makes sure that a file is here, and is what it is called.
    pub(super) async fn fetch_input(&self, input: &InputFile) -> Result<(), Error> {
        let (what, hash) = (format!("fetching {}", input.name), input.hash);
        let store = self.store.clone();
        if on_disk(&what, move || store.prove(hash)).await?.is_some() {
            return Ok(());
        }
        let mut problem = format!("no node that can be reached has the file {}", input.name);
        for (node, mut client) in self.clients() {
            let (offset, _) = self.store.received(hash);
            let offset = if offset > input.bytes { 0 } else { offset };
            let Some((first, pieces)) = content(&mut client, hash, offset).await else { continue };
            match self.take_input(input, &what, offset, first, pieces).await {
                Ok(()) => return Ok(()),
                Err(error @ (Error::TooMany(_) | Error::Failed(_))) => return Err(error),
                // Another node may have it right.
                Err(error) => problem = format!("{}: {error}", self.name(node)),
            }
        }
        Err(Error::Unavailable(problem))
    }

    async fn take_input(
        &self,
        input: &InputFile,
        what: &str,
        offset: u64,
        first: Option<ContentPiece>,
        mut pieces: Streaming<ContentPiece>,
    ) -> Result<(), Error> {
        let (hash, bytes, store) = (input.hash, input.bytes, self.store.clone());
        let receiving = on_disk(what, move || store.receive(hash, bytes, offset)).await;
        let mut incoming = receiving.map_err(|error| match error {
            // It comes from somewhere else at this moment.
            Error::Invalid(text) => Error::Unavailable(format!("{what}: {text}")),
            other => other,
        })?;
        let mut piece = first;
        while let Some(next) = piece {
            incoming = on_disk(what, move || incoming.write(&next.data).map(|()| incoming)).await?;
            piece = next_piece(&mut pieces, what).await?;
        }
        match on_disk(what, move || incoming.finish()).await? {
            (_, true) => Ok(()),
            (received, false) => {
                Err(Error::Unavailable(format!("{what}: it broke off after {received} bytes")))
            }
        }
    }

    /// Makes sure that a checkpoint is here, whole, and says where.
    pub(super) async fn fetch_checkpoint(&self, id: &str, checkpoint: &Checkpoint) -> Result<PathBuf, Error> {
        let what = match checkpoint.step {
            0 => format!("what the job {id} made"),
            step => format!("the checkpoint of {id} after step {step}"),
        };
        let job = self.store.job(id).map_err(disk(&what))?;
        let hash = checkpoint.hash;
        let _fetching = self.fetching.lock().await;
        let here = bundle::folder_of(&job, hash);
        let (folder, owner) = (here.clone(), id.to_owned());
        let verified = on_disk(&what, move || Ok(bundle::verify(&folder, &owner, hash))).await?;
        match verified {
            Ok(_) => return Ok(here),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // It stays until another one takes its place.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                tracing::warn!(job = id, step = checkpoint.step, %error, "a checkpoint is damaged");
            }
            // It may well be whole: this node cannot read it now.
            Err(error) => return Err(Error::Failed(format!("{what} cannot be read here: {error}"))),
        }
        let mut problem = format!("no node that can be reached has {what}");
        for (node, mut client) in self.clients() {
            let request = ReadCheckpointRequest { id: id.to_owned(), hash: hash.as_bytes().to_vec().into() };
            let begun = tokio::time::timeout(ANSWER, client.read_checkpoint(request)).await;
            let Ok(Ok(pieces)) = begun else { continue };
            match self.take_checkpoint(id, hash, &what, pieces.into_inner()).await {
                Ok(()) => return Ok(here),
                Err(error @ (Error::TooMany(_) | Error::Failed(_))) => return Err(error),
                Err(error) => problem = format!("{}: {error}", self.name(node)),
            }
        }
        Err(Error::Unavailable(problem))
    }

    /// The folder with what a job made, by its checkpoint.
    pub(crate) async fn result(&self, id: &str, hash: ContentHash) -> Result<PathBuf, Error> {
        let checkpoint = Checkpoint { step: 0, hash, bytes: 0 };
        Ok(self.fetch_checkpoint(id, &checkpoint).await?.join(bundle::RESULT))
    }

    async fn take_checkpoint(
        &self,
        id: &str,
        hash: ContentHash,
        what: &str,
        mut pieces: Streaming<ContentPiece>,
    ) -> Result<(), Error> {
        let broke = || Error::Unavailable(format!("{what} broke off"));
        let first = next_piece(&mut pieces, what).await?.ok_or_else(broke)?;
        if ContentHash::of(&first.data) != hash {
            return Err(Error::Unavailable(format!("{what}: another manifest came than was asked for")));
        }
        let manifest = Manifest::parse(&first.data).map_err(disk(what))?;
        if manifest.job != id {
            return Err(Error::Unavailable(format!("{what}: it is of the job {}", manifest.job)));
        }
        let job = self.store.job(id).map_err(disk(what))?;
        let (store, total) = (self.store.clone(), manifest.total());
        let mut promise = on_disk(what, move || store.promise(total)).await?;
        let (folder, name) = (job.clone(), copy_name(hash));
        let new = on_disk(what, move || bundle::begin(&folder, &name)).await?;
        for file in &manifest.files {
            let path = new.folder().join(&file.name);
            let mut out = tokio::fs::File::create(path).await.map_err(disk(what))?;
            let mut left = file.bytes;
            let mut hasher = blake3::Hasher::new();
            while left > 0 {
                let piece = next_piece(&mut pieces, what).await?.ok_or_else(broke)?;
                left = left.checked_sub(piece.data.len() as u64).ok_or_else(broke)?;
                hasher.update(&piece.data);
                promise.came(piece.data.len() as u64).map_err(disk(what))?;
                out.write_all(&piece.data).await.map_err(disk(what))?;
            }
            out.sync_all().await.map_err(disk(what))?;
            if ContentHash::from_bytes(*hasher.finalize().as_bytes()) != file.hash {
                return Err(Error::Unavailable(format!("{what}: {} came damaged", file.name)));
            }
        }
        let bytes = first.data;
        on_disk(what, move || bundle::name(&job, new.folder(), &bytes)).await?;
        Ok(())
    }
}

/// A node's stream of the file's bytes, with its first piece. `None`: it does not have it.
async fn content(
    client: &mut JobRunnerClient<Channel>,
    hash: ContentHash,
    offset: u64,
) -> Option<(Option<ContentPiece>, Streaming<ContentPiece>)> {
    let request = ReadContentRequest { hash: hash.as_bytes().to_vec().into(), offset };
    let begun = async {
        let mut pieces = client.read_content(request).await?.into_inner();
        Ok::<_, Status>((pieces.message().await?, pieces))
    };
    tokio::time::timeout(ANSWER, begun).await.ok()?.ok()
}

async fn next_piece(pieces: &mut Streaming<ContentPiece>, what: &str) -> Result<Option<ContentPiece>, Error> {
    match tokio::time::timeout(STANDSTILL, pieces.next()).await {
        Ok(Some(Ok(piece))) => Ok(Some(piece)),
        Ok(Some(Err(status))) => Err(Error::Unavailable(format!("{what}: {}", status.message()))),
        Ok(None) => Ok(None),
        Err(_) => Err(Error::Unavailable(format!("{what}: nothing came for {} s", STANDSTILL.as_secs()))),
    }
}
