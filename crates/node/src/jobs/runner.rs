//! The jobs that run on this node: those it leads, and those where it helps another node. Of each job the newest attempt counts.
//!
//! Whoever asked for a run and goes away has it save a checkpoint and end: the coordinator that comes next finds it here. A node that
//! stops saves what it leads, and has those that lead where it helps save before it goes.

use super::attempt::{Attempt, Skipped};
use super::helpers::Helper;
use super::line;
use super::peer_client::{Peers, on_disk};
use super::stops::{Stops, Will};
use super::store::AtWork;
use super::team::Place;
use futures::future::BoxFuture;
use mlxnode_cluster::{Identity, KeyPin};
use mlxnode_collective::MemberId;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, ContentHash, JobSpec, Report, RunEnd, RunJob, Wanted};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

/// Reports that wait for a slow coordinator; then the job waits too.
const REPORTS: usize = 64;
/// For an attempt that is being replaced or stopped to save and end; then it is killed.
const END_LIMIT: Duration = Duration::from_secs(60);

/// Gets a model onto this machine and says where it is.
pub(super) type FetchModel = Arc<dyn Fn(String) -> BoxFuture<'static, Result<PathBuf, Error>> + Send + Sync>;

/// What a runner needs of its node.
pub(crate) struct RunnersOptions {
    /// The executable: this node's own.
    pub(crate) command: PathBuf,
    /// What this node is to its workers and to other nodes'.
    pub(crate) identity: Arc<Identity>,
    /// Where workers listen for other workers, and under which host other nodes reach them.
    pub(crate) listen: IpAddr,
    pub(crate) advertised: String,
    /// What models leave of this node's memory budget.
    pub(crate) free: Arc<dyn Fn() -> ByteCount + Send + Sync>,
    /// Does this node answer requests now?
    pub(crate) is_busy: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Gets a model onto this machine and says where it is.
    pub(crate) fetch_model: FetchModel,
}

/// All jobs that run on this node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Runners {
    shared: Arc<Shared>,
}

struct Shared {
    options: RunnersOptions,
    peers: Peers,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Newest epoch seen, by job.
    newest: BTreeMap<String, u64>,
    running: BTreeMap<String, Held>,
    /// Workers and stages of jobs that other nodes lead: by job and member.
    helping: BTreeMap<(String, MemberId), Help>,
    stops: Stops,
    is_ending: bool,
}

impl State {
    /// Notes that this attempt begins; what helps older ones of the same job ends.
    fn begin(&mut self, id: &str, epoch: u64) -> Result<(), Error> {
        if self.is_ending {
            return Err(Error::Unavailable("the node stops".into()));
        }
        let newest = self.newest.entry(id.to_owned()).or_insert(epoch);
        if epoch < *newest {
            let newest = *newest;
            return Err(Error::Unavailable(format!(
                "attempt {epoch} of the job {id} is over: {newest} has begun"
            )));
        }
        *newest = epoch;
        let of_older = self.helping.iter().filter(|((job, _), help)| job == id && help.epoch < epoch);
        of_older.for_each(|(_, help)| help.end.cancel());
        Ok(())
    }
}

/// A worker or a stage for another node.
struct Help {
    epoch: u64,
    skipped: Skipped,
    memory: ByteCount,
    /// The node stops: whoever leads is told.
    leaving: CancellationToken,
    /// It is not wanted any more.
    end: CancellationToken,
    /// Closed when it is over.
    over: watch::Receiver<()>,
}

/// A worker for another node is at work as long as this lives.
struct Helping {
    shared: Weak<Shared>,
    key: (String, MemberId),
    epoch: u64,
    _over: watch::Sender<()>,
}

impl Drop for Helping {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            let helping = &mut shared.state.lock().unwrap_or_else(PoisonError::into_inner).helping;
            // A newer attempt may have the same member.
            if helping.get(&self.key).is_some_and(|help| help.epoch == self.epoch) {
                helping.remove(&self.key);
            }
        }
    }
}

struct Held {
    epoch: u64,
    memory: ByteCount,
    skipped: Skipped,
    will: watch::Sender<Will>,
    /// Closed when the attempt is over.
    over: watch::Receiver<()>,
    _task: AbortOnDropHandle<()>,
}

