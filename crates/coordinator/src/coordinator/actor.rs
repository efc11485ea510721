//! The actor: moves messages between the callers, the [`Deployments`], the journal and the nodes. Decides nothing itself.
//!
//! States: running from the moment the log is read until it is stopped by its owner. It ends by itself only when the control log
//! belongs to somebody else now. It owns every order under way: what is abandoned, and everything at its end, is aborted.

use super::Limits;
use super::handle::PlanReport;
use super::job_nodes::JobNodes;
use super::job_orders::{Asked, JobMessage, Tidying};
use super::journal::{Decisions, Entry, Journal};
use super::nodes::LoadAdapter;
use super::orders::{Orders, within};
use crate::deployments::{
    AdapterWish, Attempt, DeploymentView, DeploymentWish, Deployments, Effect, Event, Loaded, State,
    replica_of,
};
use crate::jobs::{self, JobView, Jobs};
use crate::keys::{KeyEntry, KeyText, KeyWish, Keys};
use crate::placement::{ModelCost, Offer, Wish};
use crate::{Error, keys};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{info, warn};

/// Where an answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What the actor hears.
pub(super) enum Message {
    /// A model is wanted.
    Load {
        /// What and where.
        wish: DeploymentWish,
        /// Names the call, for [`Message::CancelLoad`].
        call: u64,
        /// When it is ready, or why not.
        reply: Reply<DeploymentView>,
    },
    /// A call to load went away before it was answered.
    CancelLoad {
        /// Of which deployment.
        name: String,
        /// Which call.
        call: u64,
    },
    /// A model is not wanted any more.
    Unload {
        /// Which.
        name: String,
        /// When it is gone, or why not.
        reply: Reply<()>,
    },
    /// An adapter is wanted beside a deployment.
    LoadAdapter {
        /// Of which deployment; empty: the only one.
        name: String,
        /// What.
        adapter: AdapterWish,
        /// When it is there, or why not.
        reply: Reply<DeploymentView>,
    },
    /// An adapter is not wanted any more.
    UnloadAdapter {
        /// Of which deployment; empty: the only one.
        name: String,
        /// Its name.
        adapter: String,
        /// When it is gone, or why not.
        reply: Reply<DeploymentView>,
    },
    /// What would a plan be?
    Plan {
        /// Of which model.
        source: String,
        /// How.
        wish: Wish,
        /// The plan or why there is none.
        reply: Reply<PlanReport>,
    },
    /// The answer to the first half of a plan.
    Weighed {
        /// How.
        wish: Wish,
        /// What the model costs and what the nodes offer.
        result: Result<(ModelCost, Vec<Offer>), Error>,
        /// To whom.
        reply: Reply<PlanReport>,
    },
    /// A key is wanted.
    CreateKey {
        /// For whom.
        wish: KeyWish,
        /// What its text is made of.
        random: [u8; 32],
        /// Now, in seconds since 1970.
        created_unix: u64,
        /// The key, once it is durable.
        reply: Reply<(KeyText, KeyEntry)>,
    },
    /// A key is not wanted any more.
    RevokeKey {
        /// Which.
        name: String,
        /// When that is durable.
        reply: Reply<()>,
    },
    /// About a job.
    Job(JobMessage),
    /// Something happened, or an order was carried out.
    Happened(Event),
    /// It is time for [`Deployments::tick`].
    Tick,
}

pub(super) struct CoordinatorActor;

/// What it starts from.
pub(super) struct Arguments {
    pub(super) journal: Journal,
    pub(super) deployments: Deployments,
    pub(super) keys: Keys,
    pub(super) jobs: Jobs,
    pub(super) job_nodes: Arc<dyn JobNodes>,
    pub(super) job_list: watch::Sender<Vec<Arc<JobView>>>,
    pub(super) orders: Orders,
    pub(super) snapshot: watch::Sender<Vec<DeploymentView>>,
    pub(super) key_list: watch::Sender<Vec<KeyEntry>>,
}

