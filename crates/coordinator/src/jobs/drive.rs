//! What happens to jobs, and which of them runs where.

use super::table::{Aim, Job, Jobs, Moment, RunPhase, line, push_line};
use super::view::{HeldCheckpoint, Publication};
use super::{
    COPIES, Checkpoint, ContentHash, Effect, Event, JobOffer, LossPoint, MAX_FAILURES, Need, PlannedStage,
    Record, Report, RunEnd, Tidied,
};
use crate::{Error, NodeId};
use mlxnode_compute::ByteCount;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// After the first worker that died; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Before a node is asked again whose fault it was not: a missing file may come with another node.
const RETRY: Duration = Duration::from_secs(3);
/// Before an attempt that does not end is told once more: the order may have been lost.
const STOP_AGAIN: Duration = Duration::from_secs(10);
/// How much of the curve is told in a record at most, besides the thinning of [`super::Curve`].
const POINTS_PER_RECORD: usize = 256;

impl Jobs {
    /// Something happened: what has to be done now. `at` is in seconds since 1970.
    pub fn on(&mut self, event: Event, at: u64, now: Instant) -> Vec<Effect> {
        match event {
            Event::Weighed { id, result } => self.with(&id, |job| job.weighed(result, at, now)),
            Event::Reported { id, epoch, report } => self.with(&id, |job| job.reported(epoch, report, at)),
            Event::RunEnded { id, epoch, result } => {
                self.with(&id, |job| job.run_ended(epoch, result, at, now))
            }
            Event::Copied { id, hash, node, result } => self.with(&id.clone(), |job| {
                job.moment.is_copying = false;
                match result {
                    Ok(()) => vec![Effect::Record(Record::Copied { id, hash, node })],
                    Err(error) => {
                        push_line(&mut job.moment.said, at, &format!("a checkpoint was not copied: {error}"));
                        job.moment.copy_after = Some(now + RETRY);
                        Vec::new()
                    }
                }
            }),
            Event::Published { id, hash, wish, result } => self.with(&id.clone(), |job| {
                job.moment.is_publishing = false;
                if let Err(error @ Error::Unavailable(_)) = &result
                    && job.stored.spec.publish.as_ref() == Some(&wish)
                {
                    // The deployment is being formed, or is formed again: what was promised with the job is kept.
                    if job.moment.publish_after.is_none() {
                        push_line(&mut job.moment.said, at, &format!("not served yet: {error}"));
                    }
                    job.moment.publish_after = Some(now + RETRY);
                    return Vec::new();
                }
                job.moment.publish_after = None;
                let problem = result.err().map(|error| line(&error.to_string()));
                let (deployment, adapter) = (wish.deployment, wish.adapter);
                let publication = Publication { hash, deployment, adapter, problem };
                vec![Effect::Record(Record::Published { id, publication, at })]
            }),
            Event::Tidied { asked, tidied } => self.tidied(&asked, &tidied),
            Event::NodeLost { node } => self.node_lost(node, at),
            Event::NodeJoined { .. } => {
                for job in self.jobs.values_mut() {
                    (job.moment.retry_at, job.moment.copy_after, job.moment.tries) = (None, None, 0);
                }
                vec![Effect::Tidy]
            }
        }
    }

    fn with(&mut self, id: &str, change: impl FnOnce(&mut Job) -> Vec<Effect>) -> Vec<Effect> {
        self.jobs.get_mut(id).map(change).unwrap_or_default()
    }

    fn node_lost(&mut self, node: NodeId, at: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (id, job) in &mut self.jobs {
            if let Some(run) = &mut job.moment.run
                && run.node != node
                && !run.is_stopping
                && run.stages.iter().any(|stage| stage.node == node)
            {
                // The others cannot go on without it, and what they have done since the last checkpoint is not whole without its part.
                run.is_stopping = true;
                let (epoch, leading) = (run.epoch, run.node);
                push_line(
                    &mut job.moment.said,
                    at,
                    &format!("the node {}, which had a stage, is lost", node.short()),
                );
                effects.push(Effect::Stop { id: id.clone(), epoch, node: leading, saves: false });
            }
            let Some(run) = job.moment.run.take_if(|run| run.node == node) else { continue };
            push_line(&mut job.moment.said, at, &format!("the node {} is lost", node.short()));
            job.forget_undurable();
            effects.push(Effect::Abandon { id: id.clone(), epoch: run.epoch });
        }
        // It may have left the cluster, with what it has.
        effects.push(Effect::Tidy);
        effects
    }

