//! The actor's part for jobs: moves messages between the callers, [`crate::jobs::Jobs`], the journal and the nodes.

use super::actor::{Message, Reply, Running, now};
use super::job_nodes::JobReports;
use super::journal::Entry;
use super::orders::within;
use crate::deployments::{self, AdapterWish};
use crate::jobs::{
    ContentHash, Effect, Event, JobOffer, JobSpec, JobView, LogLine, Need, PublishWish, Record, Tidied,
};
use crate::placement::Offer;
use crate::{Error, NodeId};
use mlxnode_compute::ByteCount;
use ractor::ActorRef;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;
use tracing::{info, warn};

/// About jobs.
pub(super) enum JobMessage {
    /// A job is wanted.
    Submit {
        /// What.
        spec: Box<JobSpec>,
        /// When it is durable.
        reply: Reply<Arc<JobView>>,
    },
    /// A job is to change.
    Change {
        /// Which.
        id: String,
        /// How.
        change: JobChange,
        /// When that is durable.
        reply: Reply<Arc<JobView>>,
    },
    /// What a job made is to be served.
    Publish {
        /// Which.
        id: String,
        /// After so many steps; none: the newest checkpoint.
        step: Option<u64>,
        /// As what.
        wish: PublishWish,
        /// What requests write into `model`.
        reply: Reply<String>,
    },
    /// What happened to a job?
    Log {
        /// Which.
        id: String,
        /// Lines in order.
        reply: Reply<Vec<LogLine>>,
    },
    /// Something happened, or an order was carried out.
    Happened(Event),
    /// A result is served, or cannot be.
    Served {
        /// Of which job.
        event: Event,
        /// What the call that asked for it named.
        asked: Asked,
        /// The model's name.
        served: Result<String, Error>,
    },
    /// It is time to look again.
    Tick,
}

/// What a call to serve something names: the job, its checkpoint, the deployment and the adapter.
pub(super) type Asked = (String, ContentHash, String, String);

/// Whether nodes are being told what is wanted: once at a time, so that nobody hears of it in another order.
#[derive(Debug, Default)]
pub(super) struct Tidying {
    is_under_way: bool,
    again: bool,
}

impl Tidying {
    /// It is due: does it begin now? If not, it does when the one under way is over.
    fn begins(&mut self) -> bool {
        self.again = self.is_under_way;
        !std::mem::replace(&mut self.is_under_way, true)
    }

    /// Is it due again?
    fn over(&mut self) -> bool {
        self.is_under_way = false;
        std::mem::take(&mut self.again)
    }
}

/// What a person can do to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum JobChange {
    Cancel,
    Pause { by: String },
    Resume,
}

impl Running {
    pub(super) async fn on_job_message(
        &mut self,
        myself: &ActorRef<Message>,
        message: JobMessage,
    ) -> Vec<deployments::Effect> {
        let at = unix_now();
        match message {
            JobMessage::Submit { spec, reply } => {
                self.jobs.pin(self.deployments.adapter_sources());
                let id = spec.id.clone();
                let decided = self.jobs.submit(*spec, at).map(Option::unwrap_or_default);
                self.decide(myself, &id, decided, reply).await
            }
            JobMessage::Change { id, change, reply } => {
                let decided = match change {
                    JobChange::Cancel => self.jobs.cancel(&id, at),
                    JobChange::Pause { by } => self.jobs.pause(&id, &by, at),
                    JobChange::Resume => self.jobs.resume(&id, at),
                };
                let decided = decided.map(|record| record.into_iter().collect());
                self.decide(myself, &id, decided, reply).await
            }
            JobMessage::Publish { id, step, wish, reply } => match self.jobs.publish(&id, step, wish) {
                Ok(effect) => {
                    if let Effect::Publish { id, hash, wish, .. } = &effect {
                        let asked = (id.clone(), *hash, wish.deployment.clone(), wish.adapter.clone());
                        self.job_publications.entry(asked).or_default().push(reply);
                    }
                    self.carry_out_jobs(myself, vec![effect]).await
                }
                Err(error) => {
                    let _ = reply.send(Err(error));
                    Vec::new()
                }
            },
            JobMessage::Log { id, reply } => {
                let _ = reply.send(self.jobs.log(&id));
                Vec::new()
            }
            JobMessage::Happened(event) => {
                if let Event::RunEnded { id, epoch, .. } = &event {
                    self.job_runs.remove(&(id.clone(), *epoch));
                }
                let tidies = matches!(event, Event::Tidied { .. }) && self.job_tidy.over();
                let mut effects = self.jobs.on(event, at, now());
                if tidies {
                    effects.push(Effect::Tidy);
                }
                self.carry_out_jobs(myself, effects).await
            }
            JobMessage::Served { event, asked, served } => {
                for reply in self.job_publications.remove(&asked).unwrap_or_default() {
                    let _ = reply.send(served.clone());
                }
                let effects = self.jobs.on(event, at, now());
                self.carry_out_jobs(myself, effects).await
            }
            JobMessage::Tick => self.carry_out_jobs(myself, Vec::new()).await,
        }
    }

