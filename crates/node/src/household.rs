//! The members of the cluster for the API: who is here, inviting, forgetting, leaving.

use crate::data_dir::DataDir;
use crate::registrar::{Registrar, RegistrarError};
use async_trait::async_trait;
use mlxnode_api::cluster::{ClusterView, Household, HouseholdError, LinkView, NodeState, NodeView};
use mlxnode_cluster::{
    ClusterId, Invite, Inviter, MeshHandle, NodeFacts, NodeId, PeerState, PeerView, RosterEntry, RosterStore,
};
use mlxnode_proto::internal::v1::PeerLeaveRequest;
use mlxnode_proto::internal::v1::peer_client::PeerClient;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request};

/// The members as this node knows them.
pub(crate) struct NodeHousehold {
    own: NodeId,
    /// As of this node's start: remembered when the roster is gone.
    cluster: (ClusterId, String),
    data_dir: DataDir,
    roster: Arc<RosterStore>,
    mesh: MeshHandle,
    registrar: Arc<Registrar>,
    inviter: Arc<Inviter>,
    /// Set when this node has left and shall stop.
    left: watch::Sender<bool>,
    changes: Arc<watch::Sender<u64>>,
    _counting: AbortOnDropHandle<()>,
}

/// The coordinator must sign a new roster.
pub(crate) const LEAVE_TIME: Duration = Duration::from_secs(5);

/// What a household is made of.
pub(crate) struct Members {
    pub(crate) own: NodeId,
    pub(crate) cluster: (ClusterId, String),
    pub(crate) data_dir: DataDir,
    pub(crate) roster: Arc<RosterStore>,
    pub(crate) mesh: MeshHandle,
    pub(crate) registrar: Arc<Registrar>,
    pub(crate) inviter: Arc<Inviter>,
}

impl NodeHousehold {
    pub(crate) fn new(members: Members) -> Self {
        let changes = Arc::new(watch::Sender::new(0));
        let counting =
            tokio::spawn(count_changes(members.roster.clone(), members.mesh.clone(), changes.clone()));
        Self {
            own: members.own,
            cluster: members.cluster,
            data_dir: members.data_dir,
            roster: members.roster,
            mesh: members.mesh,
            registrar: members.registrar,
            inviter: members.inviter,
            left: watch::Sender::new(false),
            changes,
            _counting: AbortOnDropHandle::new(counting),
        }
    }

    /// Becomes true when this node has left its cluster.
    pub(crate) fn left(&self) -> watch::Receiver<bool> {
        self.left.subscribe()
    }

    /// Has the coordinator take this node out of the roster. `false`: it cannot be reached.
    async fn tell_coordinator(&self, coordinator: &NodeId) -> Result<bool, HouseholdError> {
        let Some(channel) = self.mesh.channel(coordinator) else { return Ok(false) };
        let mut request = Request::new(PeerLeaveRequest {});
        request.set_timeout(LEAVE_TIME);
        match PeerClient::new(channel).leave(request).await {
            Ok(_) => Ok(true),
            // What the coordinator itself says is failed_precondition.
            Err(status) if status.code() == Code::FailedPrecondition => {
                Err(HouseholdError::Refused(status.message().to_owned()))
            }
            Err(_) => Ok(false),
        }
    }

    fn node_view(&self, entry: &RosterEntry, peers: &[PeerView]) -> NodeView {
        let listed = entry.addresses.first().cloned().unwrap_or_default();
        if entry.node_id == self.own {
            let facts = self.mesh.facts();
            let links = peers.iter().map(|peer| LinkView { to: peer.node_id, rtt: peer.rtt });
            return NodeView {
                id: entry.node_id,
                name: entry.name.clone(),
                address: facts.addresses.first().cloned().unwrap_or(listed),
                state: NodeState::Alive,
                links: links.collect(),
                problem: None,
                facts,
            };
        }
        let peer = peers.iter().find(|peer| peer.node_id == entry.node_id);
        let state = match peer.map(|peer| peer.state) {
            None | Some(PeerState::Connecting) => NodeState::Connecting,
            Some(PeerState::Alive) => NodeState::Alive,
            Some(PeerState::Suspect) => NodeState::Suspect,
            Some(PeerState::Dead) => NodeState::Dead,
        };
        let facts = peer.and_then(|peer| peer.facts.clone());
        NodeView {
            id: entry.node_id,
            name: entry.name.clone(),
            address: peer.and_then(|peer| peer.address.clone()).unwrap_or(listed),
            state,
            facts: facts.unwrap_or_else(|| NodeFacts { name: entry.name.clone(), ..NodeFacts::default() }),
            links: Vec::new(),
            problem: peer.and_then(|peer| peer.problem.clone()),
        }
    }
}

