//! The cluster's deployments as every node sees them: from the coordinator in this process, or from the one on another node.

use mlxnode_cluster::NodeId;
use mlxnode_compute::{ByteCount, LayerRange};

/// What a node knows about the deployments now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeploymentsView {
    /// All of them, by name.
    pub deployments: Vec<Deployment>,
    /// False when the coordinator cannot be reached, so that the list may be old.
    pub is_current: bool,
}

/// One deployment.
#[derive(Clone, Debug, PartialEq)]
pub struct Deployment {
    /// What clients write into `model`.
    pub name: String,
    /// Where the weights come from.
    pub source: String,
    /// Raised by every new plan.
    pub epoch: u64,
    /// What it is doing.
    pub state: DeploymentState,
    /// Why, when that needs saying.
    pub detail: String,
    /// In the order of the layers; the first one's node runs the scheduler.
    pub stages: Vec<StageView>,
    /// Model family.
    pub architecture: String,
    /// Longest sequence.
    pub context_tokens: usize,
}

impl Deployment {
    /// The node that runs the scheduler: the first stage's.
    pub fn scheduler_node(&self) -> Option<NodeId> {
        self.stages.first().map(|stage| stage.node)
    }
}

/// One stage of a deployment.
#[derive(Clone, Debug, PartialEq)]
pub struct StageView {
    /// Where it runs.
    pub node: NodeId,
    /// That node's name.
    pub node_name: String,
    /// Which layers.
    pub layers: LayerRange,
    /// Bytes of their weights.
    pub weights: ByteCount,
    /// Bytes reserved for the KV cache.
    pub kv: ByteCount,
    /// The worker's process id, while there is one.
    pub worker_pid: Option<u32>,
}

/// What a deployment is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeploymentState {
    /// Workers are starting.
    Loading,
    /// Answers requests.
    Ready,
    /// A stage was lost and is being started again.
    Recovering,
    /// Given up.
    Failed,
    /// Workers are stopping.
    Unloading,
}

impl DeploymentState {
    /// As people and `--json` write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Recovering => "recovering",
            Self::Failed => "failed",
            Self::Unloading => "unloading",
        }
    }
}
