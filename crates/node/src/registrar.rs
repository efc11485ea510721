//! Changes of membership. Only the node with the cluster's key, the coordinator's, can make them.

use async_trait::async_trait;
use mlxnode_cluster::{
    Admit, ClusterKey, Departures, JoinRequest, MeshHandle, NodeId, PeerState, Refusal, RosterEntry,
    RosterError, RosterStore, RosterStoreError, SignedRoster,
};
use std::sync::{Arc, Mutex, PoisonError};
use tracing::{info, warn};

/// Signs new rosters.
pub(crate) struct Registrar {
    roster: Arc<RosterStore>,
    /// Present on the coordinator's node. Locked while a roster is changed, so that changes follow each other.
    key: Option<Mutex<ClusterKey>>,
}

/// Why membership did not change.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegistrarError {
    /// The key is elsewhere.
    #[error("this node does not coordinate the cluster")]
    NotCoordinator,
    /// This node is in no cluster.
    #[error("this node belongs to no cluster any more")]
    NoCluster,
    /// The roster does not allow it.
    #[error(transparent)]
    Roster(#[from] RosterError),
    /// It could not be kept.
    #[error(transparent)]
    Store(#[from] RosterStoreError),
}

impl Registrar {
    pub(crate) fn new(roster: Arc<RosterStore>, key: Option<ClusterKey>) -> Self {
        Self { roster, key: key.map(Mutex::new) }
    }

    /// Takes a node in; one that is in already stays as it is.
    pub(crate) fn admit(&self, joiner: &JoinRequest) -> Result<SignedRoster, RegistrarError> {
        let key = self.key.as_ref().ok_or(RegistrarError::NotCoordinator)?;
        let key = key.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.roster.current().ok_or(RegistrarError::NoCluster)?;
        if current.roster().get(&joiner.node_id).is_some() {
            return Ok(SignedRoster::clone(&current));
        }
        let mut roster = current.roster().clone();
        let entry = roster.admit(joiner.node_id, &joiner.facts.name, joiner.facts.addresses.clone())?;
        let signed = key.sign(roster)?;
        self.roster.adopt(signed.clone())?;
        info!(node = %entry.node_id.short(), name = entry.name, "node joined");
        Ok(signed)
    }

    /// Notes where members listen now: after a restart the others then find them without mDNS too.
    pub(crate) fn note_addresses(&self, news: &[(NodeId, Vec<String>)]) -> Result<(), RegistrarError> {
        let key = self.key.as_ref().ok_or(RegistrarError::NotCoordinator)?;
        let key = key.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.roster.current().ok_or(RegistrarError::NoCluster)?;
        let mut roster = current.roster().clone();
        let mut is_new = false;
        for (node, addresses) in news {
            is_new |= !addresses.is_empty() && roster.set_addresses(node, addresses.clone());
        }
        if is_new {
            self.roster.adopt(key.sign(roster)?)?;
        }
        Ok(())
    }

    /// Takes a node out.
    pub(crate) fn remove(&self, node: NodeId) -> Result<RosterEntry, RegistrarError> {
        let key = self.key.as_ref().ok_or(RegistrarError::NotCoordinator)?;
        let key = key.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.roster.current().ok_or(RegistrarError::NoCluster)?;
        let mut roster = current.roster().clone();
        let entry = roster.remove(&node)?;
        self.roster.adopt(key.sign(roster)?)?;
        info!(node = %entry.node_id.short(), name = entry.name, "node is out of the cluster");
        Ok(entry)
    }
}

/// Keeps the roster's addresses current, for as long as the mesh runs. On the coordinator's node.
pub(crate) async fn keep_addresses(registrar: Arc<Registrar>, mesh: MeshHandle, own: NodeId) {
    let mut peers = mesh.watch();
    loop {
        let mut news = vec![(own, mesh.facts().addresses)];
        for peer in peers.borrow_and_update().iter().filter(|peer| peer.state == PeerState::Alive) {
            news.push((
                peer.node_id,
                peer.facts.as_ref().map(|facts| facts.addresses.clone()).unwrap_or_default(),
            ));
        }
        if let Err(error) = registrar.note_addresses(&news) {
            warn!(reason = crate::error::chain(&error), "the members' addresses are not kept");
        }
        if peers.changed().await.is_err() {
            return;
        }
    }
}

#[async_trait]
impl Admit for Registrar {
    async fn admit(&self, joiner: JoinRequest) -> Result<SignedRoster, Refusal> {
        // Writing the roster syncs the disk; that takes milliseconds and happens when a person adds a Mac.
        Registrar::admit(self, &joiner).map_err(|error| match error {
            RegistrarError::Roster(error) => Refusal::Member(error.to_string()),
            error => Refusal::Failed(error.to_string()),
        })
    }
}

#[async_trait]
impl Departures for Registrar {
    async fn leave(&self, node: NodeId) -> Result<(), String> {
        match self.remove(node) {
            Ok(_) | Err(RegistrarError::Roster(RosterError::Unknown(_))) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}
