//! Members and rounds under random schedules: every order of messages, losses, broken streams and joins gives the bits of one worker.
//!
//! The trainer is simulated: a gradient depends on the parameters and the micro-batch, so that an update that is made twice, left out
//! or made from other parts shows in every bit that follows.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test that cannot go on stops

use bytes::Bytes;
use mlxnode_collective::{
    Answer, CatchUp, Frame, Member, MemberEffect, MemberId, Report, Rounds, RoundsEffect, RoundsOptions,
};
use mlxnode_compute::{Deal, Partial, Tally, TreeNode, TreeSum};
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::time::{Duration, Instant};

/// All that training changes.
#[derive(Clone, Debug, PartialEq)]
struct State {
    applied: u64,
    parameters: Vec<f32>,
    momentum: Vec<f32>,
    losses: Vec<u64>,
}

impl State {
    fn new(values: usize) -> Self {
        let parameters = (0..values).map(|at| (at as f32).sin()).collect();
        Self { applied: 0, parameters, momentum: vec![0.0; values], losses: vec![] }
    }

    fn gradient(&self, index: u32) -> (Bytes, Tally) {
        let mut bytes = Vec::new();
        for (at, parameter) in self.parameters.iter().enumerate() {
            let angle = (at as f32) * 0.7 + (index as f32) * 1.3 + (self.applied as f32) * 0.1;
            bytes.extend((angle.cos() + parameter * 0.3).to_le_bytes());
        }
        let loss = f64::from(self.parameters.iter().sum::<f32>()) * 0.1 + f64::from(index) * 0.3;
        (bytes.into(), Tally { loss, tokens: u64::from(index) + 1 })
    }

    fn apply(&mut self, values: &Bytes, tally: Tally) {
        for ((parameter, momentum), value) in
            self.parameters.iter_mut().zip(&mut self.momentum).zip(floats(values))
        {
            *momentum = *momentum * 0.9 + value / tally.tokens as f32;
            *parameter -= *momentum * 0.05;
        }
        self.losses.push(tally.loss.to_bits());
        self.applied += 1;
    }
}

fn floats(bytes: &Bytes) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().unwrap()))
}

fn add(left: (Bytes, Tally), right: (Bytes, Tally)) -> Result<(Bytes, Tally), Infallible> {
    let sum: Vec<u8> = floats(&left.0)
        .zip(floats(&right.0))
        .flat_map(|(left, right)| (left + right).to_le_bytes())
        .collect();
    Ok((sum.into(), left.1.plus(right.1)))
}

/// What one worker without any group makes of it.
fn alone(values: usize, micro_batches: u32, steps: u64) -> State {
    let mut state = State::new(values);
    for _ in 0..steps {
        let mut sum = TreeSum::new(micro_batches);
        for index in 0..micro_batches {
            sum.insert(TreeNode::leaf(index), state.gradient(index), add).unwrap();
        }
        let (bytes, tally) = sum.whole().unwrap().clone();
        state.apply(&bytes, tally);
    }
    state
}

/// A trainer and its member.
struct Worker {
    member: Member,
    state: State,
    doing: Doing,
    /// Written for others, by epoch.
    saved: Option<State>,
    /// Being fetched: from whom, in which epoch.
    fetching: Option<(MemberId, u64)>,
    fetched: Option<State>,
    finished: bool,
}

enum Doing {
    /// About to call `begin`.
    Between,
    Computing(Deal, TreeSum<(Bytes, Tally)>),
    Waiting(TreeSum<(Bytes, Tally)>),
}

/// A stream from one member to another, of one epoch.
#[derive(Default)]
struct Stream {
    epoch: u64,
    frames: VecDeque<Frame>,
    broken: bool,
}

enum ToMember {
    Halt(u64, u64),
    Form(mlxnode_collective::Formation),
}

struct World {
    seed: u64,
    now: Instant,
    steps: u64,
    values: usize,
    micro_batches: u32,
    workers: BTreeMap<MemberId, Worker>,
    streams: BTreeMap<(MemberId, MemberId), Stream>,
    orders: BTreeMap<MemberId, VecDeque<ToMember>>,
    reports: BTreeMap<MemberId, VecDeque<Report>>,
    /// Ended, and the rounds do not know yet.
    graves: Vec<MemberId>,
    rounds: Rounds,
    /// What checkpoints hold.
    snapshots: Vec<State>,
    next_id: u64,
    troubles: u32,
    redone: u32,
    /// Orders to catch up: by a sum, by a state.
    catch_ups: [u32; 2],
}

