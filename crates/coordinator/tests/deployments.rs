//! Deployments under any order of answers, failures and losses, in a made-up cluster.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a failing test is supposed to stop"
)]

use mlxnode_compute::ByteCount;
use mlxnode_coordinator::deployments::{
    Attempt, DeploymentWish, Deployments, Effect, Event, Loaded, MAX_FAILURES, Record, StartedWorker, State,
};
use mlxnode_coordinator::placement::{LayerCost, ModelCost, Offer, Wish};
use mlxnode_coordinator::{Error, NodeId};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn node(number: u8) -> NodeId {
    NodeId::from_bytes([number; 32])
}

fn model() -> ModelCost {
    ModelCost {
        architecture: "llama".into(),
        layers: vec![
            LayerCost {
                weights: ByteCount(100 * MIB),
                kv_per_token: ByteCount(0),
                state: ByteCount(0),
                kv_window: None
            };
            4
        ],
        joined: vec![],
        passes: 1,
        embedding: ByteCount(0),
        head: ByteCount(0),
        shared: ByteCount(0),
        context_tokens: 512,
        weight_bits: None,
        draft: None,
    }
}

fn wish(name: &str, stages: Option<usize>) -> DeploymentWish {
    let wish = Wish { stages, ..Wish::default() };
    DeploymentWish { name: name.into(), source: format!("/models/{name}"), wish, ..DeploymentWish::default() }
}

/// A cluster that does what the effects say, one pending effect at a time, well or badly.
struct World {
    now: Instant,
    deployments: Deployments,
    pending: VecDeque<Effect>,
    /// Nodes that are there.
    alive: BTreeSet<u8>,
    free_mib: u64,
    /// (node, name, epoch, pid)
    workers: BTreeSet<(u8, String, u64, u32)>,
    /// Nodes that were lost with workers of a deployment, or failed to stop them, and did not since.
    unstoppable: BTreeSet<(u8, String)>,
    next_pid: u32,
    log: Vec<Record>,
    settled: BTreeMap<String, Vec<Result<(), Error>>>,
    gone: BTreeMap<String, Vec<Result<(), Error>>>,
    epochs: BTreeSet<u64>,
}

impl World {
    fn new(nodes: u8, free_mib: u64) -> Self {
        Self {
            now: Instant::now(),
            deployments: Deployments::default(),
            pending: VecDeque::new(),
            alive: (0..nodes).collect(),
            free_mib,
            workers: BTreeSet::new(),
            unstoppable: BTreeSet::new(),
            next_pid: 100,
            log: Vec::new(),
            settled: BTreeMap::new(),
            gone: BTreeMap::new(),
            epochs: BTreeSet::new(),
        }
    }

    fn load(&mut self, wish: DeploymentWish) -> Result<Loaded, Error> {
        let (loaded, effects) = self.deployments.load(wish)?;
        self.take(effects);
        Ok(loaded)
    }

    fn unload(&mut self, name: &str) -> Result<(), Error> {
        let effects = self.deployments.unload(name, self.now)?;
        self.take(effects);
        Ok(())
    }

    fn on(&mut self, event: Event) {
        let effects = self.deployments.on(event, self.now);
        self.take(effects);
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        let effects = self.deployments.tick(self.now);
        self.take(effects);
    }

