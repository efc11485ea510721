//! What the API asks of the store.

use super::bundle::{self, BundleFile};
use super::checking::Checker;
use super::peer_client::{Peers, on_disk};
use super::service::pieces;
use super::store::Incoming;
use super::unnamed::Unnamed;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use mlxnode_api::jobs::{
    ContentHash, DownloadPart, Examined, FilePiece, JobFiles, NamedFile, Received, Receiving, TakingIn, Unfit,
};
use mlxnode_cluster::NodeId;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, InputFile};

/// The files of jobs, here and on the other nodes.
#[derive(Clone)]
pub(crate) struct NodeJobFiles {
    pub(crate) peers: Peers,
    pub(crate) checker: Checker,
}

struct Upload(Option<Incoming>);

fn gone() -> Error {
    Error::Failed("an upload went on after it had failed".into())
}

/// Writes into what comes in; once that has failed nothing more comes.
async fn written<T: Send + 'static>(
    incoming: &mut Option<T>,
    write: impl FnOnce(&mut T) -> std::io::Result<()> + Send + 'static,
) -> Result<(), Error> {
    let mut file = incoming.take().ok_or_else(gone)?;
    *incoming = Some(on_disk("taking a file in", move || write(&mut file).map(|()| file)).await?);
    Ok(())
}

impl Receiving for Upload {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), Error>> {
        written(&mut self.0, move |file| file.write(&data)).boxed()
    }

    fn finish(mut self: Box<Self>) -> BoxFuture<'static, Result<Received, Error>> {
        async move {
            let incoming = self.0.take().ok_or_else(gone)?;
            let (bytes, is_complete) = on_disk("taking a file in", move || incoming.finish()).await?;
            Ok(Received { bytes, is_complete })
        }
        .boxed()
    }
}

struct NewFile(Option<Unnamed>);

impl TakingIn for NewFile {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), Error>> {
        written(&mut self.0, move |file| file.write(&data)).boxed()
    }

    fn finish(mut self: Box<Self>) -> BoxFuture<'static, Result<(ContentHash, u64), Error>> {
        async move {
            let incoming = self.0.take().ok_or_else(gone)?;
            on_disk("taking a file in", move || incoming.finish()).await
        }
        .boxed()
    }
}