    /// What is known of copies follows what the nodes say. `asked`: what was known when they were asked; a node does not answer for what it
    /// got since.
    fn tidied(&self, asked: &BTreeMap<ContentHash, BTreeSet<NodeId>>, tidied: &Tidied) -> Vec<Effect> {
        let Tidied { held: found, members } = tidied;
        let mut records = Vec::new();
        for (id, job) in &self.jobs {
            for HeldCheckpoint { checkpoint, holders, .. } in &job.stored.checkpoints {
                let (id, hash) = (id.clone(), checkpoint.hash);
                let has_left = |node: &NodeId| !members.is_empty() && !members.contains(node);
                let was_asked = |node: &NodeId| asked.get(&hash).is_some_and(|then| then.contains(node));
                let lacks = |node: &NodeId| found.get(node).is_some_and(|found| !found.contains(&hash));
                let lost = holders.iter().filter(|node| has_left(node) || (was_asked(node) && lacks(node)));
                records.extend(lost.map(|node| Record::Lost { id: id.clone(), hash, node: *node }));
                let has = found.iter().filter(|(node, found)| found.contains(&hash) && !has_left(node));
                let new = has.filter(|(node, _)| !holders.contains(node));
                records.extend(new.map(|(node, _)| Record::Copied { id: id.clone(), hash, node: *node }));
            }
        }
        // What a node has comes first: a checkpoint that is on another one now is not lost meanwhile.
        records.sort_by_key(|record| matches!(record, Record::Lost { .. }));
        records.into_iter().map(Effect::Record).collect()
    }

    /// Gives jobs to nodes, oldest first, one for each node; copies checkpoints; serves what is finished. Called after every change
    /// and when it is time ([`Jobs::next_wake`]).
    pub fn schedule(&mut self, offers: &[JobOffer], at: u64, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        let mut busy: Vec<NodeId> = self.jobs.values().flat_map(Job::runs_on).collect();
        let mut order: Vec<String> = self.jobs.keys().cloned().collect();
        order.sort_by_key(|id| self.jobs.get(id).map(|job| job.stored.order));
        let mut epoch = self.used_epoch;
        for id in order {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            job.moment.forget_due(now);
            if job.is_waiting_to_run() {
                match job.place(offers, &busy) {
                    Place::Weigh => {
                        job.moment.is_weighing = true;
                        effects
                            .push(Effect::Weigh { id: id.clone(), spec: Box::new(job.stored.spec.clone()) });
                    }
                    Place::On(node, stages) => {
                        epoch += 1;
                        busy.extend(stages.iter().map(|stage| stage.node));
                        let started = Record::Started { id: id.clone(), epoch, node, stages, at };
                        effects.push(Effect::Record(started));
                    }
                    Place::Later => job.moment.waits_for = None,
                    Place::Nowhere(why) => job.moment.waits_for = Some(why),
                }
            }
            effects.extend(job.stop_again(now));
            effects.extend(job.copy(offers));
            effects.extend(job.serve(now));
        }
        effects
    }

    /// When [`Jobs::schedule`] has something to do although nothing happened.
    pub fn next_wake(&self, now: Instant) -> Option<Instant> {
        let wake = |job: &Job| {
            let is_unplaced = job.stored.aim == Aim::Run && job.moment.run.is_none();
            let run = is_unplaced.then(|| job.moment.retry_at.unwrap_or(now + RETRY));
            let publish = job.moment.publish_after.filter(|_| !job.moment.is_publishing);
            let stop = job.moment.run.as_ref().and_then(|run| run.stop_again);
            run.into_iter().chain(job.moment.copy_after).chain(publish).chain(stop).min()
        };
        self.jobs.values().filter_map(wake).min()
    }
}

