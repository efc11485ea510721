//! A deployment's replicas: loaded and unloaded together, each with a life of its own between.
//!
//! A replica is an entry by its own name ([`replica_name`]), so that its attempts, workers and scheduler are apart from the others'.

use super::machine::{Deployments, Loaded};
use super::name::{check_name, replica_name, replica_of};
use super::{AdapterWish, DeploymentView, DeploymentWish, Effect, State};
use crate::placement::Wish;
use crate::{Error, NodeId};
use std::collections::BTreeSet;
use std::time::Instant;

/// Most replicas of a deployment.
pub const MAX_REPLICAS: usize = 16;

impl DeploymentWish {
    /// Does somebody who wants `other` want it otherwise than this is loaded?
    pub(super) fn contradicts(&self, other: &Self) -> bool {
        let is_placed_otherwise = other.wish != Wish::default() && other.wish != self.wish;
        let is_kept_otherwise =
            (other.is_pinned && !self.is_pinned) || (other.ttl.is_some() && other.ttl != self.ttl);
        is_placed_otherwise || is_kept_otherwise
    }
}

impl Deployments {
    /// Somebody wants a model. Idempotent: what is wanted already is not touched; replicas that are missing are added.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad name, source or number of replicas, [`Error::NameTaken`], [`Error::TooMany`], and
    /// [`Error::Unavailable`] while the deployment is being unloaded.
    pub fn load(&mut self, wish: DeploymentWish) -> Result<(Loaded, Vec<Effect>), Error> {
        check_name(&wish.name)?;
        let name = wish.name.clone();
        let there = self.instances(&name);
        let count = wish.replicas.max(there.len()).max(1);
        if count > MAX_REPLICAS {
            return Err(Error::Invalid(format!("a model has at most {MAX_REPLICAS} replicas")));
        }
        if wish.is_pinned && wish.ttl.is_some() {
            return Err(Error::Invalid("a pinned model has no time after which it is unloaded".into()));
        }
        let adapters = there.first().map(|first| self.adapters_of(first)).unwrap_or_default();
        let mut all = Loaded::Already;
        for number in 1..=count {
            let wish = DeploymentWish {
                name: replica_name(&name, number),
                adapters: adapters.clone(),
                replicas: count,
                ..wish.clone()
            };
            match self.load_one(wish) {
                Ok(Loaded::Already) => {}
                Ok(Loaded::UnderWay) => all = Loaded::UnderWay,
                Err(error) if number == 1 => return Err(error),
                Err(error) => {
                    // The first ones are under way: who waits for them hears of this.
                    self.effects
                        .push(Effect::Settled { name: replica_name(&name, number), result: Err(error) });
                    all = Loaded::UnderWay;
                }
            }
        }
        for instance in self.instances(&name) {
            if let Some(entry) = self.entries.get_mut(&instance) {
                entry.wish.replicas = count;
            }
        }
        Ok((all, self.take_effects()))
    }

    /// Nobody wants it any more. [`Effect::Gone`] tells of each replica when its workers are gone. Unloading twice is fine.
    ///
    /// # Errors
    /// [`Error::NotFound`], with the names that there are.
    pub fn unload(&mut self, name: &str, now: Instant) -> Result<Vec<Effect>, Error> {
        let instances = self.instances(name);
        if instances.is_empty() {
            return Err(self.not_found(name));
        }
        for instance in instances {
            self.leave(&instance, now);
        }
        Ok(self.take_effects())
    }

    /// Who asked for a load went away, or part of it failed: takes back the replicas that were never ready.
    pub fn cancel_load(&mut self, name: &str, now: Instant) -> Vec<Effect> {
        for instance in self.instances(name) {
            let entry = self.entries.get(&instance);
            if entry.is_some_and(|entry| !entry.was_ready && entry.refusal.is_none()) {
                self.leave(&instance, now);
            }
        }
        self.take_effects()
    }

    /// The names of the deployments, each once.
    pub fn groups(&self) -> Vec<String> {
        let names: BTreeSet<&str> = self.entries.keys().map(|instance| replica_of(instance).0).collect();
        names.into_iter().map(str::to_owned).collect()
    }

    /// What the replicas of a deployment are called, in order.
    pub fn instances(&self, name: &str) -> Vec<String> {
        let mut own: Vec<&String> =
            self.entries.keys().filter(|instance| replica_of(instance).0 == name).collect();
        own.sort_by_key(|instance| replica_of(instance).1);
        own.into_iter().cloned().collect()
    }

    /// All replicas of a deployment.
    pub fn replicas(&self, name: &str) -> Vec<DeploymentView> {
        self.instances(name).iter().filter_map(|instance| self.find(instance).ok()).collect()
    }

    /// Are all replicas ready?
    pub fn is_whole(&self, name: &str) -> bool {
        let replicas = self.replicas(name);
        !replicas.is_empty() && replicas.iter().all(|replica| replica.state == State::Ready)
    }

    /// Is something being done about this adapter on any replica?
    pub fn is_adapting(&self, name: &str, adapter: &str) -> bool {
        let instances = self.instances(name);
        let mut entries = instances.iter().filter_map(|instance| self.entries.get(instance));
        entries.any(|entry| entry.adapter_orders.contains_key(adapter))
    }

    /// The nodes of the other replicas of the deployment that this one belongs to.
    pub(super) fn nodes_of_siblings(&self, instance: &str) -> BTreeSet<NodeId> {
        let (name, _) = replica_of(instance);
        let siblings = self.instances(name).into_iter().filter(|sibling| sibling != instance);
        let entries = siblings.filter_map(|sibling| self.entries.get(&sibling));
        entries.filter_map(|entry| entry.replica.as_ref()).flat_map(|replica| replica.nodes()).collect()
    }

    fn adapters_of(&self, instance: &str) -> Vec<AdapterWish> {
        self.entries.get(instance).map(|entry| entry.wish.adapters.clone()).unwrap_or_default()
    }
}
