//! The messages of `Cluster` as a picture: what each node says is put where it belongs.

use super::{Coordinator, Link, Picture, StageFigures, StageRates, Totals};
use mlxnode_proto::v1;
use serde::Serialize;

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NodePicture {
    /// In hex.
    pub id: String,
    /// Its name.
    pub name: String,
    /// HOST:PORT of its gRPC listener.
    pub address: String,
    /// "connecting", "alive", "suspect", "dead".
    pub state: &'static str,
    /// Of the machine, in bytes.
    pub memory_total_bytes: u64,
    /// What models may use.
    pub memory_budget_bytes: u64,
    /// What they use.
    pub memory_used_bytes: u64,
    /// Processor.
    pub chip: String,
    /// Release of mlxnode.
    pub version: String,
    /// As this node measures them; of other nodes only while they answer.
    pub links: Vec<Link>,
    /// Why there is no link to it; `null` while there is one.
    pub problem: Option<String>,
    /// Did it say what it does now?
    pub answers: bool,
}

/// How a deployment guesses tokens ahead.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GuessingPicture {
    /// `null` when what came before in the text says.
    pub draft_model: Option<String>,
    /// Most tokens that must have come before; `null` with a draft model.
    pub prompt_lookup: Option<u32>,
    /// At once.
    pub num_draft_tokens: u32,
}

fn guessing(guessing: v1::Guessing) -> GuessingPicture {
    GuessingPicture {
        draft_model: Some(guessing.draft_model).filter(|draft| !draft.is_empty()),
        prompt_lookup: Some(guessing.prompt_lookup).filter(|ngram| *ngram > 0),
        num_draft_tokens: guessing.num_draft_tokens,
    }
}

/// A deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DeploymentPicture {
    /// What requests call it.
    pub model: String,
    /// Which of the model's replicas (1, 2, …); each is an entry of the list.
    pub replica: u32,
    /// How many there are.
    pub replicas: u32,
    /// It stays until somebody unloads it.
    pub pinned: bool,
    /// It is unloaded when nobody asked for so long; `null`: it is not.
    pub ttl_seconds: Option<u64>,
    /// How tokens are guessed ahead; `null`: they are not.
    pub guessing: Option<GuessingPicture>,
    /// Where the weights come from.
    pub source: String,
    /// "llama", "qwen3" …
    pub architecture: String,
    /// Raised by every new plan.
    pub epoch: u64,
    /// "loading", "ready", "recovering", "failed", "unloading".
    pub state: &'static str,
    /// Why, when that needs saying.
    pub detail: String,
    /// In the order of layers.
    pub stages: Vec<StagePicture>,
    /// What changes it for the requests that ask for `MODEL:ADAPTER`.
    pub adapters: Vec<AdapterPicture>,
    /// Longest sequence in tokens.
    pub context_tokens: u32,
    /// Sequences at the same time.
    pub max_sequences: u32,
    /// Requests that generate.
    pub running: u64,
    /// Requests that wait.
    pub waiting: u64,
    /// Part of the reserved KV memory that is promised to sequences; `null` while unknown.
    pub kv_usage: Option<f64>,
    /// Generated tokens; `null` until there were two looks.
    pub tokens_per_second: Option<f64>,
    /// Tokens of prompts; `null` until there were two looks.
    pub prompt_tokens_per_second: Option<f64>,
}

/// An adapter of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AdapterPicture {
    /// Its name in the deployment.
    pub name: String,
    /// A folder, or a Hugging Face id.
    pub source: String,
    /// Why it cannot be used now; `null` while it can.
    pub problem: Option<String>,
}

/// A stage of a deployment, or of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StagePicture {
    /// Name of the node.
    pub node: String,
    /// In hex.
    pub node_id: String,
    /// First layer.
    pub layer_start: u32,
    /// The one after the last.
    pub layer_end: u32,
    /// Of the weights.
    pub weight_bytes: u64,
    /// Reserved for the KV cache.
    pub kv_bytes: u64,
    /// `null` while there is no worker.
    pub worker_pid: Option<u32>,
    /// What it does; `null` while its node does not say.
    pub figures: Option<StageFigures>,
}

