//! A simulated cluster around the job table: nodes, disks, workers, a journal that may fail; all of it dies and comes back as a test wants.

pub(crate) use mlxnode_cluster::NodeId;
pub(crate) use mlxnode_compute::ByteCount;
pub(crate) use mlxnode_coordinator::Error;
pub(crate) use mlxnode_coordinator::jobs::{
    Checkpoint, ContentHash, Effect, Event, JobKind, JobOffer, JobSpec, JobState, Jobs, LossPoint,
    MAX_FAILURES, MAX_JOBS, Need, Progress, Publication, PublishWish, Record, Report, RunEnd, SavePolicy,
    Tidied, Wanted, artifact_source,
};
use std::collections::VecDeque;
pub(crate) use std::collections::{BTreeMap, BTreeSet};
pub(crate) use std::time::{Duration, Instant};

pub(crate) const NODES: u8 = 3;
pub(crate) const STEPS: u64 = 12;

pub(crate) fn node(number: u8) -> NodeId {
    NodeId::from_bytes([number + 1; 32])
}

pub(crate) fn spec(id: &str) -> JobSpec {
    JobSpec {
        id: id.to_owned(),
        kind: JobKind::Rehearsal,
        model: String::new(),
        configuration: String::new(),
        inputs: Vec::new(),
        memory: Some(ByteCount(10)),
        workers: 1,
        // One of them on two nodes.
        stages: if id.ends_with('3') { 2 } else { 1 },
        demand: None,
        share: 25,
        saves: SavePolicy { keep: 2, ..SavePolicy::default() },
        publish: Some(PublishWish { deployment: "demo".into(), adapter: id.to_owned() }),
        owner: String::new(),
        labels: Default::default(),
    }
}

/// What a job's state after a step is, whoever computes it: the hash of all before.
pub(crate) fn state_after(id: &str, step: u64) -> ContentHash {
    (0..step).fold(ContentHash::of(id.as_bytes()), |hash, _| ContentHash::of(hash.as_bytes()))
}

pub(crate) fn checkpoint(id: &str, step: u64) -> Checkpoint {
    Checkpoint { step, hash: state_after(id, step), bytes: 1 }
}

/// An attempt on a node, which may live on after the coordinator has given it up.
#[derive(Clone)]
pub(crate) struct Runner {
    pub(crate) id: String,
    pub(crate) epoch: u64,
    pub(crate) node: NodeId,
    pub(crate) step: u64,
    /// Checkpoints of its order that it did not find, and so goes on from an older one.
    pub(crate) skipped: Vec<ContentHash>,
    /// It has saved, and the coordinator has not heard.
    pub(crate) unheard: Option<Checkpoint>,
    /// Set when it has been told to end.
    pub(crate) saves_and_ends: Option<bool>,
}

