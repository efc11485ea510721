//! One attempt at a job on this node, as the leading process or as one of the others: gets onto this machine what it needs, and starts its
//! process. What the leading one then does, `driving` says.

use super::bundle::{self, Draft};
use super::helpers::Joined;
use super::line::{self, Parted};
use super::pace::pause_after;
use super::peer_client::{Peers, disk, on_disk};
use super::runner::FetchModel;
use super::stops::Will;
use super::store::states_name;
use super::team::{LEADER, Place};
use mlxnode_cluster::KeyPin;
use mlxnode_collective::MemberId;
use mlxnode_compute::{Advance, JobError};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, ContentHash, JobKind, Report, RunEnd, RunJob};
use mlxnode_worker::{JobCallError, JobProcess, JobSetup};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Between two looks whether requests still run.
const LOOK: Duration = Duration::from_millis(20);

/// The checkpoints of its order that an attempt does not go on from though they are newer; set once that is known.
pub(super) type Skipped = Arc<OnceLock<Vec<ContentHash>>>;

/// One attempt at a job.
pub(super) struct Attempt {
    pub(super) peers: Peers,
    pub(super) command: PathBuf,
    pub(super) is_busy: Arc<dyn Fn() -> bool + Send + Sync>,
    pub(super) fetch_model: FetchModel,
    pub(super) place: Place,
    pub(super) told: watch::Receiver<Will>,
    pub(super) reports: mpsc::Sender<Report>,
    pub(super) skipped: Skipped,
    pub(super) order: RunJob,
}

/// What this node's disk cannot do now may be done later, or elsewhere: no failure of the job.
fn may_pass(error: Error) -> Error {
    match error {
        Error::Failed(text) | Error::TooMany(text) => Error::Unavailable(text),
        other => other,
    }
}

/// What a call of a job's process says of the job, as whoever leads it or the coordinator hears it. `is_stage`: a process that is killed is
/// nobody's fault, as it is where several workers have the same model.
fn told_of_process(error: JobCallError, is_stage: bool) -> Error {
    match error {
        // What it says of the job is so on every node and at any time.
        JobCallError::Job(JobError::Refused(text)) => Error::Invalid(text),
        JobCallError::Job(JobError::Lost(text)) => Error::Unavailable(text),
        error if is_stage && error.is_kill() => Error::Unavailable(crate::error::chain(&error)),
        error => Error::Failed(crate::error::chain(&error)),
    }
}

impl Attempt {
    /// Leads the job, to its end or this attempt's.
    pub(super) async fn run(mut self) -> Result<RunEnd, Error> {
        let mut told = self.told.clone();
        let prepared = {
            let preparing = self.prepare(0);
            tokio::select! {
                prepared = preparing => prepared?,
                // Nothing is computed yet: there is nothing to save.
                _ = told.wait_for(|will| *will != Will::Run) => return Ok(RunEnd::Yielded),
            }
        };
        let (setup, from) = prepared;
        let _states = self.states(LEADER)?; // of a stage too
        let step = from.as_ref().map_or(0, |checkpoint| checkpoint.step);
        if !self.order.stages.is_empty() {
            // Where there are several lines, all go on from the same one.
            self.order.checkpoints = from.into_iter().collect();
        }
        let mut process = self.spawn(format!("job {}", self.order.spec.id)).await?;
        let is_stage = setup.stage.is_some();
        let driven = self.drive(&mut process, setup, step).await;
        process.stop().await;
        match driven {
            Ok(end) => Ok(end),
            Err(Parted::LetGo) => Ok(RunEnd::Yielded),
            Err(Parted::Stage(error)) => Err(error),
            Err(Parted::Own(JobCallError::Job(JobError::Failed(text)))) => Err(Error::Failed(text)),
            Err(Parted::Own(JobCallError::Job(JobError::Lost(text)))) => Err(Error::Unavailable(text)),
            Err(Parted::Own(JobCallError::Job(error))) => Ok(RunEnd::Failed(error.to_string())),
            Err(Parted::Own(error)) => Err(told_of_process(error, is_stage)),
        }
    }