    /// A call's decision: durable first, then applied, then answered.
    async fn decide(
        &mut self,
        myself: &ActorRef<Message>,
        id: &str,
        decided: Result<Vec<Record>, Error>,
        reply: Reply<Arc<JobView>>,
    ) -> Vec<deployments::Effect> {
        let mut effects = Vec::new();
        let result = match decided {
            Err(error) => Err(error),
            Ok(records) => {
                let mut written = Ok(());
                for record in records {
                    written = self.write_job(record).await.map(|more| effects.extend(more));
                    if written.is_err() {
                        break;
                    }
                }
                written
            }
        };
        let effects = self.carry_out_jobs(myself, effects).await;
        let view = result.and_then(|()| {
            let list = self.job_list.borrow();
            let found = list.iter().find(|view| view.spec.id == id).cloned();
            found.ok_or_else(|| Error::Failed(format!("the job {id} cannot be found")))
        });
        let _ = reply.send(view);
        effects
    }

    async fn write_job(&mut self, record: Record) -> Result<Vec<Effect>, Error> {
        let fold = self.record(Entry::Job(record.clone())).await?;
        let effects = self.jobs.apply(record);
        if let Some(index) = fold {
            self.fold(index).await;
        }
        Ok(effects)
    }

    /// Carries out effects until none is left, and gives jobs to nodes. What it leads to for deployments is for the caller.
    pub(super) async fn carry_out_jobs(
        &mut self,
        myself: &ActorRef<Message>,
        effects: Vec<Effect>,
    ) -> Vec<deployments::Effect> {
        let mut effects = VecDeque::from(effects);
        let mut for_deployments = Vec::new();
        let mut is_scheduled = false;
        loop {
            let Some(effect) = effects.pop_front() else {
                if is_scheduled {
                    break;
                }
                is_scheduled = true;
                let offers = self.job_offers();
                effects.extend(self.jobs.schedule(&offers, unix_now(), now()));
                continue;
            };
            match effect {
                Effect::Record(record) => match self.write_job(record).await {
                    Ok(more) => effects.extend(more),
                    // Nothing has changed then, and it is looked at again when it is time.
                    Err(error) => warn!(%error, "a decision about a job could not be written"),
                },
                Effect::Weigh { id, spec } => self.weigh_job(myself, id, *spec),
                Effect::Run { node, order } => {
                    let (id, epoch) = (order.spec.id.clone(), order.epoch);
                    info!(job = id, epoch, node = %node.short(), "job attempt begins");
                    let reports = JobReports { actor: myself.clone(), id: id.clone(), epoch };
                    let work = self.job_nodes.run(node, *order, reports);
                    let event = {
                        let id = id.clone();
                        async move { Event::RunEnded { id, epoch, result: work.await } }
                    };
                    let run = self.spawn_job(myself, event);
                    self.job_runs.insert((id, epoch), run);
                }
                Effect::Stop { id, epoch, node, saves } => {
                    let work = self.job_nodes.stop(node, id.clone(), epoch, saves);
                    let limit = self.limits.stop;
                    self.under_way.spawn(async move {
                        if let Err(error) = within(limit, "stopping a job", work).await {
                            // Its node is gone then, or about to be: the end of its run tells.
                            warn!(job = id, epoch, %error, "a job was not told to stop");
                        }
                    });
                }
                Effect::Abandon { id, epoch } => {
                    if let Some(run) = self.job_runs.remove(&(id, epoch)) {
                        run.abort();
                    }
                }
                Effect::Copy { spec, checkpoint, node } => {
                    let (id, hash) = (spec.id.clone(), checkpoint.hash);
                    let work = self.job_nodes.copy(node, *spec, checkpoint);
                    let limit = self.limits.copy;
                    self.spawn_job(myself, async move {
                        let result = within(limit, "copying a checkpoint", work).await;
                        Event::Copied { id, hash, node, result }
                    });
                }
                Effect::Tidy => {
                    if self.job_tidy.begins() {
                        self.jobs.pin(self.deployments.adapter_sources());
                        let asked = self.jobs.holders();
                        let work = self.job_nodes.tidy(self.jobs.wanted());
                        let limit = self.limits.copy;
                        self.spawn_job(myself, async move {
                            let work = async { Ok(work.await) };
                            let tidied =
                                within(limit, "tidying up after jobs", work).await.unwrap_or_else(|error| {
                                    warn!(%error, "nodes were not told what of jobs is wanted");
                                    Tidied::default()
                                });
                            Event::Tidied { asked, tidied }
                        });
                    }
                }
                Effect::Publish { id, hash, source, wish } => {
                    for_deployments.extend(self.serve(myself, id, hash, source, wish));
                }
            }
        }
        self.job_list.send_replace(self.jobs.view().into_iter().map(Arc::new).collect());
        self.set_job_timer(myself);
        for_deployments
    }