/// A plan, as `mlxnode plan --json` writes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PlanPicture {
    /// Is there room?
    pub fits: bool,
    /// Sentences for a person.
    pub explanation: String,
    /// The model's family.
    pub architecture: String,
    /// Its layers.
    pub layers: u32,
    /// Tokens of context.
    pub context_tokens: u32,
    /// All weights.
    pub total_weight_bytes: u64,
    /// All KV caches.
    pub total_kv_bytes: u64,
    /// `null` when nothing is known about the nodes' speed.
    pub predicted_tokens_per_second: Option<f64>,
    /// Where the layers would be.
    pub stages: Vec<StagePicture>,
    /// What each node brings.
    pub budgets: Vec<BudgetPicture>,
}

/// What a node brings to a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct BudgetPicture {
    /// Name of the node.
    pub node: String,
    /// In hex.
    pub node_id: String,
    /// What models may use there.
    pub budget_bytes: u64,
    /// What they use.
    pub used_bytes: u64,
    /// What this plan would add.
    pub planned_bytes: u64,
}

/// Puts the picture together.
pub fn picture(figures: v1::ClusterFigures) -> Picture {
    let v1::ClusterFigures { status, nodes: seen } = figures;
    let status = status.unwrap_or_default();
    let name_of = |id: &str| {
        let node = status.nodes.iter().find(|node| node.id == id);
        node.map(|node| node.name.clone()).unwrap_or_default()
    };
    let coordinator = Coordinator {
        name: name_of(&status.coordinator_node_id),
        node_id: status.coordinator_node_id.clone(),
        reachable: status.coordinator_reachable,
    };
    let deployments: Vec<_> =
        status.deployments.into_iter().map(|deployment| with_figures(deployment, &seen)).collect();
    let nodes: Vec<_> = status.nodes.into_iter().map(|node| with_links(node, &seen)).collect();
    Picture {
        cluster: status.cluster_name,
        cluster_id: status.cluster_id,
        node_id: status.self_node_id,
        coordinator,
        roster_version: status.roster_version,
        totals: totals(&nodes, &deployments),
        nodes,
        deployments,
    }
}

/// A plan.
pub fn plan_picture(plan: v1::PlanResponse) -> PlanPicture {
    let budget = |budget: v1::NodeBudget| BudgetPicture {
        node: budget.node_name,
        node_id: budget.node_id,
        budget_bytes: budget.budget_bytes,
        used_bytes: budget.used_bytes,
        planned_bytes: budget.planned_bytes,
    };
    PlanPicture {
        fits: plan.fits,
        explanation: plan.explanation,
        architecture: plan.architecture,
        layers: plan.layers,
        context_tokens: plan.context_tokens,
        total_weight_bytes: plan.total_weight_bytes,
        total_kv_bytes: plan.total_kv_bytes,
        predicted_tokens_per_second: Some(plan.predicted_tokens_per_second).filter(|speed| *speed > 0.0),
        stages: plan.stages.into_iter().map(stage).collect(),
        budgets: plan.budgets.into_iter().map(budget).collect(),
    }
}

/// A deployment by itself, as `load` answers with it.
pub(crate) fn deployment(deployment: v1::Deployment) -> DeploymentPicture {
    with_figures(deployment, &[])
}

pub(super) fn totals(nodes: &[NodePicture], deployments: &[DeploymentPicture]) -> Totals {
    Totals {
        running: deployments.iter().map(|deployment| deployment.running).sum(),
        waiting: deployments.iter().map(|deployment| deployment.waiting).sum(),
        tokens_per_second: sum(deployments.iter().map(|deployment| deployment.tokens_per_second)),
        prompt_tokens_per_second: sum(deployments
            .iter()
            .map(|deployment| deployment.prompt_tokens_per_second)),
        memory_budget_bytes: nodes.iter().map(|node| node.memory_budget_bytes).sum(),
        memory_used_bytes: nodes.iter().map(|node| node.memory_used_bytes).sum(),
    }
}