    fn take(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Settled { name, result } => self.settled.entry(name).or_default().push(result),
                Effect::Gone { name, result } => self.gone.entry(name).or_default().push(result),
                Effect::Abandon { attempt } => self.abandon(&attempt),
                effect => {
                    if let Effect::Start { attempt, node, .. } = &effect {
                        self.check_start(attempt, node.as_bytes()[0]);
                    }
                    if let Effect::Record { record: Record::Wanted { epoch, .. }, .. } = &effect {
                        assert!(self.epochs.insert(*epoch), "epoch {epoch} was used twice");
                    }
                    self.pending.push_back(effect);
                }
            }
        }
    }

    /// The orders on their way may or may not have reached their nodes.
    fn abandon(&mut self, given_up: &Attempt) {
        for effect in std::mem::take(&mut self.pending) {
            match &effect {
                Effect::Record { .. } | Effect::Stop { .. } => self.pending.push_back(effect),
                Effect::Start { attempt, node, stage, .. } if attempt == given_up => {
                    let number = node.as_bytes()[0];
                    if stage % 2 == 0 {
                        self.start(attempt, number);
                        if !self.alive.contains(&number) {
                            self.unstoppable.insert((number, attempt.name.clone()));
                        }
                    }
                }
                effect if attempt_of(effect) == given_up => {}
                _ => self.pending.push_back(effect),
            }
        }
    }

    /// No worker of an older attempt acts when one of a newer attempt is started.
    fn check_start(&self, attempt: &Attempt, at: u8) {
        assert!(
            self.log
                .iter()
                .any(|record| matches!(record, Record::Wanted { epoch, .. } if *epoch == attempt.epoch)),
            "epoch {} is used before it is durable",
            attempt.epoch
        );
        for (node, name, epoch, _) in &self.workers {
            if *name == attempt.name && *epoch < attempt.epoch {
                let excused = *node != at && self.unstoppable.contains(&(*node, name.clone()));
                assert!(excused, "{name} starts epoch {} while node {node} runs {epoch}", attempt.epoch);
            }
        }
    }

    fn start(&mut self, attempt: &Attempt, node: u8) -> StartedWorker {
        self.next_pid += 1;
        let pid = self.next_pid;
        self.workers.insert((node, attempt.name.clone(), attempt.epoch, pid));
        StartedWorker { address: format!("127.0.0.1:{pid}"), key_pin: [node; 32], pid, weights: ByteCount(0) }
    }

    fn offers(&self) -> Vec<Offer> {
        let offer = |number: &u8| Offer {
            node: node(*number),
            name: format!("mac-{number}"),
            budget: ByteCount(self.free_mib * MIB),
            used: ByteCount(0),
            prompts: ByteCount(0),
            bytes_per_second: None,
            coordinator: *number == 0,
            round_trips: [].into(),
        };
        self.alive.iter().map(offer).collect()
    }

    /// Carries out one pending effect. A node that is gone fails whatever is asked of it.
    fn answer(&mut self, nth: usize, is_good: bool) {
        if self.pending.is_empty() {
            return;
        }
        let Some(effect) = self.pending.remove(nth % self.pending.len()) else { return };
        let is_there = |node: NodeId| self.alive.contains(&node.as_bytes()[0]);
        let error = || Error::Failed("it went wrong".into());
        let unreachable = |node: NodeId| Error::Unavailable(format!("{node} does not answer"));
        let result = |node: NodeId| {
            if !is_there(node) {
                return Err(unreachable(node));
            }
            if is_good { Ok(()) } else { Err(error()) }
        };
        let event = match effect {
            Effect::Record { attempt, record } => {
                let result = if is_good { Ok(()) } else { Err(error()) };
                if is_good {
                    self.log.push(record);
                }
                Event::Recorded { attempt, result }
            }
            Effect::Sweep { attempt } => {
                let alive = self.alive.clone();
                self.workers.retain(|(node, name, epoch, _)| {
                    !(alive.contains(node) && *name == attempt.name && *epoch < attempt.epoch)
                });
                let nodes = alive.iter().map(|number| node(*number)).collect();
                Event::Swept { attempt, nodes }
            }
            Effect::Weigh { attempt, .. } => {
                let result = if is_good { Ok((model(), self.offers())) } else { Err(error()) };
                Event::Weighed { attempt, result }
            }
            Effect::Prepare { attempt, node, .. } => {
                let result = result(node).map(|()| vec![1]);
                Event::Prepared { attempt, node, result }
            }
            Effect::Start { attempt, stage, node, .. } => {
                let result = result(node).map(|()| self.start(&attempt, node.as_bytes()[0]));
                Event::Started { attempt, stage, result }
            }
            Effect::Link { attempt, stage, node, pid, .. } => {
                let runs = self.workers.iter().any(|worker| worker.3 == pid);
                let result = result(node).and_then(|()| if runs { Ok(()) } else { Err(error()) });
                Event::Linked { attempt, stage, result }
            }
            Effect::StartScheduler { attempt, node, .. } => {
                Event::SchedulerStarted { attempt, result: result(node) }
            }
            Effect::Stop { attempt, node, .. } => {
                let result = result(node);
                let number = node.as_bytes()[0];
                if result.is_ok() {
                    self.unstoppable.remove(&(number, attempt.name.clone()));
                    self.workers.retain(|(at, name, epoch, _)| {
                        !(*at == number && *name == attempt.name && *epoch <= attempt.epoch)
                    });
                } else {
                    self.unstoppable.insert((number, attempt.name.clone()));
                }
                Event::Stopped { attempt, node, result }
            }
            effect => panic!("{effect:?} is for the tests of adapters"),
        };
        self.on(event);
    }

    fn kill(&mut self, nth: usize) {
        let Some((at, name, epoch, pid)) = self.workers.iter().nth(nth).cloned() else { return };
        self.workers.remove(&(at, name.clone(), epoch, pid));
        if self.alive.contains(&at) {
            let reason = "ended with signal 9".to_owned();
            self.on(Event::WorkerEnded { attempt: Attempt { name, epoch }, node: node(at), pid, reason });
        }
    }

    fn lose(&mut self, number: u8) {
        if self.alive.remove(&number) {
            let orphans = self.workers.iter().filter(|worker| worker.0 == number);
            self.unstoppable.extend(orphans.map(|worker| (number, worker.1.clone())));
            self.on(Event::NodeLost { node: node(number) });
        }
    }

    fn join(&mut self, number: u8) {
        if self.alive.insert(number) {
            self.on(Event::NodeJoined { node: node(number) });
        }
    }

    /// Everything works from now on.
    fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 2_000, "the deployments never come to rest");
            if !self.pending.is_empty() {
                self.answer(0, true);
            } else if let Some(wake) = self.deployments.next_wake() {
                self.wait(wake.saturating_duration_since(self.now));
            } else {
                return;
            }
        }
    }

    fn state(&self, name: &str) -> Option<State> {
        self.deployments.find(name).ok().map(|view| view.state)
    }
}

