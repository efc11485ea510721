//! The messages of `Cluster` and `Models` as facts.

use super::{Adapter, Budget, Coordinator, DeploymentFacts, Guessing, Link, NodeFacts, Plan, StageFacts};
use mlxnode_proto::v1;

impl Coordinator {
    /// Of a cluster.
    pub fn of(status: &v1::ClusterStatus) -> Self {
        let node = status.nodes.iter().find(|node| node.id == status.coordinator_node_id);
        Self {
            name: node.map(|node| node.name.clone()).unwrap_or_default(),
            node_id: status.coordinator_node_id.clone(),
            reachable: status.coordinator_reachable,
        }
    }
}

impl From<&v1::Link> for Link {
    fn from(link: &v1::Link) -> Self {
        Self { to: link.to_node_id.clone(), rtt_seconds: Some(link.rtt_seconds).filter(|rtt| *rtt > 0.0) }
    }
}

impl From<v1::Node> for NodeFacts {
    fn from(node: v1::Node) -> Self {
        Self {
            state: match node.state() {
                v1::NodeState::Alive => "alive",
                v1::NodeState::Suspect => "suspect",
                v1::NodeState::Dead => "dead",
                v1::NodeState::Connecting | v1::NodeState::Unspecified => "connecting",
            },
            links: node.links.iter().map(Link::from).collect(),
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
}

impl DeploymentFacts {
    /// Of a deployment.
    pub fn of(deployment: &v1::Deployment) -> Self {
        let state = match deployment.state() {
            v1::DeploymentState::Loading | v1::DeploymentState::Unspecified => "loading",
            v1::DeploymentState::Ready => "ready",
            v1::DeploymentState::Recovering => "recovering",
            v1::DeploymentState::Failed => "failed",
            v1::DeploymentState::Unloading => "unloading",
        };
        Self {
            state,
            model: deployment.name.clone(),
            source: deployment.source.clone(),
            architecture: deployment.architecture.clone(),
            epoch: deployment.epoch,
            detail: deployment.detail.clone(),
            context_tokens: deployment.context_tokens,
            adapters: deployment.adapters.iter().map(Adapter::from).collect(),
            replica: deployment.replica,
            replicas: deployment.replicas,
            pinned: deployment.pinned,
            ttl_seconds: Some(deployment.ttl_seconds).filter(|seconds| *seconds > 0),
            guessing: deployment.guessing.as_ref().map(Guessing::from),
        }
    }
}

impl From<&v1::Adapter> for Adapter {
    fn from(adapter: &v1::Adapter) -> Self {
        let problem = Some(adapter.problem.clone()).filter(|problem| !problem.is_empty());
        Self { name: adapter.name.clone(), source: adapter.source.clone(), problem }
    }
}

impl From<&v1::Guessing> for Guessing {
    fn from(guessing: &v1::Guessing) -> Self {
        Self {
            draft_model: Some(guessing.draft_model.clone()).filter(|draft| !draft.is_empty()),
            prompt_lookup: Some(guessing.prompt_lookup).filter(|ngram| *ngram > 0),
            num_draft_tokens: guessing.num_draft_tokens,
        }
    }
}

impl From<v1::Stage> for StageFacts {
    fn from(stage: v1::Stage) -> Self {
        Self {
            node: stage.node_name,
            node_id: stage.node_id,
            layer_start: stage.layer_start,
            layer_end: stage.layer_end,
            weight_bytes: stage.weight_bytes,
            kv_bytes: stage.kv_bytes,
            worker_pid: Some(stage.worker_pid).filter(|pid| *pid != 0),
        }
    }
}

impl From<v1::PlanResponse> for Plan {
    fn from(plan: v1::PlanResponse) -> Self {
        Self {
            fits: plan.fits,
            explanation: plan.explanation,
            architecture: plan.architecture,
            layers: plan.layers,
            context_tokens: plan.context_tokens,
            total_weight_bytes: plan.total_weight_bytes,
            total_kv_bytes: plan.total_kv_bytes,
            predicted_tokens_per_second: Some(plan.predicted_tokens_per_second).filter(|speed| *speed > 0.0),
            stages: plan.stages.into_iter().map(StageFacts::from).collect(),
            budgets: plan.budgets.into_iter().map(Budget::from).collect(),
        }
    }
}

impl From<v1::NodeBudget> for Budget {
    fn from(budget: v1::NodeBudget) -> Self {
        Self {
            node: budget.node_name,
            node_id: budget.node_id,
            budget_bytes: budget.budget_bytes,
            used_bytes: budget.used_bytes,
            planned_bytes: budget.planned_bytes,
        }
    }
}
