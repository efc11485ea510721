//! The cluster's answers as the facts that `--json` prints. The field names are a contract: scripts rely on them.

use mlxnode_proto::v1;
use serde::Serialize;

/// `mlxnode status --json`.
#[derive(Debug, Serialize)]
pub struct Status {
    pub cluster: String,
    pub cluster_id: String,
    /// Id of the node that answered.
    pub node_id: String,
    pub coordinator: Coordinator,
    pub nodes: Vec<Node>,
    pub deployments: Vec<Deployment>,
    pub roster_version: u64,
    /// URL of the HTTP listener of the node that answered; `null` without one.
    pub http: Option<String>,
}

/// Who decides.
#[derive(Debug, Serialize)]
pub struct Coordinator {
    pub node_id: String,
    pub name: String,
    pub reachable: bool,
}

/// A node of the cluster.
#[derive(Debug, Serialize)]
pub struct Node {
    pub id: String,
    pub name: String,
    pub address: String,
    pub state: &'static str,
    pub memory_total_bytes: u64,
    pub memory_budget_bytes: u64,
    pub memory_used_bytes: u64,
    pub chip: String,
    pub version: String,
    pub links: Vec<Link>,
    /// Why there is no link to it; `null` while there is one.
    pub problem: Option<String>,
}

/// The way from the node that answered to another one.
#[derive(Debug, Serialize)]
pub struct Link {
    pub to: String,
    /// `null` while nothing was measured.
    pub rtt_seconds: Option<f64>,
}

/// A deployment; also what `load`, `models` and `unload` print.
#[derive(Debug, Serialize)]
pub struct Deployment {
    /// What requests call it.
    pub model: String,
    pub source: String,
    pub architecture: String,
    pub epoch: u64,
    pub state: &'static str,
    pub detail: String,
    pub stages: Vec<Stage>,
    pub context_tokens: u32,
    pub active_requests: u32,
    pub queued_requests: u32,
    pub adapters: Vec<Adapter>,
    /// Which of the model's replicas: 1, 2, … Each is an entry.
    pub replica: u32,
    pub replicas: u32,
    pub pinned: bool,
    /// `null` when it is not unloaded for want of use.
    pub ttl_seconds: Option<u64>,
    /// How tokens are guessed ahead; `null`: they are not.
    pub guessing: Option<Guessing>,
}

/// How tokens are guessed ahead.
#[derive(Debug, Serialize)]
pub struct Guessing {
    /// `null` when what came before in the text says.
    pub draft_model: Option<String>,
    /// Most tokens that must have come before; `null` with a draft model.
    pub prompt_lookup: Option<u32>,
    /// At once.
    pub num_draft_tokens: u32,
}

/// An adapter of a deployment; requests call it MODEL:NAME.
#[derive(Debug, Serialize)]
pub struct Adapter {
    pub name: String,
    pub source: String,
    /// Why it cannot be used; `null` when it can.
    pub problem: Option<String>,
}

/// One stage of a deployment.
#[derive(Debug, Serialize)]
pub struct Stage {
    pub node: String,
    pub node_id: String,
    pub layer_start: u32,
    pub layer_end: u32,
    pub weight_bytes: u64,
    pub kv_bytes: u64,
    /// `null` while there is no worker.
    pub worker_pid: Option<u32>,
}

/// `mlxnode plan --json`.
#[derive(Debug, Serialize)]
pub struct Plan {
    pub fits: bool,
    pub explanation: String,
    pub architecture: String,
    pub layers: u32,
    pub context_tokens: u32,
    pub total_weight_bytes: u64,
    pub total_kv_bytes: u64,
    /// `null` when nothing is known about the nodes' speed.
    pub predicted_tokens_per_second: Option<f64>,
    pub stages: Vec<Stage>,
    pub budgets: Vec<Budget>,
}

/// What a node brings to a plan.
#[derive(Debug, Serialize)]
pub struct Budget {
    pub node: String,
    pub node_id: String,
    pub budget_bytes: u64,
    pub used_bytes: u64,
    pub planned_bytes: u64,
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
    let name_of = |id: &str| {
        let node = status.nodes.iter().find(|node| node.id == id);
        node.map(|node| node.name.clone()).unwrap_or_default()
    };
    let coordinator = Coordinator {
        name: name_of(&status.coordinator_node_id),
        node_id: status.coordinator_node_id.clone(),
        reachable: status.coordinator_reachable,
    };
    Status {
        coordinator,
        cluster: status.cluster_name,
        cluster_id: status.cluster_id,
        node_id: status.self_node_id,
        nodes: status.nodes.into_iter().map(node).collect(),
        deployments: status.deployments.into_iter().map(deployment).collect(),
        roster_version: status.roster_version,
        http: None,
    }
}

