//! `Models` messages to the coordinator's types and back.

use mlxnode_cluster::NodeId;
use mlxnode_compute::{ByteCount, LayerRange, Row};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::coordinator::{PlanReport, Progress};
use mlxnode_coordinator::deployments::{AdapterView, DeploymentView, StageView, State};
use mlxnode_coordinator::placement::{Guessing, NodeBudget, PlannedStage, Wish};
use mlxnode_coordinator::scheduler::Statistics;
use mlxnode_proto::v1;
use std::time::Duration;
use tonic::Status;

/// A deployment for clients, with how busy it is when that is known here.
pub(crate) fn deployment_to_proto(view: &DeploymentView, statistics: Option<&Statistics>) -> v1::Deployment {
    let state = match view.state {
        State::Loading => v1::DeploymentState::Loading,
        State::Ready => v1::DeploymentState::Ready,
        State::Recovering => v1::DeploymentState::Recovering,
        State::Failed => v1::DeploymentState::Failed,
        State::Unloading => v1::DeploymentState::Unloading,
    };
    v1::Deployment {
        name: view.name.clone(),
        source: view.source.clone(),
        epoch: view.epoch,
        state: state.into(),
        detail: view.detail.clone(),
        stages: view.stages.iter().map(stage_to_proto).collect(),
        architecture: view.architecture.clone(),
        context_tokens: view.context_tokens as u32,
        active_requests: statistics.map_or(0, |statistics| statistics.active as u32),
        queued_requests: statistics.map_or(0, |statistics| statistics.queued as u32),
        max_sequences: view.max_sequences as u32,
        adapters: view.adapters.iter().map(adapter_to_proto).collect(),
        replica: view.replica as u32,
        replicas: view.replicas as u32,
        pinned: view.is_pinned,
        ttl_seconds: view.ttl.map_or(0, |ttl| ttl.as_secs().max(1)),
        guessing: view.guessing.as_ref().map(guessing_to_proto),
    }
}

fn adapter_to_proto(adapter: &AdapterView) -> v1::Adapter {
    v1::Adapter {
        name: adapter.name.clone(),
        source: adapter.source.clone(),
        key: adapter.key.clone(),
        problem: adapter.problem.clone().unwrap_or_default(),
    }
}

fn adapter(adapter: v1::Adapter) -> AdapterView {
    let problem = Some(adapter.problem).filter(|problem| !problem.is_empty());
    AdapterView { name: adapter.name, source: adapter.source, key: adapter.key, problem }
}

fn stage_to_proto(stage: &StageView) -> v1::Stage {
    v1::Stage {
        node_id: stage.node.to_string(),
        node_name: stage.node_name.clone(),
        layer_start: stage.layers.start as u32,
        layer_end: stage.layers.end as u32,
        weight_bytes: stage.weights.0,
        kv_bytes: stage.kv.0,
        worker_pid: stage.pid.unwrap_or_default(),
    }
}

/// A deployment as another node's coordinator tells it.
///
/// # Errors
/// When a node's id is none.
pub fn deployment(wire: v1::Deployment) -> Result<DeploymentView, Status> {
    let state = match wire.state() {
        v1::DeploymentState::Ready => State::Ready,
        v1::DeploymentState::Recovering => State::Recovering,
        v1::DeploymentState::Failed => State::Failed,
        v1::DeploymentState::Unloading => State::Unloading,
        v1::DeploymentState::Loading | v1::DeploymentState::Unspecified => State::Loading,
    };
    let stages = wire.stages.into_iter().map(stage).collect::<Result<Vec<_>, _>>()?;
    Ok(DeploymentView {
        // The scheduler runs beside the first stage.
        scheduler: stages.first().map(|stage| stage.node).filter(|_| state == State::Ready),
        name: wire.name,
        source: wire.source,
        epoch: wire.epoch,
        state,
        detail: wire.detail,
        stages,
        architecture: wire.architecture,
        context_tokens: wire.context_tokens as usize,
        max_sequences: wire.max_sequences as usize,
        adapters: wire.adapters.into_iter().map(adapter).collect(),
        replica: wire.replica as usize,
        replicas: wire.replicas as usize,
        is_pinned: wire.pinned,
        ttl: Some(wire.ttl_seconds).filter(|ttl| *ttl > 0).map(Duration::from_secs),
        guessing: wire.guessing.map(guessing).transpose()?,
    })
}

fn stage(stage: v1::Stage) -> Result<StageView, Status> {
    let node: NodeId =
        stage.node_id.parse().map_err(|error| Status::internal(format!("a stage's node: {error}")))?;
    let (weights, kv) = (ByteCount(stage.weight_bytes), ByteCount(stage.kv_bytes));
    Ok(StageView {
        node,
        node_name: stage.node_name,
        layers: LayerRange::new(stage.layer_start as usize, stage.layer_end as usize),
        weights,
        kv,
        memory: weights + kv,
        pid: Some(stage.worker_pid).filter(|pid| *pid != 0),
    })
}

/// Tokens that are guessed at once when nobody said how many: mlx-lm's number for a draft model. Looking text up costs next to
/// nothing, so more is tried.
const DRAFT_TOKENS: u32 = 3;
const LOOKUP_TOKENS: u32 = 8;
/// Longest sequence of tokens that is looked up.
const LONGEST_NGRAM: u32 = 16;

fn guessing_to_proto(guessing: &Guessing) -> v1::Guessing {
    v1::Guessing {
        draft_model: guessing.draft.clone().unwrap_or_default(),
        prompt_lookup: guessing.ngram as u32,
        num_draft_tokens: guessing.tokens as u32,
    }
}

