//! What is durable about jobs, the wishes that change it, and what applying a record leads to.

use super::view::{HeldCheckpoint, JobState, JobView, LogLine, Progress, Publication};
use super::{
    COPIES, Checkpoint, ContentHash, Curve, Effect, JobKind, JobSpec, LossPoint, MAX_JOBS, MAX_LOG_LINES,
    Need, PlannedStage, PublishWish, Record, Wanted, artifact_source, parse_artifact_source,
};
use crate::deployments::{check_adapter_name, check_name};
use crate::{Error, NodeId};
use mlxnode_compute::ByteCount;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

/// Longest line of a log, in bytes: it may quote what a worker said.
const MAX_LINE_BYTES: usize = 1000;
/// Publications of a job that are remembered; the checkpoints of these stay.
const MAX_PUBLICATIONS: usize = 16;
/// Most jobs of one API key that are under way or served: others find room besides.
const MAX_JOBS_OF_A_KEY: usize = MAX_JOBS * 3 / 4;
/// What a rehearsal takes of a node.
const REHEARSAL_MEMORY: ByteCount = ByteCount(64 << 20);

/// What is to become of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(super) enum Aim {
    Run,
    Pause { by: String },
    Finished,
    Failed { reason: String },
    Cancelled,
}

impl Aim {
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::Finished | Self::Failed { .. } | Self::Cancelled)
    }
}

/// All that is durable about a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredJob {
    pub(super) spec: JobSpec,
    pub(super) order: u64,
    pub(super) aim: Aim,
    pub(super) submitted_at: u64,
    pub(super) started_at: Option<u64>,
    pub(super) ended_at: Option<u64>,
    /// Of the newest attempt; 0: there was none.
    pub(super) epoch: u64,
    pub(super) attempts: u32,
    /// Workers that died since the last checkpoint.
    pub(super) failures: u32,
    /// Oldest first.
    pub(super) checkpoints: Vec<HeldCheckpoint>,
    pub(super) curve: Curve,
    pub(super) publications: Vec<Publication>,
    pub(super) log: VecDeque<LogLine>,
}

/// An attempt under way.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) epoch: u64,
    pub(super) node: NodeId,
    /// What each node computes of it.
    pub(super) stages: Vec<PlannedStage>,
    /// Other nodes that work at it.
    pub(super) helpers: Vec<NodeId>,
    pub(super) phase: RunPhase,
    /// Set once it was told to end: when it is told again.
    pub(super) stop_again: Option<Instant>,
    /// It was told to end: it may be any time until it does.
    pub(super) is_stopping: bool,
    /// Losses that are not durable yet.
    pub(super) points: Curve,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum RunPhase {
    Preparing(String),
    Running,
    Held(String),
}

/// What is known only as long as this process lives.
#[derive(Debug, Default)]
pub(super) struct Moment {
    pub(super) run: Option<Run>,
    /// What it takes of nodes' memory.
    pub(super) need: Option<Need>,
    pub(super) is_weighing: bool,
    /// A copy of a checkpoint is on its way.
    pub(super) is_copying: bool,
    /// No other copy before; none: at once.
    pub(super) copy_after: Option<Instant>,
    /// When serving the result is tried again.
    pub(super) publish_after: Option<Instant>,
    pub(super) is_publishing: bool,
    /// Why no node can run it.
    pub(super) waits_for: Option<String>,
    /// With this free memory of the nodes there was no room for it, and why.
    pub(super) nowhere: Option<(Vec<(NodeId, ByteCount)>, String)>,
    /// Not before.
    pub(super) retry_at: Option<Instant>,
    /// Attempts in a row that a node could not begin.
    pub(super) tries: u32,
    /// Where the last attempt came to nothing: another node that fits is better.
    pub(super) avoids: Option<NodeId>,
    pub(super) progress: Progress,
    /// The curve with what is not durable yet.
    pub(super) curve: Curve,
    /// What was said since, besides the log.
    pub(super) said: VecDeque<LogLine>,
}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) stored: StoredJob,
    pub(super) moment: Moment,
}

