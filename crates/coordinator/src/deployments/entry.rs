//! One deployment as the machine keeps it: what is wanted, how far the present attempt is, and how that looks from outside.

use super::adapters::{AdapterView, Order};
use super::keeping::Room;
use super::name::replica_of;
use super::retry::Failures;
use super::{AdapterWish, Attempt, DeploymentView, DeploymentWish, StageView, StartedWorker, State};
use crate::placement::Plan;
use crate::{Error, NodeId};
use mlxnode_compute::ByteCount;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

#[derive(Debug)]
pub(super) struct Deployment {
    pub(super) wish: DeploymentWish,
    pub(super) epoch: u64,
    /// [`super::Deployments`]' count of nodes that came when this attempt began.
    pub(super) arrivals: u64,
    pub(super) phase: Phase,
    pub(super) replica: Option<Replica>,
    /// Nodes that were told to start something in this epoch.
    pub(super) touched: BTreeSet<NodeId>,
    /// Once ready, it is wanted whatever happens; before, a failure is the answer to who asked.
    pub(super) was_ready: bool,
    /// Made from the log: workers of older epochs may still run somewhere.
    pub(super) restored: Option<Restored>,
    pub(super) is_leaving: bool,
    pub(super) failures: Failures,
    pub(super) detail: String,
    /// Why a first load is being taken back.
    pub(super) refusal: Option<Error>,
    /// Nodes that did not say that they stopped.
    pub(super) not_stopped: Vec<String>,
    /// What is being done about adapters, by their names.
    pub(super) adapter_orders: BTreeMap<String, Order>,
    /// Why adapters that are wanted cannot be used in this attempt, by their names.
    pub(super) adapter_problems: BTreeMap<String, String>,
    /// The memory that adapters take in this attempt, by node and name.
    pub(super) adapter_bytes: BTreeMap<(NodeId, String), ByteCount>,
    /// When it was last asked something, as far as known.
    pub(super) last_used: Option<Instant>,
    /// [`super::Effect::AskUsage`] is under way.
    pub(super) is_asked: bool,
}

#[derive(Debug)]
pub(super) struct Restored {
    /// The newest epoch that may still run somewhere.
    pub(super) epoch: u64,
    /// Has the sweep been made?
    pub(super) is_swept: bool,
    /// Nodes that surely run nothing of it.
    pub(super) clean: BTreeSet<NodeId>,
}

#[derive(Debug)]
pub(super) struct Replica {
    pub(super) plan: Plan,
    pub(super) workers: Vec<Option<StartedWorker>>,
    pub(super) fingerprint: Option<Vec<u8>>,
}

#[derive(Debug)]
pub(super) enum Phase {
    Recording,
    Sweeping,
    Planning,
    /// Others go, so that it fits.
    MakingRoom(Room),
    /// Ending orphans on nodes of the plan.
    Clearing(BTreeSet<NodeId>),
    Preparing(BTreeSet<NodeId>),
    Starting(BTreeSet<usize>),
    Linking(BTreeSet<usize>),
    /// Reading the adapters that are wanted: where, and which.
    Adapting(BTreeSet<(NodeId, String)>),
    StartingScheduler,
    Ready,
    /// Its last requests finish.
    Draining,
    Stopping {
        waiting: BTreeSet<NodeId>,
        then: Then,
    },
    Waiting {
        until: Instant,
    },
    Failed {
        waits_for_nodes: bool,
    },
    Forgetting,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Then {
    Retry { at: Instant },
    Fail { waits_for_nodes: bool },
    Remove,
}

impl Deployment {
    pub(super) fn new(wish: DeploymentWish, epoch: u64) -> Self {
        Self {
            wish,
            epoch,
            arrivals: 0,
            phase: Phase::Recording,
            replica: None,
            touched: BTreeSet::new(),
            was_ready: false,
            restored: None,
            is_leaving: false,
            failures: Failures::default(),
            detail: String::new(),
            refusal: None,
            not_stopped: Vec::new(),
            adapter_orders: BTreeMap::new(),
            adapter_problems: BTreeMap::new(),
            adapter_bytes: BTreeMap::new(),
            last_used: None,
            is_asked: false,
        }
    }

    pub(super) fn attempt(&self) -> Attempt {
        Attempt { name: self.wish.name.clone(), epoch: self.epoch }
    }

