//! The steps forward: from a wish to a ready replica, each taken when the one before is answered.

use super::entry::{Phase, Replica};
use super::keeping::Room;
use super::machine::Deployments;
use super::{Attempt, Effect, Links, PREFILL_CHUNK, Record, Shard, StartedWorker};
use crate::placement::{ModelCost, Offer, Refusal};
use crate::scheduler::Limits;
use crate::{Error, NodeId};
use std::collections::BTreeSet;
use std::time::Instant;

/// What somebody hears whose model cannot be placed; `taken` nodes run other replicas of it.
fn refused(refusal: Refusal, taken: usize) -> Error {
    match (Error::from(refusal), taken) {
        (error, 0) => error,
        (Error::DoesNotFit(text), _) => Error::DoesNotFit(format!("no room for a further replica: {text}")),
        (error, _) => Error::Refused(format!(
            "no node is left for a further replica ({error}): replicas run on different nodes"
        )),
    }
}

impl Deployments {
    pub(super) fn begin_attempt(&mut self, name: &str) {
        self.last_epoch += 1;
        let epoch = self.last_epoch;
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.epoch = epoch;
        entry.arrivals = self.arrivals;
        entry.phase = Phase::Recording;
        entry.replica = None;
        entry.is_asked = false;
        entry.touched.clear();
        entry.adapter_bytes.clear();
        let record = Record::Wanted { deployment: entry.wish.clone(), epoch };
        let effect = Effect::Record { attempt: entry.attempt(), record };
        self.effects.push(effect);
    }

    pub(super) fn recorded(&mut self, attempt: &Attempt, result: Result<(), Error>, now: Instant) {
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

    pub(super) fn swept(&mut self, attempt: &Attempt, nodes: Vec<NodeId>) {
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

    pub(super) fn weigh(&mut self, attempt: &Attempt) {
        let Some(entry) = self.current(attempt) else { return };
        entry.phase = Phase::Planning;
        let source = entry.wish.source.clone();
        let draft = entry.wish.wish.draft();
        self.effects.push(Effect::Weigh { attempt: attempt.clone(), source, draft });
    }

    pub(super) fn weighed(
        &mut self,
        attempt: &Attempt,
        result: Result<(ModelCost, Vec<Offer>), Error>,
        now: Instant,
    ) {
        let Some(entry) = self.current(attempt) else { return };
        if !matches!(entry.phase, Phase::Planning) {
            return;
        }
        let wish = entry.wish.wish.clone();
        let (cost, mut offers) = match result {
            Ok(weighed) => weighed,
            Err(error) => return self.fail(&attempt.name, error, false, now),
        };
        let taken = self.nodes_of_siblings(&attempt.name);
        offers.retain(|offer| !taken.contains(&offer.node));
        match self.plan(&cost, offers.clone(), &wish) {
            Err(Refusal::DoesNotFit(_)) if self.may_make_room(&attempt.name) => {
                self.make_room(attempt, Room::new(cost, offers), now);
            }
            // Only other nodes can change this.
            Err(refusal) => self.fail(&attempt.name, refused(refusal, taken.len()), true, now),
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

    pub(super) fn prepare(&mut self, attempt: &Attempt) {
        let Some(entry) = self.entries.get_mut(&attempt.name) else { return };
        let Some(replica) = &entry.replica else { return };
        let nodes: BTreeSet<NodeId> = replica.plan.stages.iter().map(|stage| stage.node).collect();
        let first = replica.plan.stages.first().map(|stage| stage.node);
        for node in &nodes {
            self.effects.push(Effect::Prepare {
                attempt: attempt.clone(),
                node: *node,
                source: entry.wish.source.clone(),
                draft: entry.wish.wish.draft().filter(|_| Some(*node) == first),
            });
        }
        entry.phase = Phase::Preparing(nodes);
    }

    pub(super) fn prepared(
        &mut self,
        attempt: &Attempt,
        node: NodeId,
        result: Result<Vec<u8>, Error>,
        now: Instant,
    ) {
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

    pub(super) fn start_workers(&mut self, attempt: &Attempt) {
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
                    max_sequences: Limits::sequences_for(plan.concurrent_sequences),
                    prefill_chunk: PREFILL_CHUNK.min(plan.context_tokens),
                    prompts: stage.prompts,
                    guessing: entry.wish.wish.guessing.clone().filter(|_| stage.layers.is_first()),
                },
            });
        }
        entry.phase = Phase::Starting((0..plan.stages.len()).collect());
    }

    pub(super) fn started(
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

    pub(super) fn link(&mut self, attempt: &Attempt) {
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

    pub(super) fn linked(
        &mut self,
        attempt: &Attempt,
        stage: usize,
        result: Result<(), Error>,
        now: Instant,
    ) {
        let Some(entry) = self.current(attempt) else { return };
        let Phase::Linking(waiting) = &mut entry.phase else { return };
        if let Err(error) = result {
            return self.fail(&attempt.name, error, false, now);
        }
        waiting.remove(&stage);
        if !waiting.is_empty() {
            return;
        }
        self.restore_adapters(attempt);
    }

    pub(super) fn start_scheduler(&mut self, attempt: &Attempt) {
        let Some(entry) = self.entries.get_mut(&attempt.name) else { return };
        let Some(replica) = &entry.replica else { return };
        let effect = Effect::StartScheduler {
            attempt: attempt.clone(),
            node: replica.plan.stages[0].node,
            source: entry.wish.source.clone(),
            max_sequences: replica.plan.concurrent_sequences,
            context_tokens: replica.plan.context_tokens,
            fixed_tokens: replica.plan.fixed_tokens,
        };
        entry.phase = Phase::StartingScheduler;
        self.effects.push(effect);
    }

    pub(super) fn scheduler_started(&mut self, attempt: &Attempt, result: Result<(), Error>, now: Instant) {
        let Some(entry) = self.current(attempt) else { return };
        if !matches!(entry.phase, Phase::StartingScheduler) {
            return;
        }
        if let Err(error) = result {
            return self.fail(&attempt.name, error, false, now);
        }
        entry.phase = Phase::Ready;
        entry.was_ready = true;
        entry.last_used = Some(now);
        entry.detail.clear();
        self.effects.push(Effect::Settled { name: attempt.name.clone(), result: Ok(()) });
    }
}
