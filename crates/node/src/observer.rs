//! What the figures for monitoring say about this node: its schedulers, its workers, its links.

use crate::household::NodeHousehold;
use crate::schedulers::Schedulers;
use crate::workers::{SeenWorker, Workers};
use async_trait::async_trait;
use mlxnode_api::cluster::{Household as _, NodeState};
use mlxnode_api::deployments::DeploymentsView;
use mlxnode_api::metrics::{LinkSeen, Observations, Observer, SchedulerSeen, StageSeen, TimeHistogram};
use mlxnode_coordinator::deployments::replica_of;
use mlxnode_worker::TimeCounts;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// A worker that does not answer within this time is left out: a scrape has little patience.
const PATIENCE: Duration = Duration::from_millis(500);

/// Looks at one node.
pub(crate) struct NodeObserver {
    pub(crate) deployments: watch::Receiver<DeploymentsView>,
    pub(crate) schedulers: Schedulers,
    pub(crate) workers: Workers,
    pub(crate) household: Arc<NodeHousehold>,
}

#[async_trait]
impl Observer for NodeObserver {
    async fn observe(&self) -> Observations {
        let stages = self.workers.look(PATIENCE).await.into_iter().map(stage).collect();
        let deployments = self.deployments.borrow().deployments.clone();
        let schedulers = self.schedulers.statistics().into_iter().map(|(model, statistics)| {
            let deployment = deployments.iter().find(|deployment| deployment.instance() == model);
            let reserved = deployment
                .map(|deployment| deployment.max_sequences.saturating_mul(deployment.context_tokens))
                .filter(|tokens| *tokens > 0);
            SchedulerSeen {
                running: statistics.active,
                waiting: statistics.queued,
                preemptions: statistics.preemptions,
                kv_usage: reserved.map(|tokens| statistics.reserved_tokens as f64 / tokens as f64),
                prompt_memory_bytes: statistics.prompts.memory.0,
                prompt_disk_bytes: statistics.prompts.disk.0,
                model: replica_of(&model).0.to_owned(),
            }
        });
        let schedulers = schedulers.collect();
        let view = self.household.view();
        let mut nodes = BTreeMap::new();
        for node in &view.nodes {
            *nodes.entry(state_name(node.state)).or_default() += 1;
        }
        let own = view.nodes.iter().find(|node| node.id == view.own);
        let name = |id| view.nodes.iter().find(|node| node.id == id).map(|node| node.name.clone());
        let links = own.map(|own| own.links.as_slice()).unwrap_or_default().iter();
        let links = links.filter_map(|link| {
            Some(LinkSeen { to: name(link.to)?, to_id: link.to.to_string(), round_trip: link.rtt })
        });
        Observations {
            node: own.map(|own| own.name.clone()).unwrap_or_default(),
            deployments: deployments.iter().map(|deployment| deployment.name.clone()).collect(),
            schedulers,
            stages,
            links: links.collect(),
            nodes,
            memory_budget_bytes: own.map_or(0, |own| own.facts.memory_budget_bytes),
            memory_used_bytes: self.workers.memory_used().0,
        }
    }
}

fn stage(seen: SeenWorker) -> StageSeen {
    let SeenWorker { deployment, layers, stats } = seen;
    StageSeen {
        model: replica_of(&deployment).0.to_owned(),
        layers: format!("{}-{}", layers.start, layers.end),
        steps: stats.steps,
        compute: stats.compute_time,
        wait: Some(stats.wait_time),
        send: Some(stats.send_time),
        open_sequences: stats.open_sequences.into(),
        active_bytes: stats.active_bytes,
        peak_bytes: stats.peak_bytes,
        prompt_tokens: stats.prompt_tokens,
        decode_tokens: stats.decode_tokens,
        sent_bytes: stats.sent_bytes,
        guessed_tokens: stats.guessed_tokens,
        accepted_tokens: stats.accepted_tokens,
        computes: histogram(stats.computes),
        waits: histogram(stats.waits),
        sends: histogram(stats.sends),
    }
}

fn histogram(counts: TimeCounts) -> TimeHistogram {
    TimeHistogram::new(&TimeCounts::BOUNDS, &counts.0)
}

fn state_name(state: NodeState) -> &'static str {
    match state {
        NodeState::Connecting => "connecting",
        NodeState::Alive => "alive",
        NodeState::Suspect => "suspect",
        NodeState::Dead => "dead",
    }
}
