//! Many requests of several tenants on memory for few whole contexts, with made-up workers that generate what a single run would,
//! run ahead of what the scheduler has heard, and close what they are told to.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a failing test is supposed to stop"
)]

use mlxnode_compute::simulated::SimulatedStage;
use mlxnode_compute::{Sampled, Sampling, SequenceEnd, SequenceId, SequenceSpec};
use mlxnode_coordinator::scheduler::{
    DriveEvent, Effect, Limits, RequestId, RunError, RunEvent, Scheduler, Statistics,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

const VOCABULARY: usize = 1000;
const CONTEXT: usize = 4096;

/// One request, and how many tokens it really generates.
#[derive(Clone, Debug)]
struct Wanted {
    tenant: usize,
    prompt: Vec<u32>,
    max_tokens: usize,
    length: usize,
}

fn wanted(number: usize, tenant: usize, prompt: usize, max_tokens: usize, length: usize) -> Wanted {
    let prompt = (0..prompt).map(|place| ((number * 131 + place * 7) % VOCABULARY) as u32).collect();
    Wanted { tenant, prompt, max_tokens, length: length.min(max_tokens) }
}

impl Wanted {
    fn spec(&self) -> SequenceSpec {
        SequenceSpec::new(self.prompt.len(), self.max_tokens, Sampling::default())
    }
}

struct Row {
    request: usize,
    tokens: Vec<u32>,
    has_started: bool,
    is_closing: bool,
    has_ended: bool,
}

/// A scheduler, its workers, and what the fronts heard.
struct World {
    scheduler: Scheduler,
    limits: Limits,
    now: Instant,
    wanted: Vec<Wanted>,
    rows: BTreeMap<SequenceId, Row>,
    /// On its way to the scheduler.
    events: VecDeque<DriveEvent>,
    /// Events that may be on their way while the workers go on.
    lag: usize,
    heard: BTreeMap<usize, Vec<u32>>,
    ended: BTreeMap<usize, Result<SequenceEnd, RunError>>,
    /// Requests in the order of their ends.
    order: Vec<usize>,
    most_open: usize,
    most_memory: usize,
}

impl World {
    fn new(limits: Limits, lag: usize) -> Self {
        let now = Instant::now();
        Self {
            scheduler: Scheduler::new(limits.clone(), now),
            limits,
            now,
            wanted: Vec::new(),
            rows: BTreeMap::new(),
            events: VecDeque::new(),
            lag,
            heard: BTreeMap::new(),
            ended: BTreeMap::new(),
            order: Vec::new(),
            most_open: 0,
            most_memory: 0,
        }
    }

    fn submit(&mut self, wanted: Wanted) -> usize {
        let request = self.wanted.len();
        let (tenant, prompt, spec) = (format!("t{}", wanted.tenant), wanted.prompt.clone(), wanted.spec());
        self.wanted.push(wanted);
        let effects = self.scheduler.submit(RequestId(request as u64), &tenant, prompt, spec, None, self.now);
        self.apply(effects);
        request
    }

    fn cancel(&mut self, request: usize) {
        let effects = self.scheduler.cancel(RequestId(request as u64), self.now);
        self.apply(effects);
    }

    fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Open { sequence, prompt, spec, .. } => {
                    let request = self.request_of(&prompt, &spec);
                    assert_eq!(spec, self.wanted[request].spec(), "the spec is that of the whole");
                    let row = Row {
                        request,
                        tokens: prompt,
                        has_started: false,
                        is_closing: false,
                        has_ended: false,
                    };
                    assert!(self.rows.insert(sequence, row).is_none());
                }
                Effect::Cancel { sequence } => {
                    if let Some(row) = self.rows.get_mut(&sequence) {
                        row.is_closing = true;
                    }
                }
                Effect::Emit { request, event } => {
                    let request = request.0 as usize;
                    assert!(!self.ended.contains_key(&request), "an event after the end");
                    match event {
                        RunEvent::Started { .. } => {
                            assert!(self.heard.insert(request, Vec::new()).is_none(), "started twice");
                        }
                        RunEvent::Token { position, sampled, .. } => {
                            let heard = self.heard.get_mut(&request).expect("started first");
                            assert_eq!(position, self.wanted[request].prompt.len() + heard.len());
                            heard.push(sampled.token);
                        }
                        other => panic!("nobody asked: {other:?}"),
                    }
                }
                Effect::End { request, result } => {
                    let request = request.0 as usize;
                    assert!(self.ended.insert(request, result).is_none(), "ended twice");
                    self.order.push(request);
                }
                Effect::Keep { .. } | Effect::Blocks(_) => panic!("the workers keep no blocks"),
            }
        }
        let open = self.rows.len();
        assert!(open <= self.limits.max_sequences);
        self.most_open = self.most_open.max(open);
        let memory = memory(self.rows.values().map(|row| row.tokens.len()).collect());
        assert!(memory <= self.limits.kv_tokens, "{memory} of {} tokens", self.limits.kv_tokens);
        self.most_memory = self.most_memory.max(memory);
    }

    /// Prompts tell requests apart, and a continued one brings its own answer along.
    fn request_of(&self, prompt: &[u32], spec: &SequenceSpec) -> usize {
        let (own, told) = prompt.split_at(spec.prompt_tokens);
        let is_it = |request: &usize| {
            let heard = self.heard.get(request).map(Vec::as_slice).unwrap_or_default();
            self.wanted[*request].prompt == own && heard == told && !self.ended.contains_key(request)
        };
        (0..self.wanted.len()).find(is_it).expect("somebody wants it")
    }

    /// The workers do a step: a token of each sequence. Closes overtake.
    fn step(&mut self) {
        let closing: Vec<SequenceId> =
            self.rows.iter().filter(|(_, row)| row.is_closing || row.has_ended).map(|(id, _)| *id).collect();
        for sequence in closing {
            self.rows.remove(&sequence);
            self.events.push_back(DriveEvent::Closed { sequence });
        }
        for (sequence, row) in &mut self.rows {
            let sequence = *sequence;
            if !std::mem::replace(&mut row.has_started, true) {
                self.events.push_back(DriveEvent::Started { sequence });
                continue; // the prompt
            }
            let wanted = &self.wanted[row.request];
            let digest = row.tokens.iter().fold(0, |digest, token| SimulatedStage::digest(digest, *token));
            let token = SimulatedStage::next_token(digest, VOCABULARY);
            let position = row.tokens.len();
            row.tokens.push(token);
            row.has_ended = row.tokens.len() - wanted.prompt.len() == wanted.length;
            let end = row.has_ended.then_some(SequenceEnd::Stop);
            let sampled = Sampled { token, logprob: None, top: vec![] };
            self.events.push_back(DriveEvent::Token { sequence, position, sampled, end });
        }
        self.deliver(self.lag);
    }

    /// The scheduler hears all but the last `late` events.
    fn deliver(&mut self, late: usize) {
        while self.events.len() > late
            && let Some(event) = self.events.pop_front()
        {
            let effects = self.scheduler.on_drive(event, self.now);
            self.apply(effects);
        }
    }

    /// Everything that can still happen.
    fn finish(&mut self) {
        let mut steps = 0;
        while !self.rows.is_empty() || !self.events.is_empty() {
            self.step();
            self.deliver(if self.rows.is_empty() { 0 } else { self.lag });
            steps += 1;
            assert!(steps < 200_000, "it never ends");
        }
        assert_eq!(self.ended.len(), self.wanted.len(), "every request ends");
        let left = self.scheduler.statistics();
        assert_eq!(
            (left.active, left.queued, left.open_sequences, left.reserved_tokens),
            (0, 0, 0, 0),
            "nothing is left behind"
        );
    }

    /// What each front heard is what a run by itself gives.
    fn check_answers(&self) {
        for (request, result) in &self.ended {
            let wanted = &self.wanted[*request];
            match result {
                Ok(_) => assert_eq!(
                    self.heard[request],
                    SimulatedStage::expected_tokens(&wanted.prompt, wanted.length, VOCABULARY)
                ),
                Err(error) => assert!(
                    matches!(error, RunError::QueueFull { .. } | RunError::Cancelled),
                    "{request}: {error}"
                ),
            }
        }
    }

    fn preemptions(&self) -> u64 {
        self.scheduler.statistics().preemptions
    }
}

