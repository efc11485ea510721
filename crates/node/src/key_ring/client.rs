//! Keeps this node's view of the keys equal to the coordinator's, in this process or on another node.

use super::wire;
use crate::coordination::{RETRY, RosterRoute};
use mlxnode_api::keys::KeysView;
use mlxnode_api::{CoordinatorRoute as _, Route};
use mlxnode_coordinator::coordinator::CoordinatorHandle;
use mlxnode_proto::internal::v1::FollowKeysRequest;
use mlxnode_proto::internal::v1::key_ring_client::KeyRingClient;
use std::sync::Arc;
use tokio::sync::watch;
use tonic::Status;
use tonic::transport::Channel;
use tracing::debug;

/// Follows the coordinator in this process, until it ends.
pub(crate) async fn mirror(coordinator: CoordinatorHandle, view: watch::Sender<KeysView>) {
    let mut keys = coordinator.keys();
    loop {
        let now = keys.borrow_and_update().clone();
        view.send_replace(KeysView { keys: now, is_known: true });
        if keys.changed().await.is_err() {
            return;
        }
    }
}

/// Follows the coordinator on another node, for ever. While it cannot be reached, what it said last counts.
pub(crate) async fn follow(route: Arc<RosterRoute>, view: watch::Sender<KeysView>) {
    let mut peers = route.mesh.watch();
    loop {
        if let Ok(Route::There(channel)) = route.route()
            && let Err(status) = follow_once(KeyRingClient::new(channel), &view).await
        {
            debug!(reason = status.message(), "the coordinator's keys cannot be followed");
        }
        // A link that comes up wakes at once.
        let _ = tokio::time::timeout(RETRY, peers.changed()).await;
    }
}

async fn follow_once(
    mut client: KeyRingClient<Channel>,
    view: &watch::Sender<KeysView>,
) -> Result<(), Status> {
    let mut lists = client.follow(FollowKeysRequest {}).await?.into_inner();
    while let Some(list) = lists.message().await? {
        view.send_replace(KeysView { keys: wire::list(list), is_known: true });
    }
    Ok(())
}
