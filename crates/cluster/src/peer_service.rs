//! What this node answers to other nodes: the gRPC service `Peer`.
//!
//! The listener has already seen to it that the caller's key is known; here only nodes of the roster get answers.

use crate::admission::{PeerKey, Role};
use crate::mesh::{MeshHandle, Shared};
use crate::pin::NodeId;
use crate::roster_store::RosterStoreError;
use crate::wire;
use async_trait::async_trait;
use futures::{Stream, StreamExt};
use mlxnode_proto::PROTOCOL_VERSION;
use mlxnode_proto::internal::v1 as proto;
use proto::peer_server::{Peer, PeerServer};
use std::pin::Pin;
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// Largest message of the service: a roster of 64 nodes stays far below.
pub(crate) const MAX_MESSAGE: usize = 1 << 20;

/// Has a node that wants to leave taken out of the roster: by the coordinator.
#[async_trait]
pub trait Departures: Send + Sync + 'static {
    /// Takes `node` out.
    ///
    /// # Errors
    /// A sentence for the person at that node, such as that this node is not the coordinator.
    async fn leave(&self, node: NodeId) -> Result<(), String>;
}

/// The service, to be added to the node's listener.
pub fn peer_service(mesh: &MeshHandle, departures: Arc<dyn Departures>) -> PeerServer<PeerService> {
    PeerServer::new(PeerService { shared: mesh.shared().clone(), departures })
        .max_decoding_message_size(MAX_MESSAGE)
}

/// The implementation behind [`peer_service`].
pub struct PeerService {
    shared: Arc<Shared>,
    departures: Arc<dyn Departures>,
}

pub(crate) fn versions_differ(theirs: u32) -> String {
    format!(
        "protocols {PROTOCOL_VERSION} and {theirs} do not go together: install the same mlxnode on both nodes"
    )
}

fn member<T>(request: &Request<T>) -> Result<NodeId, Status> {
    match request.extensions().get::<PeerKey>() {
        Some(PeerKey { pin, role: Role::Node }) => Ok(pin.node_id()),
        _ => Err(Status::permission_denied("only nodes of the cluster may ask this")),
    }
}

#[async_trait]
impl Peer for PeerService {
    type HeartbeatStream = Pin<Box<dyn Stream<Item = Result<proto::Beat, Status>> + Send>>;

    async fn heartbeat(
        &self,
        request: Request<Streaming<proto::Beat>>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let peer = member(&request)?;
        let shared = self.shared.clone();
        let end = shared.end.clone();
        let mut sequence = 0;
        let answers = request.into_inner().map(move |beat| {
            let beat = beat?;
            if beat.protocol_version != PROTOCOL_VERSION {
                return Err(Status::failed_precondition(versions_differ(beat.protocol_version)));
            }
            sequence += 1;
            let answer = shared.beat(sequence, beat.sequence);
            shared.heard_from(peer, beat);
            Ok(answer)
        });
        Ok(Response::new(Box::pin(answers.take_until(end.cancelled_owned()))))
    }

    async fn get_roster(
        &self,
        request: Request<proto::GetRosterRequest>,
    ) -> Result<Response<proto::SignedRoster>, Status> {
        member(&request)?;
        let signed = self.shared.roster.current();
        let signed = signed.ok_or_else(|| Status::not_found("this node belongs to no cluster"))?;
        Ok(Response::new(wire::signed_roster_to_wire(&signed)))
    }

    async fn put_roster(
        &self,
        request: Request<proto::SignedRoster>,
    ) -> Result<Response<proto::PutRosterResponse>, Status> {
        member(&request)?;
        let (store, offered) = (self.shared.roster.clone(), request.into_inner());
        // Checking and keeping a roster waits for the disk.
        let taken = tokio::task::spawn_blocking(move || store.offer(&offered)).await;
        match taken {
            Ok(Ok(_)) => {
                Ok(Response::new(proto::PutRosterResponse { version: self.shared.roster.version() }))
            }
            Ok(Err(error @ RosterStoreError::Roster(_))) => Err(Status::invalid_argument(error.to_string())),
            Ok(Err(error)) => Err(Status::internal(error.to_string())),
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }

    async fn can_reach(
        &self,
        request: Request<proto::CanReachRequest>,
    ) -> Result<Response<proto::CanReachResponse>, Status> {
        member(&request)?;
        let node = NodeId::try_from(request.get_ref().node_id.as_ref())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(proto::CanReachResponse { reachable: self.shared.reaches(&node) }))
    }

    async fn leave(
        &self,
        request: Request<proto::PeerLeaveRequest>,
    ) -> Result<Response<proto::PeerLeaveResponse>, Status> {
        let node = member(&request)?;
        self.departures.leave(node).await.map_err(Status::failed_precondition)?;
        Ok(Response::new(proto::PeerLeaveResponse {}))
    }
}