impl World {
    fn random(&mut self, below: usize) -> usize {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.seed;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((value ^ (value >> 31)) % below.max(1) as u64) as usize
    }

    fn start_worker(&mut self) {
        self.next_id += 1;
        let id = MemberId(self.next_id);
        let snapshot = self.random(self.snapshots.len());
        let worker = Worker {
            member: Member::new(id, self.values, self.micro_batches),
            state: self.snapshots[snapshot].clone(),
            doing: Doing::Between,
            saved: None,
            fetching: None,
            fetched: None,
            finished: false,
        };
        self.workers.insert(id, worker);
    }

    fn kill(&mut self, id: MemberId) {
        if self.workers.remove(&id).is_some() {
            self.graves.push(id);
            self.reports.remove(&id);
            for (_, stream) in self.streams.iter_mut().filter(|((from, to), _)| *from == id || *to == id) {
                stream.broken = true; // what is on its way may still arrive
            }
        }
    }

    fn rounds_effects(&mut self, effects: Vec<RoundsEffect>) {
        for effect in effects {
            match effect {
                RoundsEffect::Halt { member, epoch, at } => {
                    self.orders.entry(member).or_default().push_back(ToMember::Halt(epoch, at));
                }
                RoundsEffect::Form { member, formation } => {
                    let order = formation.members.iter().find(|order| order.member == member);
                    match order.map(|order| order.catch_up) {
                        Some(CatchUp::Sum(_)) => self.catch_ups[0] += 1,
                        Some(CatchUp::State(_)) => self.catch_ups[1] += 1,
                        _ => {}
                    }
                    self.orders.entry(member).or_default().push_back(ToMember::Form(formation));
                }
                RoundsEffect::Evict { member, .. } => self.kill(member),
                RoundsEffect::Fail { reason } => panic!("{reason}"),
            }
        }
    }

    fn member_effects(&mut self, id: MemberId, effects: Vec<MemberEffect>) {
        for effect in effects {
            match effect {
                MemberEffect::Send { to, frame } => {
                    let epoch = self.workers[&id].member.running_epoch();
                    if let Some(stream) = self.streams.get_mut(&(id, to))
                        && Some(stream.epoch) == epoch
                        && !stream.broken
                    {
                        stream.frames.push_back(frame);
                    }
                }
                MemberEffect::Report(report) => self.reports.entry(id).or_default().push_back(report),
                MemberEffect::Formed { epoch, peers } => {
                    for peer in peers {
                        let broken = !self.workers.contains_key(&peer);
                        self.streams.insert((id, peer), Stream { epoch, broken, ..Stream::default() });
                    }
                }
                MemberEffect::Dissolved => self.streams.retain(|(from, _), _| *from != id),
                MemberEffect::Fetch { epoch, from } => {
                    self.workers.get_mut(&id).unwrap().fetching = Some((from, epoch));
                }
                MemberEffect::Saved { .. } => {
                    let worker = self.workers.get_mut(&id).unwrap();
                    worker.saved = Some(worker.state.clone());
                }
                MemberEffect::Answer(answer) => self.answer(id, answer),
            }
        }
    }

    fn answer(&mut self, id: MemberId, answer: Answer) {
        let micro_batches = self.micro_batches;
        let worker = self.workers.get_mut(&id).unwrap();
        let doing = std::mem::replace(&mut worker.doing, Doing::Between);
        let Doing::Waiting(mut parts) = doing else { panic!("an answer without a question") };
        match answer {
            Answer::Deal(deal) => worker.doing = Doing::Computing(deal, TreeSum::new(micro_batches)),
            Answer::Redeal(deal) => {
                assert_eq!(deal.step, worker.state.applied);
                parts.keep_within(&deal.run);
                worker.doing = Doing::Computing(deal, parts);
                self.redone += 1;
            }
            Answer::Save | Answer::Begin => {}
            Answer::Load => worker.state = worker.fetched.take().expect("the state was fetched"),
            Answer::Sum(sum) => {
                assert_eq!(sum.step, worker.state.applied, "an update was made twice or left out");
                worker.state.apply(&sum.values, sum.tally);
                self.snapshots.push(worker.state.clone());
            }
            Answer::OutOfStep(reason) => panic!("{reason}"),
        }
    }

