//! How the rest of the node speaks to the coordinator.

use super::Limits;
use super::actor::{Arguments, CoordinatorActor, Message};
use super::job_nodes::{JobNodes, NoJobNodes};
use super::journal::Journal;
use super::nodes::Nodes;
use super::orders::Orders;
use super::progress::{Audience, LoadUpdate, Progress};
use crate::deployments::{
    AdapterWish, Attempt, DeploymentView, DeploymentWish, Deployments, Event, default_adapter_name,
    default_name,
};
use crate::jobs::{JobView, Jobs};
use crate::keys::{KeyEntry, KeyText, KeyWish, Keys};
use crate::placement::{ModelCost, NodeBudget, Offer, Plan, Refusal, Wish};
use crate::{Error, NodeId};
use futures::Stream;
use mlxnode_cluster::ControlLog;
use mlxnode_compute::ByteCount;
use ractor::{Actor, ActorRef};
use ring::rand::{SecureRandom as _, SystemRandom};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

/// Calls that may wait for the coordinator at a time. Its mailbox has no bound of its own.
const CALLS: usize = 64;

/// A wish to load a model, as it comes from a client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadWish {
    /// A folder, a Hugging Face id, or "demo".
    pub source: String,
    /// The deployment's name; `None`: made from the source.
    pub name: Option<String>,
    /// Where and how large.
    pub wish: Wish,
    /// Complete copies on different nodes; 0 means 1.
    pub replicas: usize,
    /// Stays until somebody unloads it.
    pub is_pinned: bool,
    /// Is unloaded when nobody asked for so long.
    pub ttl: Option<Duration>,
    /// When it does not fit, others may be unloaded that were not used for longest.
    pub makes_room: bool,
}

/// What a plan would be.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanReport {
    /// `None` when it does not fit.
    pub plan: Option<Plan>,
    /// Sentences for a person: the sums, or the numbers that forbid it and what would fit.
    pub explanation: String,
    /// The model's family.
    pub architecture: String,
    /// Its layers.
    pub layers: usize,
    /// Tokens of context, as reserved or as wished.
    pub context_tokens: usize,
    /// All weights, as the stages would hold them.
    pub weights: ByteCount,
    /// All KV caches.
    pub kv: ByteCount,
    /// What each candidate node has.
    pub budgets: Vec<NodeBudget>,
}

impl PlanReport {
    /// Places the model beside what is deployed.
    pub(super) fn new(
        deployments: &Deployments,
        cost: &ModelCost,
        offers: Vec<Offer>,
        wish: &Wish,
    ) -> Result<Self, Error> {
        let budget = |offer: &Offer| NodeBudget {
            node: offer.node,
            node_name: offer.name.clone(),
            budget: offer.budget,
            used: offer.used + deployments.reserved(offer.node),
            planned: ByteCount(0),
        };
        let budgets: Vec<NodeBudget> = offers.iter().map(budget).collect();
        let (architecture, layers) = (cost.architecture.clone(), cost.layers.len());
        match deployments.plan(cost, offers, wish) {
            Ok(plan) => Ok(Self {
                explanation: plan.explain(),
                architecture,
                layers,
                context_tokens: plan.context_tokens,
                weights: plan.weights(),
                kv: plan.kv(),
                budgets: plan.budgets.clone(),
                plan: Some(plan),
            }),
            Err(Refusal::DoesNotFit(shortage)) => Ok(Self {
                plan: None,
                explanation: shortage.to_string(),
                architecture,
                layers,
                context_tokens: shortage.context_tokens,
                weights: shortage.weights,
                kv: shortage.kv,
                budgets,
            }),
            Err(refusal) => Err(refusal.into()),
        }
    }
}

/// Where wishes and news go. Cheap to clone.
#[derive(Clone)]
pub struct CoordinatorHandle {
    actor: ActorRef<Message>,
    snapshot: watch::Receiver<Vec<DeploymentView>>,
    keys: watch::Receiver<Vec<KeyEntry>>,
    pub(super) jobs: watch::Receiver<Vec<Arc<JobView>>>,
    audience: Arc<Audience>,
    calls: Arc<Semaphore>,
    next_call: Arc<AtomicU64>,
}

/// Owns the actor.
pub struct Coordinator {
    actor: ActorRef<Message>,
    task: Option<tokio::task::JoinHandle<()>>,
}

/// Reads the control log and starts the coordinator: what was wanted before is formed again.
///
/// # Errors
/// When the log cannot be read.
pub async fn start(
    limits: Limits,
    log: Arc<dyn ControlLog>,
    nodes: Arc<dyn Nodes>,
) -> Result<(CoordinatorHandle, Coordinator), Error> {
    start_with_jobs(limits, log, nodes, Arc::new(NoJobNodes)).await
}

