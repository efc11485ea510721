//! The coordinator's role: on one node it runs, on the others it is followed.
//!
//! Where it runs, this module feeds it with news: nodes that come and go, workers that end, here and elsewhere. Everywhere else it keeps
//! the view of the deployments current by watching the coordinator's node.

use crate::node_control::client::ClusterNodes;
use crate::workers::{WorkerEnded, Workers};
use mlxnode_api::deployments::DeploymentsView;
use mlxnode_api::models::deployment_from_wire;
use mlxnode_api::{CoordinatorRoute, Route};
use mlxnode_cluster::{MeshHandle, NodeId, PeerState, RosterStore};
use mlxnode_coordinator::coordinator::CoordinatorHandle;
use mlxnode_coordinator::deployments::Attempt;
use mlxnode_proto::internal::v1::WatchWorkersRequest;
use mlxnode_proto::internal::v1::node_control_client::NodeControlClient;
use mlxnode_proto::v1::WatchModelsRequest;
use mlxnode_proto::v1::models_client::ModelsClient;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, watch};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tracing::{debug, warn};

/// Before a broken watch is tried again.
pub(crate) const RETRY: Duration = Duration::from_millis(500);

/// Finds the coordinator by the roster.
pub(crate) struct RosterRoute {
    pub(crate) own: NodeId,
    pub(crate) roster: Arc<RosterStore>,
    pub(crate) mesh: MeshHandle,
    pub(crate) here: Option<CoordinatorHandle>,
}

impl CoordinatorRoute for RosterRoute {
    fn route(&self) -> Result<Route, Status> {
        let signed = self.roster.current();
        let roster = signed
            .as_ref()
            .ok_or_else(|| Status::failed_precondition("this node belongs to no cluster any more"))?;
        let coordinator = roster.roster().coordinator();
        if coordinator == self.own {
            let here = self
                .here
                .clone()
                .ok_or_else(|| Status::unavailable("the coordinator is starting; try again in a moment"))?;
            return Ok(Route::Here(here));
        }
        self.mesh.channel(&coordinator).map(Route::There).ok_or_else(|| {
            let name = roster
                .roster()
                .get(&coordinator)
                .map_or_else(|| coordinator.short(), |entry| entry.name.clone());
            Status::unavailable(format!(
                "the coordinator {name} cannot be reached; is it on, and in the same network?"
            ))
        })
    }
}

/// Keeps the view equal to what the coordinator in this process says.
pub(crate) async fn mirror(coordinator: CoordinatorHandle, view: watch::Sender<DeploymentsView>) {
    let mut snapshot = coordinator.watch();
    loop {
        let deployments = snapshot.borrow_and_update().clone();
        view.send_replace(DeploymentsView { deployments, is_current: true });
        if snapshot.changed().await.is_err() {
            view.send_modify(|view| view.is_current = false);
            return;
        }
    }
}

/// Keeps the view equal to what the coordinator on another node says, for ever.
pub(crate) async fn follow(route: Arc<RosterRoute>, view: watch::Sender<DeploymentsView>) {
    let mut peers = route.mesh.watch();
    loop {
        if let Ok(Route::There(channel)) = route.route()
            && let Err(status) = follow_once(ModelsClient::new(channel), &view).await
        {
            debug!(reason = status.message(), "the coordinator cannot be followed");
        }
        view.send_if_modified(|view| std::mem::replace(&mut view.is_current, false));
        // A link that comes up wakes at once.
        let _ = tokio::time::timeout(RETRY, peers.changed()).await;
    }
}

async fn follow_once(
    mut client: ModelsClient<tonic::transport::Channel>,
    view: &watch::Sender<DeploymentsView>,
) -> Result<(), Status> {
    let mut listings = client.watch(WatchModelsRequest {}).await?.into_inner();
    while let Some(listing) = listings.message().await? {
        let deployments =
            listing.deployments.into_iter().map(deployment_from_wire).collect::<Result<Vec<_>, _>>()?;
        view.send_replace(DeploymentsView { deployments, is_current: true });
    }
    Ok(())
}

/// Tells the coordinator in this process what happens to nodes and workers. Ends with the mesh.
pub(crate) async fn bring_news(coordinator: CoordinatorHandle, nodes: ClusterNodes, workers: Workers) {
    let mut own_ends = workers.watch();
    let mut peers = nodes.mesh.watch();
    // One watch on each node that is alive.
    let mut watches: BTreeMap<NodeId, AbortOnDropHandle<()>> = BTreeMap::new();
    // Those that can be given something to do. One that restarts quickly is suspect for a moment and never lost.
    let mut offered = BTreeSet::new();
    loop {
        let (alive, offers): (BTreeSet<NodeId>, BTreeSet<NodeId>) = {
            let peers = peers.borrow_and_update();
            // A suspect node is still a member of its pipelines: only its death changes the plan.
            let counts = |state| matches!(state, PeerState::Alive | PeerState::Suspect);
            let offers = peers.iter().filter(|peer| peer.state == PeerState::Alive && peer.facts.is_some());
            (
                peers.iter().filter(|peer| counts(peer.state)).map(|peer| peer.node_id).collect(),
                offers.map(|peer| peer.node_id).collect(),
            )
        };
        let lost: Vec<NodeId> = watches.keys().filter(|node| !alive.contains(node)).copied().collect();
        for node in lost {
            watches.remove(&node);
            coordinator.node_lost(node);
        }
        for node in offers.difference(&offered) {
            coordinator.node_joined(*node);
        }
        offered = offers;
        for node in alive {
            watches.entry(node).or_insert_with(|| {
                AbortOnDropHandle::new(tokio::spawn(watch_node(
                    node,
                    nodes.mesh.clone(),
                    coordinator.clone(),
                )))
            });
        }
        tokio::select! {
            changed = peers.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            ended = own_ends.recv() => match ended {
                Ok(WorkerEnded { attempt, pid, reason }) => coordinator.worker_ended(nodes.own, attempt, pid, reason),
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    warn!(missed, "ends of own workers were missed");
                }
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }
}

/// Hears of every worker that ends on another node. When the node's answers stop, so do its heartbeats, and that is noticed elsewhere.
async fn watch_node(node: NodeId, mesh: MeshHandle, coordinator: CoordinatorHandle) {
    loop {
        if let Some(channel) = mesh.channel(&node) {
            let watched = NodeControlClient::new(channel).watch_workers(WatchWorkersRequest {}).await;
            if let Ok(events) = watched {
                let mut events = events.into_inner();
                while let Ok(Some(event)) = events.message().await {
                    let attempt = Attempt { name: event.deployment, epoch: event.epoch };
                    coordinator.worker_ended(node, attempt, event.pid, event.reason);
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}