fn guessing(guessing: v1::Guessing) -> Result<Guessing, Status> {
    let v1::Guessing { draft_model, prompt_lookup, num_draft_tokens } = guessing;
    let most = Row::MOST_GUESSES as u32;
    let refused = |text: String| Err(Status::invalid_argument(text));
    if num_draft_tokens > most {
        return refused(format!("num_draft_tokens is {num_draft_tokens}, but must be 1 to {most}"));
    }
    let tokens = |default: u32| if num_draft_tokens == 0 { default } else { num_draft_tokens } as usize;
    match (draft_model.trim().is_empty(), prompt_lookup) {
        (false, 0) => Ok(Guessing { draft: Some(draft_model), ngram: 0, tokens: tokens(DRAFT_TOKENS) }),
        (true, 1..=LONGEST_NGRAM) => {
            Ok(Guessing { draft: None, ngram: prompt_lookup as usize, tokens: tokens(LOOKUP_TOKENS) })
        }
        (false, _) => refused("draft_model and prompt_lookup exclude each other; leave one out".to_owned()),
        (true, 0) => refused("num_draft_tokens needs draft_model or prompt_lookup".to_owned()),
        (true, _) => refused(format!("prompt_lookup is {prompt_lookup}, but must be 1 to {LONGEST_NGRAM}")),
    }
}

pub(crate) fn wish(request: &v1::PlanRequest) -> Result<Wish, Status> {
    let some = |value: u32| Some(value as usize).filter(|value| *value > 0);
    Ok(Wish {
        stages: some(request.stages),
        nodes: request.nodes.clone(),
        context_tokens: some(request.context_tokens),
        concurrent_sequences: some(request.concurrent_sequences),
        guessing: request.guessing.clone().map(guessing).transpose()?,
    })
}

pub(super) fn plan_to_proto(report: PlanReport) -> v1::PlanResponse {
    let stage = |stage: &PlannedStage| v1::Stage {
        node_id: stage.node.to_string(),
        node_name: stage.node_name.clone(),
        layer_start: stage.layers.start as u32,
        layer_end: stage.layers.end as u32,
        weight_bytes: stage.weights.0,
        kv_bytes: stage.kv.0,
        worker_pid: 0,
    };
    let budget = |budget: &NodeBudget| v1::NodeBudget {
        node_id: budget.node.to_string(),
        node_name: budget.node_name.clone(),
        budget_bytes: budget.budget.0,
        used_bytes: budget.used.0,
        planned_bytes: budget.planned.0,
    };
    let plan = report.plan.as_ref();
    v1::PlanResponse {
        fits: plan.is_some(),
        stages: plan.map(|plan| plan.stages.iter().map(stage).collect()).unwrap_or_default(),
        explanation: report.explanation,
        total_weight_bytes: report.weights.0,
        total_kv_bytes: report.kv.0,
        predicted_tokens_per_second: plan.and_then(|plan| plan.tokens_per_second).unwrap_or_default(),
        architecture: report.architecture,
        layers: report.layers as u32,
        context_tokens: report.context_tokens as u32,
        budgets: report.budgets.iter().map(budget).collect(),
    }
}

pub(super) fn progress_to_proto(progress: Progress) -> v1::LoadProgress {
    v1::LoadProgress {
        phase: progress.phase.name().to_owned(),
        node_name: progress.node_name,
        done_bytes: progress.done.0,
        total_bytes: progress.total.0,
        detail: progress.detail,
        deployment: None,
    }
}

/// The status that tells a client why an order was not carried out.
pub(crate) fn status(error: Error) -> Status {
    let text = error.to_string();
    match error {
        Error::Invalid(_) => Status::invalid_argument(text),
        Error::NotFound(_) => Status::not_found(text),
        Error::NameTaken { .. } => Status::already_exists(text),
        Error::DoesNotFit(_) | Error::Refused(_) => Status::failed_precondition(text),
        Error::Unavailable(_) => Status::unavailable(text),
        Error::TimedOut(_) => Status::deadline_exceeded(text),
        Error::TooMany(_) => Status::resource_exhausted(text),
        Error::Cancelled(_) => Status::cancelled(text),
        Error::Failed(_) => Status::internal(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deployment_survives_the_way_to_another_node() {
        let node = NodeId::from_bytes([3; 32]);
        let view = DeploymentView {
            name: "demo".into(),
            replica: 2,
            replicas: 3,
            is_pinned: true,
            ttl: Some(Duration::from_secs(600)),
            guessing: Some(Guessing { draft: Some("small".into()), ngram: 0, tokens: 3 }),
            source: "demo".into(),
            epoch: 4,
            state: State::Ready,
            detail: String::new(),
            stages: vec![StageView {
                node,
                node_name: "studio".into(),
                layers: LayerRange::new(0, 4),
                weights: ByteCount(10),
                kv: ByteCount(20),
                memory: ByteCount(30),
                pid: Some(7),
            }],
            scheduler: Some(node),
            architecture: "llama".into(),
            context_tokens: 256,
            max_sequences: 4,
            adapters: vec![AdapterView {
                name: "poet".into(),
                source: "ann/poet".into(),
                key: "poet#7".into(),
                problem: Some("gone".into()),
            }],
        };
        assert_eq!(deployment(deployment_to_proto(&view, None)).unwrap(), view);
        let broken = v1::Stage { node_id: "xyz".into(), ..Default::default() };
        assert!(deployment(v1::Deployment { stages: vec![broken], ..Default::default() }).is_err());
    }
}