    /// One thing that can happen in a worker's trainer.
    fn compute(&mut self, id: MemberId) {
        let steps = self.steps;
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let effects = match std::mem::replace(&mut worker.doing, Doing::Between) {
            Doing::Waiting(parts) => {
                worker.doing = Doing::Waiting(parts);
                return;
            }
            Doing::Between if worker.state.applied >= steps => {
                worker.finished = true;
                return;
            }
            Doing::Between => {
                worker.doing = Doing::Waiting(TreeSum::new(self.micro_batches));
                worker.member.begin(worker.state.applied)
            }
            Doing::Computing(deal, mut parts) => {
                let next = deal.run.clone().find(|&index| !parts.has(index));
                if let Some(index) = next.filter(|_| !worker.member.is_over(&deal)) {
                    parts.insert(TreeNode::leaf(index), worker.state.gradient(index), add).unwrap();
                    worker.doing = Doing::Computing(deal, parts);
                    return;
                }
                let partials: Vec<_> = parts
                    .parts()
                    .map(|(node, (values, tally))| Partial { node, values: values.clone(), tally: *tally })
                    .collect();
                let partials = if next.is_none() { partials } else { vec![] };
                worker.doing = Doing::Waiting(parts);
                worker.member.reduce(deal, &partials)
            }
        };
        self.member_effects(id, effects);
    }

    /// The next frame of a stream, when its receiver can take it.
    fn deliver(&mut self, from: MemberId, to: MemberId) {
        let Some(stream) = self.streams.get_mut(&(from, to)) else { return };
        let epoch = stream.epoch;
        let Some(worker) = self.workers.get_mut(&to) else { return };
        match worker.member.running_epoch() {
            Some(running) if running == epoch => {}
            _ if worker.member.epoch() > epoch => {
                self.streams.remove(&(from, to)); // refused as stale
                return;
            }
            _ => return, // it waits until its receiver has formed
        }
        let effects = match stream.frames.pop_front() {
            Some(frame) => worker.member.frame(from, epoch, frame).unwrap(),
            None if stream.broken => {
                self.streams.remove(&(from, to));
                let mut effects = worker.member.broken(epoch, from, "the stream ended".into());
                if let Some(sender) = self.workers.get_mut(&from) {
                    let seen = sender.member.broken(epoch, to, "the stream ended".into());
                    self.member_effects(from, seen);
                }
                effects.truncate(1);
                effects
            }
            None => return,
        };
        self.member_effects(to, effects);
    }

    fn fetch(&mut self, id: MemberId) {
        let Some((from, epoch)) = self.workers.get(&id).and_then(|worker| worker.fetching) else { return };
        let there = self.workers.get(&from);
        let running = there.is_some_and(|source| source.member.running_epoch() == Some(epoch));
        let saved = there.and_then(|source| source.saved.clone());
        let worker = self.workers.get_mut(&id).unwrap();
        if worker.member.running_epoch() != Some(epoch) {
            worker.fetching = None;
        } else if let Some(saved) = saved.filter(|_| running) {
            worker.fetching = None;
            worker.fetched = Some(saved);
            let effects = worker.member.state_arrived(epoch);
            self.member_effects(id, effects);
        } else if !running && there_is_newer(&self.workers, from, epoch) {
            let worker = self.workers.get_mut(&id).unwrap();
            worker.fetching = None;
            let effects = worker.member.broken(epoch, from, "it does not have the state".into());
            self.member_effects(id, effects);
        }
    }

    fn order(&mut self, id: MemberId) {
        let Some(order) = self.orders.get_mut(&id).and_then(VecDeque::pop_front) else { return };
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let effects = match order {
            ToMember::Halt(epoch, at) => worker.member.halt(epoch, at),
            ToMember::Form(formation) => {
                worker.saved = None;
                worker.member.form(formation)
            }
        };
        self.member_effects(id, effects);
    }

    fn report(&mut self, id: MemberId) {
        let Some(report) = self.reports.get_mut(&id).and_then(VecDeque::pop_front) else { return };
        let effects = self.rounds.report(id, report, self.now);
        self.rounds_effects(effects);
    }

    fn bury(&mut self) {
        if let Some(id) = self.graves.pop() {
            let effects = self.rounds.lost(id, self.now);
            self.rounds_effects(effects);
        }
    }

    /// Whatever happens next.
    fn event(&mut self) {
        let ids: Vec<_> = self.workers.keys().copied().collect();
        let streams: Vec<_> = self.streams.keys().copied().collect();
        self.now += Duration::from_millis(1);
        let Some(&id) = ids.get(self.random(ids.len())) else {
            self.bury();
            self.start_worker();
            return;
        };
        match self.random(100) {
            0..30 => self.compute(id),
            30..45 => self.order(id),
            45..60 => self.report(id),
            60..65 => self.fetch(id),
            65..70 => self.bury(),
            70..71 => {
                let effects = self.rounds.tick(self.now);
                self.rounds_effects(effects);
            }
            71..73 if self.troubles > 0 => self.trouble(id, &streams),
            _ => {
                if !streams.is_empty() {
                    let (from, to) = streams[self.random(streams.len())];
                    self.deliver(from, to);
                }
            }
        }
    }