/// All jobs of the cluster.
#[derive(Debug, Default)]
pub struct Jobs {
    pub(super) jobs: BTreeMap<String, Job>,
    pub(super) used_epoch: u64,
    next_order: u64,
    /// What deployments serve or are about to: see [`Jobs::pin`].
    pinned: BTreeSet<(String, ContentHash)>,
}

impl Jobs {
    /// The jobs that the records leave. What has to be done about them, [`Jobs::schedule`] says.
    pub fn restore(records: impl IntoIterator<Item = Record>) -> Self {
        let mut jobs = Self::default();
        for record in records {
            jobs.apply(record);
        }
        // Attempts of before are over for this coordinator: their nodes let go of them when it was lost.
        for job in jobs.jobs.values_mut() {
            job.moment = Moment { curve: job.stored.curve.clone(), ..Moment::default() };
            let step = job.stored.checkpoints.last().map_or(0, |held| held.checkpoint.step);
            job.moment.progress.step = step;
        }
        jobs
    }

    /// Records that say the same as all those applied so far, for a snapshot.
    pub fn records(&self) -> Vec<Record> {
        let mut all: Vec<&Job> = self.jobs.values().collect();
        all.sort_by_key(|job| job.stored.order);
        let kept = all.into_iter().map(|job| Record::Kept { job: Box::new(job.stored.clone()) });
        std::iter::once(Record::Epochs { used: self.used_epoch }).chain(kept).collect()
    }

    /// A new job. `None`: it is there already, as it is wished for. When the table is full the oldest job that is over goes first.
    ///
    /// # Errors
    /// When the wish makes no sense, the id belongs to a job that is not the same, or there are too many jobs.
    pub fn submit(&self, spec: JobSpec, at: u64) -> Result<Option<Vec<Record>>, Error> {
        spec.check()?;
        if let Some(job) = self.jobs.get(&spec.id) {
            // Who asks again is no part of what is asked: the first one owns it. What it takes follows from the rest, when nobody says it.
            let owner = job.stored.spec.owner.clone();
            let known = job.stored.spec.demand;
            let demand = known.and_then(|known| spec.demand.or(Some(known)));
            if job.stored.spec == (JobSpec { owner, demand, ..spec.clone() }) {
                return Ok(None);
            }
            return Err(Error::NameTaken {
                name: spec.id,
                source_of_other: "another job, with other content".to_owned(),
            });
        }
        // Over, and served nowhere: it makes room.
        let is_free = |job: &Job| {
            let is_pinned = self.pinned.iter().any(|(id, _)| *id == job.stored.spec.id);
            job.stored.aim.is_over() && job.moment.run.is_none() && !is_pinned
        };
        let of_owner = self.jobs.values().filter(|job| job.stored.spec.owner == spec.owner && !is_free(job));
        if !spec.owner.is_empty() && of_owner.count() >= MAX_JOBS_OF_A_KEY {
            return Err(Error::TooMany(format!(
                "{MAX_JOBS_OF_A_KEY} jobs of the key {} are under way or served, which is the most; cancel one, unload an adapter that \
                 one made, or wait",
                spec.owner
            )));
        }
        let mut records = Vec::new();
        if self.jobs.len() >= MAX_JOBS {
            let oldest = self
                .jobs
                .values()
                .filter(|job| is_free(job))
                .min_by_key(|job| (job.stored.ended_at, job.stored.order));
            let oldest = oldest.ok_or_else(|| {
                Error::TooMany(format!(
                    "the cluster has {MAX_JOBS} jobs, which is the most, and each is under way or served; cancel one, unload an \
                     adapter that one made, or wait"
                ))
            })?;
            records.push(Record::Removed { id: oldest.stored.spec.id.clone() });
        }
        records.push(Record::Submitted { spec: Box::new(spec), at });
        Ok(Some(records))
    }