pub(super) struct Running {
    pub(super) deployments: Deployments,
    keys: Keys,
    pub(super) jobs: Jobs,
    pub(super) job_nodes: Arc<dyn JobNodes>,
    pub(super) job_list: watch::Sender<Vec<Arc<JobView>>>,
    /// Attempts of jobs under way, by job and epoch.
    pub(super) job_runs: HashMap<(String, u64), AbortHandle>,
    /// Calls that wait for a job's result to be served, by job, model and adapter.
    pub(super) job_publications: HashMap<Asked, Vec<Reply<String>>>,
    pub(super) job_timer: Option<AbortHandle>,
    pub(super) job_tidy: Tidying,
    journal: Journal,
    pub(super) orders: Orders,
    pub(super) limits: Limits,
    snapshot: watch::Sender<Vec<DeploymentView>>,
    key_list: watch::Sender<Vec<KeyEntry>>,
    /// Calls that wait, by deployment; those to load with the number that cancels them.
    loads: HashMap<String, Vec<(u64, Reply<DeploymentView>)>>,
    unloads: HashMap<String, Vec<Reply<()>>>,
    /// By deployment and adapter.
    adapters: HashMap<(String, String), Vec<Reply<DeploymentView>>>,
    /// Orders and plans under way; aborted when this is dropped.
    pub(super) under_way: JoinSet<()>,
    /// Those that [`Effect::Abandon`] ends.
    of_attempt: HashMap<Attempt, Vec<AbortHandle>>,
    timer: Option<AbortHandle>,
}

impl Actor for CoordinatorActor {
    type Msg = Message;
    type State = Running;
    type Arguments = Arguments;

    async fn pre_start(
        &self,
        myself: ActorRef<Message>,
        arguments: Arguments,
    ) -> Result<Running, ActorProcessingErr> {
        let limits = arguments.orders.limits;
        let mut running = Running {
            deployments: arguments.deployments,
            keys: arguments.keys,
            jobs: arguments.jobs,
            job_nodes: arguments.job_nodes,
            job_list: arguments.job_list,
            job_runs: HashMap::new(),
            job_publications: HashMap::new(),
            job_timer: None,
            job_tidy: Tidying::default(),
            journal: arguments.journal,
            orders: arguments.orders,
            limits,
            snapshot: arguments.snapshot,
            key_list: arguments.key_list,
            loads: HashMap::new(),
            unloads: HashMap::new(),
            adapters: HashMap::new(),
            under_way: JoinSet::new(),
            of_attempt: HashMap::new(),
            timer: None,
        };
        let effects = running.deployments.start();
        running.carry_out(&myself, effects).await;
        let effects = running.carry_out_jobs(&myself, vec![jobs::Effect::Tidy]).await;
        running.carry_out(&myself, effects).await;
        Ok(running)
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        running: &mut Running,
    ) -> Result<(), ActorProcessingErr> {
        while running.under_way.try_join_next().is_some() {}
        let effects = match message {
            Message::Load { wish, call, reply } => running.load(wish, call, reply),
            Message::CancelLoad { name, call } => running.cancel_load(&name, call),
            Message::Unload { name, reply } => match running.deployments.unload(&name, now()) {
                Ok(effects) => {
                    running.unloads.entry(name).or_default().push(reply);
                    effects
                }
                Err(error) => {
                    // Nobody waits when the caller is gone; here and below.
                    let _ = reply.send(Err(error));
                    Vec::new()
                }
            },
            Message::LoadAdapter { name, adapter, reply } => running.load_adapter(&name, adapter, reply),
            Message::UnloadAdapter { name, adapter, reply } => running.unload_adapter(&name, adapter, reply),
            Message::Plan { source, wish, reply } => {
                running.weigh_for_plan(&myself, source, wish, reply);
                Vec::new()
            }
            Message::Weighed { wish, result, reply } => {
                let report = result
                    .map(|(cost, offers)| (cost, running.beside_jobs(offers)))
                    .and_then(|(cost, offers)| PlanReport::new(&running.deployments, &cost, offers, &wish));
                let _ = reply.send(report);
                Vec::new()
            }
            Message::CreateKey { wish, random, created_unix, reply } => {
                let _ = reply.send(running.create_key(wish, &random, created_unix).await);
                Vec::new()
            }
            Message::RevokeKey { name, reply } => {
                let _ = reply.send(running.revoke_key(&name).await);
                Vec::new()
            }
            Message::Job(message) => running.on_job_message(&myself, message).await,
            Message::Happened(event) => {
                let mut effects = running.news_for_jobs(&myself, &event).await;
                let event = running.with_jobs_in_mind(event);
                effects.extend(running.deployments.on(event, now()));
                effects
            }
            Message::Tick => running.deployments.tick(now()),
        };
        running.carry_out(&myself, effects).await;
        Ok(())
    }
}

