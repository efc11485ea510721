//! Drives jobs on this node: each in a process of its own, one piece after the other.
//!
//! Between two pieces the runner reports, saves when that is due, stands back for requests, and ends when it is told to. Whoever asked for
//! a run and goes away has it save a checkpoint and end: the coordinator that comes next finds it here.

use super::bundle::{self, Draft};
use super::line::{self, Led, Parted};
use super::meter::Meter;
use super::pace::pause_after;
use super::peer_client::{Peers, disk, on_disk};
use super::stops::{Stops, Will};
use super::store::{AtWork, states_name};
use super::team::{Helper, LEADER, Place, Team};
use mlxnode_cluster::{Identity, KeyPin};
use mlxnode_collective::MemberId;
use mlxnode_compute::{Advance, ByteCount, JobError};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{
    Checkpoint, ContentHash, JobKind, JobSpec, LossPoint, Report, RunEnd, RunJob, Wanted,
};
use mlxnode_worker::{JobCallError, JobProcess, JobSetup, StagePlace};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

/// Between two reports of progress.
const REPORT_PERIOD: Duration = Duration::from_millis(250);
/// Reports that wait for a slow coordinator; then the job waits too.
const REPORTS: usize = 64;
/// Before a checkpoint is tried again for which there was no room.
const ROOM_PERIOD: Duration = Duration::from_secs(10);
/// Between two looks whether requests still run.
const LOOK: Duration = Duration::from_millis(20);
/// For an attempt that is being replaced or stopped to save and end; then it is killed.
const END_LIMIT: Duration = Duration::from_secs(60);
/// A stage's piece that took longer was waiting for others.
const LONGEST_PIECE: Duration = Duration::from_secs(10);
/// A checkpoint by time waits for so many times as long as the last one took: that is 2% of the time.
const BETWEEN_SAVES: u32 = 49;

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
    pub(crate) fetch_model:
        Arc<dyn Fn(String) -> futures::future::BoxFuture<'static, Result<PathBuf, Error>> + Send + Sync>,
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
    /// The stage that this node has of a job that another one leads: of which attempt, and what ends it.
    stages: BTreeMap<String, (u64, CancellationToken)>,
    /// Workers of jobs that other nodes lead: by job and member.
    helping: BTreeMap<(String, MemberId), Help>,
    stops: Stops,
    is_ending: bool,
}

/// The checkpoints of its order that an attempt does not go on from though they are newer; set once that is known.
type Skipped = Arc<OnceLock<Vec<ContentHash>>>;

/// What a worker for another node takes here.
struct Help {
    epoch: u64,
    skipped: Skipped,
    memory: ByteCount,
}