    fn serve(
        &mut self,
        myself: &ActorRef<Message>,
        id: String,
        hash: ContentHash,
        source: String,
        wish: PublishWish,
    ) -> Vec<deployments::Effect> {
        let (reply, answer) = oneshot::channel();
        let effects =
            self.load_adapter(&wish.deployment, AdapterWish::new(wish.adapter.clone(), source), reply);
        let myself = myself.clone();
        self.under_way.spawn(async move {
            let stopped = || Err(Error::Unavailable("the coordinator has stopped".into()));
            let loaded = answer.await.unwrap_or_else(|_| stopped());
            let asked = (id.clone(), hash, wish.deployment.clone(), wish.adapter.clone());
            let mut wish = wish;
            let served = loaded.map(|view| {
                wish.deployment = view.name;
                format!("{}:{}", wish.deployment, wish.adapter)
            });
            let result = served.clone().map(drop);
            let event = Event::Published { id, hash, wish, result };
            let _ = myself.cast(Message::Job(JobMessage::Served { event, asked, served }));
        });
        effects
    }

    fn weigh_job(&mut self, myself: &ActorRef<Message>, id: String, spec: JobSpec) {
        let work = self.orders.nodes.weigh_training(spec.model.clone());
        let limit = self.limits.weigh;
        self.spawn_job(myself, async move {
            let cost = within(limit, &format!("reading {}", spec.model), work).await;
            Event::Weighed { id, result: cost.map(|cost| Need::of(&spec, cost)) }
        });
    }

    fn spawn_job(
        &mut self,
        myself: &ActorRef<Message>,
        work: impl Future<Output = Event> + Send + 'static,
    ) -> tokio::task::AbortHandle {
        let myself = myself.clone();
        self.under_way.spawn(async move {
            // An error means that the actor has ended, and then nobody needs the answer.
            let _ = myself.cast(Message::Job(JobMessage::Happened(work.await)));
        })
    }

    /// What a node has left beside deployments and jobs.
    fn left(&self, offer: &Offer) -> ByteCount {
        let reserved = self.deployments.reserved(offer.node) + self.jobs.reserved(offer.node);
        offer.budget.saturating_sub(offer.used).saturating_sub(reserved)
    }

    /// What nodes have left for jobs.
    fn job_offers(&self) -> Vec<JobOffer> {
        let free = |offer: Offer| JobOffer { free: self.left(&offer), node: offer.node, name: offer.name };
        self.orders.nodes.offers().into_iter().map(free).collect()
    }

    /// What all adapters of a deployment together may take of a node: what nobody else has.
    pub(super) fn adapter_room(&self, deployment: &str, node: NodeId) -> ByteCount {
        let offers = self.orders.nodes.offers();
        // A node that is not there says so itself.
        let left = offers.iter().find(|offer| offer.node == node).map(|offer| self.left(offer));
        left.map_or(ByteCount(u64::MAX), |left| left + self.deployments.adapter_memory(deployment, node))
    }

    /// What nodes offer to models: not what jobs have.
    pub(super) fn beside_jobs(&self, mut offers: Vec<Offer>) -> Vec<Offer> {
        for offer in &mut offers {
            offer.used += self.jobs.reserved(offer.node);
        }
        offers
    }

    pub(super) fn with_jobs_in_mind(&self, event: deployments::Event) -> deployments::Event {
        match event {
            deployments::Event::Weighed { attempt, result } => deployments::Event::Weighed {
                attempt,
                result: result.map(|(cost, offers)| (cost, self.beside_jobs(offers))),
            },
            other => other,
        }
    }

    /// Nodes that come and go.
    pub(super) async fn news_for_jobs(
        &mut self,
        myself: &ActorRef<Message>,
        event: &deployments::Event,
    ) -> Vec<deployments::Effect> {
        let news = match event {
            deployments::Event::NodeLost { node } => Event::NodeLost { node: *node },
            deployments::Event::NodeJoined { node } => Event::NodeJoined { node: *node },
            _ => return Vec::new(),
        };
        let effects = self.jobs.on(news, unix_now(), now());
        self.carry_out_jobs(myself, effects).await
    }

    fn set_job_timer(&mut self, myself: &ActorRef<Message>) {
        if let Some(timer) = self.job_timer.take() {
            timer.abort();
        }
        let Some(wake) = self.jobs.next_wake(now()) else { return };
        let myself = myself.clone();
        self.job_timer = Some(self.under_way.spawn(async move {
            tokio::time::sleep_until(wake.into()).await;
            let _ = myself.cast(Message::Job(JobMessage::Tick));
        }));
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_told_what_is_wanted_once_at_a_time() {
        let mut tidy = Tidying::default();
        assert!(tidy.begins());
        assert!(!tidy.over(), "nothing has changed meanwhile");
        assert!(tidy.begins());
        assert!(!tidy.begins() && !tidy.begins());
        assert!(tidy.over(), "once more for all that changed");
        assert!(tidy.begins());
    }
}