impl Running {
    fn load(&mut self, wish: DeploymentWish, call: u64, reply: Reply<DeploymentView>) -> Vec<Effect> {
        let name = wish.name.clone();
        match self.deployments.load(wish) {
            Ok((Loaded::Already, effects)) => {
                let _ = reply.send(self.deployments.find(&name));
                effects
            }
            Ok((Loaded::UnderWay, effects)) => {
                self.loads.entry(name).or_default().push((call, reply));
                effects
            }
            Err(error) => {
                let _ = reply.send(Err(error));
                Vec::new()
            }
        }
    }

    pub(super) fn load_adapter(
        &mut self,
        name: &str,
        adapter: AdapterWish,
        reply: Reply<DeploymentView>,
    ) -> Vec<Effect> {
        let wanted = self.deployments.named(name).and_then(|name| {
            let key = (name.clone(), adapter.name.clone());
            self.deployments.load_adapter(&name, adapter).map(|(loaded, effects)| (key, loaded, effects))
        });
        match wanted {
            Ok(((name, _), Loaded::Already, effects)) => {
                let _ = reply.send(self.deployments.find(&name));
                effects
            }
            Ok((key, Loaded::UnderWay, effects)) => {
                self.adapters.entry(key).or_default().push(reply);
                effects
            }
            Err(error) => {
                let _ = reply.send(Err(error));
                Vec::new()
            }
        }
    }

    fn unload_adapter(&mut self, name: &str, adapter: String, reply: Reply<DeploymentView>) -> Vec<Effect> {
        let wanted = self.deployments.named(name).and_then(|name| {
            let effects = self.deployments.unload_adapter(&name, &adapter)?;
            Ok((name, effects))
        });
        match wanted {
            Ok((name, effects)) => {
                self.adapters.entry((name, adapter)).or_default().push(reply);
                effects
            }
            Err(error) => {
                let _ = reply.send(Err(error));
                Vec::new()
            }
        }
    }

    /// The load is taken back when the last call that waits for it is gone.
    fn cancel_load(&mut self, name: &str, call: u64) -> Vec<Effect> {
        let Some(calls) = self.loads.get_mut(name) else { return Vec::new() };
        let before = calls.len();
        calls.retain(|(other, _)| *other != call);
        if calls.len() == before || !calls.is_empty() {
            return Vec::new();
        }
        self.loads.remove(name);
        self.deployments.cancel_load(name, now())
    }

