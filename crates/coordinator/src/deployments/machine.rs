//! The state machine of all deployments. See the parent module for the picture and the rules.

use super::entry::{Deployment, Phase, Replica, Restored, Then};
use super::name::{check_name, check_source};
use super::{
    Attempt, DeploymentView, DeploymentWish, Effect, Event, Links, MAX_DEPLOYMENTS, PREFILL_CHUNK, Record,
    Shard, StartedWorker,
};
use crate::placement::{self, ModelCost, Offer, Plan, Refusal, Wish};
use crate::{Error, NodeId};
use mlxnode_compute::ByteCount;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// All deployments of the cluster.
#[derive(Debug, Default)]
pub struct Deployments {
    entries: BTreeMap<String, Deployment>,
    last_epoch: u64,
    /// Nodes that are dead as far as is known: nothing is asked of them.
    lost: BTreeSet<NodeId>,
    orphans: BTreeMap<(NodeId, String), Orphan>,
    effects: Vec<Effect>,
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
struct Orphan {
    epoch: u64,
    /// What they take of the node's budget.
    memory: ByteCount,
    /// When to tell the node again, if it is there.
    retry_at: Instant,
}

/// How often a node is told again to stop what it did not stop.
const ORPHAN_RETRY: Duration = Duration::from_secs(30);

impl Deployments {
    /// The deployments that the records say are wanted, in the order they were written. Call [`Deployments::start`] next.
    pub fn restore(records: impl IntoIterator<Item = Record>) -> Self {
        let mut deployments = Self::default();
        for record in records {
            let epoch = match &record {
                Record::Wanted { epoch, .. }
                | Record::Removed { epoch, .. }
                | Record::Epochs { used: epoch } => *epoch,
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

    /// Somebody wants a model. Idempotent: what is wanted already is not touched, whatever the placement wish.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad name or source, [`Error::NameTaken`], [`Error::TooMany`], and [`Error::Unavailable`] while
    /// the deployment is being unloaded.
    pub fn load(&mut self, wish: DeploymentWish) -> Result<(Loaded, Vec<Effect>), Error> {
        check_name(&wish.name)?;
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
                Phase::Ready => return Ok((Loaded::Already, Vec::new())),
                Phase::Failed { .. } => {
                    entry.wish = wish;
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
        Ok((Loaded::UnderWay, self.take_effects()))
    }

    /// Nobody wants it any more. [`Effect::Gone`] tells when its workers are gone. Unloading twice is fine.
    ///
    /// # Errors
    /// [`Error::NotFound`], with the names that there are.
    pub fn unload(&mut self, name: &str, now: Instant) -> Result<Vec<Effect>, Error> {
        if !self.entries.contains_key(name) {
            return Err(self.not_found(name));
        }
        self.leave(name, now);
        Ok(self.take_effects())
    }

    /// Who asked for a load went away: takes it back if it was never ready.
    pub fn cancel_load(&mut self, name: &str, now: Instant) -> Vec<Effect> {
        if self.entries.get(name).is_some_and(|entry| !entry.was_ready && entry.refusal.is_none()) {
            self.leave(name, now);
        }
        self.take_effects()
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
        waiting.chain(there.map(|(_, orphan)| orphan.retry_at)).min()
    }

    /// Places a model beside what is deployed already.
    pub fn plan(&self, cost: &ModelCost, mut offers: Vec<Offer>, wish: &Wish) -> Result<Plan, Refusal> {
        offers.retain(|offer| !self.lost.contains(&offer.node));
        for offer in &mut offers {
            offer.used += self.reserved(offer.node);
        }
        placement::plan(cost, &offers, wish)
    }

    /// Bytes that the deployments take of a node's budget.
    pub fn reserved(&self, node: NodeId) -> ByteCount {
        let mut bytes = ByteCount(0);
        for (name, entry) in &self.entries {
            let orphan = self.orphans.get(&(node, name.clone()));
            if orphan.is_some_and(|orphan| orphan.epoch == entry.epoch) {
                continue; // counted below
            }
            let stages = entry.replica.iter().flat_map(|replica| &replica.plan.stages);
            bytes += stages.filter(|stage| stage.node == node).map(placement::PlannedStage::memory).sum();
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

    // --- steps forward ---

    fn begin_attempt(&mut self, name: &str) {
        self.last_epoch += 1;
        let epoch = self.last_epoch;
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.epoch = epoch;
        entry.phase = Phase::Recording;
        entry.replica = None;
        entry.touched.clear();
        let record = Record::Wanted { deployment: entry.wish.clone(), epoch };
        let effect = Effect::Record { attempt: entry.attempt(), record };
        self.effects.push(effect);
    }

    fn recorded(&mut self, attempt: &Attempt, result: Result<(), Error>, now: Instant) {
        let Some(entry) = self.entries.get_mut(&attempt.name) else { return };
        if entry.epoch != attempt.epoch {
            return;
        }
        match (&entry.phase, result) {
            (Phase::Recording, Ok(())) if entry.needs_sweep() => {
                entry.phase = Phase::Sweeping;
                self.effects.push(Effect::Sweep { attempt: attempt.clone() });
            }
            (Phase::Recording, Ok(())) => self.weigh(attempt),
            (Phase::Recording, Err(error)) => {
                let error = Error::Failed(format!("the decision could not be recorded: {error}"));
                self.fail(&attempt.name, error, false, now);
            }
            (Phase::Forgetting, result) => self.forgotten(&attempt.name, result, now),
            _ => {}
        }
    }

    fn swept(&mut self, attempt: &Attempt, nodes: Vec<NodeId>) {
        let Some(entry) = self.current(attempt) else { return };
        if !matches!(entry.phase, Phase::Sweeping) {
            return;
        }
        if let Some(restored) = &mut entry.restored {
            restored.is_swept = true;
            restored.clean.extend(nodes);
        }
        if entry.is_leaving || entry.refusal.is_some() {
            self.forget(&attempt.name);
        } else {
            self.weigh(attempt);
        }
    }

    fn weigh(&mut self, attempt: &Attempt) {
        let Some(entry) = self.current(attempt) else { return };
        entry.phase = Phase::Planning;
        let source = entry.wish.source.clone();
        self.effects.push(Effect::Weigh { attempt: attempt.clone(), source });
    }

    fn weighed(&mut self, attempt: &Attempt, result: Result<(ModelCost, Vec<Offer>), Error>, now: Instant) {
        let Some(entry) = self.current(attempt) else { return };
        if !matches!(entry.phase, Phase::Planning) {
            return;
        }
        let wish = entry.wish.wish.clone();
        let planned = match result {
            Ok((cost, offers)) => self.plan(&cost, offers, &wish).map_err(Error::from),
            Err(error) => return self.fail(&attempt.name, error, false, now),
        };
        match planned {
            // Only other nodes can change this.
            Err(error) => self.fail(&attempt.name, error, true, now),
            Ok(plan) => {
                let nodes: BTreeSet<NodeId> = plan.stages.iter().map(|stage| stage.node).collect();
                let Some(entry) = self.entries.get_mut(&attempt.name) else { return };
                let may_run_older = |node: &NodeId| {
                    self.orphans.contains_key(&(*node, attempt.name.clone()))
                        || entry.restored.as_ref().is_some_and(|restored| !restored.clean.contains(node))
                };
                let orphans: BTreeSet<NodeId> = nodes.into_iter().filter(may_run_older).collect();
                let workers = vec![None; plan.stages.len()];
                entry.replica = Some(Replica { plan, workers, fingerprint: None });
                if orphans.is_empty() {
                    return self.prepare(attempt);
                }
                for node in &orphans {
                    let older = Attempt { name: attempt.name.clone(), epoch: attempt.epoch - 1 };
                    self.effects.push(Effect::Stop { attempt: older, node: *node });
                }
                entry.phase = Phase::Clearing(orphans);
            }
        }
    }

    fn prepare(&mut self, attempt: &Attempt) {
        let Some(entry) = self.entries.get_mut(&attempt.name) else { return };
        let Some(replica) = &entry.replica else { return };
        let nodes: BTreeSet<NodeId> = replica.plan.stages.iter().map(|stage| stage.node).collect();
        for node in &nodes {
            self.effects.push(Effect::Prepare {
                attempt: attempt.clone(),
                node: *node,
                source: entry.wish.source.clone(),
            });
        }
        entry.phase = Phase::Preparing(nodes);
    }

    fn prepared(&mut self, attempt: &Attempt, node: NodeId, result: Result<Vec<u8>, Error>, now: Instant) {
        let Some(entry) = self.current(attempt) else { return };
        let Phase::Preparing(waiting) = &mut entry.phase else { return };
        let Some(replica) = entry.replica.as_mut() else { return };
        let fingerprint = match result {
            Ok(fingerprint) => fingerprint,
            Err(error) => return self.fail(&attempt.name, error, false, now),
        };
        if !waiting.remove(&node) {
            return;
        }
        if replica.fingerprint.get_or_insert_with(|| fingerprint.clone()) != &fingerprint {
            let error = Error::Refused(format!(
                "{} holds another version of {} than the other nodes: update or remove it there",
                replica.node_name(node),
                entry.wish.source
            ));
            return self.fail(&attempt.name, error, false, now);
        }
        if waiting.is_empty() {
            self.start_workers(attempt);
        }
    }

    fn start_workers(&mut self, attempt: &Attempt) {
        let Some(entry) = self.entries.get_mut(&attempt.name) else { return };
        let Some(replica) = &entry.replica else { return };
        let plan = &replica.plan;
        for (number, stage) in plan.stages.iter().enumerate() {
            entry.touched.insert(stage.node);
            self.effects.push(Effect::Start {
                attempt: attempt.clone(),
                stage: number,
                node: stage.node,
                source: entry.wish.source.clone(),
                shard: Shard {
                    layers: stage.layers,
                    layer_count: plan.layer_count,
                    context_tokens: plan.context_tokens,
                    max_sequences: plan.concurrent_sequences,
                    prefill_chunk: PREFILL_CHUNK.min(plan.context_tokens),
                },
            });
        }
        entry.phase = Phase::Starting((0..plan.stages.len()).collect());
    }

    fn started(
        &mut self,
        attempt: &Attempt,
        stage: usize,
        result: Result<StartedWorker, Error>,
        now: Instant,
    ) {
        let Some(entry) = self.current(attempt) else { return };
        let Phase::Starting(waiting) = &mut entry.phase else { return };
        let Some(replica) = entry.replica.as_mut() else { return };
        let worker = match result {
            Ok(worker) => worker,
            Err(error) => return self.fail(&attempt.name, error, false, now),
        };
        if !waiting.remove(&stage) {
            return;
        }
        replica.workers[stage] = Some(worker);
        if waiting.is_empty() {
            self.link(attempt);
        }
    }

    fn link(&mut self, attempt: &Attempt) {
        let Some(entry) = self.entries.get_mut(&attempt.name) else { return };
        let Some(replica) = &entry.replica else { return };
        let workers: Vec<&StartedWorker> = replica.workers.iter().flatten().collect();
        let stages = &replica.plan.stages;
        let neighbour = |stage: usize| {
            let worker = workers[stage % workers.len()];
            (workers.len() > 1).then(|| (worker.address.clone(), worker.key_pin))
        };
        for (number, stage) in stages.iter().enumerate() {
            self.effects.push(Effect::Link {
                attempt: attempt.clone(),
                stage: number,
                node: stage.node,
                pid: workers[number].pid,
                links: Links {
                    next: neighbour(number + 1),
                    previous: neighbour(number + stages.len() - 1),
                    drivers: vec![stages[0].node],
                },
            });
        }
        entry.phase = Phase::Linking((0..stages.len()).collect());
    }

    fn linked(&mut self, attempt: &Attempt, stage: usize, result: Result<(), Error>, now: Instant) {
        let Some(entry) = self.current(attempt) else { return };
        let Phase::Linking(waiting) = &mut entry.phase else { return };
        if let Err(error) = result {
            return self.fail(&attempt.name, error, false, now);
        }
        waiting.remove(&stage);
        if !waiting.is_empty() {
            return;
        }
        let Some(replica) = &entry.replica else { return };
        let effect = Effect::StartScheduler {
            attempt: attempt.clone(),
            node: replica.plan.stages[0].node,
            source: entry.wish.source.clone(),
            max_sequences: replica.plan.concurrent_sequences,
            context_tokens: replica.plan.context_tokens,
        };
        entry.phase = Phase::StartingScheduler;
        self.effects.push(effect);
    }

    fn scheduler_started(&mut self, attempt: &Attempt, result: Result<(), Error>, now: Instant) {
        let Some(entry) = self.current(attempt) else { return };
        if !matches!(entry.phase, Phase::StartingScheduler) {
            return;
        }
        if let Err(error) = result {
            return self.fail(&attempt.name, error, false, now);
        }
        entry.phase = Phase::Ready;
        entry.was_ready = true;
        entry.detail.clear();
        self.effects.push(Effect::Settled { name: attempt.name.clone(), result: Ok(()) });
    }

    // --- steps back ---

    /// The attempt failed. `needs_other_nodes`: the same will happen again until the nodes change.
    fn fail(&mut self, name: &str, error: Error, needs_other_nodes: bool, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.detail = error.to_string();
        let then = if entry.is_leaving {
            Then::Remove
        } else if !entry.was_ready {
            entry.refusal = Some(error);
            Then::Remove
        } else if needs_other_nodes {
            entry.detail.push_str("; it is tried again when a node joins");
            Then::Fail { waits_for_nodes: true }
        } else {
            match entry.failures.failed(now) {
                Some(at) => Then::Retry { at },
                None => {
                    entry.detail = format!(
                        "gave up after {} failures in {} minutes, the last one: {error}; load it again once the cause is gone",
                        super::MAX_FAILURES,
                        super::FAILURE_WINDOW.as_secs() / 60,
                    );
                    Then::Fail { waits_for_nodes: false }
                }
            }
        };
        self.stop(name, then, now);
    }

    /// Ends what the attempt started, then goes on as told.
    fn stop(&mut self, name: &str, then: Then, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let attempt = entry.attempt();
        self.effects.push(Effect::Abandon { attempt: attempt.clone() });
        let mut waiting = std::mem::take(&mut entry.touched);
        let lost: Vec<NodeId> = waiting.intersection(&self.lost).copied().collect();
        for node in &lost {
            waiting.remove(node);
        }
        for node in &waiting {
            self.effects.push(Effect::Stop { attempt: attempt.clone(), node: *node });
        }
        entry.phase = Phase::Stopping { waiting, then };
        for node in lost {
            self.orphan(name, node, now);
        }
        self.when_all_stopped(name, now);
    }

    fn stopped(&mut self, attempt: &Attempt, node: NodeId, result: Result<(), Error>, now: Instant) {
        let key = (node, attempt.name.clone());
        if result.is_ok() && self.orphans.get(&key).is_some_and(|orphan| orphan.epoch <= attempt.epoch) {
            self.orphans.remove(&key);
        }
        let Some(entry) = self.entries.get_mut(&attempt.name) else { return };
        match (&mut entry.phase, result) {
            (Phase::Clearing(waiting), Ok(())) if attempt.epoch + 1 == entry.epoch => {
                waiting.remove(&node);
                if let Some(restored) = &mut entry.restored {
                    restored.clean.insert(node);
                }
                if waiting.is_empty() {
                    let attempt = entry.attempt();
                    self.prepare(&attempt);
                }
            }
            (Phase::Clearing(waiting), Err(error)) if waiting.contains(&node) => {
                self.fail(&attempt.name.clone(), error, false, now);
            }
            (Phase::Stopping { waiting, .. }, result) if attempt.epoch == entry.epoch => {
                if !waiting.remove(&node) {
                    return;
                }
                if let Err(error) = result {
                    entry.not_stopped.push(error.to_string());
                    self.orphan(&attempt.name, node, now);
                }
                self.when_all_stopped(&attempt.name, now);
            }
            _ => {}
        }
    }

    /// Remembers that a node may still run workers of this attempt.
    fn orphan(&mut self, name: &str, node: NodeId, now: Instant) {
        let Some(entry) = self.entries.get(name) else { return };
        let stages = entry.replica.iter().flat_map(|replica| &replica.plan.stages);
        let memory = stages.filter(|stage| stage.node == node).map(placement::PlannedStage::memory).sum();
        let orphan = Orphan { epoch: entry.epoch, memory, retry_at: now + ORPHAN_RETRY };
        self.orphans.insert((node, name.to_owned()), orphan);
    }

    fn when_all_stopped(&mut self, name: &str, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let Phase::Stopping { waiting, then } = &entry.phase else { return };
        if !waiting.is_empty() {
            return;
        }
        let then = *then;
        entry.replica = None;
        match then {
            Then::Retry { at } if at <= now => self.begin_attempt(name),
            Then::Retry { at } => entry.phase = Phase::Waiting { until: at },
            Then::Fail { waits_for_nodes } => {
                entry.phase = Phase::Failed { waits_for_nodes };
                let error = Error::Failed(entry.detail.clone());
                self.effects.push(Effect::Settled { name: name.to_owned(), result: Err(error) });
            }
            Then::Remove => self.forget(name),
        }
    }

    fn leave(&mut self, name: &str, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        if std::mem::replace(&mut entry.is_leaving, true) {
            return;
        }
        match &mut entry.phase {
            Phase::Forgetting => {}
            Phase::Stopping { then, .. } => *then = Then::Remove,
            Phase::Waiting { .. } | Phase::Failed { .. } => self.forget(name),
            _ => self.stop(name, Then::Remove, now),
        }
    }

    fn forget(&mut self, name: &str) {
        if let Some(entry) = self.entries.get_mut(name).filter(|entry| entry.needs_sweep()) {
            entry.phase = Phase::Sweeping;
            let effect = Effect::Sweep { attempt: entry.attempt() };
            self.effects.push(effect);
            return;
        }
        // An epoch of its own, so that the answer to an earlier record is not taken for the answer to this one.
        self.last_epoch += 1;
        let epoch = self.last_epoch;
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.epoch = epoch;
        entry.phase = Phase::Forgetting;
        let record = Record::Removed { name: name.to_owned(), epoch: entry.epoch };
        let effect = Effect::Record { attempt: entry.attempt(), record };
        self.effects.push(effect);
    }

    fn forgotten(&mut self, name: &str, result: Result<(), Error>, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let unrecorded =
            |error| Error::Failed(format!("{name} is stopped, but that could not be recorded: {error}"));
        let result = match result {
            Ok(()) => Ok(()),
            // Whoever asked for a load that failed has his answer; there is nothing to keep.
            Err(_) if entry.refusal.is_some() => Ok(()),
            Err(error) => {
                // It would come back with the next start of the coordinator: keep it in sight.
                entry.is_leaving = false;
                entry.phase = Phase::Failed { waits_for_nodes: false };
                let error = unrecorded(error);
                entry.detail = error.to_string();
                self.effects.push(Effect::Settled { name: name.to_owned(), result: Err(error.clone()) });
                self.effects.push(Effect::Gone { name: name.to_owned(), result: Err(error) });
                return;
            }
        };
        let Some(entry) = self.entries.remove(name) else { return };
        for node in &self.lost {
            if let Some(epoch) = entry.may_still_run_on(*node) {
                let orphan = Orphan { epoch, memory: ByteCount(0), retry_at: now + ORPHAN_RETRY };
                self.orphans.entry((*node, name.to_owned())).or_insert(orphan);
            }
        }
        let refusal = entry
            .refusal
            .unwrap_or_else(|| Error::Cancelled(format!("{name} was unloaded before it was ready")));
        self.effects.push(Effect::Settled { name: name.to_owned(), result: Err(refusal) });
        let result = match entry.not_stopped.as_slice() {
            [] => result,
            errors => Err(Error::Unavailable(format!(
                "{name} is unloaded, but not all of its workers are known to be gone: {}; they are ended when their node answers",
                errors.join("; ")
            ))),
        };
        self.effects.push(Effect::Gone { name: name.to_owned(), result });
    }

    // --- what happens by itself ---

    fn worker_ended(&mut self, attempt: &Attempt, node: NodeId, pid: u32, reason: &str, now: Instant) {
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

    fn node_lost(&mut self, node: NodeId, now: Instant) {
        self.lost.insert(node);
        for name in self.entries.keys().cloned().collect::<Vec<_>>() {
            let Some(entry) = self.entries.get_mut(&name) else { continue };
            if let Phase::Stopping { waiting, .. } = &mut entry.phase {
                if waiting.remove(&node) {
                    self.orphan(&name, node, now);
                    self.when_all_stopped(&name, now);
                }
                continue;
            }
            let Some(replica) = &entry.replica else { continue };
            if replica.plan.stages.iter().any(|stage| stage.node == node) {
                let error = Error::Unavailable(format!("{} was lost", replica.node_name(node)));
                self.fail(&name, error, false, now);
            }
        }
    }

    fn node_joined(&mut self, node: NodeId, now: Instant) {
        self.lost.remove(&node);
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
    fn current(&mut self, attempt: &Attempt) -> Option<&mut Deployment> {
        self.entries.get_mut(&attempt.name).filter(|entry| entry.epoch == attempt.epoch)
    }

    fn not_found(&self, name: &str) -> Error {
        let names: Vec<&str> = self.entries.keys().map(String::as_str).collect();
        Error::NotFound(if names.is_empty() {
            format!("{name:?} is not loaded; nothing is")
        } else {
            format!("{name:?} is not loaded; loaded are: {}", names.join(", "))
        })
    }

    fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }
}
