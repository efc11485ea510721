//! The adapters of deployments: which are wanted, and what has to be done for that.
//!
//! ```text
//! load ─▶ Loading (every node of the replica reads it) ─▶ Recording ─▶ there        unload ─▶ Recording ─▶ Unloading ─▶ gone
//!             └── any node cannot: taken out again, refused
//! ```
//!
//! An adapter is durable once all stages have it, so that the journal never names one that does not fit. Every new attempt reads those
//! that are wanted before it takes requests; one that cannot be read any more is kept with its problem and does not hold up the model.

use super::entry::{Deployment, Phase};
use super::machine::{Deployments, Loaded};
use super::name::{check_adapter_name, check_source};
use super::{Attempt, DeploymentWish, Effect, Record};
use crate::{Error, NodeId};
use mlxnode_compute::ByteCount;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Most adapters of a deployment. Each takes memory beside the weights on every node that it changes layers on.
pub const MAX_ADAPTERS: usize = 64;

/// An adapter that somebody wants beside a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterWish {
    /// Requests ask for `DEPLOYMENT:NAME`.
    pub name: String,
    /// A folder, or a Hugging Face id.
    pub source: String,
    /// Tells loads apart: what caches hold of an adapter that is gone must not be taken for another one's of its name. Given by
    /// [`Deployments::load_adapter`], from the epochs, which are never used twice.
    #[serde(default)]
    pub load: u64,
}

impl AdapterWish {
    /// A wish that has not been granted.
    pub fn new(name: impl Into<String>, source: impl Into<String>) -> Self {
        Self { name: name.into(), source: source.into(), load: 0 }
    }

    /// What the workers call it, and with them whatever keeps something that was computed with it.
    pub fn key(&self) -> String {
        format!("{}#{}", self.name, self.load)
    }
}

/// An adapter of a deployment, for those who look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterView {
    /// Requests ask for `DEPLOYMENT:NAME`.
    pub name: String,
    /// Where it comes from.
    pub source: String,
    /// What the workers call it: [`AdapterWish::key`].
    pub key: String,
    /// Why it cannot be used now.
    pub problem: Option<String>,
}

/// Something that is being done about an adapter.
#[derive(Debug)]
pub(super) struct Order {
    adapter: AdapterWish,
    step: Step,
}

#[derive(Debug)]
enum Step {
    /// These nodes read it still; what went wrong elsewhere.
    Loading {
        waiting: BTreeSet<NodeId>,
        problem: Option<Error>,
    },
    /// All have it.
    RecordingAdded,
    RecordingRemoved,
    /// These nodes have it still.
    Unloading {
        waiting: BTreeSet<NodeId>,
        problem: Option<Error>,
    },
}

impl DeploymentWish {
    /// Adds an adapter, in place of an earlier one of its name.
    pub(super) fn put_adapter(&mut self, adapter: AdapterWish) {
        self.adapters.retain(|other| other.name != adapter.name);
        self.adapters.push(adapter);
        self.adapters.sort_by(|a, b| a.name.cmp(&b.name));
    }
}

impl Deployments {
    /// Somebody wants an adapter beside a deployment that is ready. [`Effect::AdapterSettled`] tells when it is there.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad name or source, [`Error::NotFound`] for an unknown deployment, [`Error::NameTaken`],
    /// [`Error::TooMany`], and [`Error::Unavailable`] while the deployment is not ready.
    pub fn load_adapter(
        &mut self,
        name: &str,
        mut adapter: AdapterWish,
    ) -> Result<(Loaded, Vec<Effect>), Error> {
        check_adapter_name(&adapter.name)?;
        check_source(&adapter.source)?;
        let instances = self.instances(name);
        if instances.is_empty() {
            return Err(self.not_found(name));
        }
        self.last_epoch += 1;
        adapter.load = self.last_epoch;
        let mut all = Loaded::Already;
        for instance in instances {
            match self.load_adapter_on(&instance, adapter.clone()) {
                Ok(Loaded::Already) => {}
                Ok(Loaded::UnderWay) => all = Loaded::UnderWay,
                Err(error) => {
                    let (name, adapter) = (instance, adapter.name.clone());
                    match all {
                        Loaded::Already => return Err(error),
                        // Others read it already: who waits for them hears of this.
                        Loaded::UnderWay => {
                            self.effects.push(Effect::AdapterSettled { name, adapter, result: Err(error) });
                        }
                    }
                }
            }
        }
        Ok((all, self.take_effects()))
    }