    /// A job is not wanted any more. `None`: it was cancelled before.
    ///
    /// # Errors
    /// When there is no such job, or it is over.
    pub fn cancel(&self, id: &str, at: u64) -> Result<Option<Record>, Error> {
        let job = self.get(id)?;
        match &job.stored.aim {
            Aim::Cancelled => Ok(None),
            Aim::Finished => Err(Error::Refused(format!("the job {id} is finished already"))),
            Aim::Failed { .. } | Aim::Run | Aim::Pause { .. } => {
                Ok(Some(Record::Cancelled { id: id.to_owned(), at }))
            }
        }
    }

    /// A job is to stand still. `None`: it does.
    ///
    /// # Errors
    /// When there is no such job, or it is over.
    pub fn pause(&self, id: &str, by: &str, at: u64) -> Result<Option<Record>, Error> {
        let job = self.get(id)?;
        match &job.stored.aim {
            Aim::Pause { .. } => Ok(None),
            Aim::Run => Ok(Some(Record::Paused { id: id.to_owned(), by: line(by), at })),
            over => Err(self.over(id, over)),
        }
    }

    /// A job is to go on, from its newest checkpoint; one that failed too. `None`: it is to run anyway.
    ///
    /// # Errors
    /// When there is no such job, or it is finished or cancelled.
    pub fn resume(&self, id: &str, at: u64) -> Result<Option<Record>, Error> {
        let job = self.get(id)?;
        match &job.stored.aim {
            Aim::Run => Ok(None),
            Aim::Pause { .. } | Aim::Failed { .. } => Ok(Some(Record::Resumed { id: id.to_owned(), at })),
            over => Err(self.over(id, over)),
        }
    }

    /// Serves what a job made: the checkpoint after `step`, or the newest.
    ///
    /// # Errors
    /// When there is no such job or checkpoint, or the names make no sense.
    pub fn publish(&self, id: &str, step: Option<u64>, wish: PublishWish) -> Result<Effect, Error> {
        if !wish.deployment.is_empty() {
            check_name(&wish.deployment)?;
        }
        check_adapter_name(&wish.adapter)?;
        let hash = self.checkpoint(id, step)?.hash;
        Ok(Effect::Publish { id: id.to_owned(), hash, source: artifact_source(id, hash), wish })
    }

    /// The checkpoint after `step`, or the newest.
    ///
    /// # Errors
    /// When there is no such job or checkpoint.
    pub fn checkpoint(&self, id: &str, step: Option<u64>) -> Result<Checkpoint, Error> {
        let job = self.get(id)?;
        let mut newest_first = job.stored.checkpoints.iter().rev().map(|held| &held.checkpoint);
        let found = newest_first.find(|checkpoint| step.is_none_or(|step| checkpoint.step == step));
        found.cloned().ok_or_else(|| {
            let steps: Vec<String> =
                job.stored.checkpoints.iter().map(|held| held.checkpoint.step.to_string()).collect();
            match (step, steps.is_empty()) {
                (_, true) => Error::Refused(format!("the job {id} has saved nothing yet")),
                (Some(step), false) => Error::NotFound(format!(
                    "the job {id} has no checkpoint after step {step}; there are those after {}",
                    steps.join(", ")
                )),
                (None, false) => Error::Failed(format!("the checkpoints of the job {id} cannot be found")),
            }
        })
    }

    fn over(&self, id: &str, aim: &Aim) -> Error {
        let state = match aim {
            Aim::Finished => "finished",
            Aim::Cancelled => "cancelled",
            _ => "over",
        };
        Error::Refused(format!("the job {id} is {state}"))
    }

    fn get(&self, id: &str) -> Result<&Job, Error> {
        self.jobs.get(id).ok_or_else(|| {
            let shown: String = id.chars().take(64).collect();
            Error::NotFound(format!("there is no job {shown:?}; `mlxnode jobs list` shows all"))
        })
    }