impl Moment {
    /// What was to wait until now waits no more. What is due and cannot be done is looked at again when something changes, or a
    /// while later: a time that has passed and stayed would wake the coordinator without an end.
    fn forget_due(&mut self, now: Instant) {
        for after in [&mut self.retry_at, &mut self.copy_after] {
            after.take_if(|at| *at <= now);
        }
    }
}

enum Place {
    /// What it needs is not known.
    Weigh,
    /// Led by this node.
    On(NodeId, Vec<PlannedStage>),
    /// Another job runs where it could.
    Later,
    /// What is missing.
    Nowhere(String),
}

impl Job {
    fn runs_on(&self) -> Vec<NodeId> {
        let Some(run) = &self.moment.run else { return Vec::new() };
        std::iter::once(run.node).chain(run.stages.iter().map(|stage| stage.node)).collect()
    }

    fn is_waiting_to_run(&self) -> bool {
        self.stored.aim == Aim::Run
            && self.moment.run.is_none()
            && !self.moment.is_weighing
            && self.moment.retry_at.is_none()
    }

    fn place(&mut self, offers: &[JobOffer], busy: &[NodeId]) -> Place {
        let Some(need) = self.moment.need.clone().or_else(|| self.known_need()) else { return Place::Weigh };
        let need = self.moment.need.insert(need);
        let spec = &self.stored.spec;
        // Asked again with every event: nothing has changed then, mostly.
        let rooms: Vec<(NodeId, ByteCount)> = offers.iter().map(|offer| (offer.node, offer.free)).collect();
        if let Some((_, missing)) = self.moment.nowhere.as_ref().filter(|(known, _)| *known == rooms) {
            return Place::Nowhere(missing.clone());
        }
        let everywhere: Vec<&JobOffer> = offers.iter().collect();
        if let Err(missing) = need.plan(spec, &everywhere, &|_| 0) {
            self.moment.nowhere = Some((rooms, missing.clone()));
            return Place::Nowhere(missing);
        }
        // Another node can copy from one that has a checkpoint: somebody there must have one.
        let checkpoints = &self.stored.checkpoints;
        let is_here = |node: &NodeId| offers.iter().any(|offer| offer.node == *node);
        let newest = checkpoints.iter().rev().find(|held| held.holders.iter().any(is_here));
        if newest.is_none() && !checkpoints.is_empty() {
            let mut holders: Vec<String> = checkpoints
                .iter()
                .flat_map(|held| &held.holders)
                .map(mlxnode_cluster::NodeId::short)
                .collect();
            holders.sort();
            holders.dedup();
            if holders.is_empty() {
                let why = "no node has any of its checkpoints any more: bring a node back that has one, or cancel the job and submit it again";
                return Place::Nowhere(why.to_owned());
            }
            let holders = holders.join(", ");
            return Place::Nowhere(format!("its checkpoints are on nodes that are not there: {holders}"));
        }
        let holders = newest.map(|held| held.holders.as_slice()).unwrap_or_default();
        let avoids = self.moment.avoids;
        let preferred = |node| 2 * u8::from(avoids != Some(node)) + u8::from(holders.contains(&node));
        let free: Vec<&JobOffer> = offers.iter().filter(|offer| !busy.contains(&offer.node)).collect();
        match need.plan(spec, &free, &preferred).map(|stages| (stages.first().cloned(), stages)) {
            Ok((Some(first), stages)) => Place::On(first.node, stages),
            _ => Place::Later,
        }
    }

    /// An attempt that was told to end and goes on is told again.
    fn stop_again(&mut self, now: Instant) -> Option<Effect> {
        let run = self.moment.run.as_mut().filter(|run| run.is_stopping)?;
        let is_due = run.stop_again.is_some_and(|at| at <= now);
        if is_due || run.stop_again.is_none() {
            run.stop_again = Some(now + STOP_AGAIN);
        }
        let (id, epoch, node) = (self.stored.spec.id.clone(), run.epoch, run.node);
        is_due.then_some(Effect::Stop { id, epoch, node, saves: !self.stored.aim.is_over() })
    }

