//! The cluster's answers as the facts that `--json` prints. The field names are a contract: scripts rely on them.

use mlxnode_api::picture::{Coordinator, DeploymentFacts, NodeFacts, StageFacts};
use mlxnode_proto::v1;
use serde::Serialize;
use std::ops::Deref;

/// `mlxnode status --json`.
#[derive(Debug, Serialize)]
pub struct Status {
    pub cluster: String,
    pub cluster_id: String,
    /// Id of the node that answered.
    pub node_id: String,
    pub coordinator: Coordinator,
    pub nodes: Vec<NodeFacts>,
    pub deployments: Vec<Deployment>,
    pub roster_version: u64,
    /// URL of the HTTP listener of the node that answered; `null` without one.
    pub http: Option<String>,
}

/// A deployment; also what `load`, `models` and `unload` print.
#[derive(Debug, Serialize)]
pub struct Deployment {
    #[serde(flatten)]
    pub facts: DeploymentFacts,
    pub stages: Vec<StageFacts>,
    pub active_requests: u32,
    pub queued_requests: u32,
}

// Read as what it adds to.
impl Deref for Deployment {
    type Target = DeploymentFacts;

    fn deref(&self) -> &DeploymentFacts {
        &self.facts
    }
}

/// `mlxnode invite --json`.
#[derive(Debug, Serialize)]
pub struct Invite {
    pub code: String,
    pub token: String,
    pub expires_unix: i64,
}

/// `mlxnode keys list --json`.
#[derive(Debug, Serialize)]
pub struct Key {
    pub name: String,
    pub role: &'static str,
    /// Empty: all.
    pub models: Vec<String>,
    /// `null` when there is no limit.
    pub requests_per_minute: Option<u32>,
    pub tokens_per_minute: Option<u32>,
    pub created_unix: i64,
    pub id: String,
}

/// `mlxnode keys create --json`.
#[derive(Serialize)]
pub struct NewKey {
    /// The key's text.
    pub key: String,
    #[serde(flatten)]
    pub facts: Key,
}

pub fn status(status: v1::ClusterStatus) -> Status {
    let coordinator = Coordinator::of(&status);
    Status {
        coordinator,
        cluster: status.cluster_name,
        cluster_id: status.cluster_id,
        node_id: status.self_node_id,
        nodes: status.nodes.into_iter().map(NodeFacts::from).collect(),
        deployments: status.deployments.into_iter().map(deployment).collect(),
        roster_version: status.roster_version,
        http: None,
    }
}

pub fn deployment(deployment: v1::Deployment) -> Deployment {
    Deployment {
        facts: DeploymentFacts::of(&deployment),
        stages: deployment.stages.into_iter().map(StageFacts::from).collect(),
        active_requests: deployment.active_requests,
        queued_requests: deployment.queued_requests,
    }
}

pub fn key(key: v1::ApiKey) -> Key {
    let some = |limit: u32| Some(limit).filter(|limit| *limit > 0);
    Key {
        role: match key.role() {
            v1::KeyRole::User | v1::KeyRole::Unspecified => "user",
            v1::KeyRole::Trainer => "trainer",
            v1::KeyRole::Admin => "admin",
            v1::KeyRole::Metrics => "metrics",
        },
        name: key.name,
        models: key.models,
        requests_per_minute: some(key.requests_per_minute),
        tokens_per_minute: some(key.tokens_per_minute),
        created_unix: key.created_unix,
        id: key.id,
    }
}

/// Figures at this pace.
pub fn figures_request(period: std::time::Duration) -> v1::FiguresRequest {
    v1::FiguresRequest { period_milliseconds: u32::try_from(period.as_millis()).unwrap_or(u32::MAX) }
}

pub fn invite(invite: v1::InviteResponse) -> Invite {
    Invite { code: invite.code, token: invite.token, expires_unix: invite.expires_unix }
}
