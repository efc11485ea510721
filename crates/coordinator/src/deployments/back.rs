//! The steps back: failures, stops and removals. Whatever the attempt started is ended before anything else begins.

use super::entry::{Phase, Then};
use super::machine::{Deployments, ORPHAN_RETRY, Orphan};
use super::{Attempt, Effect, Record};
use crate::placement;
use crate::{Error, NodeId};
use mlxnode_compute::ByteCount;
use std::time::Instant;

impl Deployments {
    /// The attempt failed. `needs_other_nodes`: the same will happen again until the nodes change.
    pub(super) fn fail(&mut self, name: &str, error: Error, needs_other_nodes: bool, now: Instant) {
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
    pub(super) fn stop(&mut self, name: &str, then: Then, now: Instant) {
        self.give_up_adapter_orders(name);
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

    pub(super) fn stopped(
        &mut self,
        attempt: &Attempt,
        node: NodeId,
        result: Result<(), Error>,
        now: Instant,
    ) {
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
    pub(super) fn orphan(&mut self, name: &str, node: NodeId, now: Instant) {
        let Some(entry) = self.entries.get(name) else { return };
        let stages = entry.replica.iter().flat_map(|replica| &replica.plan.stages);
        let memory = stages.filter(|stage| stage.node == node).map(placement::PlannedStage::memory).sum();
        let orphan = Orphan { epoch: entry.epoch, memory, retry_at: now + ORPHAN_RETRY };
        self.orphans.insert((node, name.to_owned()), orphan);
    }

    pub(super) fn when_all_stopped(&mut self, name: &str, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let Phase::Stopping { waiting, then } = &entry.phase else { return };
        if !waiting.is_empty() {
            return;
        }
        let then = *then;
        entry.replica = None;
        match then {
            // A node came in the meantime: it may be what was missing.
            Then::Fail { waits_for_nodes: true } if entry.arrivals < self.arrivals => {
                self.begin_attempt(name)
            }
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

    pub(super) fn leave(&mut self, name: &str, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let is_draining = matches!(entry.phase, Phase::Draining);
        if std::mem::replace(&mut entry.is_leaving, true) && !is_draining {
            return;
        }
        match &mut entry.phase {
            Phase::Forgetting => {}
            Phase::Stopping { then, .. } => *then = Then::Remove,
            Phase::Waiting { .. } | Phase::Failed { .. } => self.forget(name),
            _ => self.stop(name, Then::Remove, now),
        }
    }

    pub(super) fn forget(&mut self, name: &str) {
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

    pub(super) fn forgotten(&mut self, name: &str, result: Result<(), Error>, now: Instant) {
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
                self.room_is_made(name, now);
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
        self.room_is_made(name, now);
    }
}