    /// A copy of the newest checkpoint for another node, where it has too few.
    fn copy(&mut self, offers: &[JobOffer]) -> Option<Effect> {
        if self.moment.is_copying || self.moment.copy_after.is_some() {
            return None;
        }
        let held = self.stored.checkpoints.last()?;
        let is_here = |node: &NodeId| offers.iter().any(|offer| offer.node == *node);
        if held.holders.len() >= COPIES || !held.holders.iter().any(is_here) {
            return None;
        }
        let others = offers.iter().filter(|offer| !held.holders.contains(&offer.node));
        let target = others.max_by_key(|offer| (offer.free, offer.node))?.node;
        self.moment.is_copying = true;
        let spec = Box::new(self.stored.spec.clone());
        Some(Effect::Copy { spec, checkpoint: held.checkpoint.clone(), node: target })
    }

    /// What the job was to be served as when it is finished, if it is not, and it is time to try.
    fn serve(&mut self, now: Instant) -> Option<Effect> {
        let wish = self.stored.spec.publish.clone()?;
        if self.moment.publish_after.is_some_and(|at| at > now) {
            return None;
        }
        let is_due = self.stored.aim == Aim::Finished
            && !self.moment.is_publishing
            && !self.stored.publications.iter().any(|it| {
                it.deployment == wish.deployment && it.adapter == wish.adapter && {
                    self.stored.checkpoints.last().is_some_and(|held| held.checkpoint.hash == it.hash)
                }
            });
        let Some(last) = self.stored.checkpoints.last().filter(|_| is_due) else {
            if !self.moment.is_publishing {
                self.moment.publish_after = None;
            }
            return None;
        };
        let hash = last.checkpoint.hash;
        self.moment.is_publishing = true;
        let id = self.stored.spec.id.clone();
        Some(Effect::Publish { source: super::artifact_source(&id, hash), id, hash, wish })
    }

    fn weighed(&mut self, result: Result<Need, Error>, at: u64, now: Instant) -> Vec<Effect> {
        self.moment.is_weighing = false;
        match result {
            Ok(need) => {
                self.moment.need = Some(need);
                Vec::new()
            }
            Err(error) if is_for_good(&error) => self.fail(error.to_string(), at),
            Err(error) => {
                self.moment.waits_for = Some(error.to_string());
                self.moment.retry_at = Some(now + RETRY);
                Vec::new()
            }
        }
    }

    fn reported(&mut self, epoch: u64, report: Report, at: u64) -> Vec<Effect> {
        let id = self.stored.spec.id.clone();
        let moment = &mut self.moment;
        // Of an attempt that is over: whoever reports does not know yet.
        let Some(run) = moment.run.as_mut().filter(|run| run.epoch == epoch) else { return Vec::new() };
        match report {
            Report::Preparing(what) => run.phase = RunPhase::Preparing(line(&what)),
            Report::Running { step } => {
                run.phase = RunPhase::Running;
                (moment.tries, moment.avoids) = (0, None);
                moment.curve.cut_after(step);
                moment.progress.step = step;
                let from = if step == 0 { "the beginning".to_owned() } else { format!("step {step}") };
                push_line(&mut moment.said, at, &format!("computes from {from} on {}", run.node.short()));
            }
            Report::Advanced { points, progress } => {
                for point in points {
                    run.points.push(point);
                    moment.curve.push(point);
                }
                if let Some(progress) = progress {
                    moment.progress = progress;
                }
            }
            Report::Held(why) => {
                push_line(&mut moment.said, at, &format!("stands still: {why}"));
                run.phase = RunPhase::Held(line(&why));
            }
            Report::Going => {
                push_line(&mut moment.said, at, "goes on");
                run.phase = RunPhase::Running;
            }
            Report::Said(text) => push_line(&mut moment.said, at, &text),
            Report::Helped(mut nodes) => {
                nodes.truncate(self.stored.spec.workers as usize);
                run.helpers = nodes;
            }
            Report::Checkpointed(checkpoint) => {
                let points = take_points(&mut run.points);
                let node = run.node;
                let record = Record::Checkpointed { id, epoch, checkpoint, node, points, at };
                return vec![Effect::Record(record)];
            }
        }
        Vec::new()
    }