    /// Makes a durable record count, and says what follows from it.
    pub fn apply(&mut self, record: Record) -> Vec<Effect> {
        match record {
            Record::Submitted { spec, at } => {
                let order = self.next_order;
                self.next_order += 1;
                let id = spec.id.clone();
                let mut stored = StoredJob {
                    spec: *spec,
                    order,
                    aim: Aim::Run,
                    submitted_at: at,
                    started_at: None,
                    ended_at: None,
                    epoch: 0,
                    attempts: 0,
                    failures: 0,
                    checkpoints: Vec::new(),
                    curve: Curve::default(),
                    publications: Vec::new(),
                    log: VecDeque::new(),
                };
                stored.log(at, "submitted".to_owned());
                self.jobs.insert(id, Job { stored, moment: Moment::default() });
                Vec::new()
            }
            Record::Kept { job } => {
                self.next_order = self.next_order.max(job.order + 1);
                self.used_epoch = self.used_epoch.max(job.epoch);
                self.jobs.insert(job.spec.id.clone(), Job { stored: *job, moment: Moment::default() });
                Vec::new()
            }
            Record::Epochs { used } => {
                self.used_epoch = self.used_epoch.max(used);
                Vec::new()
            }
            Record::Removed { id } => {
                self.jobs.remove(&id);
                vec![Effect::Tidy]
            }
            Record::Started { id, epoch, node, stages, at } => {
                self.used_epoch = self.used_epoch.max(epoch);
                self.of(&id, |job| job.start(epoch, node, stages, at))
            }
            Record::Checkpointed { id, epoch, checkpoint, node, points, at } => self.of(&id, |job| {
                if epoch != job.stored.epoch || job.stored.aim.is_over() {
                    return Vec::new();
                }
                job.stored.log(at, format!("checkpoint after step {}", checkpoint.step));
                job.save(checkpoint, node, points, at);
                vec![Effect::Tidy]
            }),
            Record::Copied { id, hash, node } => self.of(&id, |job| {
                let held = job.stored.checkpoints.iter_mut().find(|held| held.checkpoint.hash == hash);
                if let Some(held) = held
                    && !held.holders.contains(&node)
                {
                    held.holders.push(node);
                }
                Vec::new()
            }),
            Record::Lost { id, hash, node } => self.of(&id, |job| {
                job.stored.lose(hash, node);
                Vec::new()
            }),
            Record::Stumbled { id, epoch, reason, at } => self.of(&id, |job| {
                if epoch == job.stored.epoch {
                    job.stored.failures += 1;
                    job.stored.log(at, reason);
                }
                Vec::new()
            }),
            Record::Paused { id, by, at } => self.of(&id, |job| {
                job.stored.log(at, format!("paused by {by}"));
                job.stored.aim = Aim::Pause { by };
                job.stop(true)
            }),
            Record::Resumed { id, at } => self.of(&id, |job| {
                job.stored.log(at, "resumed".to_owned());
                job.stored.aim = Aim::Run;
                job.stored.ended_at = None;
                job.stored.failures = 0;
                (job.moment.retry_at, job.moment.tries) = (None, 0);
                Vec::new()
            }),
            Record::Finished { id, epoch, checkpoint, node, points, at } => self.of(&id, |job| {
                if epoch != job.stored.epoch || job.stored.aim.is_over() {
                    return Vec::new();
                }
                job.stored.log(at, format!("finished after step {}", checkpoint.step));
                job.save(checkpoint, node, points, at);
                job.end(Aim::Finished, at);
                vec![Effect::Tidy]
            }),
            Record::Failed { id, reason, at } => self.of(&id, |job| {
                job.stored.log(at, format!("failed: {reason}"));
                job.end(Aim::Failed { reason: line(&reason) }, at);
                job.stop(false)
            }),
            Record::Cancelled { id, at } => self.of(&id, |job| {
                job.stored.log(at, "cancelled".to_owned());
                job.end(Aim::Cancelled, at);
                job.stop(false)
            }),
            Record::Published { id, publication, at } => self.of(&id, |job| {
                let Publication { deployment, adapter, problem, .. } = &publication;
                job.stored.log(
                    at,
                    match problem {
                        None => format!("served as {deployment}:{adapter}"),
                        Some(problem) => format!("not served as {deployment}:{adapter}: {problem}"),
                    },
                );
                job.stored.publish(publication);
                Vec::new()
            }),
        }
    }

