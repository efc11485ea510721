//! How long models stay: until nobody asked for as long as their wish says, or until another one needs the room.
//!
//! ```text
//! time is up ──▶ ask the scheduler how busy it is ──▶ still idle: drain, then stop, then forget
//! does not fit ─▶ ask those that may go ─▶ those not used for longest, as few as it takes: drain … ─▶ weigh again
//! ```
//!
//! What is known of the last use is old; so the scheduler is always asked before anything goes. A replica that goes takes no further
//! request and lets the ones that it has finish. All replicas of a deployment go together.

use super::entry::Phase;
use super::machine::Deployments;
use super::{Attempt, Effect, Usage};
use crate::Error;
use crate::placement::{ModelCost, Offer};
use std::collections::BTreeSet;
use std::time::Instant;

/// What a load waits for that does not fit.
#[derive(Debug)]
pub(super) struct Room {
    cost: ModelCost,
    offers: Vec<Offer>,
    /// Replicas that are asked how busy they are, or that go.
    waiting: BTreeSet<String>,
    /// Is it decided who goes?
    is_chosen: bool,
}

impl Room {
    pub(super) fn new(cost: ModelCost, offers: Vec<Offer>) -> Self {
        Self { cost, offers, waiting: BTreeSet::new(), is_chosen: false }
    }
}

impl Deployments {
    /// When a deployment's time is up, as far as is known. None: never, or somebody is being asked.
    pub(super) fn idle_at(&self, name: &str) -> Option<Instant> {
        let mut last = None;
        for instance in self.instances(name) {
            let entry = self.entries.get(&instance)?;
            let ttl = entry.wish.ttl.filter(|_| !entry.wish.is_pinned)?;
            if entry.is_asked || entry.is_leaving || !matches!(entry.phase, Phase::Ready) {
                return None;
            }
            last = last.max(Some(entry.last_used?.checked_add(ttl)?));
        }
        last
    }

    /// Asks those whose time seems to be up.
    pub(super) fn ask_the_idle(&mut self, now: Instant) {
        for name in self.groups() {
            if self.idle_at(&name).is_some_and(|at| at <= now) {
                for instance in self.instances(&name) {
                    self.ask(&instance);
                }
            }
        }
    }

    fn ask(&mut self, instance: &str) -> bool {
        let Some(entry) = self.entries.get_mut(instance) else { return false };
        let Some(replica) = entry.replica.as_ref().filter(|_| matches!(entry.phase, Phase::Ready)) else {
            return false;
        };
        if !std::mem::replace(&mut entry.is_asked, true) {
            let node = replica.plan.stages[0].node;
            let effect = Effect::AskUsage { attempt: entry.attempt(), node };
            self.effects.push(effect);
        }
        true
    }

    /// A scheduler said how busy it is.
    pub(super) fn used(&mut self, attempt: &Attempt, result: Result<Usage, Error>, now: Instant) {
        if let Some(entry) = self.current(attempt).filter(|entry| entry.is_asked) {
            entry.is_asked = false;
            entry.last_used = match result {
                Ok(Usage { busy: 0, idle }) => Some(now.checked_sub(idle).unwrap_or(now)),
                // Busy, or not known: then nobody goes for want of use.
                _ => Some(now),
            };
        }
        let name = super::replica_of(&attempt.name).0.to_owned();
        if self.idle_at(&name).is_some_and(|at| at <= now) {
            tracing::info!(deployment = name, "nobody asked for it as long as it may stay");
            for instance in self.instances(&name) {
                self.retire(&instance, now);
            }
        }
        for waiting in self.makers_of_room(&attempt.name, false) {
            self.choose_who_goes(&waiting, now);
        }
    }

    /// Nothing runs any more, or longer than that nobody waits.
    pub(super) fn drained(&mut self, attempt: &Attempt, now: Instant) {
        if self.current(attempt).is_some_and(|entry| matches!(entry.phase, Phase::Draining)) {
            self.stop(&attempt.name, super::entry::Then::Remove, now);
        }
    }

    /// Lets a replica go once its requests have finished.
    fn retire(&mut self, instance: &str, now: Instant) {
        let Some(entry) = self.entries.get_mut(instance) else { return };
        match entry.replica.as_ref().filter(|_| matches!(entry.phase, Phase::Ready) && !entry.is_leaving) {
            Some(replica) => {
                let node = replica.plan.stages[0].node;
                entry.is_leaving = true;
                entry.phase = Phase::Draining;
                let effect = Effect::Drain { attempt: entry.attempt(), node };
                self.effects.push(effect);
            }
            None => self.leave(instance, now),
        }
    }