fn attempt_of(effect: &Effect) -> &Attempt {
    match effect {
        Effect::Record { attempt, .. }
        | Effect::Sweep { attempt }
        | Effect::Weigh { attempt, .. }
        | Effect::Prepare { attempt, .. }
        | Effect::Start { attempt, .. }
        | Effect::Link { attempt, .. }
        | Effect::StartScheduler { attempt, .. }
        | Effect::Abandon { attempt }
        | Effect::Stop { attempt, .. } => attempt,
        effect => panic!("{effect:?} has no attempt"),
    }
}

#[test]
fn a_load_goes_through_all_steps_and_links_the_ring() {
    let mut world = World::new(2, 400);
    assert_eq!(world.load(wish("a", Some(2))), Ok(Loaded::UnderWay));
    let mut steps = Vec::new();
    while let Some(effect) = world.pending.front().cloned() {
        if let Effect::Link { stage: 0, links, .. } = &effect {
            assert!(
                links.next.is_some() && links.next == links.previous,
                "two stages are each other's neighbours"
            );
            assert_eq!(links.drivers, [node(0)]);
        }
        steps.push(format!("{effect:?}").split(' ').next().unwrap().to_owned());
        world.answer(0, true);
    }
    assert_eq!(
        steps,
        ["Record", "Weigh", "Prepare", "Prepare", "Start", "Start", "Link", "Link", "StartScheduler"]
    );
    let view = world.deployments.find("a").unwrap();
    assert_eq!((view.state, view.scheduler, view.context_tokens), (State::Ready, Some(node(0)), 512));
    assert!(view.stages.iter().all(|stage| stage.pid.is_some()));
    assert_eq!(world.settled["a"], [Ok(())]);
    assert_eq!(world.load(wish("a", None)), Ok(Loaded::Already));
}