/// As [`start`], for nodes that run jobs too.
///
/// # Errors
/// When the log cannot be read.
pub async fn start_with_jobs(
    limits: Limits,
    log: Arc<dyn ControlLog>,
    nodes: Arc<dyn Nodes>,
    job_nodes: Arc<dyn JobNodes>,
) -> Result<(CoordinatorHandle, Coordinator), Error> {
    let (journal, decisions) = Journal::open(log).await?;
    let keys = Keys::restore(decisions.keys);
    let (key_list, key_receiver) = watch::channel(keys.list());
    let jobs = Jobs::restore(decisions.jobs);
    let (job_list, job_receiver) = watch::channel(jobs.view().into_iter().map(Arc::new).collect());
    let audience = Arc::new(Audience::default());
    let (sender, snapshot) = watch::channel(Vec::new());
    let arguments = Arguments {
        journal,
        deployments: Deployments::restore(decisions.deployments),
        keys,
        jobs,
        job_nodes,
        job_list,
        orders: Orders { nodes, audience: audience.clone(), limits },
        snapshot: sender,
        key_list,
    };
    let (actor, task) = Actor::spawn(None, CoordinatorActor, arguments)
        .await
        .map_err(|error| Error::Failed(format!("the coordinator could not start: {error}")))?;
    let handle = CoordinatorHandle {
        actor: actor.clone(),
        snapshot,
        keys: key_receiver,
        jobs: job_receiver,
        audience,
        calls: Arc::new(Semaphore::new(CALLS)),
        next_call: Arc::new(AtomicU64::new(0)),
    };
    Ok((handle, Coordinator { actor, task: Some(task) }))
}