    /// May others go so that this one fits? Only for a first load: what is formed again has no more right to the room than others.
    pub(super) fn may_make_room(&self, instance: &str) -> bool {
        let Some(entry) = self.entries.get(instance) else { return false };
        entry.wish.makes_room && !entry.was_ready && !self.who_may_go(instance).is_empty()
    }

    /// Deployments that may go for this one's sake, the one that was not used for longest first.
    fn who_may_go(&self, instance: &str) -> Vec<String> {
        let own = super::replica_of(instance).0;
        let mut found = Vec::new();
        for name in self.groups().into_iter().filter(|name| name != own) {
            let instances = self.instances(&name);
            let entries: Vec<_> =
                instances.iter().filter_map(|instance| self.entries.get(instance)).collect();
            let may_go = entries.iter().all(|entry| {
                matches!(entry.phase, Phase::Ready) && !entry.wish.is_pinned && !entry.is_leaving
            });
            if may_go {
                found.push((entries.iter().filter_map(|entry| entry.last_used).max(), name));
            }
        }
        found.sort();
        found.into_iter().map(|(_, name)| name).collect()
    }

    /// Begins to make room: first those are asked that may go.
    pub(super) fn make_room(&mut self, attempt: &Attempt, mut room: Room, now: Instant) {
        for name in self.who_may_go(&attempt.name) {
            for instance in self.instances(&name) {
                if self.ask(&instance) {
                    room.waiting.insert(instance);
                }
            }
        }
        if let Some(entry) = self.current(attempt) {
            entry.phase = Phase::MakingRoom(room);
        }
        self.choose_who_goes(&attempt.name.clone(), now);
    }

    /// Once all have answered: as few go as it takes, those that were not used for longest.
    fn choose_who_goes(&mut self, instance: &str, now: Instant) {
        let Some(entry) = self.entries.get(instance) else { return };
        let Phase::MakingRoom(room) = &entry.phase else { return };
        if !room.waiting.is_empty() || room.is_chosen {
            return;
        }
        let (cost, offers, wish) = (room.cost.clone(), room.offers.clone(), entry.wish.wish.clone());
        let attempt = entry.attempt();
        let fits_without = |gone: &[String]| {
            let instances: Vec<String> = gone.iter().flat_map(|name| self.instances(name)).collect();
            self.plan_without(&cost, offers.clone(), &wish, &instances)
        };
        let mut gone: Vec<String> = Vec::new();
        let mut outcome = fits_without(&gone);
        for name in self.who_may_go(instance) {
            if outcome.is_ok() {
                break;
            }
            gone.push(name);
            outcome = fits_without(&gone);
        }
        if let Err(refusal) = outcome {
            return self.fail(instance, refusal.into(), true, now);
        }
        // Some that were not used for long may not help: they stay.
        for place in (0..gone.len()).rev() {
            let mut fewer = gone.clone();
            fewer.remove(place);
            if fits_without(&fewer).is_ok() {
                gone = fewer;
            }
        }
        if gone.is_empty() {
            return self.weigh(&attempt);
        }
        let instances: Vec<String> = gone.iter().flat_map(|name| self.instances(name)).collect();
        tracing::info!(deployment = instance, gone = gone.join(", "), "making room");
        if let Some(entry) = self.entries.get_mut(instance)
            && let Phase::MakingRoom(room) = &mut entry.phase
        {
            room.is_chosen = true;
            room.waiting = instances.iter().cloned().collect();
            entry.detail =
                format!("making room: {} is unloaded once its requests have finished", gone.join(", "));
        }
        for instance in instances {
            self.retire(&instance, now);
        }
    }

    /// A replica is gone (or will not go): who waited for its room weighs again.
    pub(super) fn room_is_made(&mut self, gone: &str, now: Instant) {
        for instance in self.makers_of_room(gone, true) {
            let Some(entry) = self.entries.get_mut(&instance) else { continue };
            entry.detail.clear();
            let attempt = entry.attempt();
            self.weigh(&attempt);
        }
        // One that was asked and is gone meanwhile does not answer.
        for instance in self.makers_of_room(gone, false) {
            self.choose_who_goes(&instance, now);
        }
    }

    /// Those that wait for nobody any more after this one, at that step of making room.
    fn makers_of_room(&mut self, done: &str, is_chosen: bool) -> Vec<String> {
        let mut ready = Vec::new();
        for (name, entry) in &mut self.entries {
            if let Phase::MakingRoom(room) = &mut entry.phase
                && room.is_chosen == is_chosen
                && room.waiting.remove(done)
                && room.waiting.is_empty()
            {
                ready.push(name.clone());
            }
        }
        ready
    }
}