    fn load_adapter_on(&mut self, name: &str, adapter: AdapterWish) -> Result<Loaded, Error> {
        let not_found = self.not_found(name);
        let entry = self.entries.get_mut(name).ok_or(not_found)?;
        let mut broken = None;
        let taken = |source: &str| Error::NameTaken {
            name: adapter.name.clone(),
            source_of_other: source.to_owned(),
        };
        if let Some(order) = entry.adapter_orders.get(&adapter.name) {
            return match order.step {
                Step::RecordingRemoved | Step::Unloading { .. } => Err(Error::Unavailable(format!(
                    "{} is being unloaded; load it again once it is gone",
                    adapter.name
                ))),
                _ if order.adapter.source != adapter.source => Err(taken(&order.adapter.source)),
                _ => Ok(Loaded::UnderWay),
            };
        }
        if let Some(other) = entry.wish.adapters.iter().find(|other| other.name == adapter.name) {
            if other.source != adapter.source {
                return Err(taken(&other.source));
            }
            if !entry.adapter_problems.contains_key(&adapter.name) {
                return Ok(Loaded::Already);
            }
            // Some nodes may have read it.
            broken = Some(other.key());
        } else if entry.wish.adapters.len() + entry.adapter_orders.len() >= MAX_ADAPTERS {
            return Err(Error::TooMany(format!(
                "{name} has {MAX_ADAPTERS} adapters already; unload one first"
            )));
        }
        let Some(replica) = entry.replica.as_ref().filter(|_| matches!(entry.phase, Phase::Ready)) else {
            return Err(Error::Unavailable(format!("{name} is not ready; load the adapter once it is")));
        };
        let (attempt, waiting) = (entry.attempt(), replica.nodes());
        if let Some(broken) = broken {
            for node in &waiting {
                let (attempt, adapter) = (attempt.clone(), broken.clone());
                self.effects.push(Effect::UnloadAdapter { attempt, node: *node, adapter });
            }
        }
        for node in &waiting {
            let (attempt, adapter) = (attempt.clone(), adapter.clone());
            self.effects.push(Effect::LoadAdapter { attempt, node: *node, adapter });
        }
        let step = Step::Loading { waiting, problem: None };
        entry.adapter_orders.insert(adapter.name.clone(), Order { adapter, step });
        Ok(Loaded::UnderWay)
    }

    /// Where the adapters come from that are wanted, are being loaded or are about to go.
    pub fn adapter_sources(&self) -> impl Iterator<Item = &str> {
        self.entries.values().flat_map(|entry| {
            let ordered = entry.adapter_orders.values().map(|order| &order.adapter);
            entry.wish.adapters.iter().chain(ordered).map(|adapter| adapter.source.as_str())
        })
    }

    /// Nobody wants an adapter any more. [`Effect::AdapterSettled`] tells when it is gone; requests that have it keep it to their end.
    ///
    /// # Errors
    /// [`Error::NotFound`], with the names that there are, and [`Error::Unavailable`] while it is being loaded.
    pub fn unload_adapter(&mut self, name: &str, adapter: &str) -> Result<Vec<Effect>, Error> {
        let instances = self.instances(name);
        if instances.is_empty() {
            return Err(self.not_found(name));
        }
        for instance in instances {
            self.unload_adapter_on(&instance, adapter)?;
        }
        Ok(self.take_effects())
    }