    fn of(&mut self, id: &str, change: impl FnOnce(&mut Job) -> Vec<Effect>) -> Vec<Effect> {
        self.jobs.get_mut(id).map(change).unwrap_or_default()
    }

    /// These adapters of deployments are served now or about to be, by their sources: what those name stays wanted, and their jobs are
    /// not forgotten. Said anew whenever that has changed.
    pub fn pin<'a>(&mut self, sources: impl IntoIterator<Item = &'a str>) {
        let named = sources.into_iter().filter_map(parse_artifact_source);
        self.pinned = named.map(|(id, hash)| (id.to_owned(), hash)).collect();
    }

    /// What of jobs is still wanted on the nodes.
    pub fn wanted(&self) -> Vec<Wanted> {
        let wanted = |job: &Job| {
            let stored = &job.stored;
            let mut checkpoints: Vec<Checkpoint> =
                stored.checkpoints.iter().map(|held| held.checkpoint.clone()).collect();
            let pinned = self.pinned.iter().filter(|(id, _)| *id == stored.spec.id);
            for (_, hash) in pinned {
                if !checkpoints.iter().any(|checkpoint| checkpoint.hash == *hash) {
                    // How many steps it had is not known any more; it is older than those that are.
                    checkpoints.push(Checkpoint { step: 0, hash: *hash, bytes: 0 });
                }
            }
            let inputs = stored.spec.inputs.iter().map(|input| input.hash).collect();
            Wanted { id: stored.spec.id.clone(), checkpoints, inputs }
        };
        self.jobs.values().map(wanted).collect()
    }

    /// Who has which checkpoint, as far as known.
    pub fn holders(&self) -> BTreeMap<ContentHash, BTreeSet<NodeId>> {
        let held = self.jobs.values().flat_map(|job| &job.stored.checkpoints);
        held.map(|held| (held.checkpoint.hash, held.holders.iter().copied().collect())).collect()
    }

    /// What running jobs take of a node's memory.
    pub fn reserved(&self, node: NodeId) -> ByteCount {
        let of_run = |run: &Run| {
            let planned = run.stages.iter().find(|stage| stage.node == node).map(|stage| stage.memory);
            // Who helps takes as much as who leads.
            let helps = run.helpers.contains(&node).then(|| run.stages.first().map(|stage| stage.memory));
            planned.or(helps.flatten())
        };
        self.jobs.values().filter_map(|job| job.moment.run.as_ref()).filter_map(of_run).sum()
    }

    /// All jobs, the newest first.
    pub fn view(&self) -> Vec<JobView> {
        let mut all: Vec<&Job> = self.jobs.values().collect();
        all.sort_by_key(|job| std::cmp::Reverse(job.stored.order));
        all.into_iter().map(Job::view).collect()
    }

    /// What happened to a job, in order.
    ///
    /// # Errors
    /// When there is no such job.
    pub fn log(&self, id: &str) -> Result<Vec<LogLine>, Error> {
        let job = self.get(id)?;
        let mut lines: Vec<LogLine> = job.stored.log.iter().chain(&job.moment.said).cloned().collect();
        lines.sort_by_key(|line| line.at); // stable: lines of one second stay in order
        Ok(lines)
    }
}

impl StoredJob {
    pub(super) fn log(&mut self, at: u64, text: String) {
        push_line(&mut self.log, at, &text);
    }

    /// Remembers what became of a wish to serve something. What is served stays served when another checkpoint could not take its
    /// place.
    fn publish(&mut self, publication: Publication) {
        let failed = publication.problem.is_some();
        self.publications.retain(|other| {
            let is_same =
                (&other.deployment, &other.adapter) == (&publication.deployment, &publication.adapter);
            !is_same || (failed && other.problem.is_none() && other.hash != publication.hash)
        });
        self.publications.push(publication);
        if self.publications.len() > MAX_PUBLICATIONS {
            let failed = self.publications.iter().position(|other| other.problem.is_some());
            self.publications.remove(failed.unwrap_or(0));
        }
    }

