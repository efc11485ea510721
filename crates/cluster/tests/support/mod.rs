//! A listener with one small service behind it, and ways to knock on it.
#![allow(dead_code)] // every test file uses its own part

use mlxnode_cluster::{AccessList, Admission, Identity, PeerKey, ServeOptions, serve};
use mlxnode_proto::internal::v1 as proto;
use proto::peer_server::{Peer, PeerServer};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

/// Echoes: beats come back as they are; `can_reach` says whether the question came from a [`PeerKey`] with that id.
pub(crate) struct Echo;

#[tonic::async_trait]
impl Peer for Echo {
    type HeartbeatStream = Pin<Box<dyn futures::Stream<Item = Result<proto::Beat, Status>> + Send>>;

    async fn heartbeat(
        &self,
        request: Request<Streaming<proto::Beat>>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        Ok(Response::new(Box::pin(request.into_inner())))
    }

    async fn get_roster(
        &self,
        _: Request<proto::GetRosterRequest>,
    ) -> Result<Response<proto::SignedRoster>, Status> {
        Err(Status::unimplemented("an echo has no roster"))
    }

    async fn put_roster(
        &self,
        _: Request<proto::SignedRoster>,
    ) -> Result<Response<proto::PutRosterResponse>, Status> {
        Err(Status::unimplemented("an echo has no roster"))
    }

    async fn can_reach(
        &self,
        request: Request<proto::CanReachRequest>,
    ) -> Result<Response<proto::CanReachResponse>, Status> {
        let peer = *request.extensions().get::<PeerKey>().expect("every request says who spoke");
        let reachable = peer.pin.as_bytes().as_slice() == request.get_ref().node_id.as_ref();
        Ok(Response::new(proto::CanReachResponse { reachable }))
    }

    async fn leave(
        &self,
        _: Request<proto::PeerLeaveRequest>,
    ) -> Result<Response<proto::PeerLeaveResponse>, Status> {
        tokio::time::sleep(Duration::from_secs(3600)).await;
        Err(Status::deadline_exceeded("nobody waits that long"))
    }
}

pub(crate) struct Listener {
    pub(crate) identity: Arc<Identity>,
    pub(crate) access: Arc<AccessList>,
    pub(crate) address: SocketAddr,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) async fn listen(options: ServeOptions) -> Listener {
    let identity = Arc::new(Identity::generate().unwrap());
    let access = Arc::new(AccessList::default());
    listen_as(identity, access, options).await
}

pub(crate) async fn listen_as(
    identity: Arc<Identity>,
    access: Arc<AccessList>,
    options: ServeOptions,
) -> Listener {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let admission: Arc<dyn Admission> = access.clone();
    let routes = Routes::new(PeerServer::new(Echo));
    let serving = serve(listener, identity.clone(), admission, routes, options, shutdown.clone());
    let task = tokio::spawn(async move { serving.await.unwrap() });
    Listener { identity, access, address, shutdown, task }
}

/// Waits until `condition` holds, for at most five seconds.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "not within five seconds: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
