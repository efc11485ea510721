//! What the API needs of the cluster's members. The node, which knows them, implements [`Household`].

use async_trait::async_trait;
use mlxnode_cluster::{ClusterId, Invite, NodeFacts, NodeId};
use std::time::Duration;
use tokio::sync::watch;

/// The members as one node sees them.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterView {
    /// Which cluster.
    pub cluster: ClusterId,
    /// Its name.
    pub cluster_name: String,
    /// The node that looks.
    pub own: NodeId,
    /// The node that decides.
    pub coordinator: NodeId,
    /// All members, in the roster's order.
    pub nodes: Vec<NodeView>,
    /// Raised by every change of membership.
    pub roster_version: u64,
}

/// One member.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// Its key's hash.
    pub id: NodeId,
    /// Its name in the roster.
    pub name: String,
    /// HOST:PORT where it was reached last, or where it is said to be.
    pub address: String,
    /// Is it there?
    pub state: NodeState,
    /// What it says about itself; zeros and empty texts while it was never heard.
    pub facts: NodeFacts,
    /// Links that the looking node knows of; only its own.
    pub links: Vec<LinkView>,
    /// Why there is no link to it, in words.
    pub problem: Option<String>,
}

/// A link to another node.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkView {
    /// The other end.
    pub to: NodeId,
    /// Smoothed round trip time of heartbeats; `None` while unknown.
    pub rtt: Option<Duration>,
}

/// Is a node there?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// No link yet.
    Connecting,
    /// Heartbeats arrive.
    Alive,
    /// Heartbeats are late.
    Suspect,
    /// Given up until it is heard again.
    Dead,
}

/// Why a change of membership did not happen.
#[derive(Debug, thiserror::Error)]
pub enum HouseholdError {
    /// No such node, or several.
    #[error("{0}")]
    UnknownNode(String),
    /// Not possible in this state.
    #[error("{0}")]
    Refused(String),
    /// The coordinator cannot be reached.
    #[error("{0}")]
    Unavailable(String),
    /// A file could not be written.
    #[error("{0}")]
    Failed(String),
}

/// The members and the ways in and out, as the node that implements it can offer them.
#[async_trait]
pub trait Household: Send + Sync + 'static {
    /// The members now.
    fn view(&self) -> ClusterView;

    /// Wakes whenever [`Household::view`] may have changed.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Opens a window in which one node may join. On the coordinator only.
    async fn invite(&self, lifetime: Duration) -> Result<Invite, HouseholdError>;

    /// Removes a member by name or id. On the coordinator only. Returns it as it was.
    async fn forget(&self, reference: &str) -> Result<NodeView, HouseholdError>;

    /// Takes this node out of its cluster and lets it stop. Returns the name of a coordinator that could not be told.
    async fn leave(&self) -> Result<Option<String>, HouseholdError>;
}