impl CoordinatorHandle {
    /// Where the layers would go, without loading anything. That it does not fit is an answer, not an error.
    ///
    /// # Errors
    /// When the model cannot be read, or the wish makes no sense.
    pub async fn plan(&self, source: String, wish: Wish) -> Result<PlanReport, Error> {
        let _permit = self.permit()?;
        let (reply, answer) = oneshot::channel();
        self.send(Message::Plan { source, wish, reply })?;
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Loads a model. Everything that can go wrong comes as the stream's last item. Dropping the stream takes the load back,
    /// unless the deployment is ready or somebody else waits for it too.
    pub fn load(&self, load: LoadWish) -> LoadStream {
        let name = load.name.filter(|name| !name.is_empty()).unwrap_or_else(|| default_name(&load.source));
        let wish = DeploymentWish {
            name: name.clone(),
            source: load.source,
            wish: load.wish,
            adapters: Vec::new(),
            replicas: load.replicas,
            is_pinned: load.is_pinned,
            ttl: load.ttl,
            makes_room: load.makes_room,
        };
        let call = self.next_call.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let progress = self.audience.join(&name);
        let sent = self.permit().and_then(|permit| {
            self.send(Message::Load { wish, call, reply })?;
            Ok(permit)
        });
        let (permit, refused) = match sent {
            Ok(permit) => (Some(permit), None),
            Err(error) => (None, Some(error)),
        };
        LoadStream {
            progress,
            progress_is_over: false,
            answer,
            refused,
            is_over: false,
            actor: self.actor.clone(),
            audience: self.audience.clone(),
            name,
            call,
            _permit: permit,
        }
    }

    /// Unloads a model; returns when its workers are gone.
    ///
    /// # Errors
    /// [`Error::NotFound`], or when the workers of a node are not known to be gone.
    pub async fn unload(&self, name: String) -> Result<(), Error> {
        let _permit = self.permit()?;
        let (reply, answer) = oneshot::channel();
        self.send(Message::Unload { name, reply })?;
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Loads an adapter beside a deployment that is ready; answers with the deployment and the adapter's name once all stages have it
    /// and it is durable.
    ///
    /// # Errors
    /// When there is no such deployment or adapter, the name is taken, or the adapter does not fit the model.
    pub async fn load_adapter(
        &self,
        deployment: String,
        source: String,
        name: Option<String>,
    ) -> Result<(DeploymentView, String), Error> {
        let _permit = self.permit()?;
        let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| default_adapter_name(&source));
        let adapter = AdapterWish::new(name.clone(), source);
        let (reply, answer) = oneshot::channel();
        self.send(Message::LoadAdapter { name: deployment, adapter, reply })?;
        let view = answer.await.unwrap_or_else(|_| Err(stopped()))?;
        Ok((view, name))
    }

    /// Unloads an adapter. Requests that have it keep it to their end.
    ///
    /// # Errors
    /// [`Error::NotFound`], or when the control log cannot be written.
    pub async fn unload_adapter(&self, deployment: String, adapter: String) -> Result<DeploymentView, Error> {
        let _permit = self.permit()?;
        let (reply, answer) = oneshot::channel();
        self.send(Message::UnloadAdapter { name: deployment, adapter, reply })?;
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Makes an API key. Nobody can be told its text again.
    ///
    /// # Errors
    /// When the wish makes no sense, the name is taken, or the control log cannot be written.
    pub async fn create_key(&self, wish: KeyWish) -> Result<(KeyText, KeyEntry), Error> {
        let _permit = self.permit()?;
        let mut random = [0; 32];
        SystemRandom::new()
            .fill(&mut random)
            .map_err(|_| Error::Failed("the system gives no random bytes for a key".into()))?;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (reply, answer) = oneshot::channel();
        self.send(Message::CreateKey { wish, random, created_unix: since_1970.as_secs(), reply })?;
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Ends an API key; it is refused here when this returns, and elsewhere within a second.
    ///
    /// # Errors
    /// [`Error::NotFound`], or when the control log cannot be written.
    pub async fn revoke_key(&self, name: String) -> Result<(), Error> {
        let _permit = self.permit()?;
        let (reply, answer) = oneshot::channel();
        self.send(Message::RevokeKey { name, reply })?;
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// All API keys now and whenever one is made or ends. Closed when the coordinator has stopped.
    pub fn keys(&self) -> watch::Receiver<Vec<KeyEntry>> {
        self.keys.clone()
    }

    /// All deployments now, by name.
    pub fn list(&self) -> Vec<DeploymentView> {
        self.snapshot.borrow().clone()
    }

    /// All deployments now and whenever one changes. Closed when the coordinator has stopped.
    pub fn watch(&self) -> watch::Receiver<Vec<DeploymentView>> {
        self.snapshot.clone()
    }

    /// A node is dead.
    pub fn node_lost(&self, node: NodeId) {
        self.happened(Event::NodeLost { node });
    }

    /// A node is there (again).
    pub fn node_joined(&self, node: NodeId) {
        self.happened(Event::NodeJoined { node });
    }

    /// A worker's process ended.
    pub fn worker_ended(&self, node: NodeId, attempt: Attempt, pid: u32, reason: String) {
        self.happened(Event::WorkerEnded { attempt, node, pid, reason });
    }

    fn happened(&self, event: Event) {
        // A stopped coordinator needs no news; the next one asks the nodes.
        let _ = self.actor.cast(Message::Happened(event));
    }

    pub(super) fn send(&self, message: Message) -> Result<(), Error> {
        self.actor.cast(message).map_err(|_| stopped())
    }

    pub(super) fn permit(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.calls.clone().try_acquire_owned().map_err(|_| {
            Error::TooMany(format!("{CALLS} calls wait for the coordinator already; try again in a moment"))
        })
    }
}

impl Coordinator {
    /// Stops the coordinator. Deployments go on running: the next coordinator forms them again. Calls that wait end with an error.
    pub async fn stop(mut self) {
        self.actor.stop(None);
        if let Some(task) = self.task.take() {
            // It failed only if the actor panicked, which it has logged.
            let _ = task.await;
        }
    }

    /// Waits until the coordinator ends by itself, which is an error of its own.
    pub async fn ended(&mut self) {
        if let Some(task) = &mut self.task {
            let _ = task.await;
            self.task = None;
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.actor.kill();
    }
}

pub(super) fn stopped() -> Error {
    Error::Unavailable("the coordinator has stopped; try again in a moment".into())
}

/// A load under way: progress, then [`LoadUpdate::Ready`] or an error as the last item.
pub struct LoadStream {
    progress: mpsc::Receiver<Progress>,
    progress_is_over: bool,
    answer: oneshot::Receiver<Result<DeploymentView, Error>>,
    refused: Option<Error>,
    is_over: bool,
    actor: ActorRef<Message>,
    audience: Arc<Audience>,
    name: String,
    call: u64,
    _permit: Option<OwnedSemaphorePermit>,
}

impl LoadStream {
    /// The deployment's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for the end, without the progress.
    ///
    /// # Errors
    /// Why it is not ready.
    pub async fn ready(mut self) -> Result<DeploymentView, Error> {
        loop {
            match futures::StreamExt::next(&mut self).await {
                Some(Ok(LoadUpdate::Ready(view))) => return Ok(*view),
                Some(Ok(LoadUpdate::Progress(_))) => {}
                Some(Err(error)) => return Err(error),
                None => return Err(stopped()),
            }
        }
    }
}

impl Stream for LoadStream {
    type Item = Result<LoadUpdate, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if let Some(error) = self.refused.take() {
            self.is_over = true;
            return Poll::Ready(Some(Err(error)));
        }
        if !self.progress_is_over {
            match self.progress.poll_recv(context) {
                Poll::Ready(Some(progress)) => return Poll::Ready(Some(Ok(LoadUpdate::Progress(progress)))),
                Poll::Ready(None) => self.progress_is_over = true,
                Poll::Pending => {}
            }
        }
        let answer = match Pin::new(&mut self.answer).poll(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(answer) => answer.unwrap_or_else(|_| Err(stopped())),
        };
        self.is_over = true;
        Poll::Ready(Some(answer.map(|view| LoadUpdate::Ready(Box::new(view)))))
    }
}

impl Drop for LoadStream {
    fn drop(&mut self) {
        self.progress.close();
        self.audience.leave(&self.name);
        if !self.is_over && self.refused.is_none() {
            // A stopped coordinator has nothing to take back.
            let _ = self.actor.cast(Message::CancelLoad { name: self.name.clone(), call: self.call });
        }
    }
}
