//! The cluster as one picture: its nodes, its models, and what each stage does now. The web page draws it, `mlxnode top` shows it, and
//! `GET /api/v1/cluster` and `mlxnode top --json` write it down; the names of the fields are a contract.

mod facts;
mod wire;

pub use facts::{Adapter, Budget, Coordinator, DeploymentFacts, Guessing, Link, NodeFacts, Plan, StageFacts};
pub(crate) use wire::deployment;
pub use wire::{DeploymentPicture, NodePicture, StagePicture, picture};

use serde::Serialize;

/// Everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Picture {
    /// Name of the cluster.
    pub cluster: String,
    /// In hex.
    pub cluster_id: String,
    /// The node that looked.
    pub node_id: String,
    /// The node that decides.
    pub coordinator: Coordinator,
    /// Raised by every change of membership.
    pub roster_version: u64,
    /// In the roster's order.
    pub nodes: Vec<NodePicture>,
    /// By name.
    pub deployments: Vec<DeploymentPicture>,
    /// Sums over all.
    pub totals: Totals,
}

/// Sums over the cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Requests that generate.
    pub running: u64,
    /// Requests that wait.
    pub waiting: u64,
    /// Generated tokens; `null` until there were two looks.
    pub tokens_per_second: Option<f64>,
    /// Tokens of prompts; `null` until there were two looks.
    pub prompt_tokens_per_second: Option<f64>,
    /// What models may use, in bytes.
    pub memory_budget_bytes: u64,
    /// What they use.
    pub memory_used_bytes: u64,
}

/// What a stage does. Everything but what it holds counts from its start.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StageFigures {
    /// Steps computed.
    pub steps: u64,
    /// Total time of the steps.
    pub compute_seconds: f64,
    /// Total time that batches waited before theirs.
    pub wait_seconds: f64,
    /// Total time that messages took to the next stage.
    pub send_seconds: f64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Generated tokens.
    pub decode_tokens: u64,
    /// Bytes of the messages to the next stage.
    pub sent_bytes: u64,
    /// Sequences that hold memory.
    pub open_sequences: u64,
    /// Held now.
    pub memory_bytes: u64,
    /// Held at most.
    pub memory_peak_bytes: u64,
    /// `null` until there were two looks.
    pub rates: Option<StageRates>,
}

/// What a stage does now: means since the look before.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StageRates {
    /// Part of the time that it computed, 0 to 1.
    pub busy: f64,
    /// Of a step; 0 when there was none.
    pub compute_seconds: f64,
    /// Of a batch before its step.
    pub wait_seconds: f64,
    /// Of what a step made, to the next stage.
    pub send_seconds: f64,
    /// Tokens of prompts.
    pub prompt_tokens_per_second: f64,
    /// Generated tokens.
    pub tokens_per_second: f64,
    /// While it sends; 0 when it sent nothing.
    pub sent_bytes_per_second: f64,
}

impl Picture {
    /// Only the deployments that somebody may see, with what the sums say about them.
    #[must_use]
    pub fn held_to(mut self, may_see: impl Fn(&str) -> bool) -> Self {
        self.deployments.retain(|deployment| may_see(&deployment.model));
        self.totals = wire::totals(&self.nodes, &self.deployments);
        self
    }
}
