//! `KeyRing`: the keys of the coordinator in this process, for the other nodes.

use super::wire;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use mlxnode_coordinator::coordinator::CoordinatorHandle;
use mlxnode_proto::internal::v1::key_ring_server::KeyRing;
use mlxnode_proto::internal::v1::{FollowKeysRequest, KeyList};
use tonic::{Request, Response, Status};

/// The service on one node.
pub(crate) struct KeyRingService {
    pub(crate) coordinator: Option<CoordinatorHandle>,
}

#[tonic::async_trait]
impl KeyRing for KeyRingService {
    type FollowStream = BoxStream<'static, Result<KeyList, Status>>;

    async fn follow(
        &self,
        _request: Request<FollowKeysRequest>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let coordinator = self
            .coordinator
            .as_ref()
            .ok_or_else(|| Status::failed_precondition("this node does not coordinate the cluster"))?;
        let mut keys = coordinator.keys();
        keys.mark_changed(); // the first list comes at once
        let lists = futures::stream::unfold(keys, |mut keys| async move {
            keys.changed().await.ok()?;
            let list = wire::list_to_proto(&keys.borrow_and_update());
            Some((Ok(list), keys))
        });
        Ok(Response::new(lists.boxed()))
    }
}