/// What sequences of these lengths take at most in an engine: pieces of 256 tokens, and those side by side are as long as the longest of
/// them, which differ by a factor of two or by 512 at most.
fn memory(mut lengths: Vec<usize>) -> usize {
    lengths.sort_unstable_by(|left, right| right.cmp(left));
    let mut memory = 0;
    let mut longest = 0;
    for length in lengths {
        if longest > (2 * length).max(length + 512) {
            longest = 0; // too short for the others: a group of its own begins
        }
        longest = longest.max(length);
        memory += longest.next_multiple_of(256).min(CONTEXT);
    }
    memory
}

fn shared(contexts: usize) -> Limits {
    Limits { max_queued: 10_000, tenant_percent: 100, ..Limits::shared(contexts, CONTEXT, 0) }
}

#[test]
fn short_requests_share_what_is_reserved_for_few_long_ones() {
    let mut world = World::new(shared(4), 0);
    for number in 0..40 {
        world.submit(wanted(number, 0, 100, 2000, 60));
    }
    assert_eq!(world.rows.len(), 4, "nothing is known of their lengths, so each may take a context");
    world.finish();
    world.check_answers();
    assert!(world.most_open >= 12, "{} at once", world.most_open);
    assert_eq!(world.preemptions(), 0);
}

#[test]
fn when_they_get_longer_than_ever_the_youngest_gives_way_and_nobody_notices() {
    let mut world = World::new(shared(4), 5);
    for number in 0..60 {
        world.submit(wanted(number, 0, 100, 3000, 60));
    }
    world.finish();
    let short = world.order.len();
    for number in 60..90 {
        world.submit(wanted(number, 0, 100, 3000, 1500));
    }
    world.finish();
    world.check_answers();
    assert!(world.preemptions() > 0, "the forecast was too low, so somebody had to give way");
    assert!(world.most_memory > CONTEXT, "and the memory is used");
    assert_eq!(world.order[short], 60, "the oldest is never stopped");
}