    /// Carries out effects until none is left: records at once and in order, orders as tasks whose answers come back as messages.
    async fn carry_out(&mut self, myself: &ActorRef<Message>, effects: Vec<Effect>) {
        let mut effects = VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Record { attempt, record } => {
                    let result = self.record(Entry::Deployment(record)).await;
                    let fold = result.as_ref().ok().copied().flatten();
                    let event = Event::Recorded { attempt, result: result.map(|_| ()) };
                    effects.extend(self.deployments.on(event, now()));
                    // Only now do the deployments say what the record says.
                    if let Some(index) = fold {
                        self.fold(index).await;
                    }
                }
                Effect::RecordAdapter { name, adapter, record } => {
                    let result = self.record(Entry::Deployment(record)).await;
                    let fold = result.as_ref().ok().copied().flatten();
                    let event = Event::AdapterRecorded { name, adapter, result: result.map(|_| ()) };
                    effects.extend(self.deployments.on(event, now()));
                    if let Some(index) = fold {
                        self.fold(index).await;
                    }
                }
                Effect::AdapterSettled { name, adapter, result } => {
                    info!(deployment = name, adapter, ok = result.is_ok(), "adapter settled");
                    self.adapter_settled(&name, adapter, result);
                }
                Effect::Abandon { attempt } => {
                    for order in self.of_attempt.remove(&attempt).unwrap_or_default() {
                        order.abort();
                    }
                }
                Effect::Settled { name, result } => effects.extend(self.settled(&name, &result)),
                Effect::Gone { name, result } => {
                    info!(deployment = name, ok = result.is_ok(), "deployment unloaded");
                    // Of several replicas the last one counts, or the first that is not known to be gone.
                    let name = replica_of(&name).0;
                    if result.is_err() || self.deployments.instances(name).is_empty() {
                        for reply in self.unloads.remove(name).unwrap_or_default() {
                            let _ = reply.send(result.clone());
                        }
                    }
                }
                effect => self.order(myself, effect),
            }
        }
        self.publish();
        self.set_timer(myself);
        if self.journal.is_superseded() {
            warn!("another coordinator has taken over: this one ends");
            myself.stop(None);
        }
    }

    /// Makes a decision durable. Answers whether the log should be folded now, up to which entry.
    pub(super) async fn record(&mut self, entry: Entry) -> Result<Option<u64>, Error> {
        within(self.limits.record, "writing the control log", self.journal.append(&entry)).await
    }

    async fn create_key(
        &mut self,
        wish: KeyWish,
        random: &[u8; 32],
        created_unix: u64,
    ) -> Result<(KeyText, KeyEntry), Error> {
        let (text, key) = self.keys.create(wish, random, created_unix)?;
        self.decide_on_keys(keys::Record::Created { key: key.clone() }).await?;
        info!(key = key.name, id = key.hash.id(), "API key created");
        Ok((text, key))
    }

    async fn revoke_key(&mut self, name: &str) -> Result<(), Error> {
        let record = self.keys.revoke(name)?;
        self.decide_on_keys(record).await?;
        info!(key = name, "API key revoked");
        Ok(())
    }

    async fn decide_on_keys(&mut self, record: keys::Record) -> Result<(), Error> {
        let fold = self.record(Entry::Key(record.clone())).await?;
        self.keys.apply(record);
        self.key_list.send_replace(self.keys.list());
        if let Some(index) = fold {
            self.fold(index).await;
        }
        Ok(())
    }

    fn order(&mut self, myself: &ActorRef<Message>, effect: Effect) {
        // Stops are never abandoned: whoever gave them waits for all of them.
        let attempt = match &effect {
            Effect::Weigh { attempt, .. }
            | Effect::Prepare { attempt, .. }
            | Effect::Start { attempt, .. }
            | Effect::Link { attempt, .. }
            | Effect::LoadAdapter { attempt, .. }
            | Effect::UnloadAdapter { attempt, .. }
            | Effect::StartScheduler { attempt, .. } => Some(attempt.clone()),
            _ => None,
        };
        let work = match effect {
            Effect::LoadAdapter { attempt, node, adapter } => {
                let room = self.adapter_room(&attempt.name, node);
                self.orders.load_adapter(node, LoadAdapter { attempt, adapter, room })
            }
            effect => match self.orders.carry_out(effect) {
                Some(work) => work,
                None => return,
            },
        };
        let myself = myself.clone();
        let order = self.under_way.spawn(async move {
            // An error means that the actor has ended, and then nobody needs the answer.
            let _ = myself.cast(Message::Happened(work.await));
        });
        if let Some(attempt) = attempt {
            let handles = self.of_attempt.entry(attempt).or_default();
            handles.retain(|handle| !handle.is_finished());
            handles.push(order);
        }
    }

    /// A replica is ready, or will not be. Who waits hears of it when all are ready, or one is not.
    fn settled(&mut self, name: &str, result: &Result<(), Error>) -> Vec<Effect> {
        match result {
            Ok(()) => info!(deployment = name, "deployment ready"),
            Err(error) => warn!(deployment = name, %error, "deployment not ready"),
        }
        self.of_attempt.retain(|attempt, handles| {
            handles.retain(|handle| !handle.is_finished());
            attempt.name != name || !handles.is_empty()
        });
        let name = replica_of(name).0;
        if result.is_ok() && !self.deployments.is_whole(name) {
            return Vec::new();
        }
        let waiting = self.loads.remove(name).unwrap_or_default();
        let (mut effects, mut answer) =
            (Vec::new(), result.clone().and_then(|()| self.deployments.find(name)));
        if let Err(error) = &mut answer
            && !waiting.is_empty()
        {
            effects = self.deployments.cancel_load(name, now());
            let replicas = self.deployments.replicas(name);
            let ready = replicas.iter().filter(|replica| replica.state == State::Ready).count();
            if ready > 0 {
                *error =
                    Error::Refused(format!("{ready} of {} replicas of {name} run; {error}", replicas.len()));
            }
        }
        for (_, reply) in waiting {
            let _ = reply.send(answer.clone());
        }
        effects
    }

    /// A replica has an adapter or has none any more, or that failed. Who waits hears of it when that goes for all, or one failed.
    fn adapter_settled(&mut self, name: &str, adapter: String, result: Result<(), Error>) {
        let name = replica_of(name).0;
        if result.is_ok() && self.deployments.is_adapting(name, &adapter) {
            return;
        }
        let answer = result.and_then(|()| self.deployments.find(name));
        for reply in self.adapters.remove(&(name.to_owned(), adapter)).unwrap_or_default() {
            let _ = reply.send(answer.clone());
        }
    }

    fn weigh_for_plan(
        &mut self,
        myself: &ActorRef<Message>,
        source: String,
        wish: Wish,
        reply: Reply<PlanReport>,
    ) {
        let orders = self.orders.clone();
        let limit = self.limits.weigh;
        let myself = myself.clone();
        self.under_way.spawn(async move {
            let work = super::orders::weigh(orders.nodes.clone(), source.clone(), wish.draft());
            let cost = within(limit, &format!("reading {source}"), work).await;
            let result = cost.map(|cost| (cost, orders.nodes.offers()));
            let _ = myself.cast(Message::Weighed { wish, result, reply });
        });
    }

    /// Failing to fold loses nothing: the entries are still there, and it is tried again with the next one.
    pub(super) async fn fold(&mut self, index: u64) {
        let decisions = Decisions {
            deployments: self.deployments.records(),
            keys: self.keys.records(),
            jobs: self.jobs.records(),
        };
        let work = self.journal.fold(index, &decisions);
        if let Err(error) = within(self.limits.record, "folding the control log", work).await {
            warn!(%error, "the control log keeps growing");
        }
    }

    fn publish(&self) {
        let view = self.deployments.view();
        self.snapshot.send_if_modified(|old| {
            let is_new = *old != view;
            *old = view;
            is_new
        });
    }

    fn set_timer(&mut self, myself: &ActorRef<Message>) {
        if let Some(timer) = self.timer.take() {
            timer.abort();
        }
        let Some(wake) = self.deployments.next_wake() else { return };
        let myself = myself.clone();
        self.timer = Some(self.under_way.spawn(async move {
            tokio::time::sleep_until(wake.into()).await;
            let _ = myself.cast(Message::Tick);
        }));
    }
}

pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