    fn trouble(&mut self, id: MemberId, streams: &[(MemberId, MemberId)]) {
        if self.random(20) != 0 {
            return; // rare, or no step would ever be done
        }
        self.troubles -= 1;
        match self.random(3) {
            0 => {
                self.kill(id);
                if self.random(2) == 0 {
                    self.start_worker();
                }
            }
            1 if self.workers.len() < 6 => self.start_worker(),
            _ => {
                if !streams.is_empty() {
                    let at = streams[self.random(streams.len())];
                    let keep = self.random(4);
                    if let Some(stream) = self.streams.get_mut(&at) {
                        stream.frames.truncate(keep);
                        stream.broken = true;
                    }
                }
            }
        }
    }
}

fn there_is_newer(workers: &BTreeMap<MemberId, Worker>, from: MemberId, epoch: u64) -> bool {
    workers.get(&from).is_none_or(|source| source.member.epoch() > epoch)
}

fn run(seed: u64, workers: usize, micro_batches: u32, values: usize, steps: u64, troubles: u32) -> World {
    let options = RoundsOptions {
        expected: workers,
        gather_within: Duration::from_secs(5),
        halt_within: Duration::from_secs(50),
        step_within: Duration::from_secs(50),
    };
    let mut world = World {
        seed,
        now: Instant::now(),
        steps,
        values,
        micro_batches,
        workers: BTreeMap::new(),
        streams: BTreeMap::new(),
        orders: BTreeMap::new(),
        reports: BTreeMap::new(),
        graves: vec![],
        rounds: Rounds::new(options, 0),
        snapshots: vec![State::new(values)],
        next_id: 0,
        troubles,
        redone: 0,
        catch_ups: [0; 2],
    };
    (0..workers).for_each(|_| world.start_worker());
    for _ in 0..2_000_000 {
        world.event();
        if world.workers.values().any(|worker| worker.finished) {
            return world;
        }
    }
    let stuck: Vec<_> = world
        .workers
        .values()
        .map(|worker| (worker.state.applied, worker.member.running_epoch(), worker.member.waiting_for()))
        .collect();
    panic!("nobody came to the end: {stuck:?}, {:?}", world.rounds);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_schedule_gives_the_bits_of_one_worker(
        seed in any::<u64>(),
        workers in 1_usize..=4,
        micro_batches in 1_u32..=9,
        values in prop_oneof![Just(1_usize), 2_usize..40],
        steps in 1_u64..=6,
        troubles in 0_u32..=8,
    ) {
        let expected = alone(values, micro_batches, steps);
        let world = run(seed, workers, micro_batches, values, steps, troubles);
        for worker in world.workers.values().filter(|worker| worker.finished) {
            prop_assert_eq!(&worker.state, &expected);
        }
        // Whatever anybody has at any step is what one worker had there.
        for snapshot in &world.snapshots {
            prop_assert_eq!(snapshot, &alone(values, micro_batches, snapshot.applied));
        }
    }
}

#[test]
fn a_vector_of_several_pieces_has_the_same_bits() {
    let values = mlxnode_collective::CHUNK_VALUES * 2 + 7;
    let expected = alone(values, 3, 2);
    for workers in 1..=3 {
        let world = run(7, workers, 3, values, 2, 2);
        assert!(
            world.workers.values().filter(|worker| worker.finished).all(|worker| worker.state == expected)
        );
    }
}

/// One that computes nothing and adds nothing up: the others must not run away from it.
#[test]
fn members_with_nothing_to_do_stay_in_step() {
    let expected = alone(1, 2, 5);
    for seed in 0..50 {
        let world = run(seed, 4, 2, 1, 5, 2);
        assert!(
            world.workers.values().filter(|worker| worker.finished).all(|worker| worker.state == expected)
        );
    }
}

#[test]
fn everything_happens_in_these_schedules() {
    let worlds: Vec<_> = (0..60).map(|seed| run(seed, 3, 8, 10, 6, 8)).collect();
    let redone: u32 = worlds.iter().map(|world| world.redone).sum();
    let [sums, states] = [0, 1].map(|kind| worlds.iter().map(|world| world.catch_ups[kind]).sum::<u32>());
    assert!(redone > 20 && sums > 20 && states > 20, "{redone} redone, {sums} sums, {states} states");
}