impl JobFiles for NodeJobFiles {
    fn received(&self, hash: ContentHash) -> BoxFuture<'static, Result<Received, Error>> {
        let store = self.peers.store.clone();
        async move {
            let (bytes, is_complete) =
                on_disk("looking for a file", move || Ok(store.received(hash))).await?;
            Ok(Received { bytes, is_complete })
        }
        .boxed()
    }

    fn receive(
        &self,
        hash: ContentHash,
        bytes: u64,
        offset: u64,
    ) -> BoxFuture<'static, Result<Box<dyn Receiving>, Error>> {
        let store = self.peers.store.clone();
        async move {
            let incoming = on_disk("taking a file in", move || store.receive(hash, bytes, offset)).await?;
            Ok(Box::new(Upload(Some(incoming))) as Box<dyn Receiving>)
        }
        .boxed()
    }

    fn missing(&self, hashes: Vec<ContentHash>) -> BoxFuture<'static, Vec<ContentHash>> {
        let peers = self.peers.clone();
        async move { peers.missing(hashes).await }.boxed()
    }

    fn has_length(&self, hash: ContentHash, bytes: u64) -> BoxFuture<'static, Option<bool>> {
        let peers = self.peers.clone();
        async move { peers.has_length(hash, bytes).await }.boxed()
    }

    fn take_in(&self) -> BoxFuture<'static, Result<Box<dyn TakingIn>, Error>> {
        let store = self.peers.store.clone();
        async move {
            let incoming = on_disk("taking a file in", move || store.take_in()).await?;
            Ok(Box::new(NewFile(Some(incoming))) as Box<dyn TakingIn>)
        }
        .boxed()
    }

    fn keep(&self, file: NamedFile) -> BoxFuture<'static, Result<(), Error>> {
        let store = self.peers.store.clone();
        async move { on_disk("keeping a file", move || store.keep(&file)).await }.boxed()
    }

    fn kept(&self) -> BoxFuture<'static, Result<Vec<NamedFile>, Error>> {
        let peers = self.peers.clone();
        async move {
            let store = peers.store.clone();
            let own = on_disk("looking for files", move || store.kept()).await?;
            Ok(own.into_iter().chain(peers.kept().await).collect())
        }
        .boxed()
    }

    fn forget(&self, id: String) -> BoxFuture<'static, Result<(), Error>> {
        let peers = self.peers.clone();
        async move {
            let (store, own) = (peers.store.clone(), id.clone());
            on_disk("forgetting a file", move || store.forget(&own)).await?;
            peers.forget(&id).await
        }
        .boxed()
    }

    fn content(&self, file: InputFile) -> BoxStream<'static, Result<Bytes, Error>> {
        let peers = self.peers.clone();
        let opened = async move {
            peers.fetch_input(&file).await?;
            let path = peers.store.find(file.hash);
            path.ok_or_else(|| Error::Unavailable(format!("{} has just gone", file.name)))
        };
        let stream = futures::stream::once(opened).flat_map(|opened| match opened {
            Ok(path) => pieces([path], 0)
                .map(|piece| match piece {
                    Ok((_, data)) => Ok(data),
                    Err(error) => Err(Error::Failed(format!("reading a file: {error}"))),
                })
                .boxed(),
            Err(error) => futures::stream::once(async move { Err(error) }).boxed(),
        });
        stream.boxed()
    }

    fn check(
        &self,
        configuration: String,
        model: String,
        inputs: Vec<InputFile>,
    ) -> BoxFuture<'static, Result<Examined, Unfit>> {
        let (checker, peers) = (self.checker.clone(), self.peers.clone());
        async move { checker.check(&peers, configuration, model, inputs).await }.boxed()
    }

    fn download(
        &self,
        id: String,
        checkpoint: Checkpoint,
        part: DownloadPart,
    ) -> BoxStream<'static, Result<FilePiece, Error>> {
        let peers = self.peers.clone();
        let opened = async move {
            let folder = peers.fetch_checkpoint(&id, &checkpoint).await?;
            let (of, hash) = (folder.clone(), checkpoint.hash);
            let manifest = on_disk("reading a checkpoint", move || bundle::manifest(&of, hash)).await?.0;
            let has_folders = part == DownloadPart::All;
            let meant = |file: &BundleFile| match (&part, file.name.split_once('/')) {
                (DownloadPart::All, _) => true,
                (DownloadPart::Result, Some((folder, _))) => folder == bundle::RESULT,
                (DownloadPart::One(wanted), Some((folder, name))) => {
                    folder == bundle::RESULT && name == wanted
                }
                (_, None) => false,
            };
            let files: Vec<BundleFile> = manifest.files.into_iter().filter(meant).collect();
            let streams = futures::stream::iter(files).flat_map(move |file| {
                let path = folder.join(&file.name);
                let name = match has_folders {
                    true => file.name.clone(),
                    false => file.name.split_once('/').map_or(file.name.clone(), |(_, name)| name.to_owned()),
                };
                let head = FilePiece::File { name, bytes: file.bytes, hash: file.hash };
                let data = pieces([path], 0).map(|piece| match piece {
                    Ok((_, data)) => Ok(FilePiece::Data(data)),
                    Err(error) => Err(Error::Failed(format!("reading a checkpoint: {error}"))),
                });
                futures::stream::once(async move { Ok(head) }).chain(data)
            });
            Ok::<_, Error>(streams)
        };
        let stream = futures::stream::once(opened).flat_map(|opened| match opened {
            Ok(streams) => streams.boxed(),
            Err(error) => futures::stream::once(async move { Err(error) }).boxed(),
        });
        stream.boxed()
    }

    fn node_name(&self, node: NodeId) -> String {
        self.peers.name(node)
    }
}
