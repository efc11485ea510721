//! What all nodes do now: this one looks at itself, the others are asked by `NodeControl.Observe`.

use crate::node_control::client::observe;
use crate::observer::NodeObserver;
use async_trait::async_trait;
use mlxnode_api::metrics::Observer as _;
use mlxnode_api::panorama::{NodeSeen, Sight};
use mlxnode_cluster::{MeshHandle, NodeId, PeerState};
use std::sync::Arc;
use std::time::Duration;

/// A node that does not answer within this time is left out: its own workers have half a second, the way there and back the rest.
const PATIENCE: Duration = Duration::from_millis(800);

/// Looks from one node at all.
pub(crate) struct ClusterSight {
    pub(crate) own: NodeId,
    pub(crate) mesh: MeshHandle,
    pub(crate) observer: Arc<NodeObserver>,
}

#[async_trait]
impl Sight for ClusterSight {
    async fn look(&self) -> Vec<NodeSeen> {
        let is_there = |state| matches!(state, PeerState::Alive | PeerState::Suspect);
        let peers = self.mesh.peers();
        let others = peers.iter().filter(|peer| is_there(peer.state)).map(|peer| async move {
            let channel = self.mesh.channel(&peer.node_id)?;
            let seen = tokio::time::timeout(PATIENCE, observe(channel)).await.ok()?.ok()?;
            // Nobody speaks for another.
            (seen.node == peer.node_id).then_some(seen)
        });
        let (own, others) =
            tokio::join!(seen_by(self.own, &self.observer), futures::future::join_all(others));
        std::iter::once(own).chain(others.into_iter().flatten()).collect()
    }
}

/// What one node sees of itself.
pub(crate) async fn seen_by(node: NodeId, observer: &NodeObserver) -> NodeSeen {
    let observations = observer.observe().await;
    NodeSeen {
        node,
        schedulers: observations.schedulers,
        stages: observations.stages,
        links: observations.links,
    }
}