    fn unload_adapter_on(&mut self, name: &str, adapter: &str) -> Result<(), Error> {
        let not_found = self.not_found(name);
        let entry = self.entries.get_mut(name).ok_or(not_found)?;
        match entry.adapter_orders.get(adapter).map(|order| &order.step) {
            None => {}
            Some(Step::RecordingRemoved | Step::Unloading { .. }) => return Ok(()),
            Some(_) => {
                return Err(Error::Unavailable(format!(
                    "{adapter} is being loaded; unload it once it is there"
                )));
            }
        }
        let Some(wish) = entry.wish.adapters.iter().find(|other| other.name == adapter).cloned() else {
            return Err(unknown(entry, adapter));
        };
        entry
            .adapter_orders
            .insert(adapter.to_owned(), Order { adapter: wish, step: Step::RecordingRemoved });
        let record = Record::AdapterRemoved { name: name.to_owned(), adapter: adapter.to_owned() };
        self.effects.push(Effect::RecordAdapter {
            name: name.to_owned(),
            adapter: adapter.to_owned(),
            record,
        });
        Ok(())
    }

    /// The workers are linked: they read the adapters that are wanted.
    pub(super) fn restore_adapters(&mut self, attempt: &Attempt) {
        let Some(entry) = self.entries.get_mut(&attempt.name) else { return };
        let Some(replica) = &entry.replica else { return };
        entry.adapter_problems.clear();
        let mut waiting = BTreeSet::new();
        for adapter in &entry.wish.adapters {
            for node in replica.nodes() {
                waiting.insert((node, adapter.name.clone()));
                let (attempt, adapter) = (attempt.clone(), adapter.clone());
                self.effects.push(Effect::LoadAdapter { attempt, node, adapter });
            }
        }
        if waiting.is_empty() {
            return self.start_scheduler(attempt);
        }
        entry.phase = Phase::Adapting(waiting);
    }

    pub(super) fn adapter_loaded(
        &mut self,
        attempt: &Attempt,
        node: NodeId,
        adapter: &str,
        result: Result<ByteCount, Error>,
    ) {
        let Some(entry) = self.current(attempt) else { return };
        if let Ok(bytes) = result {
            entry.adapter_bytes.insert((node, adapter.to_owned()), bytes);
        }
        if let Phase::Adapting(waiting) = &mut entry.phase {
            if !waiting.remove(&(node, adapter.to_owned())) {
                return;
            }
            if let Err(error) = result {
                entry.adapter_problems.entry(adapter.to_owned()).or_insert(error.to_string());
            }
            if waiting.is_empty() {
                self.start_scheduler(attempt);
            }
            return;
        }
        let Some(order) = entry.adapter_orders.get_mut(adapter) else { return };
        let Step::Loading { waiting, problem } = &mut order.step else { return };
        if !waiting.remove(&node) {
            return;
        }
        if let Err(error) = result {
            problem.get_or_insert(error);
        }
        if !waiting.is_empty() {
            return;
        }
        if let Some(error) = problem.take() {
            return self.refuse_adapter(&attempt.name, adapter, error);
        }
        order.step = Step::RecordingAdded;
        let record = Record::AdapterAdded { name: attempt.name.clone(), adapter: order.adapter.clone() };
        let (name, adapter) = (attempt.name.clone(), adapter.to_owned());
        self.effects.push(Effect::RecordAdapter { name, adapter, record });
    }

