//! The shell around [`Rounds`]: connects to the workers of a job, hears their reports, gives them their orders.
//!
//! One task owns the rounds; another one per worker reads its reports. A worker is lost when its stream ends, which for a process that
//! was killed on this machine is at once, and for one on another machine when its connection breaks.

use super::client::{GroupClient, GroupPeer, GroupReports};
use mlxnode_cluster::Identity;
use mlxnode_collective::{MemberId, Report, Rounds, RoundsEffect, RoundsOptions, RoundsSummary};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(200);
/// News that the rounds have not heard yet: a worker whose reports wait here waits as well.
const MOST_NEWS: usize = 256;
/// Events that the owner has not read. When it does not read at all, orders wait too.
const MOST_EVENTS: usize = 64;

/// A worker of a job, for whoever controls its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupWorker {
    /// Never used before in this job.
    pub member: MemberId,
    /// As the conductor reaches it.
    pub control: SocketAddr,
    /// As the other workers reach it.
    pub peer: GroupPeer,
}

/// What the owner of a group has to do or to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConductorEvent {
    /// The worker is counted no more: end it.
    Lost {
        /// Which one.
        member: MemberId,
        /// Why, for people.
        reason: String,
        /// It is there and had to go: it computes otherwise than the others, or does not answer.
        is_evicted: bool,
    },
    /// The job cannot go on.
    Failed {
        /// Why, for people.
        reason: String,
    },
}

enum News {
    Add(GroupWorker),
    Connected(MemberId, GroupClient, GroupReports),
    Report(MemberId, Report),
    Lost(MemberId, String),
}

/// The group of one job. Dropping it makes all workers leave.
#[derive(Debug)]
pub struct GroupConductor {
    news: mpsc::Sender<News>,
    summary: watch::Receiver<RoundsSummary>,
    _task: AbortOnDropHandle<()>,
}

impl GroupConductor {
    /// A group without workers. `epoch` is the newest one that the job had, 0 at first. `identity` is what the workers were started
    /// to obey.
    pub fn start(
        options: RoundsOptions,
        epoch: u64,
        identity: Arc<Identity>,
    ) -> (Self, mpsc::Receiver<ConductorEvent>) {
        let (news, incoming) = mpsc::channel(MOST_NEWS);
        let (events, outgoing) = mpsc::channel(MOST_EVENTS);
        let rounds = Rounds::new(options, epoch);
        let (told, summary) = watch::channel(rounds.summary());
        let conducting = Conducting {
            rounds,
            identity,
            workers: BTreeMap::new(),
            peers: BTreeMap::new(),
            dialling: JoinSet::new(),
            news: news.downgrade(),
            events,
            told,
        };
        let task = AbortOnDropHandle::new(tokio::spawn(conducting.run(incoming)));
        (Self { news, summary, _task: task }, outgoing)
    }

    /// One more worker, which takes part from the next step's border on, or from the beginning.
    pub async fn add(&self, worker: GroupWorker) {
        // The task ends only with this handle.
        let _ = self.news.send(News::Add(worker)).await;
    }

    /// This worker's process has ended.
    pub async fn lost(&self, member: MemberId, reason: String) {
        let _ = self.news.send(News::Lost(member, reason)).await;
    }

    /// Epoch, members, step; changes as they do.
    pub fn summary(&self) -> watch::Receiver<RoundsSummary> {
        self.summary.clone()
    }
}

struct Conducting {
    rounds: Rounds,
    identity: Arc<Identity>,
    /// Orders, and the task that reads reports.
    workers: BTreeMap<MemberId, (GroupClient, AbortOnDropHandle<()>)>,
    peers: BTreeMap<MemberId, GroupPeer>,
    /// Connections being made.
    dialling: JoinSet<()>,
    news: mpsc::WeakSender<News>,
    events: mpsc::Sender<ConductorEvent>,
    told: watch::Sender<RoundsSummary>,
}