/// Of those that are known; none when none is.
fn sum(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    values.flatten().fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

fn with_links(node: v1::Node, seen: &[v1::NodeFigures]) -> NodePicture {
    let figures = seen.iter().find(|figures| figures.node_id == node.id);
    let links = figures.map_or(&node.links, |figures| &figures.links);
    NodePicture {
        state: match node.state() {
            v1::NodeState::Alive => "alive",
            v1::NodeState::Suspect => "suspect",
            v1::NodeState::Dead => "dead",
            v1::NodeState::Connecting | v1::NodeState::Unspecified => "connecting",
        },
        links: links
            .iter()
            .map(|link| Link {
                to: link.to_node_id.clone(),
                rtt_seconds: Some(link.rtt_seconds).filter(|rtt| *rtt > 0.0),
            })
            .collect(),
        problem: Some(node.problem).filter(|problem| !problem.is_empty()),
        answers: figures.is_some(),
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

fn with_figures(deployment: v1::Deployment, seen: &[v1::NodeFigures]) -> DeploymentPicture {
    let state = match deployment.state() {
        v1::DeploymentState::Loading | v1::DeploymentState::Unspecified => "loading",
        v1::DeploymentState::Ready => "ready",
        v1::DeploymentState::Recovering => "recovering",
        v1::DeploymentState::Failed => "failed",
        v1::DeploymentState::Unloading => "unloading",
    };
    let stages: Vec<StagePicture> = deployment
        .stages
        .into_iter()
        .map(|told| {
            let stage = stage(told);
            let layers = format!("{}-{}", stage.layer_start, stage.layer_end);
            let node = seen.iter().find(|figures| figures.node_id == stage.node_id);
            let figures = node.and_then(|node| {
                node.stages
                    .iter()
                    .find(|figures| figures.model == deployment.name && figures.layers == layers)
            });
            StagePicture { figures: figures.map(stage_figures), ..stage }
        })
        .collect();
    // A replica's scheduler is beside its first stage; other replicas of the model have theirs elsewhere.
    let beside = stages.first().map(|stage| stage.node_id.clone());
    let schedulers: Vec<_> = seen
        .iter()
        .filter(|figures| Some(&figures.node_id) == beside.as_ref())
        .flat_map(|figures| &figures.schedulers)
        .filter(|scheduler| scheduler.model == deployment.name)
        .collect();
    // Every token goes through every stage once; the first one counts.
    let rate = |of: fn(&StageRates) -> f64| {
        let first = stages.iter().filter(|stage| stage.layer_start == 0);
        sum(first.map(|stage| stage.figures.as_ref()?.rates.as_ref().map(of)))
    };
    DeploymentPicture {
        state,
        running: schedulers.iter().map(|scheduler| u64::from(scheduler.running)).sum(),
        waiting: schedulers.iter().map(|scheduler| u64::from(scheduler.waiting)).sum(),
        kv_usage: schedulers.iter().filter_map(|scheduler| scheduler.kv_usage).reduce(f64::max),
        tokens_per_second: rate(|rates| rates.tokens_per_second),
        prompt_tokens_per_second: rate(|rates| rates.prompt_tokens_per_second),
        model: deployment.name,
        replica: deployment.replica,
        replicas: deployment.replicas,
        pinned: deployment.pinned,
        ttl_seconds: Some(deployment.ttl_seconds).filter(|seconds| *seconds > 0),
        guessing: deployment.guessing.map(guessing),
        source: deployment.source,
        architecture: deployment.architecture,
        epoch: deployment.epoch,
        detail: deployment.detail,
        adapters: deployment.adapters.into_iter().map(adapter).collect(),
        stages,
        context_tokens: deployment.context_tokens,
        max_sequences: deployment.max_sequences,
    }
}

fn adapter(adapter: v1::Adapter) -> AdapterPicture {
    AdapterPicture {
        name: adapter.name,
        source: adapter.source,
        problem: Some(adapter.problem).filter(|problem| !problem.is_empty()),
    }
}

fn stage(stage: v1::Stage) -> StagePicture {
    StagePicture {
        node: stage.node_name,
        node_id: stage.node_id,
        layer_start: stage.layer_start,
        layer_end: stage.layer_end,
        weight_bytes: stage.weight_bytes,
        kv_bytes: stage.kv_bytes,
        worker_pid: Some(stage.worker_pid).filter(|pid| *pid != 0),
        figures: None,
    }
}

fn stage_figures(figures: &v1::StageFigures) -> StageFigures {
    StageFigures {
        steps: figures.steps,
        compute_seconds: figures.compute_seconds,
        wait_seconds: figures.wait_seconds,
        send_seconds: figures.send_seconds,
        prompt_tokens: figures.prompt_tokens,
        decode_tokens: figures.decode_tokens,
        sent_bytes: figures.sent_bytes,
        open_sequences: figures.open_sequences,
        memory_bytes: figures.memory_bytes,
        memory_peak_bytes: figures.memory_peak_bytes,
        rates: figures.rates.map(|rates| StageRates {
            busy: rates.busy,
            compute_seconds: rates.compute_seconds,
            wait_seconds: rates.wait_seconds,
            send_seconds: rates.send_seconds,
            prompt_tokens_per_second: rates.prompt_tokens_per_second,
            tokens_per_second: rates.tokens_per_second,
            sent_bytes_per_second: rates.sent_bytes_per_second,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(node: &str, layers: &str, tokens: Option<f64>) -> v1::NodeFigures {
        let rates =
            tokens.map(|tokens_per_second| v1::StageRates { tokens_per_second, ..Default::default() });
        v1::NodeFigures {
            node_id: node.into(),
            schedulers: vec![v1::SchedulerFigures {
                model: "demo".into(),
                running: 2,
                waiting: 1,
                kv_usage: Some(0.5),
                preemptions: 3,
                ..Default::default()
            }],
            stages: vec![v1::StageFigures {
                model: "demo".into(),
                layers: layers.into(),
                rates,
                ..Default::default()
            }],
            links: vec![v1::Link { to_node_id: "b".into(), rtt_seconds: 0.001 }],
        }
    }

    fn figures(nodes: Vec<v1::NodeFigures>) -> v1::ClusterFigures {
        let stage = |node: &str, layer_start, layer_end| v1::Stage {
            node_id: node.into(),
            layer_start,
            layer_end,
            ..Default::default()
        };
        let node = |id: &str| v1::Node { id: id.into(), memory_budget_bytes: 10, ..Default::default() };
        let deployments = vec![
            v1::Deployment {
                name: "demo".into(),
                stages: vec![stage("a", 0, 2), stage("b", 2, 4)],
                ..Default::default()
            },
            v1::Deployment { name: "other".into(), stages: vec![stage("a", 0, 2)], ..Default::default() },
        ];
        let status = v1::ClusterStatus {
            nodes: vec![node("a"), node("b")],
            deployments,
            self_node_id: "a".into(),
            ..Default::default()
        };
        v1::ClusterFigures { status: Some(status), nodes }
    }

    #[test]
    fn what_a_node_says_is_put_at_its_stages() {
        let picture = picture(figures(vec![seen("a", "0-2", Some(5.0)), seen("b", "2-4", Some(5.0))]));
        let demo = &picture.deployments[0];
        assert_eq!((demo.running, demo.waiting, demo.tokens_per_second), (2, 1, Some(5.0)));
        assert!(demo.stages.iter().all(|stage| stage.figures.is_some()));
        assert_eq!(picture.deployments[1].stages[0].figures, None, "another model's stage is not this one's");
        assert_eq!(picture.nodes[0].links[0].rtt_seconds, Some(0.001));
        assert_eq!((picture.totals.running, picture.totals.tokens_per_second), (2, Some(5.0)));
        assert_eq!(picture.totals.memory_budget_bytes, 20);
        let held = picture.held_to(|model| model == "other");
        assert_eq!(
            (held.deployments.len(), held.totals.running, held.totals.tokens_per_second),
            (1, 0, None)
        );
    }

    #[test]
    fn each_replica_has_its_own_figures() {
        let mut figures = figures(vec![seen("a", "0-4", Some(5.0)), seen("b", "0-4", Some(7.0))]);
        let status = figures.status.as_mut().unwrap();
        status.deployments = ["a", "b"]
            .into_iter()
            .zip(1..)
            .map(|(node, replica)| v1::Deployment {
                name: "demo".into(),
                replica,
                replicas: 2,
                stages: vec![v1::Stage { node_id: node.into(), layer_end: 4, ..Default::default() }],
                ..Default::default()
            })
            .collect();
        let picture = picture(figures);
        let told = picture.deployments.iter().map(|it| (it.replica, it.running, it.tokens_per_second));
        assert_eq!(told.collect::<Vec<_>>(), [(1, 2, Some(5.0)), (2, 2, Some(7.0))]);
        assert_eq!((picture.totals.running, picture.totals.tokens_per_second), (4, Some(12.0)));
    }

    #[test]
    fn what_is_not_known_is_not_zero() {
        let picture = picture(figures(vec![seen("b", "2-4", None)]));
        assert_eq!(picture.deployments[0].tokens_per_second, None);
        assert_eq!((picture.nodes[0].answers, picture.nodes[1].answers), (false, true));
        assert_eq!(super::picture(v1::ClusterFigures::default()), Picture::default());
    }
}