#[async_trait]
impl Household for NodeHousehold {
    fn view(&self) -> ClusterView {
        let peers = self.mesh.peers();
        let roster = self.roster.current();
        let roster = roster.as_ref().map(|signed| signed.roster());
        ClusterView {
            cluster: self.cluster.0,
            cluster_name: self.cluster.1.clone(),
            own: self.own,
            coordinator: roster.map_or(self.own, |roster| roster.coordinator()),
            nodes: roster
                .map(|roster| roster.nodes().iter().map(|entry| self.node_view(entry, &peers)).collect())
                .unwrap_or_default(),
            roster_version: roster.map_or(0, |roster| roster.version()),
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn invite(&self, lifetime: Duration) -> Result<Invite, HouseholdError> {
        Ok(self.inviter.open_for(self.cluster.0, &self.mesh.facts().addresses, lifetime))
    }

    async fn forget(&self, reference: &str) -> Result<NodeView, HouseholdError> {
        let roster = self.roster.current().ok_or_else(|| failure(RegistrarError::NoCluster))?;
        let entry = roster
            .roster()
            .find(reference)
            .map_err(|error| HouseholdError::UnknownNode(error.to_string()))?
            .clone();
        let view = self.node_view(&entry, &self.mesh.peers());
        if entry.node_id == self.own {
            let text = format!("{} is this node: `mlxnode leave` takes it out", entry.name);
            return Err(HouseholdError::Refused(text));
        }
        self.registrar.remove(entry.node_id).map_err(failure)?;
        Ok(view)
    }

    async fn leave(&self) -> Result<Option<String>, HouseholdError> {
        let roster = self.roster.current().ok_or_else(|| failure(RegistrarError::NoCluster))?;
        let coordinator = roster.roster().coordinator();
        let mut untold = None;
        if coordinator != self.own {
            // One that is gone, or that has forgotten this node already, must not keep it for ever.
            if !self.tell_coordinator(&coordinator).await? {
                let entry = roster.roster().get(&coordinator);
                untold = Some(entry.map_or_else(|| coordinator.short(), |entry| entry.name.clone()));
            }
        } else if roster.roster().nodes().len() > 1 {
            return Err(HouseholdError::Refused(
                "this node coordinates the cluster and has other members; let them leave first, or `mlxnode forget` them"
                    .to_owned(),
            ));
        }
        self.roster.clear().map_err(|error| HouseholdError::Failed(crate::error::chain(&error)))?;
        self.data_dir
            .forget_cluster()
            .map_err(|error| HouseholdError::Failed(crate::error::chain(&error)))?;
        self.left.send_replace(true);
        Ok(untold)
    }
}

fn failure(error: RegistrarError) -> HouseholdError {
    let text = crate::error::chain(&error);
    match error {
        RegistrarError::NotCoordinator | RegistrarError::NoCluster | RegistrarError::Roster(_) => {
            HouseholdError::Refused(text)
        }
        RegistrarError::Store(_) => HouseholdError::Failed(text),
    }
}

/// Turns "the roster or a peer changed" into one number that changes.
async fn count_changes(roster: Arc<RosterStore>, mesh: MeshHandle, changes: Arc<watch::Sender<u64>>) {
    let (mut roster, mut peers) = (roster.watch(), mesh.watch());
    loop {
        let changed = tokio::select! {
            changed = roster.changed() => changed,
            changed = peers.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        changes.send_modify(|count| *count += 1);
    }
}