    /// A node does not have a checkpoint any more. One that nobody has is of no use where another one can be gone on from; the result
    /// of a job stays in its record.
    fn lose(&mut self, hash: ContentHash, node: NodeId) {
        let Some(held) = self.checkpoints.iter_mut().find(|held| held.checkpoint.hash == hash) else {
            return;
        };
        held.holders.retain(|holder| *holder != node);
        let is_gone = held.holders.is_empty() && self.aim != Aim::Finished;
        if is_gone && self.checkpoints.iter().any(|held| !held.holders.is_empty()) {
            self.checkpoints.retain(|held| held.checkpoint.hash != hash);
        }
    }

    /// What may go: all but the last few, the newest that two nodes have, and what is served.
    fn forget_old(&mut self) {
        let keep = self.spec.saves.keep as usize;
        let first_kept = self.checkpoints.len().saturating_sub(keep);
        let newest_safe = self.checkpoints.iter().rposition(|held| held.holders.len() >= COPIES);
        let published: Vec<ContentHash> = self.publications.iter().map(|it| it.hash).collect();
        let mut place = 0;
        self.checkpoints.retain(|held| {
            place += 1;
            let is_new = place > first_kept;
            is_new || newest_safe == Some(place - 1) || published.contains(&held.checkpoint.hash)
        });
    }
}

impl Job {
    fn start(&mut self, epoch: u64, node: NodeId, stages: Vec<PlannedStage>, at: u64) -> Vec<Effect> {
        let stored = &mut self.stored;
        (stored.epoch, stored.attempts) = (epoch, stored.attempts + 1);
        stored.started_at.get_or_insert(at);
        stored.log(at, format!("attempt {} begins on {}", stored.attempts, begins_on(node, &stages)));
        let checkpoints = stored.checkpoints.iter().rev().map(|held| held.checkpoint.clone()).collect();
        let divided = if stages.len() > 1 { stages.clone() } else { Vec::new() };
        let memory = stages.first().map_or(ByteCount(0), |stage| stage.memory);
        let order = super::RunJob { spec: stored.spec.clone(), epoch, checkpoints, stages: divided, memory };
        self.moment.run = Some(Run {
            epoch,
            node,
            stages,
            helpers: Vec::new(),
            phase: RunPhase::Preparing(String::new()),
            stop_again: None,
            is_stopping: false,
            points: Curve::default(),
        });
        self.moment.waits_for = None;
        vec![Effect::Run { node, order: Box::new(order) }]
    }

    fn save(&mut self, checkpoint: Checkpoint, node: NodeId, points: Vec<LossPoint>, at: u64) {
        let stored = &mut self.stored;
        let before = stored.checkpoints.last().map_or(0, |held| held.checkpoint.step);
        if checkpoint.step > before {
            stored.failures = 0;
        }
        if let Some(first) = points.first() {
            // The attempt may have begun from an older checkpoint than the newest.
            stored.curve.cut_after(first.step.saturating_sub(1));
        }
        points.into_iter().for_each(|point| stored.curve.push(point));
        // The same again, after steps that were done again: another holder.
        match stored.checkpoints.iter_mut().find(|held| held.checkpoint.hash == checkpoint.hash) {
            Some(held) if !held.holders.contains(&node) => held.holders.push(node),
            Some(_) => {}
            None => {
                // What was saved later, by an attempt that is over, is not on the way to this one.
                let published: Vec<ContentHash> = stored.publications.iter().map(|it| it.hash).collect();
                stored.checkpoints.retain(|held| {
                    held.checkpoint.step < checkpoint.step || published.contains(&held.checkpoint.hash)
                });
                stored.checkpoints.push(HeldCheckpoint { checkpoint, at, holders: vec![node] });
            }
        }
        stored.forget_old();
    }

    fn end(&mut self, aim: Aim, at: u64) {
        self.stored.aim = aim;
        self.stored.ended_at = Some(at);
        self.moment.waits_for = None;
        self.moment.retry_at = None;
    }

