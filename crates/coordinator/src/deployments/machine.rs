//! The state machine of all deployments: its state and what comes in. The steps that follow are in `forward` and `back`; the
//! parent module has the picture and the rules.

use super::entry::{Deployment, Phase, Restored};
use super::name::check_source;
use super::{Attempt, DeploymentView, DeploymentWish, Effect, Event, MAX_DEPLOYMENTS, Record};
use crate::placement::{self, ModelCost, Offer, Plan, Refusal, Wish};
use crate::{Error, NodeId};
use mlxnode_compute::ByteCount;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// All deployments of the cluster.
#[derive(Debug, Default)]
pub struct Deployments {
    pub(super) entries: BTreeMap<String, Deployment>,
    pub(super) last_epoch: u64,
    /// Nodes that are dead as far as is known: nothing is asked of them.
    pub(super) lost: BTreeSet<NodeId>,
    /// How often a node came.
    pub(super) arrivals: u64,
    pub(super) orphans: BTreeMap<(NodeId, String), Orphan>,
    pub(super) effects: Vec<Effect>,
}

/// How a load stands when it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// Nothing to do.
    Already,
    /// Under way; [`Effect::Settled`] tells when it is over.
    UnderWay,
}

/// Workers that could not be stopped, because their node was lost or did not answer.
#[derive(Debug)]
pub(super) struct Orphan {
    pub(super) epoch: u64,
    /// What they take of the node's budget.
    pub(super) memory: ByteCount,
    /// When to tell the node again, if it is there.
    pub(super) retry_at: Instant,
}

/// How often a node is told again to stop what it did not stop.
pub(super) const ORPHAN_RETRY: Duration = Duration::from_secs(30);

impl Deployments {
    /// The deployments that the records say are wanted, in the order they were written. Call [`Deployments::start`] next.
    pub fn restore(records: impl IntoIterator<Item = Record>) -> Self {
        let mut deployments = Self::default();
        for record in records {
            let epoch = match &record {
                Record::Wanted { epoch, .. }
                | Record::Removed { epoch, .. }
                | Record::Epochs { used: epoch } => *epoch,
                Record::AdapterAdded { adapter, .. } => adapter.load,
                Record::AdapterRemoved { .. } => 0,
            };
            deployments.last_epoch = deployments.last_epoch.max(epoch);
            match record {
                Record::Wanted { deployment, epoch } => {
                    let entry = Deployment {
                        was_ready: true,
                        restored: Some(Restored { epoch, is_swept: false, clean: BTreeSet::new() }),
                        ..Deployment::new(deployment.clone(), epoch)
                    };
                    deployments.entries.insert(deployment.name, entry);
                }
                Record::Removed { name, .. } => {
                    deployments.entries.remove(&name);
                }
                Record::AdapterAdded { name, adapter } => {
                    if let Some(entry) = deployments.entries.get_mut(&name) {
                        entry.wish.put_adapter(adapter);
                    }
                }
                Record::AdapterRemoved { name, adapter } => {
                    if let Some(entry) = deployments.entries.get_mut(&name) {
                        entry.wish.adapters.retain(|other| other.name != adapter);
                    }
                }
                Record::Epochs { .. } => {}
            }
        }
        deployments
    }

    /// Records that say the same as all those written so far, for a snapshot.
    pub fn records(&self) -> Vec<Record> {
        let wanted = self
            .entries
            .values()
            .map(|entry| Record::Wanted { deployment: entry.wish.clone(), epoch: entry.epoch });
        std::iter::once(Record::Epochs { used: self.last_epoch }).chain(wanted).collect()
    }

    /// Forms again what was restored.
    pub fn start(&mut self) -> Vec<Effect> {
        for name in self.entries.keys().cloned().collect::<Vec<_>>() {
            self.begin_attempt(&name);
        }
        self.take_effects()
    }

    /// One replica of [`Deployments::load`].
    pub(super) fn load_one(&mut self, wish: DeploymentWish) -> Result<Loaded, Error> {
        check_source(&wish.source)?;
        let name = wish.name.clone();
        if let Some(entry) = self.entries.get_mut(&name) {
            if entry.wish.source != wish.source {
                return Err(Error::NameTaken { name, source_of_other: entry.wish.source.clone() });
            }
            if entry.is_leaving || entry.refusal.is_some() {
                return Err(Error::Unavailable(format!(
                    "{name} is being unloaded; load it again once it is gone"
                )));
            }
            match entry.phase {
                Phase::Ready if entry.wish.contradicts(&wish) => {
                    return Err(Error::Refused(format!(
                        "{name} is loaded already, with other settings; unload it first, or load it under another name"
                    )));
                }
                Phase::Ready => return Ok(Loaded::Already),
                Phase::Failed { .. } => {
                    let adapters = std::mem::take(&mut entry.wish.adapters);
                    entry.wish = DeploymentWish { adapters, ..wish };
                    entry.was_ready = false;
                    entry.failures.forget();
                    self.begin_attempt(&name);
                }
                _ => {}
            }
        } else {
            if self.entries.len() >= MAX_DEPLOYMENTS {
                return Err(Error::TooMany(format!(
                    "there are {MAX_DEPLOYMENTS} deployments already; unload one first"
                )));
            }
            self.entries.insert(name.clone(), Deployment::new(wish, 0));
            self.begin_attempt(&name);
        }
        Ok(Loaded::UnderWay)
    }