    fn run_ended(&mut self, epoch: u64, result: Result<RunEnd, Error>, at: u64, now: Instant) -> Vec<Effect> {
        let Some(mut run) = self.moment.run.take_if(|run| run.epoch == epoch) else { return Vec::new() };
        let id = self.stored.spec.id.clone();
        if self.stored.aim.is_over() {
            return vec![Effect::Tidy];
        }
        match result {
            Ok(RunEnd::Finished(checkpoint)) => {
                let (points, node) = (take_points(&mut run.points), run.node);
                // Should this not become durable, the job runs again from its newest checkpoint.
                let finished = Record::Finished { id, epoch, checkpoint, node, points, at };
                vec![Effect::Record(finished)]
            }
            Ok(RunEnd::Yielded) => {
                self.forget_undurable();
                if self.stored.aim == Aim::Run {
                    push_line(&mut self.moment.said, at, "its node let go of it");
                }
                Vec::new()
            }
            Ok(RunEnd::Failed(reason)) => self.fail(reason, at),
            Err(_) if run.is_stopping => {
                self.forget_undurable();
                Vec::new()
            }
            Err(error) if is_for_good(&error) => self.fail(error.to_string(), at),
            Err(
                error
                @ (Error::Unavailable(_) | Error::TimedOut(_) | Error::Cancelled(_) | Error::TooMany(_)),
            ) => {
                self.forget_undurable();
                self.moment.waits_for = Some(error.to_string());
                if matches!(run.phase, RunPhase::Preparing(_)) {
                    // What this node could not fetch or read another one may. One that computed has the newest checkpoint.
                    self.moment.avoids = Some(run.node);
                }
                let pause = RETRY.saturating_mul(1 << self.moment.tries.min(6));
                self.moment.tries = self.moment.tries.saturating_add(1);
                self.moment.retry_at = Some(now + pause.min(LONGEST_PAUSE));
                Vec::new()
            }
            Err(error) => {
                self.forget_undurable();
                let reason = error.to_string();
                let stumbled = Record::Stumbled { id: id.clone(), epoch, reason: reason.clone(), at };
                let failures = self.stored.failures + 1;
                // A single death is nobody's fault, and elsewhere the model may have to be fetched first.
                self.moment.avoids = (failures > 1).then_some(run.node);
                if failures >= MAX_FAILURES {
                    let reason = format!("{failures} workers in a row ended; the last one: {reason}");
                    return vec![Effect::Record(stumbled), Effect::Record(Record::Failed { id, reason, at })];
                }
                let pause = FIRST_PAUSE.saturating_mul(1 << failures.min(6).saturating_sub(1));
                self.moment.retry_at = Some(now + pause.min(LONGEST_PAUSE));
                vec![Effect::Record(stumbled)]
            }
        }
    }

    fn fail(&mut self, reason: String, at: u64) -> Vec<Effect> {
        self.forget_undurable();
        vec![Effect::Record(Record::Failed { id: self.stored.spec.id.clone(), reason, at })]
    }

    /// What an attempt did since its last checkpoint is done again.
    fn forget_undurable(&mut self) {
        self.moment.curve = self.stored.curve.clone();
        self.moment.progress.step = self.newest().map_or(0, |checkpoint| checkpoint.step);
    }

    fn newest(&self) -> Option<&Checkpoint> {
        self.stored.checkpoints.last().map(|held| &held.checkpoint)
    }
}

/// Would it be the same on every node and at any time?
fn is_for_good(error: &Error) -> bool {
    matches!(error, Error::Invalid(_) | Error::NotFound(_) | Error::Refused(_) | Error::NameTaken { .. })
}

/// The newest in full, the others thinned.
fn take_points(curve: &mut super::Curve) -> Vec<LossPoint> {
    let mut points = std::mem::take(curve).points().to_vec();
    while points.len() > POINTS_PER_RECORD {
        let mut place = 0;
        let last = points.len();
        points.retain(|point| {
            place += 1;
            place % 2 == 1 || place == last || point.validation.is_some()
        });
        if points.len() > POINTS_PER_RECORD && points.iter().all(|point| point.validation.is_some()) {
            points.drain(..points.len() - POINTS_PER_RECORD);
        }
    }
    points
}