    pub(super) fn adapter_recorded(&mut self, name: &str, adapter: &str, result: Result<(), Error>) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let attempt = entry.attempt();
        let is_ready = matches!(entry.phase, Phase::Ready);
        let Some(order) = entry.adapter_orders.get_mut(adapter) else { return };
        let result =
            result.map_err(|error| Error::Failed(format!("the decision could not be recorded: {error}")));
        match (&order.step, result) {
            (Step::RecordingAdded, Ok(())) => {
                entry.wish.put_adapter(order.adapter.clone());
                entry.adapter_problems.remove(adapter);
                self.settle_adapter(name, adapter, Ok(()));
            }
            (Step::RecordingAdded, Err(error)) => self.refuse_adapter(name, adapter, error),
            (Step::RecordingRemoved, Ok(())) => {
                entry.wish.adapters.retain(|other| other.name != adapter);
                entry.adapter_problems.remove(adapter);
                let nodes = entry.replica.as_ref().filter(|_| is_ready).map(|replica| replica.nodes());
                let waiting = nodes.unwrap_or_default();
                if waiting.is_empty() {
                    return self.settle_adapter(name, adapter, Ok(()));
                }
                order.step = Step::Unloading { waiting: waiting.clone(), problem: None };
                let key = order.adapter.key();
                self.take_adapter_out(&attempt, &key, waiting);
            }
            (Step::RecordingRemoved, Err(error)) => self.settle_adapter(name, adapter, Err(error)),
            _ => {}
        }
    }

    pub(super) fn adapter_unloaded(
        &mut self,
        attempt: &Attempt,
        node: NodeId,
        key: &str,
        result: Result<(), Error>,
    ) {
        let Some(entry) = self.current(attempt) else { return };
        let mut orders = entry.adapter_orders.iter_mut();
        let Some((adapter, order)) = orders.find(|(_, order)| order.adapter.key() == key) else { return };
        let adapter = adapter.clone();
        entry.adapter_bytes.remove(&(node, adapter.clone()));
        let Step::Unloading { waiting, problem } = &mut order.step else { return };
        waiting.remove(&node);
        if let Err(error) = result {
            let text =
                format!("{adapter} is unloaded, but not all of its memory is known to be free: {error}");
            problem.get_or_insert(Error::Unavailable(text));
        }
        if waiting.is_empty() {
            let result = problem.take().map_or(Ok(()), Err);
            self.settle_adapter(&attempt.name, &adapter, result);
        }
    }

    /// The attempt ends: what was being done about adapters ends with it.
    pub(super) fn give_up_adapter_orders(&mut self, name: &str) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let mut over = Vec::new();
        for (adapter, order) in &entry.adapter_orders {
            match order.step {
                Step::Loading { .. } => over.push((
                    adapter.clone(),
                    Err(Error::Unavailable(format!(
                        "{name} is not ready any more; load the adapter once it is"
                    ))),
                )),
                Step::Unloading { .. } => over.push((adapter.clone(), Ok(()))), // gone with the workers
                // The journal answers still.
                Step::RecordingAdded | Step::RecordingRemoved => {}
            }
        }
        for (adapter, result) in over {
            self.settle_adapter(name, &adapter, result);
        }
    }

    /// Takes out what some nodes may have, and says why there is no adapter.
    fn refuse_adapter(&mut self, name: &str, adapter: &str, error: Error) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        if let (Phase::Ready, Some(replica)) = (&entry.phase, &entry.replica) {
            let (attempt, nodes) = (entry.attempt(), replica.nodes());
            let key = entry.adapter_orders.get(adapter).map(|order| order.adapter.key());
            entry.adapter_bytes.retain(|(_, other), _| other != adapter);
            self.take_adapter_out(&attempt, &key.unwrap_or_default(), nodes);
        }
        self.settle_adapter(name, adapter, Err(error));
    }

    fn take_adapter_out(&mut self, attempt: &Attempt, adapter: &str, nodes: BTreeSet<NodeId>) {
        for node in nodes {
            let (attempt, adapter) = (attempt.clone(), adapter.to_owned());
            self.effects.push(Effect::UnloadAdapter { attempt, node, adapter });
        }
    }

    fn settle_adapter(&mut self, name: &str, adapter: &str, result: Result<(), Error>) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.adapter_orders.remove(adapter);
        }
        let (name, adapter) = (name.to_owned(), adapter.to_owned());
        self.effects.push(Effect::AdapterSettled { name, adapter, result });
    }
}

fn unknown(entry: &Deployment, adapter: &str) -> Error {
    let names: Vec<&str> = entry.wish.adapters.iter().map(|other| other.name.as_str()).collect();
    let name = &entry.wish.name;
    Error::NotFound(match names.is_empty() {
        true => format!("{name} has no adapter named {adapter:?}; it has none"),
        false => format!("{name} has no adapter named {adapter:?}; it has: {}", names.join(", ")),
    })
}