/// A run for whoever asked for it. Dropping it has the run save and end.
pub(crate) struct RunningJob {
    pub(crate) reports: mpsc::Receiver<Report>,
    pub(crate) end: tokio::sync::oneshot::Receiver<Result<RunEnd, Error>>,
    will: watch::Sender<Will>,
}

impl Drop for RunningJob {
    fn drop(&mut self) {
        self.will.send_if_modified(|will| {
            *will == Will::Run && {
                *will = Will::SaveAndEnd;
                true
            }
        });
    }
}

impl Runners {
    pub(crate) fn new(options: RunnersOptions, peers: Peers) -> Self {
        Self { shared: Arc::new(Shared { options, peers, state: Mutex::default() }) }
    }

    pub(crate) fn peers(&self) -> &Peers {
        &self.shared.peers
    }

    /// Begins an attempt, once an older one of the same job has ended here.
    ///
    /// # Errors
    /// When a newer attempt has begun, or the node stops.
    pub(crate) async fn run(&self, order: RunJob) -> Result<RunningJob, Error> {
        let id = order.spec.id.clone();
        let older = {
            let mut state = self.state();
            state.begin(&id, order.epoch)?;
            state.running.get(&id).map(|held| {
                held.will.send_replace(Will::SaveAndEnd);
                held.over.clone()
            })
        };
        if let Some(over) = older {
            wait_for_end(over).await;
        }
        let (over_sender, over) = watch::channel(());
        let (reports, receiver) = mpsc::channel(REPORTS);
        let (end_sender, end) = tokio::sync::oneshot::channel();
        let mut state = self.state();
        if state.is_ending || state.newest.get(&id) != Some(&order.epoch) {
            return Err(Error::Unavailable(format!("attempt {} of the job {id} is over", order.epoch)));
        }
        let (epoch, memory) = (order.epoch, order.memory);
        let (will, told) = watch::channel(state.stops.told(&id, epoch));
        let skipped = Skipped::default();
        let attempt = self.attempt(order, told, reports, skipped.clone());
        let shared = Arc::downgrade(&self.shared);
        let task = tokio::spawn(async move {
            let (id, epoch) = (attempt.order.spec.id.clone(), attempt.order.epoch);
            let result = attempt.run().await;
            info!(job = id, epoch, ok = result.is_ok(), "job attempt over");
            if let Some(shared) = shared.upgrade() {
                let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.running.get(&id).is_some_and(|held| held.epoch == epoch) {
                    // Taking oneself out of the map aborts this very task, at its next await: there is none.
                    let _ = end_sender.send(result);
                    drop(over_sender);
                    state.running.remove(&id);
                    return;
                }
            }
            let _ = end_sender.send(result);
            drop(over_sender);
        });
        let task = AbortOnDropHandle::new(task);
        let held = Held { epoch, memory, skipped, will: will.clone(), over, _task: task };
        state.running.insert(id, held); // the older one, if it hangs, is killed with its task
        Ok(RunningJob { reports: receiver, end, will })
    }

    fn attempt(
        &self,
        order: RunJob,
        told: watch::Receiver<Will>,
        reports: mpsc::Sender<Report>,
        skipped: Skipped,
    ) -> Attempt {
        let options = &self.shared.options;
        let place = Place {
            identity: options.identity.clone(),
            listen: options.listen,
            advertised: options.advertised.clone(),
        };
        Attempt {
            peers: self.shared.peers.clone(),
            command: options.command.clone(),
            is_busy: options.is_busy.clone(),
            fetch_model: options.fetch_model.clone(),
            place,
            told,
            reports,
            skipped,
            order,
        }
    }