#[test]
fn tenants_share_by_tokens_and_not_by_requests() {
    let mut world = World::new(Limits { max_sequences: 4, ..shared(4) }, 0);
    for number in 0..120 {
        world.submit(wanted(number, 0, 50, 100, 100));
    }
    for number in 120..140 {
        world.submit(wanted(number, 1, 50, 100, 100));
    }
    world.finish();
    world.check_answers();
    let place = world.order.iter().rposition(|request| *request >= 120).unwrap();
    // Twenty of each until the second tenant has all its answers; a few more were under way before it came.
    assert!((38..=48).contains(&place), "the last of the few came {place}th");
}

#[test]
fn one_tenant_cannot_fill_the_queue() {
    let limits = Limits { max_sequences: 1, max_queued: 100, tenant_percent: 75, ..shared(1) };
    let mut world = World::new(limits, 0);
    for number in 0..200 {
        world.submit(wanted(number, 0, 10, 5, 5));
    }
    assert_eq!(world.scheduler.statistics().queued, 75);
    for number in 200..230 {
        world.submit(wanted(number, number, 10, 5, 5));
    }
    assert_eq!(world.scheduler.statistics().queued, 100, "others find places until all are taken");
    world.finish();
    world.check_answers();
}

#[test]
fn ten_thousand_cancels_leave_nothing_behind() {
    let mut world = World::new(shared(4), 7);
    let mut state = 1u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize) % below
    };
    let mut running = VecDeque::new();
    for number in 0..10_000 {
        running.push_back(world.submit(wanted(number, number % 3, 5 + number % 90, 500, 400)));
        for _ in 0..random(3) {
            world.step();
        }
        if running.len() > random(40) {
            let place = random(running.len());
            let request = running.remove(place).unwrap();
            let before = world.rows.values().filter(|row| row.request == request && !row.is_closing).count();
            world.cancel(request);
            let after = world.rows.values().filter(|row| row.request == request && !row.is_closing).count();
            assert!(before <= 1 && after == 0, "it is closed with the next step");
        }
        // What the test itself remembers of those that are over.
        world.wanted[number].prompt.shrink_to_fit();
    }
    for request in running {
        world.cancel(request);
    }
    world.finish();
    world.check_answers();
    let cancelled = world.ended.values().filter(|result| **result == Err(RunError::Cancelled)).count();
    assert!(cancelled > 9_000, "{cancelled}");
    let left = world.scheduler.statistics();
    assert_eq!(Statistics { preemptions: 0, ..left }, Statistics::default());
    assert_eq!(world.scheduler.next_wake(), None);
}

#[test]
fn ten_times_too_much_is_answered_as_fast_as_enough() {
    // Tokens in so many steps, with so many requests arriving in each hundred of them.
    let tokens = |per_hundred: usize| {
        let limits = Limits { max_queued: 64, ..shared(4) };
        let mut world = World::new(limits, 3);
        let mut number = 0;
        for step in 0..4000 {
            while number * 100 < step * per_hundred {
                world.submit(wanted(number, number % 5, 40 + number % 50, 200, 50 + number % 60));
                number += 1;
            }
            world.now += Duration::from_millis(10);
            world.step();
            assert!(world.scheduler.statistics().queued <= 64);
        }
        let tokens: usize = world.heard.values().map(Vec::len).sum();
        world.finish();
        world.check_answers();
        let refused = world.ended.values().filter(|result| result.is_err()).count();
        (tokens, refused, number)
    };
    let (enough, none_refused, _) = tokens(16);
    let (ten_times, refused, asked) = tokens(160);
    assert_eq!(none_refused, 0);
    assert!(refused * 10 > asked * 7, "{refused} of {asked}");
    assert!(ten_times * 10 >= enough * 9, "{ten_times} tokens, {enough} without overload");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn memory_is_never_exceeded_and_everybody_gets_what_a_single_run_gives(
        requests in proptest::collection::vec((0usize..4, 1usize..1500, 1usize..1500, 1usize..700, 0usize..30), 1..50),
        contexts in 1usize..5,
        fixed in prop_oneof![Just(0usize), 0usize..CONTEXT],
        lag in 0usize..20,
        cancels in proptest::collection::vec((0usize..50, 0usize..400), 0..8),
    ) {
        let limits = Limits { max_queued: 10_000, tenant_percent: 100, ..Limits::shared(contexts, CONTEXT, fixed) };
        let mut world = World::new(limits, lag);
        let mut step = 0;
        for (number, (tenant, prompt, max_tokens, length, steps)) in requests.iter().enumerate() {
            world.submit(wanted(number, *tenant, *prompt, *max_tokens, *length));
            for _ in 0..*steps {
                world.step();
                step += 1;
                for (request, _) in cancels.iter().filter(|(request, at)| *at == step && *request <= number) {
                    world.cancel(*request);
                }
            }
        }
        world.finish();
        world.check_answers();
    }
}