impl Conducting {
    async fn run(mut self, mut news: mpsc::Receiver<News>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let effects = tokio::select! {
                item = news.recv() => match item {
                    Some(item) => self.hear(item).await,
                    None => return,
                },
                _ = ticks.tick() => self.rounds.tick(Instant::now()),
            };
            self.carry_out(effects).await;
            let summary = self.rounds.summary();
            self.told.send_if_modified(|told| std::mem::replace(told, summary) != summary);
        }
    }

    async fn hear(&mut self, news: News) -> Vec<RoundsEffect> {
        let now = Instant::now();
        match news {
            News::Add(worker) => {
                self.connect(worker);
                vec![]
            }
            News::Connected(member, client, reports) => {
                // Only from here on its reports are read: what follows from them can be told to it.
                let reader = tokio::spawn(read(member, reports, self.news.clone()));
                self.workers.insert(member, (client, AbortOnDropHandle::new(reader)));
                vec![]
            }
            News::Report(member, report) => {
                debug!(%member, ?report, "a worker reports");
                self.rounds.report(member, report, now)
            }
            News::Lost(member, reason) => self.lose(member, reason, false).await,
        }
    }

    /// In a task of its own: a worker that does not answer holds nobody up.
    fn connect(&mut self, worker: GroupWorker) {
        let GroupWorker { member, control, peer } = worker;
        let pin = peer.key_pin;
        self.peers.insert(member, peer);
        let Some(news) = self.news.upgrade() else { return };
        let identity = self.identity.clone();
        while self.dialling.try_join_next().is_some() {}
        self.dialling.spawn(async move {
            match GroupClient::connect(control, pin, &identity).await {
                Ok((client, reports)) => drop(news.send(News::Connected(member, client, reports)).await),
                Err(error) => drop(news.send(News::Lost(member, error.to_string())).await),
            }
        });
    }

    async fn lose(&mut self, member: MemberId, reason: String, is_evicted: bool) -> Vec<RoundsEffect> {
        let was_there = self.workers.remove(&member).is_some();
        if self.peers.remove(&member).is_none() && !was_there {
            return vec![];
        }
        info!(%member, %reason, "a worker of the job is lost");
        let _ = self.events.send(ConductorEvent::Lost { member, reason, is_evicted }).await; // nobody may listen any more
        self.rounds.lost(member, Instant::now())
    }

    async fn carry_out(&mut self, mut effects: Vec<RoundsEffect>) {
        // Losses found here have effects of their own, after those that are known.
        while !effects.is_empty() {
            let mut more = Vec::new();
            for effect in effects {
                match effect {
                    RoundsEffect::Halt { member, epoch, at } => {
                        let told = self.workers.get(&member).map(|(client, _)| client.halt(epoch, at));
                        if let Some(Err(error)) = told {
                            more.extend(self.lose(member, error.to_string(), false).await);
                        }
                    }
                    RoundsEffect::Form { member, formation } => {
                        let told =
                            self.workers.get(&member).map(|(client, _)| client.form(&formation, &self.peers));
                        if let Some(Err(error)) = told {
                            more.extend(self.lose(member, error.to_string(), false).await);
                        }
                    }
                    RoundsEffect::Evict { member, reason } => {
                        warn!(%member, %reason, "a worker of the job has to go");
                        more.extend(self.lose(member, reason, true).await);
                    }
                    RoundsEffect::Fail { reason } => {
                        let _ = self.events.send(ConductorEvent::Failed { reason }).await;
                    }
                }
            }
            effects = more;
        }
    }
}

/// Reads a worker's reports until they end.
async fn read(member: MemberId, mut reports: GroupReports, news: mpsc::WeakSender<News>) {
    loop {
        let item = match reports.next().await {
            Ok(Some(report)) => News::Report(member, report),
            Ok(None) => News::Lost(member, "it left its group".to_owned()),
            Err(error) => News::Lost(member, error.to_string()),
        };
        let ended = matches!(item, News::Lost(..));
        let Some(news) = news.upgrade() else { return };
        if news.send(item).await.is_err() || ended {
            return;
        }
    }
}
