//! The cluster's deployments as every node sees them: from the coordinator in this process, or from the one on another node.

pub use mlxnode_coordinator::deployments::{AdapterView, DeploymentView, StageView, State};

/// What a node knows about the deployments now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeploymentsView {
    /// All of them, by name.
    pub deployments: Vec<DeploymentView>,
    /// False when the coordinator cannot be reached, so that the list may be old.
    pub is_current: bool,
}

/// A state as people and `--json` write it.
pub fn state_name(state: State) -> &'static str {
    match state {
        State::Loading => "loading",
        State::Ready => "ready",
        State::Recovering => "recovering",
        State::Failed => "failed",
        State::Unloading => "unloading",
    }
}
