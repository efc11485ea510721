//! What the API asks of the store.

use super::bundle::{self, BundleFile};
use super::peer_client::{Peers, on_disk};
use super::service::pieces;
use super::store::Incoming;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use mlxnode_api::jobs::{ContentHash, FilePiece, JobFiles, Received, Receiving};
use mlxnode_cluster::NodeId;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, InputFile};

/// The files of jobs, here and on the other nodes.
#[derive(Clone)]
pub(crate) struct NodeJobFiles {
    pub(crate) peers: Peers,
}

struct Upload(Option<Incoming>);

fn gone() -> Error {
    Error::Failed("an upload went on after it had failed".into())
}

impl Receiving for Upload {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), Error>> {
        async move {
            let mut incoming = self.0.take().ok_or_else(gone)?;
            let written = move || incoming.write(&data).map(|()| incoming);
            self.0 = Some(on_disk("taking a file in", written).await?);
            Ok(())
        }
        .boxed()
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

    fn read(&self, hash: ContentHash, at_most: u64) -> BoxFuture<'static, Result<Bytes, Error>> {
        let peers = self.peers.clone();
        async move {
            let input = InputFile { name: format!("file {hash}"), hash, bytes: at_most };
            if peers.store.find(hash).is_none() {
                peers.fetch_input(&input).await?;
            }
            let store = peers.store.clone();
            on_disk("reading a file", move || {
                use std::io::Read as _;
                let path = store.find(hash).ok_or(std::io::ErrorKind::NotFound)?;
                let mut bytes = Vec::new();
                std::fs::File::open(path)?.take(at_most).read_to_end(&mut bytes)?;
                Ok(Bytes::from(bytes))
            })
            .await
        }
        .boxed()
    }

    fn download(
        &self,
        id: String,
        checkpoint: Checkpoint,
        state: bool,
    ) -> BoxStream<'static, Result<FilePiece, Error>> {
        let peers = self.peers.clone();
        let opened = async move {
            let folder = peers.fetch_checkpoint(&id, &checkpoint).await?;
            let (of, hash) = (folder.clone(), checkpoint.hash);
            let manifest = on_disk("reading a checkpoint", move || bundle::manifest(&of, hash)).await?.0;
            let prefix = format!("{}/", bundle::RESULT);
            let meant = move |file: &BundleFile| state || file.name.starts_with(&prefix);
            let files: Vec<BundleFile> = manifest.files.into_iter().filter(meant).collect();
            let streams = futures::stream::iter(files).flat_map(move |file| {
                let path = folder.join(&file.name);
                let name = match state {
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
