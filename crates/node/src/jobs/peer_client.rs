//! Fetches files and checkpoints from whichever node has them.

use super::bundle::{self, Manifest};
use super::client::parsed;
use super::store::Store;
use futures::StreamExt as _;
use mlxnode_api::jobs::NamedFile;
use mlxnode_cluster::{MeshHandle, NodeId, RosterStore};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, ContentHash, InputFile};
use mlxnode_proto::internal::v1::job_runner_client::JobRunnerClient;
use mlxnode_proto::internal::v1::{
    ContentPiece, ForgetFileRequest, KeptFilesRequest, ReadCheckpointRequest, ReadContentRequest,
};
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
        io::ErrorKind::InvalidInput | io::ErrorKind::FileTooLarge => Error::Invalid(error.to_string()),
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
            if self.store.find(hash).is_none() && self.content(hash, 0).await.is_none() {
                missing.push(hash);
            }
        }
        missing
    }

    /// What the other nodes keep, as far as they answer.
    pub(super) async fn kept(&self) -> Vec<NamedFile> {
        let asked = self.clients().into_iter().map(|(_, mut client)| async move {
            let answer = tokio::time::timeout(ANSWER, client.kept_files(KeptFilesRequest {})).await;
            let files = answer.ok()?.ok()?.into_inner().files;
            parsed::<Vec<NamedFile>>(&files, "what another node keeps").ok()
        });
        futures::future::join_all(asked).await.into_iter().flatten().flatten().collect()
    }

    /// Has the other nodes forget a file.
    ///
    /// # Errors
    /// When one does not answer: it may keep it still.
    pub(super) async fn forget(&self, id: &str) -> Result<(), Error> {
        let asked = self.clients().into_iter().map(|(node, mut client)| async move {
            let request = ForgetFileRequest { id: id.to_owned() };
            match tokio::time::timeout(ANSWER, client.forget_file(request)).await {
                Ok(Ok(_)) => Ok(()),
                _ => Err(Error::Unavailable(format!(
                    "{} does not answer and may keep the file; delete it again in a moment",
                    self.name(node)
                ))),
            }
        });
        futures::future::join_all(asked).await.into_iter().collect()
    }

    /// A node's stream of the file's bytes, with its first piece.
    async fn content(
        &self,
        hash: ContentHash,
        offset: u64,
    ) -> Option<(Option<ContentPiece>, Streaming<ContentPiece>)> {
        for (_, mut client) in self.clients() {
            let request = ReadContentRequest { hash: hash.as_bytes().to_vec().into(), offset };
            let begun = async {
                let mut pieces = client.read_content(request).await?.into_inner();
                Ok::<_, Status>((pieces.message().await?, pieces))
            };
            if let Ok(Ok(begun)) = tokio::time::timeout(ANSWER, begun).await {
                return Some(begun);
            }
        }
        None
    }

    /// Makes sure that a file is here.
    pub(super) async fn fetch_input(&self, input: &InputFile) -> Result<(), Error> {
        let hash = input.hash;
        if self.store.find(hash).is_some() {
            return Ok(());
        }
        let (offset, _) = self.store.received(hash);
        let offset = if offset > input.bytes { 0 } else { offset };
        let what = format!("fetching {}", input.name);
        let (first, mut pieces) = self.content(hash, offset).await.ok_or_else(|| {
            Error::Unavailable(format!("no node that can be reached has the file {}", input.name))
        })?;
        let (store, bytes) = (self.store.clone(), input.bytes);
        let receiving = on_disk(&what, move || store.receive(hash, bytes, offset)).await;
        let mut incoming = receiving.map_err(|error| match error {
            // It comes from somewhere else at this moment.
            Error::Invalid(text) => Error::Unavailable(format!("{what}: {text}")),
            other => other,
        })?;
        let mut piece = first;
        while let Some(next) = piece {
            incoming = on_disk(&what, move || incoming.write(&next.data).map(|()| incoming)).await?;
            piece = next_piece(&mut pieces, &what).await?;
        }
        match on_disk(&what, move || incoming.finish()).await {
            Ok((_, true)) => Ok(()),
            Ok((received, false)) => {
                Err(Error::Unavailable(format!("{what}: it broke off after {received} bytes")))
            }
            // Not what it is called: another node may have it right.
            Err(Error::Invalid(text)) => Err(Error::Unavailable(format!("{what}: {text}"))),
            Err(error) => Err(error),
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
            Err(error) => {
                tracing::warn!(job = id, step = checkpoint.step, %error, "a checkpoint is damaged");
                let folder = here.clone();
                on_disk(&what, move || std::fs::remove_dir_all(folder)).await?;
            }
        }
        let mut problem = format!("no node that can be reached has {what}");
        for (node, mut client) in self.clients() {
            let request = ReadCheckpointRequest { id: id.to_owned(), hash: hash.as_bytes().to_vec().into() };
            let begun = tokio::time::timeout(ANSWER, client.read_checkpoint(request)).await;
            let Ok(Ok(pieces)) = begun else { continue };
            match self.take_checkpoint(id, hash, &what, pieces.into_inner()).await {
                Ok(()) => return Ok(here),
                Err(error @ Error::TooMany(_)) => return Err(error),
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
        let (folder, name) = (job.clone(), format!("copy-{hash}"));
        let new = on_disk(what, move || bundle::begin(&folder, &name)).await?;
        for file in &manifest.files {
            let mut out = tokio::fs::File::create(new.join(&file.name)).await.map_err(disk(what))?;
            let mut left = file.bytes;
            let mut hasher = blake3::Hasher::new();
            while left > 0 {
                let piece = next_piece(&mut pieces, what).await?.ok_or_else(broke)?;
                left = left.checked_sub(piece.data.len() as u64).ok_or_else(broke)?;
                hasher.update(&piece.data);
                out.write_all(&piece.data).await.map_err(disk(what))?;
            }
            out.sync_all().await.map_err(disk(what))?;
            if ContentHash::from_bytes(*hasher.finalize().as_bytes()) != file.hash {
                return Err(Error::Unavailable(format!("{what}: {} came damaged", file.name)));
            }
        }
        let bytes = first.data;
        on_disk(what, move || bundle::name(&job, &new, &bytes)).await?;
        Ok(())
    }
}

async fn next_piece(pieces: &mut Streaming<ContentPiece>, what: &str) -> Result<Option<ContentPiece>, Error> {
    match tokio::time::timeout(STANDSTILL, pieces.next()).await {
        Ok(Some(Ok(piece))) => Ok(Some(piece)),
        Ok(Some(Err(status))) => Err(Error::Unavailable(format!("{what}: {}", status.message()))),
        Ok(None) => Ok(None),
        Err(_) => Err(Error::Unavailable(format!("{what}: nothing came for {} s", STANDSTILL.as_secs()))),
    }
}