/// A worker for another node is at work as long as this lives.
struct Helping {
    shared: Weak<Shared>,
    key: (String, MemberId),
    epoch: u64,
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
            if state.is_ending {
                return Err(Error::Unavailable("the node stops".into()));
            }
            let newest = state.newest.entry(id.clone()).or_insert(order.epoch);
            if order.epoch < *newest {
                let newest = *newest;
                return Err(Error::Unavailable(format!(
                    "attempt {} of the job {id} is over: {newest} has begun",
                    order.epoch
                )));
            }
            *newest = order.epoch;
            if let Some((_, end)) = state.stages.remove(&id) {
                end.cancel();
            }
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
        let attempt = Attempt {
            shared: Arc::downgrade(&self.shared),
            peers: self.shared.peers.clone(),
            command: self.shared.options.command.clone(),
            is_busy: self.shared.options.is_busy.clone(),
            place: self.place(),
            told,
            reports,
            skipped: skipped.clone(),
            order,
        };
        let fetch_model = self.shared.options.fetch_model.clone();
        let task = tokio::spawn(async move {
            let (id, epoch) = (attempt.order.spec.id.clone(), attempt.order.epoch);
            let shared = attempt.shared.clone();
            let result = attempt.run(fetch_model).await;
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

    fn place(&self) -> Place {
        let options = &self.shared.options;
        Place {
            identity: options.identity.clone(),
            listen: options.listen,
            advertised: options.advertised.clone(),
        }
    }

    /// A further worker of a job that another node leads. Dropping it ends it.
    ///
    /// # Errors
    /// When the node stops, runs that job itself, or has not as much memory left.
    pub(crate) fn help(&self, order: RunJob, member: MemberId, leader: KeyPin) -> Result<Helper, Error> {
        let mut state = self.state();
        let id = order.spec.id.clone();
        if state.is_ending {
            return Err(Error::Unavailable("the node stops".into()));
        }
        if state.running.contains_key(&id) {
            return Err(Error::Unavailable(format!("the job {id} runs on this node already")));
        }
        let newest = state.newest.entry(id.clone()).or_insert(order.epoch);
        if order.epoch < *newest {
            let newest = *newest;
            return Err(Error::Unavailable(format!(
                "attempt {} of the job {id} is over: {newest} has begun",
                order.epoch
            )));
        }
        *newest = order.epoch;
        // An older attempt's worker of this job ends for it.
        let of_others =
            state.helping.iter().filter(|((job, _), help)| *job != id || help.epoch >= order.epoch);
        let of_others = of_others.map(|(_, help)| help.memory);
        let taken: ByteCount = state.running.values().map(|held| held.memory).chain(of_others).sum();
        let free = (self.shared.options.free)().saturating_sub(taken);
        let need = line::memory(&order, member);
        if free < need {
            let text = format!("the job {} needs {need} of memory, and {free} are free here", order.spec.id);
            return Err(Error::Unavailable(text));
        }
        let skipped = Skipped::default();
        let key = (order.spec.id.clone(), member);
        let help = Help { epoch: order.epoch, skipped: skipped.clone(), memory: need };
        state.helping.insert(key.clone(), help);
        let end = CancellationToken::new();
        if !order.stages.is_empty()
            && let Some((_, older)) = state.stages.insert(id, (order.epoch, end.clone()))
        {
            older.cancel();
        }
        drop(state);
        let helping = Helping { shared: Arc::downgrade(&self.shared), key, epoch: order.epoch };
        let forgets =
            Forgets { shared: Arc::downgrade(&self.shared), id: order.spec.id.clone(), epoch: order.epoch };
        let (will, told) = watch::channel(Will::Run);
        let (reports, _nobody) = mpsc::channel(1);
        let attempt = Attempt {
            shared: Arc::downgrade(&self.shared),
            peers: self.shared.peers.clone(),
            command: self.shared.options.command.clone(),
            is_busy: self.shared.options.is_busy.clone(),
            place: self.place(),
            told,
            reports,
            skipped,
            order,
        };
        let fetch_model = self.shared.options.fetch_model.clone();
        Ok(Helper::start(move |joined| async move {
            let _running = (will, helping, forgets); // as long as the helper is wanted
            tokio::select! {
                ended = attempt.help(fetch_model, member, leader, joined) => ended,
                () = end.cancelled() => Err(Error::Unavailable("a newer attempt has begun".into())),
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

    /// Ends all, after a checkpoint each, for the node's own end.
    pub(crate) async fn stop_all(&self) {
        let waiting: Vec<watch::Receiver<()>> = {
            let mut state = self.state();
            state.is_ending = true;
            for held in state.running.values() {
                held.will.send_replace(Will::SaveAndEnd);
            }
            std::mem::take(&mut state.stages).into_values().for_each(|(_, end)| end.cancel());
            state.running.values().map(|held| held.over.clone()).collect()
        };
        futures::future::join_all(waiting.into_iter().map(wait_for_end)).await;
        let left = std::mem::take(&mut self.state().running);
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

/// Forgets the stage of an attempt when that is over here.
struct Forgets {
    shared: std::sync::Weak<Shared>,
    id: String,
    epoch: u64,
}

impl Drop for Forgets {
    fn drop(&mut self) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.stages.get(&self.id).is_some_and(|(epoch, _)| *epoch == self.epoch) {
            state.stages.remove(&self.id);
        }
    }
}

async fn wait_for_end(mut over: watch::Receiver<()>) {
    let ended = async { while over.changed().await.is_ok() {} };
    if tokio::time::timeout(END_LIMIT, ended).await.is_err() {
        warn!("a job does not end: its process is killed");
    }
}

/// One attempt at a job.
struct Attempt {
    shared: std::sync::Weak<Shared>,
    peers: Peers,
    command: PathBuf,
    is_busy: Arc<dyn Fn() -> bool + Send + Sync>,
    place: Place,
    told: watch::Receiver<Will>,
    reports: mpsc::Sender<Report>,
    skipped: Skipped,
    order: RunJob,
}

/// What this node's disk cannot do now may be done later, or elsewhere: no failure of the job.
fn may_pass(error: Error) -> Error {
    match error {
        Error::Failed(text) | Error::TooMany(text) => Error::Unavailable(text),
        other => other,
    }
}

type FetchModel =
    Arc<dyn Fn(String) -> futures::future::BoxFuture<'static, Result<PathBuf, Error>> + Send + Sync>;

impl Attempt {
    async fn run(mut self, fetch_model: FetchModel) -> Result<RunEnd, Error> {
        let mut told = self.told.clone();
        let prepared = {
            let preparing = self.prepare(fetch_model, 0);
            tokio::select! {
                prepared = preparing => prepared?,
                // Nothing is computed yet: there is nothing to save.
                _ = told.wait_for(|will| *will != Will::Run) => return Ok(RunEnd::Yielded),
            }
        };
        let (setup, step) = prepared;
        let _states = self.states(LEADER)?; // of a stage too
        let arguments = [OsString::from("worker"), OsString::from("--job")];
        let name = format!("job {}", self.order.spec.id);
        let started = JobProcess::spawn(&self.command, &arguments, name).await;
        let mut process = started.map_err(|error| Error::Failed(crate::error::chain(&error)))?;
        let driven = self.drive(&mut process, setup, step).await;
        process.stop().await;
        match driven {
            Ok(end) => Ok(end),
            Err(Parted::LetGo) => Ok(RunEnd::Yielded),
            Err(Parted::Stage(error)) => Err(error),
            Err(Parted::Own(JobCallError::Job(JobError::Failed(text)))) => Err(Error::Failed(text)),
            Err(Parted::Own(JobCallError::Job(error))) => Ok(RunEnd::Failed(error.to_string())),
            Err(Parted::Own(JobCallError::Process(error))) => Err(Error::Failed(crate::error::chain(&error))),
        }
    }

    /// As one of several workers, until the job is through.
    async fn help(
        mut self,
        fetch_model: FetchModel,
        member: MemberId,
        leader: KeyPin,
        joined: tokio::sync::oneshot::Sender<(SocketAddr, KeyPin)>,
    ) -> Result<(), Error> {
        let stage = usize::try_from(member.0.saturating_sub(1)).unwrap_or(usize::MAX);
        let is_stage = line::is_stage(&self.order, stage);
        if is_stage == self.order.stages.is_empty() {
            return Err(Error::Invalid(format!("the job has no stage {stage}")));
        }
        let (setup, _) = self.prepare(fetch_model, stage).await?;
        let _states = self.states(member)?;
        let arguments = [OsString::from("worker"), OsString::from("--job")];
        let name = format!("job {}, worker {member}", self.order.spec.id);
        let failed = |error: JobCallError| match error {
            // What it says of the job is so on every node and at any time.
            JobCallError::Job(JobError::Refused(text)) => Error::Invalid(text),
            error => Error::Failed(crate::error::chain(&error)),
        };
        let started = JobProcess::spawn(&self.command, &arguments, name).await;
        let mut process = started.map_err(|error| Error::Failed(crate::error::chain(&error)))?;
        if let Some(stage) = &setup.stage {
            // The stages make their job together.
            let place = line::line_place(&self.place, leader, stage);
            let _ = joined.send(process.join_line(place).await.map_err(failed)?); // whoever leads may be gone
            process.begin(setup).await.map_err(failed)?;
        } else {
            let place = self.place.of(member, leader, &self.peers, &self.order).map_err(failed)?;
            let listens = process.join(place).await.map_err(failed)?;
            process.begin(setup).await.map_err(failed)?;
            let _ = joined.send(listens);
        }
        let mut meter = Meter::default();
        loop {
            let started = Instant::now();
            // A stage's pieces are as long as those of the one that leads, and what that one does between them.
            let advanced = if is_stage { process.follow().await } else { process.advance().await };
            match advanced.map_err(failed)? {
                Advance::Finished => break,
                Advance::Step(_) => self.stand_back(started.elapsed(), &mut meter).await,
                _ if is_stage => self.stand_back(started.elapsed().min(LONGEST_PIECE), &mut meter).await,
                _ => {}
            }
        }
        // Others may need the last update's sum, or the leading one may still be writing: it ends this.
        std::future::pending().await
    }

    /// The folder of a worker's states on their way, which goes with the worker.
    fn states(&self, member: MemberId) -> Result<Draft, Error> {
        let job = self.peers.store.job(&self.order.spec.id).map_err(disk("the job's folder"))?;
        Ok(Draft::of(job.join(states_name(self.order.epoch, member))))
    }

    async fn say(&self, report: Report) {
        // Nobody listens any more: then this attempt is about to be told to end.
        let _ = self.reports.send(report).await;
    }

    /// Everything onto this machine: model, files, and what to go on from.
    async fn prepare(&self, fetch_model: FetchModel, stage: usize) -> Result<(JobSetup, u64), Error> {
        let spec = &self.order.spec;
        let mut model = None;
        if spec.kind != JobKind::Rehearsal {
            self.say(Report::Preparing(format!("fetching {}", spec.model))).await;
            // What one node cannot fetch another one may: it is tried again.
            model = Some(fetch_model(spec.model.clone()).await?);
        }
        for input in &spec.inputs {
            self.say(Report::Preparing(format!("fetching {}", input.name))).await;
            self.peers.fetch_input(input).await.map_err(may_pass)?;
        }
        let (store, id) = (self.peers.store.clone(), spec.id.clone());
        let named: Vec<_> = spec.inputs.iter().map(|input| (input.name.clone(), input.hash)).collect();
        let inputs = on_disk("laying out the job's files", move || store.lay_out(&id, &named)).await;
        let inputs = inputs.map_err(may_pass)?;
        let (peers, order) = (self.peers.clone(), self.order.clone());
        let stage =
            on_disk("laying out the stage's folder", move || line::place(&peers, &order, stage)).await;
        let stage = stage.map_err(may_pass)?;
        let (resume, step) = match &stage {
            // The first stage gives the others their part of the state.
            Some(place) if place.stage > 0 => (None, 0),
            _ => self.checkpoint().await?,
        };
        let setup = JobSetup {
            kind: spec.kind.name().to_owned(),
            model,
            model_name: spec.model.clone(),
            configuration: spec.configuration.clone(),
            inputs,
            resume: resume.map(|folder| folder.join(bundle::STATE)),
            stage,
        };
        Ok((setup, step))
    }

    /// The newest checkpoint that is whole: one that was saved here when nobody listened, or one of the order's.
    async fn checkpoint(&self) -> Result<(Option<PathBuf>, u64), Error> {
        let spec = &self.order.spec;
        let newest = self.order.checkpoints.iter().map(|checkpoint| checkpoint.step).max().unwrap_or(0);
        let job = self.peers.store.job(&spec.id).map_err(disk("the job's folder"))?;
        let mut own: Vec<Checkpoint> = bundle::list(&job)
            .into_iter()
            .filter(|(manifest, _)| manifest.step > newest)
            .map(|(manifest, hash)| Checkpoint { step: manifest.step, hash, bytes: manifest.total() })
            .collect();
        own.sort_by_key(|checkpoint| std::cmp::Reverse(checkpoint.step));
        let known = own.len();
        let skips = |step: u64| {
            let newer = self.order.checkpoints.iter().filter(|checkpoint| checkpoint.step > step);
            let _ = self.skipped.set(newer.map(|checkpoint| checkpoint.hash).collect()); // once in an attempt
        };
        let mut problem = None;
        for (place, checkpoint) in own.iter().chain(&self.order.checkpoints).enumerate() {
            let what = format!("fetching the checkpoint after step {}", checkpoint.step);
            self.say(Report::Preparing(what)).await;
            match self.peers.fetch_checkpoint(&spec.id, checkpoint).await {
                Ok(folder) => {
                    if place < known {
                        // The coordinator has not heard of it.
                        self.say(Report::Checkpointed(checkpoint.clone())).await;
                    }
                    skips(checkpoint.step);
                    return Ok((Some(folder), checkpoint.step));
                }
                // An older one would not do better, and later this one may be had.
                Err(error @ (Error::TooMany(_) | Error::Failed(_))) => return Err(may_pass(error)),
                Err(error) => {
                    self.say(Report::Said(error.to_string())).await;
                    problem.get_or_insert(error);
                }
            }
        }
        match problem {
            Some(error) if !self.order.checkpoints.is_empty() => Err(error),
            _ => {
                skips(0);
                Ok((None, 0))
            }
        }
    }

    async fn drive(
        &mut self,
        process: &mut JobProcess,
        setup: JobSetup,
        from: u64,
    ) -> Result<RunEnd, Parted> {
        self.say(Report::Preparing("starting".into())).await;
        let (mut _team, mut led) = (None, None);
        if let Some(stage) = &setup.stage {
            led = Some(self.lead(process, stage).await?);
            self.say(Report::Preparing("the stages read their layers".into())).await;
            let mut told = self.told.clone();
            tokio::select! {
                begun = line::call(&mut led, process.begin(setup)) => begun?,
                () = told_to(&mut told, |will| will != Will::Run) => return Err(Parted::LetGo),
            }
        } else if self.order.spec.workers > 1 {
            _team = Some(
                Team::lead(&self.place, &self.peers, &self.order, process, setup, self.reports.clone())
                    .await?,
            );
        } else {
            process.begin(setup).await?;
        }
        let mut process = Stage { process, led, told: self.told.clone() };
        let process = &mut process;
        let saves = self.order.spec.saves;
        let mut meter = Meter::at(from);
        let (mut saved_step, mut saved_at, mut pause) = (from, Instant::now(), Duration::ZERO);
        let mut saved = None;
        let mut is_running = false;
        let mut last_report = Instant::now();
        loop {
            let will = *self.told.borrow();
            match will {
                Will::End => return Ok(RunEnd::Yielded),
                Will::SaveAndEnd => {
                    if meter.step > saved_step {
                        self.flush(&mut meter).await;
                        // No room: it ends without, and goes on from the one before.
                        if let Err(error) = self.save(process, meter.step).await {
                            warn!(job = self.order.spec.id, %error, "no checkpoint at the end");
                            self.say(Report::Said(format!("no checkpoint at the end: {error}"))).await;
                        }
                    }
                    return Ok(RunEnd::Yielded);
                }
                Will::Run => {}
            }
            let started = Instant::now();
            let advance = process.advance().await?;
            let piece = started.elapsed();
            if !is_running && matches!(advance, Advance::Step(_) | Advance::Validated { .. }) {
                is_running = true;
                self.say(Report::Running { step: from }).await;
            }
            match advance {
                Advance::Prepared(what) if is_running => self.say(Report::Said(what)).await,
                Advance::Prepared(what) => self.say(Report::Preparing(what)).await,
                Advance::Step(step) => meter.step(&step, piece),
                Advance::Validated { step, loss, seconds } => {
                    meter.points.push(LossPoint { step, training: None, validation: Some(loss) });
                    self.say(Report::Said(format!(
                        "validation after step {step}: loss {loss:.4} ({seconds:.1} s)"
                    )))
                    .await;
                }
                Advance::Tested { loss } => {
                    self.say(Report::Said(format!("test: loss {loss:.4}, perplexity {:.3}", loss.exp())))
                        .await;
                }
                Advance::Finished => {
                    self.flush(&mut meter).await;
                    if let Some(checkpoint) = saved.filter(|_| saved_step == meter.step) {
                        return Ok(RunEnd::Finished(checkpoint));
                    }
                    return match self.save_when_there_is_room(process, meter.step).await? {
                        Some((checkpoint, _)) => Ok(RunEnd::Finished(checkpoint)),
                        None => Ok(RunEnd::Yielded),
                    };
                }
            }
            if last_report.elapsed() >= REPORT_PERIOD {
                last_report = Instant::now();
                self.flush(&mut meter).await;
            }
            let by_steps = saves.every_steps > 0 && meter.step >= saved_step + saves.every_steps;
            let period = Duration::from_secs(saves.every_seconds).max(pause * BETWEEN_SAVES);
            let by_time = saves.every_seconds > 0 && saved_at.elapsed() >= period;
            if meter.step > saved_step && (by_steps || by_time) {
                self.flush(&mut meter).await;
                if let Some((checkpoint, took)) = self.save_when_there_is_room(process, meter.step).await? {
                    self.say(Report::Checkpointed(checkpoint.clone())).await;
                    let seconds = took.as_secs_f64();
                    self.say(Report::Said(format!("checkpoint after step {}: {seconds:.3} s", meter.step)))
                        .await;
                    (saved, pause) = (Some(checkpoint), took);
                }
                (saved_step, saved_at) = (meter.step, Instant::now());
            }
            self.stand_back(piece, &mut meter).await;
        }
    }

    /// Brings the stages of a divided model together, and says what it waits for.
    async fn lead(&self, process: &mut JobProcess, stage: &StagePlace) -> Result<Led, Parted> {
        let (tell, mut told) = mpsc::channel(4);
        let leading = Led::lead(&self.place, &self.peers, &self.order, process, stage, tell);
        let mut will = self.told.clone();
        tokio::pin!(leading);
        loop {
            tokio::select! {
                led = &mut leading => return led,
                Some(what) = told.recv() => self.say(Report::Preparing(what)).await,
                () = told_to(&mut will, |will| will != Will::Run) => return Err(Parted::LetGo),
            }
        }
    }

    async fn flush(&self, meter: &mut Meter) {
        if !meter.points.is_empty() {
            let points = std::mem::take(&mut meter.points);
            self.say(Report::Advanced { points, progress: Some(meter.progress()) }).await;
        }
    }

    /// Requests go first: the job has its share of the time while there are any.
    async fn stand_back(&mut self, piece: Duration, meter: &mut Meter) {
        let until = Instant::now() + pause_after(piece, self.order.spec.share);
        let started = Instant::now();
        while (self.is_busy)() && Instant::now() < until && *self.told.borrow() == Will::Run {
            tokio::time::sleep(LOOK).await;
        }
        meter.stood_back += started.elapsed();
    }

    /// A checkpoint, and how long writing it took; waits while there is no room. `None`: it was told to end meanwhile.
    async fn save_when_there_is_room(
        &mut self,
        process: &mut Stage<'_>,
        step: u64,
    ) -> Result<Option<(Checkpoint, Duration)>, Parted> {
        let mut is_held = false;
        loop {
            let begun = Instant::now();
            match self.write(process, step).await {
                Err(Parted::Own(JobCallError::Job(JobError::NoRoom(text)))) => {
                    if !std::mem::replace(&mut is_held, true) {
                        self.say(Report::Held(format!("no room on the disk: {text}"))).await;
                    }
                    let mut told = self.told.clone();
                    let ended = told.wait_for(|will| *will != Will::Run);
                    if tokio::time::timeout(ROOM_PERIOD, ended).await.is_ok() {
                        return Ok(None);
                    }
                }
                Ok(checkpoint) => {
                    if is_held {
                        self.say(Report::Going).await;
                    }
                    return Ok(Some((checkpoint, begun.elapsed())));
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn save(&self, process: &mut Stage<'_>, step: u64) -> Result<(), Parted> {
        let checkpoint = self.write(process, step).await?;
        self.say(Report::Checkpointed(checkpoint)).await;
        Ok(())
    }

    async fn write(&self, process: &mut Stage<'_>, step: u64) -> Result<Checkpoint, Parted> {
        let (store, id, epoch) =
            (self.peers.store.clone(), self.order.spec.id.clone(), self.order.epoch.to_string());
        let begun = tokio::task::spawn_blocking(move || {
            let job = store.job(&id)?;
            let new = bundle::begin(&job, &epoch)?;
            Ok::<_, std::io::Error>((job, new, id))
        });
        let (job, new, id) = flatten(begun.await)?;
        process.save(new.folder().join(bundle::STATE)).await?;
        process.publish(new.folder().join(bundle::RESULT)).await?;
        let sealed = tokio::task::spawn_blocking(move || bundle::seal(&job, new.folder(), &id, step));
        Ok(flatten(sealed.await)?)
    }
}

/// Waits until this is what a run is told.
async fn told_to(told: &mut watch::Receiver<Will>, is_it: impl Fn(Will) -> bool) {
    // Whoever told is gone: then its task is about to be ended.
    let _ = told.wait_for(|will| is_it(*will)).await;
}

/// The process of a job that this node leads, and with a divided model the other stages, without which it does not go on.
struct Stage<'a> {
    process: &'a mut JobProcess,
    led: Option<Led>,
    told: watch::Receiver<Will>,
}

impl Stage<'_> {
    async fn advance(&mut self) -> Result<Advance, Parted> {
        let is_led = self.led.is_some();
        tokio::select! {
            advanced = line::call(&mut self.led, self.process.advance()) => advanced,
            // One process alone ends after the piece. A stage may wait for one that is lost.
            () = told_to(&mut self.told, |will| will == Will::End), if is_led => Err(Parted::LetGo),
        }
    }

    async fn save(&mut self, folder: PathBuf) -> Result<(), Parted> {
        line::call(&mut self.led, self.process.save(folder)).await
    }

    async fn publish(&mut self, folder: PathBuf) -> Result<(), Parted> {
        line::call(&mut self.led, self.process.publish(folder)).await
    }
}

fn flatten<T>(done: Result<std::io::Result<T>, tokio::task::JoinError>) -> Result<T, JobCallError> {
    use std::io::ErrorKind;
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            Err(JobError::NoRoom(error.to_string()).into())
        }
        Ok(Err(error)) => Err(JobError::Failed(format!("cannot write a checkpoint: {error}")).into()),
        Err(error) => Err(JobError::Failed(format!("cannot write a checkpoint: {error}")).into()),
    }
}