pub(crate) struct World {
    pub(crate) log: Vec<Record>,
    pub(crate) jobs: Jobs,
    pub(crate) alive: BTreeSet<NodeId>,
    /// Checkpoints on the disks of nodes, which outlive the nodes.
    pub(crate) disks: BTreeMap<NodeId, BTreeSet<(String, ContentHash)>>,
    pub(crate) runners: Vec<Runner>,
    pub(crate) copies: VecDeque<(String, Checkpoint, NodeId)>,
    pub(crate) publications: VecDeque<(String, ContentHash, PublishWish)>,
    /// Answers of nodes that have tidied up, on their way.
    pub(crate) tidied: VecDeque<Event>,
    pub(crate) served: BTreeMap<String, ContentHash>,
    pub(crate) acknowledged: BTreeSet<String>,
    pub(crate) cancelled: BTreeSet<String>,
    pub(crate) log_fails: bool,
    /// Orders to stop do not arrive.
    pub(crate) stops_are_lost: bool,
    pub(crate) now: Instant,
    pub(crate) at: u64,
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            log: Vec::new(),
            jobs: Jobs::default(),
            alive: (0..NODES).map(node).collect(),
            disks: BTreeMap::new(),
            runners: Vec::new(),
            copies: VecDeque::new(),
            publications: VecDeque::new(),
            tidied: VecDeque::new(),
            served: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            cancelled: BTreeSet::new(),
            log_fails: false,
            stops_are_lost: false,
            now: Instant::now(),
            at: 1000,
        }
    }

    /// As the actor does it.
    pub(crate) fn carry_out(&mut self, effects: Vec<Effect>) {
        let mut effects = VecDeque::from(effects);
        let mut is_scheduled = false;
        loop {
            let Some(effect) = effects.pop_front() else {
                if std::mem::replace(&mut is_scheduled, true) {
                    break;
                }
                let offers: Vec<JobOffer> = self
                    .alive
                    .iter()
                    .map(|node| JobOffer { node: *node, name: node.short(), free: ByteCount(100) })
                    .collect();
                effects.extend(self.jobs.schedule(&offers, self.at, self.now));
                let wake = self.jobs.next_wake(self.now);
                assert!(wake.is_none_or(|wake| wake > self.now), "it would look again at once, for ever");
                continue;
            };
            match effect {
                Effect::Record(record) => effects.extend(self.write(record).unwrap_or_default()),
                Effect::Run { node, order } => {
                    // A node lets go of an older attempt when it hears of a newer one; others may still run theirs.
                    self.runners.retain(|runner| runner.node != node || runner.id != order.spec.id);
                    let mut skipped: Vec<ContentHash> = Vec::new();
                    let from = order.checkpoints.iter().find(|it| {
                        let is_there = self.is_somewhere(&order.spec.id, it);
                        skipped.extend((!is_there).then_some(it.hash));
                        is_there
                    });
                    let step = from.map_or(0, |checkpoint| checkpoint.step);
                    assert!(
                        step > 0 || order.checkpoints.is_empty(),
                        "a job with checkpoints must not begin anew: {:?}",
                        order.checkpoints
                    );
                    let (id, epoch) = (order.spec.id.clone(), order.epoch);
                    // It begins with a copy of its own.
                    let own = from.map(|checkpoint| (id.clone(), checkpoint.hash));
                    self.disks.entry(node).or_default().extend(own);
                    let (unheard, saves_and_ends) = (None, None);
                    self.runners.push(Runner { id, epoch, node, step, skipped, unheard, saves_and_ends });
                }
                Effect::Stop { .. } if self.stops_are_lost => {}
                Effect::Stop { id, epoch, saves, .. } => {
                    for runner in &mut self.runners {
                        if runner.id == id && runner.epoch == epoch {
                            runner.saves_and_ends = Some(saves);
                        }
                    }
                }
                Effect::Copy { spec, checkpoint, node } => self.copies.push_back((spec.id, checkpoint, node)),
                Effect::Tidy => self.tidy(),
                Effect::Publish { id, hash, wish, .. } => self.publications.push_back((id, hash, wish)),
                Effect::Abandon { .. } => {} // its node may be alive, cut off, and go on
                Effect::Weigh { id, .. } => {
                    let weighed = Event::Weighed { id, result: Ok(Need::Fixed(ByteCount(10))) };
                    effects.extend(self.jobs.on(weighed, self.at, self.now));
                }
            }
        }
        self.check();
    }

    pub(crate) fn is_somewhere(&self, id: &str, checkpoint: &Checkpoint) -> bool {
        let held = (id.to_owned(), checkpoint.hash);
        self.alive.iter().any(|node| self.disks.get(node).is_some_and(|disk| disk.contains(&held)))
    }

    pub(crate) fn write(&mut self, record: Record) -> Result<Vec<Effect>, Error> {
        if self.log_fails {
            return Err(Error::Failed("no room for the control log".into()));
        }
        self.log.push(record.clone());
        Ok(self.jobs.apply(record))
    }

    /// As the nodes do it; what they answer comes later.
    pub(crate) fn tidy(&mut self) {
        let (wanted, asked) = (self.jobs.wanted(), self.jobs.holders());
        let mut tidied = Tidied { members: (0..NODES).map(node).collect(), ..Tidied::default() };
        for node in &self.alive {
            let disk = self.disks.entry(*node).or_default();
            disk.retain(|(id, hash)| {
                let runner = self.runners.iter().find(|runner| runner.node == *node && runner.id == *id);
                let Some(job) = wanted.iter().find(|job| job.id == *id) else { return runner.is_some() };
                let Some(newest) = job.checkpoints.iter().max_by_key(|it| it.step) else { return true };
                // Who goes on from an older checkpoint makes new ones that are older than the newest.
                let is_behind = runner.is_some_and(|runner| runner.skipped.contains(&newest.hash));
                let is_newer = (newest.step + 1..=STEPS).any(|step| state_after(id, step) == *hash);
                is_behind || is_newer || job.checkpoints.iter().any(|it| it.hash == *hash)
            });
            let wanted = wanted.iter().flat_map(|job| &job.checkpoints).map(|it| it.hash);
            let held = wanted.filter(|wanted| disk.iter().any(|(_, hash)| hash == wanted)).collect();
            tidied.held.insert(*node, held);
        }
        let views = self.jobs.view();
        for runner in &self.runners {
            // What an attempt has saved stays until it was heard of. What one says that is over changes nothing.
            let counts = views.iter().any(|view| view.spec.id == runner.id && view.epoch == runner.epoch);
            let saved = runner.unheard.as_ref().filter(|_| counts && self.alive.contains(&runner.node));
            let is_here = |it: &Checkpoint| self.disks[&runner.node].contains(&(runner.id.clone(), it.hash));
            assert!(saved.is_none_or(is_here), "a checkpoint nobody has heard of was removed");
        }
        self.tidied.push_back(Event::Tidied { asked, tidied });
    }

    /// The nodes' answer comes.
    pub(crate) fn hear_what_is_there(&mut self) {
        if let Some(event) = self.tidied.pop_front() {
            self.happen(event);
        }
    }

    pub(crate) fn happen(&mut self, event: Event) {
        let effects = self.jobs.on(event, self.at, self.now);
        self.carry_out(effects);
    }

    pub(crate) fn submit(&mut self, id: &str) {
        let Ok(records) = self.jobs.submit(spec(id), self.at) else { return };
        let mut effects = Vec::new();
        for record in records.into_iter().flatten() {
            match self.write(record) {
                Ok(more) => effects.extend(more),
                Err(_) => return self.carry_out(effects),
            }
        }
        self.acknowledged.insert(id.to_owned());
        self.carry_out(effects);
    }

    pub(crate) fn change(&mut self, decided: Result<Option<Record>, Error>) -> bool {
        let Ok(Some(record)) = decided else { return false };
        match self.write(record) {
            Ok(effects) => {
                self.carry_out(effects);
                true
            }
            Err(_) => false,
        }
    }

    /// One runner does its next piece.
    pub(crate) fn advance(&mut self, which: usize) {
        if self.runners.is_empty() {
            return;
        }
        let which = which % self.runners.len();
        let runner = self.runners[which].clone();
        if !self.alive.contains(&runner.node) {
            return;
        }
        if let Some(saved) = self.runners[which].unheard.take() {
            let (id, epoch) = (runner.id, runner.epoch);
            return self.happen(Event::Reported { id, epoch, report: Report::Checkpointed(saved) });
        }
        let (id, epoch) = (runner.id.clone(), runner.epoch);
        let report = |report| Event::Reported { id: id.clone(), epoch, report };
        let saved = (id.clone(), state_after(&id, runner.step));
        if let Some(saves) = runner.saves_and_ends {
            self.runners.remove(which);
            if saves && runner.step > 0 {
                self.disks.entry(runner.node).or_default().insert(saved);
                self.happen(report(Report::Checkpointed(checkpoint(&id, runner.step))));
            }
            return self.happen(Event::RunEnded { id, epoch, result: Ok(RunEnd::Yielded) });
        }
        let step = runner.step + 1;
        let is_last = step >= STEPS;
        self.runners[which].step = step;
        let point = LossPoint { step, training: Some(1.0 / step as f64), validation: None };
        let progress = Some(Progress { step, steps: STEPS, ..Progress::default() });
        self.happen(report(Report::Running { step: runner.step }));
        self.happen(report(Report::Advanced { points: vec![point], progress }));
        if is_last {
            self.runners.retain(|runner| (&runner.id, runner.epoch) != (&id, epoch));
            self.disks.entry(runner.node).or_default().insert((id.clone(), state_after(&id, STEPS)));
            let end = Ok(RunEnd::Finished(checkpoint(&id, STEPS)));
            self.happen(Event::RunEnded { id, epoch, result: end });
        } else if step.is_multiple_of(3) {
            self.disks.entry(runner.node).or_default().insert((id.clone(), state_after(&id, step)));
            // An event of before may have ended it or moved it.
            let runner = self.runners.iter_mut().find(|runner| (&runner.id, runner.epoch) == (&id, epoch));
            if let Some(runner) = runner {
                runner.unheard = Some(checkpoint(&id, step));
            }
        }
    }

    pub(crate) fn finish_copy(&mut self, works: bool) {
        let Some((id, checkpoint, target)) = self.copies.pop_front() else { return };
        let works = works && self.alive.contains(&target) && self.is_somewhere(&id, &checkpoint);
        let result = match works {
            true => {
                self.disks.entry(target).or_default().insert((id.clone(), checkpoint.hash));
                Ok(())
            }
            false => Err(Error::Unavailable("gone".into())),
        };
        self.happen(Event::Copied { id, hash: checkpoint.hash, node: target, result });
    }

    /// `works`: the deployment is ready.
    pub(crate) fn finish_publication(&mut self, works: bool) {
        let Some((id, hash, wish)) = self.publications.pop_front() else { return };
        let result = match works {
            true => {
                self.served.insert(id.clone(), hash);
                Ok(())
            }
            false => Err(Error::Unavailable("demo is not ready".into())),
        };
        self.happen(Event::Published { id, hash, wish, result });
    }

    pub(crate) fn kill_worker(&mut self, which: usize) {
        if self.runners.is_empty() {
            return;
        }
        let runner = self.runners.remove(which % self.runners.len());
        let result = Err(Error::Failed("the worker ended with signal 9".into()));
        self.happen(Event::RunEnded { id: runner.id, epoch: runner.epoch, result });
    }

    /// `cut_off`: the node lives, but nobody sees it, and its runner goes on.
    pub(crate) fn lose_node(&mut self, number: u8, cut_off: bool) {
        let node = node(number % NODES);
        if !self.alive.remove(&node) {
            return;
        }
        if !cut_off {
            self.runners.retain(|runner| runner.node != node);
        }
        self.happen(Event::NodeLost { node });
    }

    pub(crate) fn revive_node(&mut self, number: u8) {
        let node = node(number % NODES);
        if self.alive.insert(node) {
            self.happen(Event::NodeJoined { node });
        }
    }

    /// The coordinator dies with all that it knew, and another reads the log, folded or not.
    pub(crate) fn restart_coordinator(&mut self, folded: bool) {
        if folded {
            self.log = self.jobs.records();
        }
        // As it is written and read.
        let text = serde_json::to_vec(&self.log).expect("records are JSON");
        self.log = serde_json::from_slice(&text).expect("what was written can be read");
        self.jobs = Jobs::restore(self.log.clone());
        self.copies.clear();
        self.publications.clear();
        self.tidied.clear();
        self.carry_out(vec![Effect::Tidy]);
    }

    pub(crate) fn check(&self) {
        let views = self.jobs.view();
        for id in &self.acknowledged {
            assert!(views.iter().any(|view| view.spec.id == *id), "the acknowledged job {id} is lost");
        }
        for view in &views {
            let id = &view.spec.id;
            for held in &view.checkpoints {
                assert_eq!(
                    held.checkpoint,
                    checkpoint(id, held.checkpoint.step),
                    "a wrong checkpoint of {id}"
                );
            }
            if view.state == JobState::Finished {
                let last = view.checkpoints.last().expect("a result");
                assert_eq!(last.checkpoint, checkpoint(id, STEPS), "{id} is finished with a wrong result");
            }
            if self.cancelled.contains(id) {
                assert_eq!(view.state, JobState::Cancelled, "{id} was cancelled");
            }
        }
        for (id, hash) in &self.served {
            assert_eq!(*hash, state_after(id, STEPS), "a wrong result of {id} is served");
        }
        // What is durable is the fold of the records, whatever is not durable.
        let restored = Jobs::restore(self.log.clone());
        assert_eq!(restored.records(), self.jobs.records());
    }

    /// All is well again: everything that is wanted comes to its end.
    pub(crate) fn settle(&mut self) {
        self.log_fails = false;
        for number in 0..NODES {
            self.revive_node(number);
        }
        let ids: Vec<String> = self.acknowledged.iter().cloned().collect();
        for id in ids {
            let resumed = self.jobs.resume(&id, self.at);
            self.change(resumed);
        }
        for round in 0..1000 {
            self.now += Duration::from_secs(5);
            self.at += 5;
            self.advance(round);
            self.hear_what_is_there();
            self.finish_copy(true);
            self.finish_publication(true);
            self.carry_out(Vec::new());
        }
        for view in self.jobs.view() {
            let id = view.spec.id.as_str();
            match self.cancelled.contains(id) {
                true => assert_eq!(view.state, JobState::Cancelled),
                false => {
                    assert_eq!(view.state, JobState::Finished, "{id}: {}", view.detail);
                    assert_eq!(self.served.get(id), Some(&state_after(id, STEPS)), "{id} is served");
                    let steps: Vec<u64> = view.curve.iter().map(|point| point.step).collect();
                    assert!(steps.is_sorted(), "{steps:?}");
                    assert!(
                        view.checkpoints.last().expect("a result").holders.len() >= 2,
                        "{id} is on two nodes"
                    );
                }
            }
        }
    }
}