#[test]
fn a_name_belongs_to_one_source() {
    let mut world = World::new(1, 1000);
    world.load(wish("a", None)).unwrap();
    let other = DeploymentWish { source: "/models/b".into(), ..wish("a", None) };
    assert!(matches!(world.load(other), Err(Error::NameTaken { .. })));
    let bad = DeploymentWish { name: "a b".into(), ..wish("a", None) };
    assert!(matches!(world.load(bad), Err(Error::Invalid(_))));
    assert_eq!(world.unload("c"), Err(Error::NotFound("\"c\" is not loaded; loaded are: a".into())));
}

#[test]
fn a_first_load_that_fails_is_cleaned_up_and_forgotten() {
    let mut world = World::new(2, 400);
    world.load(wish("a", Some(2))).unwrap();
    for _ in 0..4 {
        world.answer(0, true); // recorded, weighed, prepared twice
    }
    world.answer(0, true); // one worker starts
    world.answer(0, false); // the other does not
    assert_eq!(world.state("a"), Some(State::Unloading));
    world.settle();
    assert_eq!(world.workers, BTreeSet::new());
    assert_eq!(world.state("a"), None);
    assert_eq!(world.settled["a"], [Err(Error::Failed("it went wrong".into()))]);
    assert!(matches!(world.log.last(), Some(Record::Removed { .. })));
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_numbers() {
    let mut world = World::new(1, 300);
    world.load(wish("a", None)).unwrap();
    world.settle();
    let Err(Error::DoesNotFit(text)) = &world.settled["a"][0] else { panic!("{:?}", world.settled) };
    assert!(text.contains("mac-0 has 315 MB free"), "{text}");
}

#[test]
fn what_is_deployed_counts_against_the_budget_of_the_next_one() {
    let mut world = World::new(1, 900);
    world.load(wish("a", None)).unwrap();
    world.settle();
    world.load(wish("b", None)).unwrap();
    world.settle();
    assert!(matches!(world.settled["b"][0], Err(Error::DoesNotFit(_))));
    world.unload("a").unwrap();
    world.settle();
    world.load(wish("b", None)).unwrap();
    world.settle();
    assert_eq!(world.state("b"), Some(State::Ready));
}

#[test]
fn a_killed_worker_is_replaced_at_once_in_a_new_epoch() {
    let mut world = World::new(2, 400);
    world.load(wish("a", Some(2))).unwrap();
    world.settle();
    let before = world.deployments.find("a").unwrap().epoch;
    world.kill(0);
    let view = world.deployments.find("a").unwrap();
    assert_eq!(view.state, State::Recovering);
    assert_eq!(view.detail, "the worker of layers 0..2 on mac-0 ended with signal 9");
    while !world.pending.is_empty() {
        world.answer(0, true); // without a pause
    }
    let after = world.deployments.find("a").unwrap();
    assert_eq!(after.state, State::Ready);
    assert!(after.epoch > before);
    assert_eq!(world.workers.len(), 2);
}

#[test]
fn a_worker_that_dies_again_and_again_is_given_up_until_somebody_loads_it_again() {
    let mut world = World::new(1, 1000);
    world.load(wish("a", None)).unwrap();
    world.settle();
    for _ in 0..MAX_FAILURES {
        assert_eq!(world.state("a"), Some(State::Ready));
        world.kill(0);
        world.settle();
    }
    let view = world.deployments.find("a").unwrap();
    assert_eq!(view.state, State::Failed);
    assert!(view.detail.starts_with("gave up after 5 failures in 10 minutes"), "{}", view.detail);
    world.load(wish("a", None)).unwrap();
    world.settle();
    assert_eq!(world.state("a"), Some(State::Ready));
}

#[test]
fn a_lost_node_is_replaced_and_stopped_when_it_comes_back() {
    let mut world = World::new(3, 400);
    world.load(wish("a", Some(2))).unwrap();
    world.settle();
    world.lose(1);
    world.settle();
    let view = world.deployments.find("a").unwrap();
    assert_eq!(view.state, State::Ready);
    assert!(view.stages.iter().all(|stage| stage.node != node(1)));
    assert_eq!(world.workers.len(), 3, "the lost node still runs its own");
    world.join(1);
    world.settle();
    assert_eq!(world.workers.len(), 2);
}

#[test]
fn what_fits_no_longer_waits_for_a_node() {
    let mut world = World::new(2, 300);
    world.load(wish("a", None)).unwrap();
    world.settle();
    world.lose(1);
    world.settle();
    let view = world.deployments.find("a").unwrap();
    assert_eq!(view.state, State::Failed);
    assert!(view.detail.ends_with("it is tried again when a node joins"), "{}", view.detail);
    world.join(1);
    world.settle();
    assert_eq!(world.state("a"), Some(State::Ready));
}

#[test]
fn a_node_that_comes_while_an_attempt_fails_for_want_of_it_is_not_missed() {
    let mut world = World::new(2, 300);
    world.load(wish("a", None)).unwrap();
    world.settle();
    world.lose(1);
    // It is there, and not offered yet.
    world.on(Event::NodeJoined { node: node(1) });
    let epoch = world.deployments.find("a").unwrap().epoch;
    for _ in 0..20 {
        if world.deployments.find("a").unwrap().epoch == epoch && !world.pending.is_empty() {
            world.answer(0, true);
        }
    }
    world.alive.insert(1);
    world.settle();
    assert_eq!(world.state("a"), Some(State::Ready));
}

#[test]
fn unloading_ends_the_workers_whatever_is_under_way() {
    for steps in 0..12 {
        let mut world = World::new(2, 400);
        world.load(wish("a", Some(2))).unwrap();
        for _ in 0..steps {
            world.answer(0, true);
        }
        world.unload("a").unwrap();
        assert!(world.unload("a").is_ok(), "unloading twice is fine");
        world.settle();
        assert_eq!(world.state("a"), None);
        assert_eq!(world.workers, BTreeSet::new());
        assert_eq!(world.gone["a"], [Ok(())]);
    }
}

#[test]
fn a_load_that_is_taken_back_leaves_nothing_but_a_ready_one_stays() {
    let mut world = World::new(1, 1000);
    world.load(wish("a", None)).unwrap();
    world.answer(0, true);
    let effects = world.deployments.cancel_load("a", world.now);
    world.take(effects);
    world.settle();
    assert_eq!(world.state("a"), None);
    world.load(wish("a", None)).unwrap();
    world.settle();
    let effects = world.deployments.cancel_load("a", world.now);
    assert_eq!(effects, []);
    assert_eq!(world.state("a"), Some(State::Ready));
}

#[test]
fn a_restart_forms_again_what_is_wanted_after_ending_what_still_runs() {
    let mut world = World::new(2, 800);
    world.load(wish("a", Some(2))).unwrap();
    world.load(wish("b", Some(1))).unwrap();
    world.settle();
    world.unload("b").unwrap();
    world.settle();
    let last_epoch = *world.epochs.last().unwrap();
    world.deployments = Deployments::restore(world.log.clone());
    let effects = world.deployments.start();
    world.take(effects);
    assert_eq!(world.state("a"), Some(State::Recovering));
    world.settle();
    let view = world.deployments.find("a").unwrap();
    assert_eq!(view.state, State::Ready);
    assert!(view.epoch > last_epoch);
    assert_eq!(world.workers.len(), 2);
    assert_eq!(world.state("b"), None);
}

#[test]
fn records_survive_json() {
    let record = Record::Wanted { deployment: wish("a", Some(2)), epoch: 7 };
    let text = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
}

// --- any order ---

#[derive(Clone, Debug)]
enum Action {
    Load(u8, Option<usize>),
    Unload(u8),
    CancelLoad(u8),
    Answer(usize, bool),
    Kill(usize),
    Lose(u8),
    Join(u8),
    Wait(u64),
    Restart,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        3 => (0u8..3, proptest::option::of(1usize..3)).prop_map(|(name, stages)| Action::Load(name, stages)),
        1 => (0u8..3).prop_map(Action::Unload),
        1 => (0u8..3).prop_map(Action::CancelLoad),
        20 => (0usize..8, proptest::bool::weighted(0.9)).prop_map(|(nth, good)| Action::Answer(nth, good)),
        2 => (0usize..6).prop_map(Action::Kill),
        1 => (0u8..3).prop_map(Action::Lose),
        2 => (0u8..3).prop_map(Action::Join),
        2 => (1u64..60_000).prop_map(Action::Wait),
        1 => proptest::bool::weighted(0.1).prop_map(|yes| if yes { Action::Restart } else { Action::Wait(1) }),
    ];
    proptest::collection::vec(action, 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn everything_ends_ready_or_failed_and_no_two_epochs_act(actions in actions()) {
        let mut world = World::new(3, 420);
        for action in actions {
            let name = |number: u8| format!("model-{number}");
            match action {
                Action::Load(number, stages) => {
                    let _ = world.load(wish(&name(number), stages));
                }
                Action::Unload(number) => {
                    let _ = world.unload(&name(number));
                }
                Action::CancelLoad(number) => {
                    let effects = world.deployments.cancel_load(&name(number), world.now);
                    world.take(effects);
                }
                Action::Answer(nth, is_good) => world.answer(nth, is_good),
                Action::Kill(nth) => world.kill(nth),
                Action::Lose(number) => world.lose(number),
                Action::Join(number) => world.join(number),
                Action::Wait(millis) => world.wait(Duration::from_millis(millis)),
                Action::Restart => {
                    // Answers to the old coordinator reach nobody; orders that were sent may have been carried out.
                    world.pending.clear();
                    world.epochs.retain(|used| {
                        world.log.iter().any(|it| matches!(it, Record::Wanted { epoch, .. } if epoch == used))
                    });
                    // Its orphans are forgotten with it: workers of a name that is not wanted any more stay where their
                    // node could not be reached, until the name is loaded again or the node ends.
                    let wanted = Deployments::restore(world.log.clone());
                    let names: BTreeSet<String> = wanted.view().into_iter().map(|view| view.name).collect();
                    world.workers.retain(|(_, name, _, _)| names.contains(name));
                    world.deployments = wanted;
                    let alive = world.alive.clone();
                    for gone in (0..3).filter(|number| !alive.contains(number)) {
                        let orphans = world.workers.iter().filter(|worker| worker.0 == gone);
                        world.unstoppable.extend(orphans.map(|worker| (gone, worker.1.clone())));
                        world.on(Event::NodeLost { node: node(gone) });
                    }
                    let effects = world.deployments.start();
                    world.take(effects);
                }
            }
            for view in world.deployments.view() {
                let reserved: u64 = view.stages.iter().map(|stage| stage.memory.0).sum();
                prop_assert!(reserved <= 3 * 420 * MIB);
            }
            for number in 0..3 {
                prop_assert!(world.deployments.reserved(node(number)).0 <= 420 * MIB);
            }
        }
        for number in 0..3 {
            world.join(number);
        }
        world.settle();
        let mut expected = 0;
        for view in world.deployments.view() {
            prop_assert!(matches!(view.state, State::Ready | State::Failed), "{:?}", view);
            if view.state == State::Ready {
                expected += view.stages.len();
                for stage in &view.stages {
                    let worker = (
                        stage.node.as_bytes()[0], view.name.clone(), view.epoch, stage.pid.unwrap_or_default(),
                    );
                    prop_assert!(world.workers.contains(&worker), "{:?} of {:?}", worker, world.workers);
                }
            }
        }
        prop_assert_eq!(world.workers.len(), expected, "workers nobody wants: {:?}", world.workers);
        // What runs is in the log, so a restart now would keep it.
        let restored: Vec<String> =
            Deployments::restore(world.log.clone()).view().into_iter().map(|view| view.name).collect();
        let ready = world.deployments.view().into_iter().filter(|view| view.state == State::Ready);
        let present: Vec<String> = ready.map(|view| view.name).collect();
        prop_assert!(present.iter().all(|name| restored.contains(name)), "{:?} of {:?}", present, restored);
    }
}