    fn stop(&mut self, saves: bool) -> Vec<Effect> {
        let Some(run) = &mut self.moment.run else { return Vec::new() };
        (run.is_stopping, run.stop_again) = (true, None);
        let (id, epoch, node) = (self.stored.spec.id.clone(), run.epoch, run.node);
        vec![Effect::Stop { id, epoch, node, saves }]
    }

    /// What it takes of a node, when that needs no look at the model.
    pub(super) fn known_need(&self) -> Option<Need> {
        let spec = &self.stored.spec;
        let memory = match spec.kind {
            JobKind::Rehearsal => Some(spec.memory.unwrap_or(REHEARSAL_MEMORY)),
            // How the layers are divided, the model says.
            JobKind::FineTuning if spec.stages > 1 => None,
            JobKind::FineTuning => spec.memory,
        };
        memory.map(Need::Fixed)
    }

    fn state(&self) -> (JobState, String) {
        let run = self.moment.run.as_ref();
        match &self.stored.aim {
            Aim::Finished => (JobState::Finished, String::new()),
            Aim::Failed { reason } => (JobState::Failed, reason.clone()),
            Aim::Cancelled => (JobState::Cancelled, String::new()),
            Aim::Pause { by } if run.is_some() => {
                (JobState::Paused, format!("by {by}; it is saving a checkpoint"))
            }
            Aim::Pause { by } => (JobState::Paused, format!("by {by}")),
            Aim::Run => match run.map(|run| &run.phase) {
                Some(RunPhase::Preparing(what)) => (JobState::Preparing, what.clone()),
                Some(RunPhase::Running) => (JobState::Running, String::new()),
                Some(RunPhase::Held(why)) => (JobState::Paused, format!("by its node: {why}")),
                None => match &self.moment.waits_for {
                    Some(what) => (JobState::WaitingForNodes, what.clone()),
                    None if self.moment.is_weighing => (JobState::Preparing, "reading the model".to_owned()),
                    None => (JobState::Queued, String::new()),
                },
            },
        }
    }

    fn view(&self) -> JobView {
        let (state, detail) = self.state();
        let stored = &self.stored;
        JobView {
            spec: stored.spec.clone(),
            state,
            detail,
            submitted_at: stored.submitted_at,
            started_at: stored.started_at,
            ended_at: stored.ended_at,
            attempts: stored.attempts,
            epoch: stored.epoch,
            node: self.moment.run.as_ref().map(|run| run.node),
            stages: self.moment.run.as_ref().map(|run| run.stages.clone()).unwrap_or_default(),
            progress: self.moment.progress,
            curve: self.moment.curve.points().to_vec(),
            checkpoints: stored.checkpoints.clone(),
            publications: stored.publications.clone(),
        }
    }
}

/// "1f0a9c2e", or what each of several nodes has.
fn begins_on(node: NodeId, stages: &[PlannedStage]) -> String {
    if stages.len() < 2 {
        return node.short();
    }
    let is_replicated = stages.iter().any(|stage| stage.replica > 0);
    let part = |stage: &PlannedStage| {
        let (first, last) = (stage.layers.start, stage.layers.end.saturating_sub(1));
        let of = if is_replicated { format!("replica {}, ", stage.replica) } else { String::new() };
        format!("{}: {of}layers {first} to {last}, {}", stage.node.short(), stage.memory)
    };
    let parts: Vec<String> = stages.iter().map(part).collect();
    format!("{} nodes ({})", stages.len(), parts.join("; "))
}

pub(super) fn push_line(log: &mut VecDeque<LogLine>, at: u64, text: &str) {
    log.push_back(LogLine { at, text: line(text) });
    while log.len() > MAX_LOG_LINES {
        log.pop_front();
    }
}

/// One line of bounded length, whatever somebody said.
pub(super) fn line(text: &str) -> String {
    let mut line = String::new();
    for character in text.chars().map(|character| if character.is_control() { ' ' } else { character }) {
        if line.len() + character.len_utf8() > MAX_LINE_BYTES {
            line.push('…');
            break;
        }
        line.push(character);
    }
    line
}