    /// A further worker of a job that another node leads. Dropping it ends it.
    ///
    /// # Errors
    /// When the node stops, runs that job itself, or has not as much memory left.
    pub(crate) fn help(&self, order: RunJob, member: MemberId, leader: KeyPin) -> Result<Helper, Error> {
        let mut state = self.state();
        let (id, epoch) = (order.spec.id.clone(), order.epoch);
        if state.running.contains_key(&id) {
            return Err(Error::Unavailable(format!("the job {id} runs on this node already")));
        }
        state.begin(&id, epoch)?;
        // An older attempt's worker of this job ends for it.
        let of_others = state.helping.iter().filter(|((job, _), help)| *job != id || help.epoch >= epoch);
        let of_others = of_others.map(|(_, help)| help.memory);
        let taken: ByteCount = state.running.values().map(|held| held.memory).chain(of_others).sum();
        let free = (self.shared.options.free)().saturating_sub(taken);
        let need = line::memory(&order, member);
        if free < need {
            let text = format!("the job {id} needs {need} of memory, and {free} are free here");
            return Err(Error::Unavailable(text));
        }
        let skipped = Skipped::default();
        let (leaving, end) = (CancellationToken::new(), CancellationToken::new());
        let (over_sender, over) = watch::channel(());
        let key = (id, member);
        let help = Help {
            epoch,
            skipped: skipped.clone(),
            memory: need,
            leaving: leaving.clone(),
            end: end.clone(),
            over,
        };
        state.helping.insert(key.clone(), help);
        drop(state);
        let helping = Helping { shared: Arc::downgrade(&self.shared), key, epoch, _over: over_sender };
        let (will, told) = watch::channel(Will::Run);
        let (reports, _nobody) = mpsc::channel(1);
        let attempt = self.attempt(order, told, reports, skipped);
        Ok(Helper::start(leaving, move |joined| async move {
            let _running = (will, helping); // as long as the helper is wanted
            tokio::select! {
                ended = attempt.help(member, leader, joined) => ended,
                () = end.cancelled() => Err(Error::Unavailable("a newer attempt has begun, or the node stops".into())),
            }
        }))
    }

    /// Has an attempt end.
    pub(crate) fn stop(&self, id: &str, epoch: u64, saves: bool) {
        let will = if saves { Will::SaveAndEnd } else { Will::End };
        let mut state = self.state();
        // It may not have begun: then it begins with this.
        state.stops.tell(id, epoch, will);
        if let Some(held) = state.running.get(id).filter(|held| held.epoch <= epoch) {
            held.will.send_replace(will);
        }
    }

    /// Ends all for the node's own end: what it leads after a checkpoint each, and where it helps once whoever leads has saved and let go of it.
    pub(crate) async fn stop_all(&self) {
        let waiting: Vec<watch::Receiver<()>> = {
            let mut state = self.state();
            state.is_ending = true;
            for held in state.running.values() {
                held.will.send_replace(Will::SaveAndEnd);
            }
            state.helping.values().for_each(|help| help.leaving.cancel());
            let led = state.running.values().map(|held| held.over.clone());
            led.chain(state.helping.values().map(|help| help.over.clone())).collect()
        };
        futures::future::join_all(waiting.into_iter().map(wait_for_end)).await;
        let left = {
            let mut state = self.state();
            state.helping.values().for_each(|help| help.end.cancel());
            std::mem::take(&mut state.running)
        };
        drop(left);
    }

    /// What of jobs is wanted still; the rest goes. The answer: which of the wanted checkpoints are here.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) async fn tidy(&self, wanted: Vec<Wanted>) -> Result<BTreeSet<ContentHash>, Error> {
        let at_work = |epoch: u64, skipped: &Skipped| AtWork { epoch, skipped: skipped.get().cloned() };
        let at_work: BTreeMap<String, AtWork> = {
            let state = self.state();
            let helping = state.helping.iter().map(|((id, _), help)| (id, help.epoch, &help.skipped));
            let running = state.running.iter().map(|(id, held)| (id, held.epoch, &held.skipped));
            helping.chain(running).map(|(id, epoch, skipped)| (id.clone(), at_work(epoch, skipped))).collect()
        };
        // No copy of a checkpoint comes while this is held.
        let fetching = self.shared.peers.fetching.clone().try_lock_owned();
        let store = self.shared.peers.store.clone();
        on_disk("removing what is not wanted of jobs", move || {
            let tidied = store.tidy(&wanted, &at_work, fetching.is_err());
            drop(fetching);
            tidied
        })
        .await
    }

    /// Makes sure that a checkpoint, and what its job reads, is here.
    ///
    /// # Errors
    /// When no node has it, or there is no room.
    pub(crate) async fn copy(&self, spec: &JobSpec, checkpoint: &Checkpoint) -> Result<(), Error> {
        for input in &spec.inputs {
            self.shared.peers.fetch_input(input).await?;
        }
        self.shared.peers.fetch_checkpoint(&spec.id, checkpoint).await.map(drop)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn wait_for_end(mut over: watch::Receiver<()>) {
    let ended = async { while over.changed().await.is_ok() {} };
    if tokio::time::timeout(END_LIMIT, ended).await.is_err() {
        warn!("a job does not end: its process is killed");
    }
}