    /// An answer came, or something happened.
    pub fn on(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        match event {
            Event::Recorded { attempt, result } => self.recorded(&attempt, result, now),
            Event::Swept { attempt, nodes } => self.swept(&attempt, nodes),
            Event::Weighed { attempt, result } => self.weighed(&attempt, result, now),
            Event::Prepared { attempt, node, result } => self.prepared(&attempt, node, result, now),
            Event::Started { attempt, stage, result } => self.started(&attempt, stage, result, now),
            Event::Linked { attempt, stage, result } => self.linked(&attempt, stage, result, now),
            Event::AdapterLoaded { attempt, node, adapter, result } => {
                self.adapter_loaded(&attempt, node, &adapter, result);
            }
            Event::AdapterUnloaded { attempt, node, adapter, result } => {
                self.adapter_unloaded(&attempt, node, &adapter, result);
            }
            Event::AdapterRecorded { name, adapter, result } => {
                self.adapter_recorded(&name, &adapter, result)
            }
            Event::Used { attempt, result } => self.used(&attempt, result, now),
            Event::Drained { attempt, .. } => self.drained(&attempt, now),
            Event::SchedulerStarted { attempt, result } => self.scheduler_started(&attempt, result, now),
            Event::Stopped { attempt, node, result } => self.stopped(&attempt, node, result, now),
            Event::WorkerEnded { attempt, node, pid, reason } => {
                self.worker_ended(&attempt, node, pid, &reason, now);
            }
            Event::NodeLost { node } => self.node_lost(node, now),
            Event::NodeJoined { node } => self.node_joined(node, now),
        }
        self.take_effects()
    }

    /// Time passed. To be called at [`Deployments::next_wake`]; calling it more often changes nothing.
    pub fn tick(&mut self, now: Instant) -> Vec<Effect> {
        for name in self.entries.keys().cloned().collect::<Vec<_>>() {
            let is_due = self.entries.get(&name).is_some_and(|entry| match entry.phase {
                Phase::Waiting { until } => until <= now,
                _ => false,
            });
            if is_due {
                self.begin_attempt(&name);
            }
        }
        self.ask_the_idle(now);
        let lost = &self.lost;
        for ((node, name), orphan) in &mut self.orphans {
            if orphan.retry_at <= now && !lost.contains(node) {
                orphan.retry_at = now + ORPHAN_RETRY;
                let attempt = Attempt { name: name.clone(), epoch: orphan.epoch };
                self.effects.push(Effect::Stop { attempt, node: *node });
            }
        }
        self.take_effects()
    }

    /// When to call [`Deployments::tick`].
    pub fn next_wake(&self) -> Option<Instant> {
        let waiting = self.entries.values().filter_map(|entry| match entry.phase {
            Phase::Waiting { until } => Some(until),
            _ => None,
        });
        let there = self.orphans.iter().filter(|((node, _), _)| !self.lost.contains(node));
        let idle = self.groups().into_iter().filter_map(|group| self.idle_at(&group));
        waiting.chain(there.map(|(_, orphan)| orphan.retry_at)).chain(idle).min()
    }

    /// Places a model beside what is deployed already.
    pub fn plan(&self, cost: &ModelCost, offers: Vec<Offer>, wish: &Wish) -> Result<Plan, Refusal> {
        self.plan_without(cost, offers, wish, &[])
    }

    /// As [`Deployments::plan`], as if these replicas were gone.
    pub(super) fn plan_without(
        &self,
        cost: &ModelCost,
        mut offers: Vec<Offer>,
        wish: &Wish,
        gone: &[String],
    ) -> Result<Plan, Refusal> {
        offers.retain(|offer| !self.lost.contains(&offer.node));
        for offer in &mut offers {
            offer.used += self.reserved_without(offer.node, gone);
        }
        placement::plan(cost, &offers, wish)
    }

    /// Bytes that the adapters of a deployment take of a node.
    pub fn adapter_memory(&self, name: &str, node: NodeId) -> ByteCount {
        let entry = self.entries.get(name).filter(|entry| entry.replica.is_some());
        let adapters = entry.into_iter().flat_map(|entry| &entry.adapter_bytes);
        adapters.filter(|((other, _), _)| *other == node).map(|(_, bytes)| *bytes).sum()
    }

    /// Bytes that the deployments take of a node's budget.
    pub fn reserved(&self, node: NodeId) -> ByteCount {
        self.reserved_without(node, &[])
    }