pub fn node(node: v1::Node) -> Node {
    Node {
        state: match node.state() {
            v1::NodeState::Alive => "alive",
            v1::NodeState::Suspect => "suspect",
            v1::NodeState::Dead => "dead",
            v1::NodeState::Connecting | v1::NodeState::Unspecified => "connecting",
        },
        links: node
            .links
            .into_iter()
            .map(|link| Link {
                to: link.to_node_id,
                rtt_seconds: Some(link.rtt_seconds).filter(|rtt| *rtt > 0.0),
            })
            .collect(),
        problem: Some(node.problem).filter(|problem| !problem.is_empty()),
        id: node.id,
        name: node.name,
        address: node.address,
        memory_total_bytes: node.memory_total_bytes,
        memory_budget_bytes: node.memory_budget_bytes,
        memory_used_bytes: node.memory_used_bytes,
        chip: node.chip,
        version: node.version,
    }
}

pub fn deployment(deployment: v1::Deployment) -> Deployment {
    Deployment {
        state: match deployment.state() {
            v1::DeploymentState::Loading | v1::DeploymentState::Unspecified => "loading",
            v1::DeploymentState::Ready => "ready",
            v1::DeploymentState::Recovering => "recovering",
            v1::DeploymentState::Failed => "failed",
            v1::DeploymentState::Unloading => "unloading",
        },
        model: deployment.name,
        source: deployment.source,
        architecture: deployment.architecture,
        epoch: deployment.epoch,
        detail: deployment.detail,
        stages: deployment.stages.into_iter().map(stage).collect(),
        context_tokens: deployment.context_tokens,
        active_requests: deployment.active_requests,
        queued_requests: deployment.queued_requests,
        adapters: deployment.adapters.into_iter().map(adapter).collect(),
        replica: deployment.replica,
        replicas: deployment.replicas,
        pinned: deployment.pinned,
        ttl_seconds: Some(deployment.ttl_seconds).filter(|ttl| *ttl > 0),
        guessing: deployment.guessing.map(|guessing| Guessing {
            draft_model: Some(guessing.draft_model).filter(|draft| !draft.is_empty()),
            prompt_lookup: Some(guessing.prompt_lookup).filter(|ngram| *ngram > 0),
            num_draft_tokens: guessing.num_draft_tokens,
        }),
    }
}

fn adapter(adapter: v1::Adapter) -> Adapter {
    let problem = Some(adapter.problem).filter(|problem| !problem.is_empty());
    Adapter { name: adapter.name, source: adapter.source, problem }
}

fn stage(stage: v1::Stage) -> Stage {
    Stage {
        node: stage.node_name,
        node_id: stage.node_id,
        layer_start: stage.layer_start,
        layer_end: stage.layer_end,
        weight_bytes: stage.weight_bytes,
        kv_bytes: stage.kv_bytes,
        worker_pid: Some(stage.worker_pid).filter(|pid| *pid != 0),
    }
}

pub fn key(key: v1::ApiKey) -> Key {
    let some = |limit: u32| Some(limit).filter(|limit| *limit > 0);
    Key {
        role: match key.role() {
            v1::KeyRole::User | v1::KeyRole::Unspecified => "user",
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

pub fn plan(plan: v1::PlanResponse) -> Plan {
    Plan {
        fits: plan.fits,
        explanation: plan.explanation,
        architecture: plan.architecture,
        layers: plan.layers,
        context_tokens: plan.context_tokens,
        total_weight_bytes: plan.total_weight_bytes,
        total_kv_bytes: plan.total_kv_bytes,
        predicted_tokens_per_second: Some(plan.predicted_tokens_per_second).filter(|speed| *speed > 0.0),
        stages: plan.stages.into_iter().map(stage).collect(),
        budgets: plan
            .budgets
            .into_iter()
            .map(|budget| Budget {
                node: budget.node_name,
                node_id: budget.node_id,
                budget_bytes: budget.budget_bytes,
                used_bytes: budget.used_bytes,
                planned_bytes: budget.planned_bytes,
            })
            .collect(),
    }
}

/// Figures at this pace.
pub fn figures_request(period: std::time::Duration) -> v1::FiguresRequest {
    v1::FiguresRequest { period_milliseconds: u32::try_from(period.as_millis()).unwrap_or(u32::MAX) }
}

pub fn invite(invite: v1::InviteResponse) -> Invite {
    Invite { code: invite.code, token: invite.token, expires_unix: invite.expires_unix }
}