    pub(super) fn needs_sweep(&self) -> bool {
        self.restored.as_ref().is_some_and(|restored| !restored.is_swept)
    }

    /// The epoch of workers from before the restart that the node may still run, once the sweep has passed it by.
    pub(super) fn may_still_run_on(&self, node: NodeId) -> Option<u64> {
        let restored = self.restored.as_ref().filter(|restored| !restored.clean.contains(&node))?;
        Some(restored.epoch)
    }

    pub(super) fn state(&self) -> State {
        if self.is_leaving || self.refusal.is_some() {
            return State::Unloading;
        }
        match self.phase {
            Phase::Ready => State::Ready,
            Phase::Failed { .. } => State::Failed,
            _ if self.was_ready => State::Recovering,
            _ => State::Loading,
        }
    }

    pub(super) fn view(&self) -> DeploymentView {
        let plan = self.replica.as_ref().map(|replica| &replica.plan);
        let stages = self.replica.iter().flat_map(|replica| replica.plan.stages.iter().zip(&replica.workers));
        let (name, replica) = replica_of(&self.wish.name);
        DeploymentView {
            name: name.to_owned(),
            replica,
            replicas: self.wish.replicas.max(1),
            is_pinned: self.wish.is_pinned,
            ttl: self.wish.ttl,
            source: self.wish.source.clone(),
            epoch: self.epoch,
            state: self.state(),
            detail: if self.detail.is_empty() { self.phase.text().to_owned() } else { self.detail.clone() },
            stages: stages
                .map(|(stage, worker)| StageView {
                    node: stage.node,
                    node_name: stage.node_name.clone(),
                    layers: stage.layers,
                    weights: stage.weights,
                    kv: stage.kv,
                    memory: stage.memory(),
                    pid: worker.as_ref().map(|worker| worker.pid),
                })
                .collect(),
            scheduler: plan.filter(|_| matches!(self.phase, Phase::Ready)).map(|plan| plan.stages[0].node),
            architecture: plan.map(|plan| plan.architecture.clone()).unwrap_or_default(),
            context_tokens: plan.map_or(0, |plan| plan.context_tokens),
            max_sequences: plan.map_or(0, |plan| plan.concurrent_sequences),
            adapters: self.adapters(),
            guessing: self.wish.wish.guessing.clone(),
        }
    }
}

impl Deployment {
    fn adapters(&self) -> Vec<AdapterView> {
        let view = |wish: &AdapterWish| AdapterView {
            name: wish.name.clone(),
            source: wish.source.clone(),
            key: wish.key(),
            problem: self.adapter_problems.get(&wish.name).cloned(),
        };
        self.wish.adapters.iter().map(view).collect()
    }
}

impl Replica {
    /// The nodes that run its stages.
    pub(super) fn nodes(&self) -> BTreeSet<NodeId> {
        self.plan.stages.iter().map(|stage| stage.node).collect()
    }

    pub(super) fn node_name(&self, node: NodeId) -> String {
        let stage = self.plan.stages.iter().find(|stage| stage.node == node);
        stage.map_or_else(|| node.to_string(), |stage| stage.node_name.clone())
    }
}

impl Phase {
    /// May workers of the attempt be running as they should?
    pub(super) fn has_workers(&self) -> bool {
        matches!(
            self,
            Self::Starting(_)
                | Self::Linking(_)
                | Self::Adapting(_)
                | Self::StartingScheduler
                | Self::Ready
                | Self::Draining
        )
    }

    pub(super) fn text(&self) -> &'static str {
        match self {
            Self::Recording | Self::Planning => "planning",
            Self::MakingRoom(_) => "making room",
            Self::Sweeping => "looking for workers from before the restart",
            Self::Clearing(_) => "ending workers from before the loss of a node",
            Self::Preparing(_) => "downloading",
            Self::Starting(_) => "loading",
            Self::Linking(_) | Self::StartingScheduler => "linking",
            Self::Adapting(_) => "loading adapters",
            Self::Ready => "",
            Self::Draining => "finishing its requests",
            Self::Stopping { .. } | Self::Forgetting => "stopping",
            Self::Waiting { .. } => "waiting before the next try",
            Self::Failed { .. } => "failed",
        }
    }
}