    fn reserved_without(&self, node: NodeId, gone: &[String]) -> ByteCount {
        let mut bytes = ByteCount(0);
        for (name, entry) in self.entries.iter().filter(|(name, _)| !gone.contains(name)) {
            let orphan = self.orphans.get(&(node, name.clone()));
            if orphan.is_some_and(|orphan| orphan.epoch == entry.epoch) {
                continue; // counted below
            }
            let stages = entry.replica.iter().flat_map(|replica| &replica.plan.stages);
            bytes += stages.filter(|stage| stage.node == node).map(placement::PlannedStage::memory).sum();
            if entry.replica.is_some() {
                let adapters = entry.adapter_bytes.iter().filter(|((other, _), _)| *other == node);
                bytes += adapters.map(|(_, bytes)| *bytes).sum();
            }
        }
        for (_, orphan) in self.orphans.iter().filter(|((other, _), _)| *other == node) {
            bytes += orphan.memory;
        }
        bytes
    }

    /// All deployments by name, for those who look.
    pub fn view(&self) -> Vec<DeploymentView> {
        self.entries.values().map(Deployment::view).collect()
    }

    /// One deployment.
    pub fn find(&self, name: &str) -> Result<DeploymentView, Error> {
        self.entries.get(name).map(Deployment::view).ok_or_else(|| self.not_found(name))
    }

    /// The deployment of this name; without a name the only one.
    ///
    /// # Errors
    /// [`Error::NotFound`], or [`Error::Invalid`] when there are several and none is named.
    pub fn named(&self, name: &str) -> Result<String, Error> {
        if self.entries.contains_key(name) {
            return Ok(name.to_owned());
        }
        let groups = self.groups();
        match (name, groups.as_slice()) {
            ("", [only]) => Ok(only.clone()),
            ("", [_, _, ..]) => Err(Error::Invalid(format!(
                "several models are loaded ({}); name one of them",
                groups.join(", ")
            ))),
            _ => Err(self.not_found(name)),
        }
    }

    // --- what happens by itself ---

    pub(super) fn worker_ended(
        &mut self,
        attempt: &Attempt,
        node: NodeId,
        pid: u32,
        reason: &str,
        now: Instant,
    ) {
        let Some(entry) = self.current(attempt) else { return };
        if !entry.phase.has_workers() {
            return;
        }
        let Some(replica) = &entry.replica else { return };
        let of_pid =
            replica.workers.iter().position(|worker| worker.as_ref().is_some_and(|it| it.pid == pid));
        let stage = of_pid.filter(|stage| replica.plan.stages[*stage].node == node);
        let what = match stage {
            Some(stage) => format!("the worker of layers {}", replica.plan.stages[stage].layers),
            None => "a worker".to_owned(),
        };
        let error = Error::Failed(format!("{what} on {} {reason}", replica.node_name(node)));
        self.fail(&attempt.name, error, false, now);
    }

    pub(super) fn node_lost(&mut self, node: NodeId, now: Instant) {
        self.lost.insert(node);
        for name in self.entries.keys().cloned().collect::<Vec<_>>() {
            let Some(entry) = self.entries.get_mut(&name) else { continue };
            if let Phase::Stopping { waiting, .. } = &mut entry.phase {
                if waiting.remove(&node) {
                    entry.failures.forget(); // the node's loss explains them
                    self.orphan(&name, node, now);
                    self.when_all_stopped(&name, now);
                }
                continue;
            }
            let Some(replica) = &entry.replica else { continue };
            if replica.plan.stages.iter().any(|stage| stage.node == node) {
                let error = Error::Unavailable(format!("{} was lost", replica.node_name(node)));
                entry.failures.forget(); // what failed was the node, not the model
                self.fail(&name, error, false, now);
            }
        }
    }

    pub(super) fn node_joined(&mut self, node: NodeId, now: Instant) {
        self.lost.remove(&node);
        self.arrivals += 1;
        for (name, entry) in &mut self.entries {
            let Some(epoch) = entry.may_still_run_on(node) else { continue };
            let orphan = Orphan { epoch, memory: ByteCount(0), retry_at: now };
            self.orphans.entry((node, name.clone())).or_insert(orphan);
            if let Some(restored) = &mut entry.restored {
                restored.clean.insert(node); // from now on it is the orphan that stands for it
            }
        }
        for ((other, name), orphan) in &mut self.orphans {
            if *other == node {
                orphan.retry_at = now + ORPHAN_RETRY;
                let attempt = Attempt { name: name.clone(), epoch: orphan.epoch };
                self.effects.push(Effect::Stop { attempt, node });
            }
        }
        for name in self.entries.keys().cloned().collect::<Vec<_>>() {
            let waits = self
                .entries
                .get(&name)
                .is_some_and(|entry| matches!(entry.phase, Phase::Failed { waits_for_nodes: true }));
            if waits {
                self.begin_attempt(&name);
            }
        }
    }

    /// The deployment, when the answer is to its present attempt.
    pub(super) fn current(&mut self, attempt: &Attempt) -> Option<&mut Deployment> {
        self.entries.get_mut(&attempt.name).filter(|entry| entry.epoch == attempt.epoch)
    }

    pub(super) fn not_found(&self, name: &str) -> Error {
        let names = self.groups();
        Error::NotFound(if names.is_empty() {
            format!("{name:?} is not loaded; nothing is")
        } else {
            format!("{name:?} is not loaded; loaded are: {}", names.join(", "))
        })
    }

    pub(super) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }
}
