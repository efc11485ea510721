//! The job table against a simulated cluster that dies everywhere: workers, nodes, the coordinator, all of it, between any two
//! events. No acknowledged job is lost, none is finished with anything but what it computes, and the records say all that counts.

use mlxnode_cluster::NodeId;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{
    Checkpoint, ContentHash, Effect, Event, JobKind, JobOffer, JobSpec, JobState, Jobs, LossPoint,
    MAX_FAILURES, MAX_JOBS, Need, Progress, Publication, PublishWish, Record, Report, RunEnd, SavePolicy,
    Tidied, TrainingDemand, Wanted, artifact_source,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

const NODES: u8 = 3;
const STEPS: u64 = 12;

fn node(number: u8) -> NodeId {
    NodeId::from_bytes([number + 1; 32])
}

fn spec(id: &str) -> JobSpec {
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
fn state_after(id: &str, step: u64) -> ContentHash {
    (0..step).fold(ContentHash::of(id.as_bytes()), |hash, _| ContentHash::of(hash.as_bytes()))
}

fn checkpoint(id: &str, step: u64) -> Checkpoint {
    Checkpoint { step, hash: state_after(id, step), bytes: 1 }
}

/// An attempt on a node, which may live on after the coordinator has given it up.
#[derive(Clone)]
struct Runner {
    id: String,
    epoch: u64,
    node: NodeId,
    step: u64,
    /// Checkpoints of its order that it did not find, and so goes on from an older one.
    skipped: Vec<ContentHash>,
    /// It has saved, and the coordinator has not heard.
    unheard: Option<Checkpoint>,
    /// Set when it has been told to end.
    saves_and_ends: Option<bool>,
}

struct World {
    log: Vec<Record>,
    jobs: Jobs,
    alive: BTreeSet<NodeId>,
    /// Checkpoints on the disks of nodes, which outlive the nodes.
    disks: BTreeMap<NodeId, BTreeSet<(String, ContentHash)>>,
    runners: Vec<Runner>,
    copies: VecDeque<(String, Checkpoint, NodeId)>,
    publications: VecDeque<(String, ContentHash, PublishWish)>,
    /// Answers of nodes that have tidied up, on their way.
    tidied: VecDeque<Event>,
    served: BTreeMap<String, ContentHash>,
    acknowledged: BTreeSet<String>,
    cancelled: BTreeSet<String>,
    log_fails: bool,
    /// Orders to stop do not arrive.
    stops_are_lost: bool,
    now: Instant,
    at: u64,
}

impl World {
    fn new() -> Self {
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
    fn carry_out(&mut self, effects: Vec<Effect>) {
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

    fn is_somewhere(&self, id: &str, checkpoint: &Checkpoint) -> bool {
        let held = (id.to_owned(), checkpoint.hash);
        self.alive.iter().any(|node| self.disks.get(node).is_some_and(|disk| disk.contains(&held)))
    }

    fn write(&mut self, record: Record) -> Result<Vec<Effect>, Error> {
        if self.log_fails {
            return Err(Error::Failed("no room for the control log".into()));
        }
        self.log.push(record.clone());
        Ok(self.jobs.apply(record))
    }

    /// As the nodes do it; what they answer comes later.
    fn tidy(&mut self) {
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
    fn hear_what_is_there(&mut self) {
        if let Some(event) = self.tidied.pop_front() {
            self.happen(event);
        }
    }

    fn happen(&mut self, event: Event) {
        let effects = self.jobs.on(event, self.at, self.now);
        self.carry_out(effects);
    }

    fn submit(&mut self, id: &str) {
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

    fn change(&mut self, decided: Result<Option<Record>, Error>) -> bool {
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
    fn advance(&mut self, which: usize) {
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

    fn finish_copy(&mut self, works: bool) {
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
    fn finish_publication(&mut self, works: bool) {
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

    fn kill_worker(&mut self, which: usize) {
        if self.runners.is_empty() {
            return;
        }
        let runner = self.runners.remove(which % self.runners.len());
        let result = Err(Error::Failed("the worker ended with signal 9".into()));
        self.happen(Event::RunEnded { id: runner.id, epoch: runner.epoch, result });
    }

    /// `cut_off`: the node lives, but nobody sees it, and its runner goes on.
    fn lose_node(&mut self, number: u8, cut_off: bool) {
        let node = node(number % NODES);
        if !self.alive.remove(&node) {
            return;
        }
        if !cut_off {
            self.runners.retain(|runner| runner.node != node);
        }
        self.happen(Event::NodeLost { node });
    }

    fn revive_node(&mut self, number: u8) {
        let node = node(number % NODES);
        if self.alive.insert(node) {
            self.happen(Event::NodeJoined { node });
        }
    }

    /// The coordinator dies with all that it knew, and another reads the log, folded or not.
    fn restart_coordinator(&mut self, folded: bool) {
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

    fn check(&self) {
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
    fn settle(&mut self) {
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

#[derive(Clone, Debug)]
enum Step {
    Submit(u8),
    Advance(usize),
    FinishCopy(bool),
    FinishPublication(bool),
    HearWhatIsThere,
    KillWorker(usize),
    LoseNode(u8, bool),
    ReviveNode(u8),
    RestartCoordinator(bool),
    RestartAll,
    Cancel(u8),
    Pause(u8),
    Resume(u8),
    LogFails(bool),
    TimePasses(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..4u8).prop_map(Step::Submit),
        30 => any::<usize>().prop_map(Step::Advance),
        4 => any::<bool>().prop_map(Step::FinishCopy),
        2 => any::<bool>().prop_map(Step::FinishPublication),
        4 => Just(Step::HearWhatIsThere),
        3 => any::<usize>().prop_map(Step::KillWorker),
        2 => (0..NODES, any::<bool>()).prop_map(|(node, cut_off)| Step::LoseNode(node, cut_off)),
        3 => (0..NODES).prop_map(Step::ReviveNode),
        2 => any::<bool>().prop_map(Step::RestartCoordinator),
        1 => Just(Step::RestartAll),
        1 => (0..4u8).prop_map(Step::Cancel),
        1 => (0..4u8).prop_map(Step::Pause),
        2 => (0..4u8).prop_map(Step::Resume),
        1 => any::<bool>().prop_map(Step::LogFails),
        5 => (0..90u64).prop_map(Step::TimePasses),
    ]
}

fn play(steps: &[Step]) {
    let mut world = World::new();
    for step in steps {
        let id = |number: u8| format!("job-{number}");
        match step.clone() {
            Step::Submit(number) => world.submit(&id(number)),
            Step::Advance(which) => world.advance(which),
            Step::FinishCopy(works) => world.finish_copy(works),
            Step::FinishPublication(works) => world.finish_publication(works),
            Step::HearWhatIsThere => world.hear_what_is_there(),
            Step::KillWorker(which) => world.kill_worker(which),
            Step::LoseNode(number, cut_off) => world.lose_node(number, cut_off),
            Step::ReviveNode(number) => world.revive_node(number),
            Step::RestartCoordinator(folded) => world.restart_coordinator(folded),
            Step::RestartAll => {
                world.runners.clear();
                world.restart_coordinator(false);
            }
            Step::Cancel(number) => {
                let decided = world.jobs.cancel(&id(number), world.at);
                if world.change(decided) {
                    world.cancelled.insert(id(number));
                }
            }
            Step::Pause(number) => {
                let decided = world.jobs.pause(&id(number), "ann", world.at);
                world.change(decided);
            }
            Step::Resume(number) => {
                let decided = world.jobs.resume(&id(number), world.at);
                world.change(decided);
            }
            Step::LogFails(fails) => world.log_fails = fails,
            Step::TimePasses(seconds) => {
                world.now += Duration::from_secs(seconds);
                world.at += seconds;
                world.carry_out(Vec::new());
            }
        }
    }
    world.settle();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_acknowledged_job_is_lost_and_none_ends_with_a_wrong_result(steps in prop::collection::vec(step(), 1..150)) {
        play(&steps);
    }
}

#[test]
fn the_same_id_is_the_same_job_or_an_error() {
    let mut world = World::new();
    world.submit("a");
    assert_eq!(world.jobs.submit(spec("a"), 5), Ok(None));
    let again = JobSpec { owner: "ann".into(), ..spec("a") };
    assert_eq!(world.jobs.submit(again, 5), Ok(None), "whoever asks");
    let demand = Some(TrainingDemand { rows: 2, ..TrainingDemand::default() });
    world
        .jobs
        .submit(JobSpec { demand, ..spec("b") }, 5)
        .unwrap()
        .unwrap()
        .into_iter()
        .for_each(|record| drop(world.jobs.apply(record)));
    assert_eq!(world.jobs.submit(spec("b"), 5), Ok(None), "what it takes is not said by everybody");
    let other = JobSpec { configuration: "iters: 2".into(), ..spec("a") };
    assert!(matches!(world.jobs.submit(other, 5), Err(Error::NameTaken { .. })));
    assert!(matches!(world.jobs.cancel("c", 5), Err(Error::NotFound(_))));
}

#[test]
fn an_attempt_that_is_over_changes_nothing() {
    let mut world = World::new();
    world.submit("a");
    let old = world.runners[0].clone();
    world.kill_worker(0);
    world.now += Duration::from_secs(60);
    world.carry_out(Vec::new());
    assert_eq!(world.runners.len(), 1, "it runs again");
    let before = world.jobs.records();
    let wrong = Checkpoint { step: STEPS, hash: ContentHash::of(b"wrong"), bytes: 1 };
    for event in [
        Event::Reported { id: "a".into(), epoch: old.epoch, report: Report::Checkpointed(wrong.clone()) },
        Event::RunEnded { id: "a".into(), epoch: old.epoch, result: Ok(RunEnd::Finished(wrong.clone())) },
        Event::RunEnded { id: "a".into(), epoch: old.epoch, result: Ok(RunEnd::Failed("no".into())) },
    ] {
        world.happen(event);
        assert_eq!(world.jobs.records(), before);
    }
    // Even as a record, from a coordinator that slept.
    let (node, points) = (old.node, Vec::new());
    let stale = Record::Finished { id: "a".into(), epoch: old.epoch, checkpoint: wrong, node, points, at: 9 };
    world.jobs.apply(stale);
    assert_eq!(world.jobs.records(), before);
}

#[test]
fn a_worker_that_dies_again_and_again_fails_the_job_until_it_is_resumed() {
    let mut world = World::new();
    world.submit("a");
    for _ in 0..MAX_FAILURES {
        world.kill_worker(0);
        world.now += Duration::from_secs(120);
        world.carry_out(Vec::new());
    }
    let view = world.jobs.view().remove(0);
    assert_eq!(view.state, JobState::Failed);
    assert!(view.detail.contains("signal 9"), "{}", view.detail);
    world.settle();
}

#[test]
fn what_cannot_run_anywhere_says_what_is_missing() {
    let mut jobs = Jobs::default();
    let large = JobSpec { memory: Some(ByteCount(8_000_000_000)), ..spec("a") };
    let records = jobs.submit(large, 1).unwrap().unwrap();
    records.into_iter().for_each(|record| drop(jobs.apply(record)));
    let offer = JobOffer { node: node(0), name: "desk".into(), free: ByteCount(2_000_000_000) };
    assert!(jobs.schedule(&[offer], 1, Instant::now()).is_empty());
    let view = jobs.view().remove(0);
    assert_eq!(view.state, JobState::WaitingForNodes);
    for words in ["8.0 GB", "2.0 GB", "desk"] {
        assert!(view.detail.contains(words), "{}", view.detail);
    }
}

#[test]
fn a_job_on_two_nodes_waits_for_both_and_begins_again_when_either_is_lost() {
    let mut world = World::new();
    for number in 1..NODES {
        world.lose_node(number, false);
    }
    let divided = |world: &World| {
        let views = world.jobs.view();
        views.into_iter().find(|view| view.spec.id == "job-3").expect("the job")
    };
    world.submit("job-3");
    let view = divided(&world);
    assert_eq!(view.state, JobState::WaitingForNodes);
    assert!(view.detail.contains("waiting for 1 more node"), "{}", view.detail);
    world.revive_node(1);
    for attempt in 1..=3 {
        let view = divided(&world);
        let nodes: BTreeSet<NodeId> = view.stages.iter().map(|stage| stage.node).collect();
        assert_eq!((nodes.len(), view.attempts, view.node), (2, attempt, Some(view.stages[0].node)));
        for node in &nodes {
            assert_eq!(world.jobs.reserved(*node), ByteCount(10));
        }
        // Another job finds no node.
        world.submit("job-1");
        assert_eq!(world.runners.len(), 1);
        // First the one that leads is lost, then the other one.
        let lost = view.stages[usize::from(attempt % 2 == 0)].node;
        let number = (0..NODES).find(|number| node(*number) == lost).unwrap();
        world.lose_node(number, false);
        if attempt % 2 == 0 {
            assert_eq!(world.runners[0].saves_and_ends, Some(false), "it is told that the line is over");
            world.advance(0);
        }
        // The other job, which has the node that is left now, ends.
        let cancelled = world.jobs.cancel("job-1", 1);
        world.change(cancelled);
        world.cancelled.insert("job-1".into());
        if let Some(place) = world.runners.iter().position(|runner| runner.id == "job-1") {
            world.advance(place);
        }
        world.revive_node(number);
        world.now += Duration::from_secs(60);
        world.carry_out(Vec::new());
    }
    assert_eq!(divided(&world).attempts, 4);
    let restored: Vec<Record> = world.log.clone();
    assert!(restored.iter().any(|it| matches!(it, Record::Started { stages, .. } if stages.len() == 2)));
}

#[test]
fn what_is_due_and_cannot_be_done_does_not_wake_the_coordinator_at_once() {
    let mut world = World::new();
    world.lose_node(2, false);
    world.submit("a");
    (0..4).for_each(|_| world.advance(0));
    assert_eq!(world.copies.len(), 1, "to the other node");
    let running = world.runners[0].node;
    let other = (0..2).find(|number| node(*number) != running).unwrap();
    world.lose_node(other, false);
    world.finish_copy(false);
    // The pause after a copy that failed is over, and no node is there to copy to.
    world.now += Duration::from_secs(60);
    world.carry_out(Vec::new());
    // A node that could not be asked, and then none is there.
    let (id, epoch) = ("a".to_owned(), world.runners[0].epoch);
    let result = Err(Error::Unavailable("the hub does not answer".into()));
    world.runners.clear();
    world.happen(Event::RunEnded { id, epoch, result });
    world.alive.clear();
    world.now += Duration::from_secs(60);
    world.carry_out(Vec::new());
    assert!(world.jobs.next_wake(world.now).is_some(), "it is looked at again, later");
    world.settle();
}

#[test]
fn an_attempt_that_did_not_hear_that_it_is_to_stop_is_told_again() {
    let mut world = World::new();
    for (id, is_cancelled) in [("a", true), ("b", false)] {
        world.submit(id);
        let place = world.runners.iter().position(|runner| runner.id == id).unwrap();
        world.stops_are_lost = true;
        let decided = match is_cancelled {
            true => world.jobs.cancel(id, 1),
            false => world.jobs.pause(id, "ann", 1),
        };
        assert!(world.change(decided));
        world.stops_are_lost = false;
        world.carry_out(Vec::new());
        assert_eq!(world.runners[place].saves_and_ends, None, "not at once again");
        let wake = world.jobs.next_wake(world.now).expect("it looks again");
        world.now = wake;
        world.carry_out(Vec::new());
        assert_eq!(world.runners[place].saves_and_ends, Some(!is_cancelled));
    }
}

fn published(id: &str, step: u64, adapter: &str, problem: Option<&str>) -> Record {
    let hash = state_after(id, step);
    let publication = Publication {
        hash,
        deployment: "demo".into(),
        adapter: adapter.into(),
        problem: problem.map(str::to_owned),
    };
    Record::Published { id: id.to_owned(), publication, at: 1 }
}

fn wants(jobs: &Jobs, id: &str, step: u64) -> bool {
    let wanted = jobs.wanted();
    let job = wanted.iter().find(|job| job.id == id);
    job.is_some_and(|job| job.checkpoints.iter().any(|it| it.hash == state_after(id, step)))
}

/// A job `a` that has saved after 3 and 6 steps, and keeps 2 checkpoints.
fn world_with_checkpoints() -> World {
    let mut world = World::new();
    world.submit("a");
    (0..8).for_each(|_| world.advance(0));
    assert!(wants(&world.jobs, "a", 3) && wants(&world.jobs, "a", 6));
    world
}

#[test]
fn what_is_served_stays_when_something_else_cannot_take_its_place() {
    let mut world = world_with_checkpoints();
    let _ = world.write(published("a", 3, "poet", None));
    let _ = world.write(published("a", 6, "poet", Some("the name is taken")));
    let view = world.jobs.view().remove(0);
    let told: Vec<bool> = view.publications.iter().map(|it| it.problem.is_none()).collect();
    assert_eq!(told, [true, false], "the one is served, the other is not");
    (0..7).for_each(|_| world.advance(0));
    assert!(wants(&world.jobs, "a", 3), "a node that starts again reads it");
    // Failures make room for each other, not what is served.
    for number in 0..40 {
        let _ = world.write(published("a", 6, &format!("poet-{number}"), Some("no")));
    }
    assert!(wants(&world.jobs, "a", 3));
    let _ = world.write(published("a", 9, "poet", None));
    let publications = &world.jobs.view()[0].publications;
    let of_poet: Vec<ContentHash> =
        publications.iter().filter(|it| it.adapter == "poet").map(|it| it.hash).collect();
    assert_eq!(of_poet, [state_after("a", 9)], "what is served in its place is all that counts");
}

#[test]
fn what_deployments_serve_is_wanted_though_the_job_forgot_it() {
    let mut world = world_with_checkpoints();
    // A call to serve it is under way while the job goes on.
    let source = artifact_source("a", state_after("a", 3));
    let unrelated = ["/adapters/poet".to_owned(), artifact_source("gone", state_after("a", 3))];
    world.jobs.pin(unrelated.iter().chain([&source]).map(String::as_str));
    (0..8).for_each(|_| world.advance(0));
    assert!(wants(&world.jobs, "a", 3), "it is about to be served");
    world.jobs.pin([]);
    assert!(!wants(&world.jobs, "a", 3), "and then it is not any more");
}

#[test]
fn one_key_leaves_room_for_the_jobs_of_others() {
    let mut jobs = Jobs::default();
    let owned = |id: String, owner: &str| JobSpec { owner: owner.into(), ..spec(&id) };
    let most = MAX_JOBS * 3 / 4;
    for number in 0..most {
        let records = jobs.submit(owned(format!("job-{number}"), "ann"), 1).unwrap().unwrap();
        records.into_iter().for_each(|record| drop(jobs.apply(record)));
    }
    let refused = jobs.submit(owned("one-more".into(), "ann"), 1).unwrap_err();
    assert!(matches!(&refused, Error::TooMany(text) if text.contains("ann")), "{refused}");
    assert!(jobs.submit(owned("another".into(), "bob"), 1).is_ok(), "others have room");
    assert!(jobs.submit(owned("another".into(), ""), 1).is_ok());
    assert_eq!(jobs.submit(owned("job-0".into(), "ann"), 1), Ok(None), "what is there is no further one");
    let cancelled = jobs.cancel("job-3", 2).unwrap().unwrap();
    jobs.apply(cancelled);
    assert!(jobs.submit(owned("one-more".into(), "ann"), 3).is_ok(), "what is over does not count");
}

#[test]
fn a_job_whose_result_is_served_is_not_forgotten_to_make_room() {
    let mut jobs = Jobs::default();
    for number in 0..MAX_JOBS as u64 {
        jobs.apply(Record::Submitted { spec: Box::new(spec(&format!("job-{number}"))), at: number });
    }
    for id in ["job-3", "job-4"] {
        let cancelled = jobs.cancel(id, 1).unwrap().unwrap();
        jobs.apply(cancelled);
    }
    let source = artifact_source("job-3", state_after("job-3", 3));
    jobs.pin([source.as_str()]);
    let records = jobs.submit(spec("one-more"), 1).unwrap().unwrap();
    assert_eq!(records[0], Record::Removed { id: "job-4".into() });
    records.into_iter().for_each(|record| drop(jobs.apply(record)));
    let refused = jobs.submit(spec("another"), 1).unwrap_err().to_string();
    assert!(refused.contains("served"), "{refused}");
}

#[test]
fn what_a_node_cannot_fetch_another_one_may_and_it_is_tried_without_an_end() {
    let mut world = World::new();
    world.submit("a");
    let mut nodes = BTreeSet::new();
    let mut pauses = Vec::new();
    for _ in 0..20 {
        let runner = world.runners.pop().expect("it is tried again");
        nodes.insert(runner.node);
        let result = Err(Error::Unavailable("the hub does not answer".into()));
        world.happen(Event::RunEnded { id: runner.id, epoch: runner.epoch, result });
        assert!(world.runners.is_empty(), "after a pause");
        assert!(world.jobs.view()[0].detail.contains("the hub"), "{:?}", world.jobs.view()[0].detail);
        let wake = world.jobs.next_wake(world.now).expect("it is tried again");
        pauses.push(wake - world.now);
        world.now = wake;
        world.carry_out(Vec::new());
    }
    assert!(nodes.len() > 1, "another node is asked");
    assert!(pauses.is_sorted() && pauses[19] > pauses[0] && pauses[19] <= Duration::from_secs(60));
    world.settle();
}

#[test]
fn a_job_goes_on_where_its_newest_checkpoint_is_unless_its_worker_dies_there_again() {
    let mut world = World::new();
    world.submit("a");
    (0..4).for_each(|_| world.advance(0));
    let first = world.runners[0].node;
    let mut nodes = Vec::new();
    for _ in 0..3 {
        world.kill_worker(0);
        world.now += Duration::from_secs(60);
        world.carry_out(Vec::new());
        nodes.push(world.runners[0].node);
    }
    assert_eq!(nodes[0], first);
    assert!(nodes[1] != first, "{nodes:?}");
    world.settle();
}

#[test]
fn an_emptied_disk_and_a_node_that_left_are_no_copies() {
    let holders = |world: &World| -> BTreeSet<NodeId> {
        let view = world.jobs.view().remove(0);
        view.checkpoints.last().expect("a checkpoint").holders.iter().copied().collect()
    };
    let mut world = World::new();
    world.submit("a");
    for _ in 0..40 {
        world.advance(0);
        world.finish_copy(true);
        world.hear_what_is_there();
    }
    let two = holders(&world);
    assert_eq!((two.len(), world.jobs.view()[0].state), (2, JobState::Finished));
    // A disk is replaced; its node comes back and says what it has.
    let emptied = *two.first().unwrap();
    world.disks.remove(&emptied);
    let number = (0..NODES).find(|number| node(*number) == emptied).unwrap();
    world.lose_node(number, false);
    world.revive_node(number);
    while !world.tidied.is_empty() {
        world.hear_what_is_there();
    }
    assert_eq!(holders(&world).len(), 1, "it is known to be gone");
    world.finish_copy(true);
    let two = holders(&world);
    assert_eq!(two.len(), 2, "and is copied again");
    // Another one leaves the cluster.
    let left = *two.last().unwrap();
    let asked = world.jobs.holders();
    let members = (0..NODES).map(node).filter(|node| *node != left).collect();
    world.alive.remove(&left);
    world.happen(Event::Tidied { asked, tidied: Tidied { members, ..Tidied::default() } });
    assert!(!holders(&world).contains(&left));
    world.finish_copy(true);
    assert_eq!(holders(&world).len(), 2);
    // An answer that is older than what is known by now takes nothing away.
    let stale = Tidied {
        held: (0..NODES).map(|number| (node(number), BTreeSet::new())).collect(),
        ..Tidied::default()
    };
    world.happen(Event::Tidied { asked: BTreeMap::new(), tidied: stale });
    assert_eq!(holders(&world).len(), 2);
}

#[test]
fn what_a_job_takes_of_the_nodes_that_help_is_reserved() {
    let mut jobs = Jobs::default();
    let wish = JobSpec { workers: 2, kind: JobKind::FineTuning, model: "demo".into(), ..spec("a") };
    let records = jobs.submit(wish, 1).unwrap().unwrap();
    records.into_iter().for_each(|record| drop(jobs.apply(record)));
    let (id, epoch) = ("a".to_owned(), 1);
    let offer = JobOffer { node: node(0), name: String::new(), free: ByteCount(100) };
    for effect in jobs.schedule(&[offer], 1, Instant::now()) {
        let Effect::Record(record) = effect else { panic!("{effect:?}") };
        let effects = jobs.apply(record);
        let Some(Effect::Run { order, .. }) = effects.first() else { panic!("{effects:?}") };
        assert_eq!(order.memory, ByteCount(10), "whoever helps knows what it takes");
    }
    let reserved = |jobs: &Jobs| [0, 1, 2].map(|number| jobs.reserved(node(number)).0);
    assert_eq!(reserved(&jobs), [10, 0, 0]);
    let tell = |jobs: &mut Jobs, nodes: Vec<NodeId>| {
        let report = Report::Helped(nodes);
        jobs.on(Event::Reported { id: id.clone(), epoch, report }, 1, Instant::now());
    };
    tell(&mut jobs, vec![node(2)]);
    assert_eq!(reserved(&jobs), [10, 0, 10]);
    tell(&mut jobs, Vec::new());
    assert_eq!(reserved(&jobs), [10, 0, 0]);
    tell(&mut jobs, vec![node(1)]);
    jobs.on(Event::RunEnded { id: id.clone(), epoch, result: Ok(RunEnd::Yielded) }, 1, Instant::now());
    assert_eq!(reserved(&jobs), [0, 0, 0], "and no longer than it runs");
}

#[test]
fn a_node_runs_one_job_at_a_time_and_the_oldest_goes_first() {
    let mut world = World::new();
    for number in 0..5 {
        world.submit(&format!("job-{number}"));
    }
    let running: BTreeSet<NodeId> = world.runners.iter().map(|runner| runner.node).collect();
    assert_eq!((world.runners.len(), running.len()), (3, 3));
    let ids: Vec<&str> = world.runners.iter().map(|runner| runner.id.as_str()).collect();
    assert_eq!(ids, ["job-0", "job-1", "job-2"]);
    world.settle();
}

#[test]
fn a_full_table_forgets_the_oldest_that_is_over_and_refuses_when_none_is() {
    let mut jobs = Jobs::default();
    for number in 0..MAX_JOBS as u64 {
        jobs.apply(Record::Submitted { spec: Box::new(spec(&format!("job-{number}"))), at: number });
    }
    assert!(matches!(jobs.submit(spec("one-more"), 1), Err(Error::TooMany(_))));
    let cancelled = jobs.cancel("job-7", 1).unwrap().unwrap();
    jobs.apply(cancelled);
    let records = jobs.submit(spec("one-more"), 1).unwrap().unwrap();
    assert_eq!(records[0], Record::Removed { id: "job-7".into() });
    records.into_iter().for_each(|record| drop(jobs.apply(record)));
    let wanted: Vec<Wanted> = jobs.wanted();
    assert_eq!(wanted.len(), MAX_JOBS);
    assert!(!wanted.iter().any(|job| job.id == "job-7"));
}