    /// As one of several workers, until the job is through.
    pub(super) async fn help(
        self,
        member: MemberId,
        leader: KeyPin,
        joined: tokio::sync::oneshot::Sender<Joined>,
    ) -> Result<(), Error> {
        let stage = usize::try_from(member.0.saturating_sub(1)).unwrap_or(usize::MAX);
        let is_stage = line::is_stage(&self.order, stage);
        if is_stage == self.order.stages.is_empty() || !self.order.is_well_divided() {
            return Err(Error::Invalid(format!("the job has no stage {stage}")));
        }
        let (setup, _) = self.prepare(stage).await?;
        let _states = self.states(member)?;
        let failed = |error| told_of_process(error, is_stage);
        let mut process = self.spawn(format!("job {}, worker {member}", self.order.spec.id)).await?;
        if let Some(stage) = &setup.stage {
            // The stages make their job together, once all are there: another node may have to fetch the model before.
            let at = process.join_line(line::line_place(&self.place, leader, stage)).await.map_err(failed)?;
            let exchange = match line::group_place(&self.place, leader, &self.order, stage) {
                Some(place) => Some(process.join(place).await.map_err(failed)?),
                None => None,
            };
            let _ = joined.send(Joined { at, exchange }); // whoever leads may be gone
            process.begin_in_line(setup).await.map_err(failed)?;
        } else {
            let place = self.place.of(member, leader, &self.peers, &self.order).map_err(failed)?;
            let at = process.join(place).await.map_err(failed)?;
            process.begin(setup).await.map_err(failed)?;
            let _ = joined.send(Joined { at, exchange: None });
        }
        loop {
            let started = Instant::now();
            // A stage's next piece begins when the one that leads says what it is.
            let advanced = if is_stage { process.follow().await } else { process.advance().await };
            match advanced.map_err(failed)? {
                Advance::Finished => break,
                Advance::Step(_) => {
                    self.stand_back(computed(&process, started)).await;
                }
                _ if is_stage => {
                    self.stand_back(computed(&process, started)).await;
                }
                _ => {}
            }
        }
        // Others may need the last update's sum, or the leading one may still be writing: it ends this.
        std::future::pending().await
    }

    async fn spawn(&self, name: String) -> Result<JobProcess, Error> {
        let arguments = [OsString::from("worker"), OsString::from("--job")];
        let started = JobProcess::spawn(&self.command, &arguments, name).await;
        started.map_err(|error| Error::Failed(crate::error::chain(&error)))
    }

    /// Requests go first: the job has its share of the time while there are any. `computed` is what its process took of the machine for a
    /// piece, without what it waited for others: they stand back as well.
    pub(super) async fn stand_back(&self, computed: Duration) -> Duration {
        let started = Instant::now();
        let until = started + pause_after(computed, self.order.spec.share);
        while (self.is_busy)() && Instant::now() < until && *self.told.borrow() == Will::Run {
            tokio::time::sleep(LOOK).await;
        }
        started.elapsed()
    }

    /// The folder of a worker's states on their way, which goes with the worker.
    fn states(&self, member: MemberId) -> Result<Draft, Error> {
        let job = self.peers.store.job(&self.order.spec.id).map_err(disk("the job's folder"))?;
        Ok(Draft::of(job.join(states_name(self.order.epoch, member))))
    }

    pub(super) async fn say(&self, report: Report) {
        // Nobody listens any more: then this attempt is about to be told to end.
        let _ = self.reports.send(report).await;
    }

    /// Everything onto this machine: model, files, and what to go on from.
    async fn prepare(&self, stage: usize) -> Result<(JobSetup, Option<Checkpoint>), Error> {
        let spec = &self.order.spec;
        let mut model = None;
        if spec.kind != JobKind::Rehearsal {
            self.say(Report::Preparing(format!("fetching {}", spec.model))).await;
            // What one node cannot fetch another one may: it is tried again.
            model = Some((self.fetch_model)(spec.model.clone()).await?);
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
        let from = match &stage {
            // The first stage gives the others their part of the state.
            Some(place) if place.stage > 0 => None,
            // Other lines go on from what the leading one goes on from, which knows best.
            Some(place) => self.checkpoint(place.replica == 0).await?,
            None => self.checkpoint(true).await?,
        };
        let (resume, from) = from.unzip();
        let setup = JobSetup {
            kind: spec.kind.name().to_owned(),
            model,
            model_name: spec.model.clone(),
            configuration: spec.configuration.clone(),
            inputs,
            resume: resume.map(|folder: PathBuf| folder.join(bundle::STATE)),
            stage,
        };
        Ok((setup, from))
    }

    /// The newest checkpoint that is whole, and where it is: one that was saved here when nobody listened, if such ones count (`own`), or one
    /// of the order's.
    async fn checkpoint(&self, own: bool) -> Result<Option<(PathBuf, Checkpoint)>, Error> {
        let spec = &self.order.spec;
        let newest = self.order.checkpoints.iter().map(|checkpoint| checkpoint.step).max().unwrap_or(0);
        let job = self.peers.store.job(&spec.id).map_err(disk("the job's folder"))?;
        let listed = if own { bundle::list(&job) } else { Vec::new() };
        let mut own: Vec<Checkpoint> = listed
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
                    return Ok(Some((folder, checkpoint.clone())));
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
                Ok(None)
            }
        }
    }
}

/// What the process computed of a piece that began then, in time.
pub(super) fn computed(process: &JobProcess, began: Instant) -> Duration {
    began.elapsed().saturating_sub(process.waited())
}
