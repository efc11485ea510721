//! The messages of `Cluster` as a picture: what each node says is put where it belongs.

use super::facts::{Coordinator, DeploymentFacts, Link, NodeFacts, StageFacts};
use super::{Picture, StageFigures, StageRates, Totals};
use mlxnode_proto::v1;
use serde::Serialize;
use std::ops::Deref;

/// A node, as far as it answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NodePicture {
    /// What is known of it.
    #[serde(flatten)]
    pub facts: NodeFacts,
    /// Did it say what it does now?
    pub answers: bool,
}

/// A deployment and what it does.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DeploymentPicture {
    /// What is known of it.
    #[serde(flatten)]
    pub facts: DeploymentFacts,
    /// In the order of layers.
    pub stages: Vec<StagePicture>,
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

/// A stage of a deployment and what it does.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StagePicture {
    /// What is known of it.
    #[serde(flatten)]
    pub facts: StageFacts,
    /// What it does; `null` while its node does not say.
    pub figures: Option<StageFigures>,
}

// A picture is read as what it adds to.
impl Deref for NodePicture {
    type Target = NodeFacts;

    fn deref(&self) -> &NodeFacts {
        &self.facts
    }
}

impl Deref for DeploymentPicture {
    type Target = DeploymentFacts;

    fn deref(&self) -> &DeploymentFacts {
        &self.facts
    }
}

impl Deref for StagePicture {
    type Target = StageFacts;

    fn deref(&self) -> &StageFacts {
        &self.facts
    }
}

/// Puts the picture together.
pub fn picture(figures: v1::ClusterFigures) -> Picture {
    let v1::ClusterFigures { status, nodes: seen } = figures;
    let status = status.unwrap_or_default();
    let coordinator = Coordinator::of(&status);
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
    let mut facts = NodeFacts::from(node);
    if let Some(figures) = figures {
        facts.links = figures.links.iter().map(Link::from).collect();
    }
    NodePicture { facts, answers: figures.is_some() }
}

fn with_figures(deployment: v1::Deployment, seen: &[v1::NodeFigures]) -> DeploymentPicture {
    let facts = DeploymentFacts::of(&deployment);
    let stages: Vec<StagePicture> = deployment
        .stages
        .into_iter()
        .map(|told| {
            let facts = StageFacts::from(told);
            let layers = format!("{}-{}", facts.layer_start, facts.layer_end);
            let node = seen.iter().find(|figures| figures.node_id == facts.node_id);
            let figures = node.and_then(|node| {
                node.stages
                    .iter()
                    .find(|figures| figures.model == deployment.name && figures.layers == layers)
            });
            StagePicture { figures: figures.map(stage_figures), facts }
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
        facts,
        running: schedulers.iter().map(|scheduler| u64::from(scheduler.running)).sum(),
        waiting: schedulers.iter().map(|scheduler| u64::from(scheduler.waiting)).sum(),
        kv_usage: schedulers.iter().filter_map(|scheduler| scheduler.kv_usage).reduce(f64::max),
        tokens_per_second: rate(|rates| rates.tokens_per_second),
        prompt_tokens_per_second: rate(|rates| rates.prompt_tokens_per_second),
        stages,
        max_sequences: deployment.max_sequences,
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
