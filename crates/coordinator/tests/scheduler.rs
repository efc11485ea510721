//! The scheduler's promises under any order of events, with a made-up pipeline that does as the workers do.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a failing test is supposed to stop"
)]

use mlxnode_compute::{
    BLOCK_TOKENS, BlockCapacity, BlockOrder, BlockPlan, ByteCount, LogprobRequest, Sampled, Sampling,
    SequenceEnd, SequenceId, SequenceSpec,
};
use mlxnode_coordinator::scheduler::{DriveEvent, Effect, Limits, RequestId, RunError, RunEvent, Scheduler};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

fn limits() -> Limits {
    Limits { max_queued: 5, max_queued_tokens: 60, tenant_percent: 100, kv_tokens: 60, ..Limits::new(3, 40) }
}

fn spec(prompt_tokens: usize, max_tokens: usize) -> SequenceSpec {
    SequenceSpec::new(prompt_tokens, max_tokens, Sampling::default())
}

fn sampled(token: u32) -> Sampled {
    Sampled { token, logprob: None, top: vec![] }
}

fn ends(effects: &[Effect]) -> Vec<(u64, Result<SequenceEnd, RunError>)> {
    let end = |effect: &Effect| match effect {
        Effect::End { request, result } => Some((request.0, result.clone())),
        _ => None,
    };
    effects.iter().filter_map(end).collect()
}

fn opened(effects: &[Effect]) -> Vec<u64> {
    let open = |effect: &Effect| match effect {
        Effect::Open { sequence, .. } => Some(sequence.0),
        _ => None,
    };
    effects.iter().filter_map(open).collect()
}

#[test]
fn a_request_runs_from_open_to_closed() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(limits(), now);
    let effects = scheduler.submit(RequestId(1), "", vec![7, 8], spec(2, 2), None, now);
    let sequence = SequenceId(1);
    assert_eq!(
        effects,
        [Effect::Open { sequence, prompt: vec![7, 8], spec: spec(2, 2), blocks: BlockPlan::default() }]
    );
    let started = scheduler.on_drive(DriveEvent::Started { sequence }, now);
    assert_eq!(
        started,
        [Effect::Emit { request: RequestId(1), event: RunEvent::Started { cached_tokens: 0 } }]
    );
    let token = |position, end| DriveEvent::Token { sequence, position, sampled: sampled(5), end };
    assert_eq!(scheduler.on_drive(token(2, None), now).len(), 1);
    let last = scheduler.on_drive(token(3, Some(SequenceEnd::Length)), now);
    assert_eq!(last.len(), 2);
    assert_eq!(ends(&last), [(1, Ok(SequenceEnd::Length))]);
    assert_eq!(scheduler.statistics().active, 0);
    assert_eq!(scheduler.statistics().open_sequences, 1, "its memory is not free yet");
    assert_eq!(scheduler.on_drive(DriveEvent::Closed { sequence }, now), []);
    assert_eq!(scheduler.statistics(), Default::default());
}

#[test]
fn what_does_not_fit_waits_and_what_waits_is_never_overtaken() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(limits(), now);
    // 30 + 20 of 60 KV tokens; 30 more do not fit, and the 2 after them wait too although they would.
    assert_eq!(opened(&scheduler.submit(RequestId(1), "", vec![0; 20], spec(20, 10), None, now)), [1]);
    assert_eq!(opened(&scheduler.submit(RequestId(2), "", vec![0; 10], spec(10, 10), None, now)), [2]);
    assert_eq!(
        opened(&scheduler.submit(RequestId(3), "", vec![0; 20], spec(20, 10), None, now)),
        [] as [u64; 0]
    );
    assert_eq!(
        opened(&scheduler.submit(RequestId(4), "", vec![0; 1], spec(1, 1), None, now)),
        [] as [u64; 0]
    );
    assert_eq!(scheduler.statistics().queued, 2);
    scheduler.cancel(RequestId(2), now);
    let effects = scheduler.on_drive(DriveEvent::Closed { sequence: SequenceId(2) }, now);
    assert_eq!(opened(&effects), [3]);
    scheduler.cancel(RequestId(1), now);
    let effects = scheduler.on_drive(DriveEvent::Closed { sequence: SequenceId(1) }, now);
    assert_eq!(opened(&effects), [4]);
}

#[test]
fn the_queue_is_bounded_in_requests_and_in_tokens() {
    let now = Instant::now();
    let full = |prompt: usize, waiting: usize| {
        let mut scheduler = Scheduler::new(Limits { max_sequences: 1, ..limits() }, now);
        for request in 0..=waiting as u64 {
            let effects =
                scheduler.submit(RequestId(request), "", vec![0; prompt], spec(prompt, 1), None, now);
            assert_eq!(ends(&effects), []);
        }
        ends(&scheduler.submit(RequestId(99), "", vec![0; prompt], spec(prompt, 1), None, now))
    };
    assert_eq!(full(1, 5), [(99, Err(RunError::QueueFull { queued: 5, tokens: 5 }))]);
    assert_eq!(full(30, 2), [(99, Err(RunError::QueueFull { queued: 2, tokens: 60 }))]);
}

#[test]
fn requests_that_can_never_run_are_refused_at_once() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(limits(), now);
    let long = scheduler.submit(RequestId(1), "", vec![0; 30], spec(30, 11), None, now);
    assert_eq!(ends(&long), [(1, Err(RunError::TooLong { tokens: 41, context: 40 }))]);
    let huge = scheduler.submit(RequestId(2), "", vec![0; 30], spec(30, usize::MAX), None, now);
    assert!(matches!(ends(&huge)[0].1, Err(RunError::TooLong { .. })));
    let empty = scheduler.submit(RequestId(3), "", vec![], spec(0, 1), None, now);
    assert!(matches!(ends(&empty)[0].1, Err(RunError::Invalid(_))));
    let late = scheduler.submit(RequestId(4), "", vec![0], spec(1, 1), Some(now), now);
    assert_eq!(ends(&late), [(4, Err(RunError::DeadlineExceeded))]);
}

#[test]
fn a_continued_sequence_counts_what_was_generated_before() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(limits(), now);
    // 2 of prompt and 3 of 5 to generate: two tokens more.
    let effects = scheduler.submit(RequestId(1), "", vec![7; 5], spec(2, 5), None, now);
    assert_eq!(opened(&effects), [1]);
    assert_eq!(scheduler.statistics().reserved_tokens, 7, "as much as the whole");
    let sequence = SequenceId(1);
    let mut token = |position| {
        scheduler.on_drive(DriveEvent::Token { sequence, position, sampled: sampled(5), end: None }, now)
    };
    assert_eq!(ends(&token(5)), []);
    // The workers end it; should they not, it ends here.
    assert_eq!(ends(&token(6)), [(1, Ok(SequenceEnd::Length))]);
    for (prompt, prompt_tokens, max_tokens) in [(5, 2, 3), (5, 0, 9), (5, 6, 9)] {
        let wrong =
            scheduler.submit(RequestId(2), "", vec![7; prompt], spec(prompt_tokens, max_tokens), None, now);
        assert!(matches!(ends(&wrong)[0].1, Err(RunError::Invalid(_))), "{prompt_tokens} {max_tokens}");
    }
}

#[test]
fn a_deadline_ends_what_runs_and_what_waits() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(Limits { max_sequences: 1, ..limits() }, now);
    let soon = now + Duration::from_secs(1);
    scheduler.submit(RequestId(1), "", vec![0], spec(1, 9), Some(soon), now);
    scheduler.submit(RequestId(2), "", vec![0], spec(1, 9), Some(soon), now);
    assert_eq!(scheduler.next_wake(), Some(soon));
    assert_eq!(scheduler.tick(now), []);
    let effects = scheduler.tick(soon);
    assert_eq!(ends(&effects), [(1, Err(RunError::DeadlineExceeded)), (2, Err(RunError::DeadlineExceeded))]);
    assert!(effects.contains(&Effect::Cancel { sequence: SequenceId(1) }));
}

#[test]
fn a_lost_token_fails_the_request_and_a_repeated_one_is_dropped() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(limits(), now);
    scheduler.submit(RequestId(1), "", vec![0], spec(1, 9), None, now);
    let sequence = SequenceId(1);
    let mut token = |position| {
        scheduler.on_drive(DriveEvent::Token { sequence, position, sampled: sampled(5), end: None }, now)
    };
    assert_eq!(token(1).len(), 2, "started and the token");
    assert_eq!(token(1), []);
    let effects = token(3);
    assert!(matches!(ends(&effects)[0].1, Err(RunError::Failed(_))));
    assert!(effects.contains(&Effect::Cancel { sequence }));
}

#[test]
fn the_place_of_a_failed_sequence_is_free_when_closed_or_after_a_grace() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(limits(), now);
    scheduler.submit(RequestId(1), "", vec![0], spec(1, 9), None, now);
    let failed = DriveEvent::Failed { sequence: SequenceId(1), reason: "no memory".into() };
    assert_eq!(scheduler.on_drive(failed, now), [], "it may be the whole pipeline");
    let effects = scheduler.tick(scheduler.next_wake().unwrap());
    assert_eq!(ends(&effects), [(1, Err(RunError::Failed("no memory".into())))]);
    assert_eq!(scheduler.statistics().open_sequences, 1);
    let wake = scheduler.next_wake().unwrap();
    scheduler.tick(wake);
    assert_eq!(scheduler.statistics(), Default::default());
}

#[test]
fn a_breaking_pipeline_makes_every_request_unavailable_and_opens_no_other() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(Limits { max_sequences: 1, ..limits() }, now);
    scheduler.submit(RequestId(1), "", vec![0], spec(1, 9), None, now);
    scheduler.submit(RequestId(2), "", vec![0], spec(1, 9), None, now);
    let sequence = SequenceId(1);
    let failed = DriveEvent::Failed { sequence, reason: "the next stage is gone".into() };
    assert_eq!(scheduler.on_drive(failed, now), []);
    assert_eq!(scheduler.on_drive(DriveEvent::Closed { sequence }, now), []);
    let effects = scheduler.on_drive(DriveEvent::Lost { reason: "the next stage is gone".into() }, now);
    let lost = || Err(RunError::Unavailable("the next stage is gone".into()));
    assert_eq!(ends(&effects), [(1, lost()), (2, lost())]);
}

#[test]
fn silent_workers_count_as_lost() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(limits(), now);
    assert_eq!(scheduler.next_wake(), None, "nothing is owed by idle workers");
    scheduler.submit(RequestId(1), "", vec![0; 10], spec(10, 9), None, now);
    assert_eq!(
        scheduler.next_wake(),
        Some(now + Duration::from_secs(31)),
        "30 s and 0.1 s for each prompt token"
    );
    let effects = scheduler.tick(now + Duration::from_secs(31));
    assert_eq!(ends(&effects), [(1, Err(RunError::Unavailable("its workers said nothing for 31 s".into())))]);
    let after = scheduler.submit(RequestId(2), "", vec![0], spec(1, 1), None, now);
    assert!(matches!(ends(&after)[0].1, Err(RunError::Unavailable(_))));
}

// --- blocks of prompts ---

/// A scheduler whose workers keep `blocks` blocks, and a prompt of two blocks and one token.
fn with_blocks(blocks: u64, now: Instant) -> (Scheduler, Vec<u32>) {
    let mut scheduler = Scheduler::new(Limits::new(3, 2000), now);
    let stage = BlockCapacity {
        block: ByteCount(1),
        memory: ByteCount(blocks),
        disk: ByteCount(blocks),
        ..BlockCapacity::default()
    };
    assert_eq!(scheduler.on_drive(DriveEvent::Capacity { stages: vec![stage; 2] }, now), []);
    (scheduler, (0..2 * BLOCK_TOKENS as u32 + 1).collect())
}

fn plan_of(effects: &[Effect]) -> BlockPlan {
    let plans = effects.iter().find_map(|effect| match effect {
        Effect::Open { blocks, .. } => Some(blocks.clone()),
        _ => None,
    });
    plans.expect("a sequence is opened")
}

#[test]
fn a_prompt_that_is_being_computed_is_waited_for_and_others_pass() {
    let now = Instant::now();
    let (mut scheduler, prompt) = with_blocks(10, now);
    let spec = spec(prompt.len(), 2);
    let first = scheduler.submit(RequestId(1), "a", prompt.clone(), spec.clone(), None, now);
    assert_eq!(plan_of(&first).keep.len(), 2);
    assert_eq!(
        opened(&scheduler.submit(RequestId(2), "a", prompt.clone(), spec.clone(), None, now)),
        [] as [u64; 0]
    );
    let other = scheduler.submit(RequestId(3), "b", prompt.clone(), spec.clone(), None, now);
    assert_eq!(opened(&other), [2], "another tenant's prompt is another one");
    let sequence = SequenceId(1);
    scheduler.on_drive(DriveEvent::Started { sequence }, now);
    let half = scheduler.on_drive(DriveEvent::Progress { sequence, tokens: BLOCK_TOKENS }, now);
    assert_eq!(opened(&half), [] as [u64; 0]);
    let whole = scheduler.on_drive(DriveEvent::Progress { sequence, tokens: 2 * BLOCK_TOKENS }, now);
    assert_eq!(opened(&whole), [3]);
    let plan = plan_of(&whole);
    assert_eq!((plan.cached_tokens(), plan.keep.len()), (2 * BLOCK_TOKENS, 0));
    // Only when a result came is it sure that all stages have the blocks.
    let sequence = SequenceId(3);
    assert_eq!(scheduler.on_drive(DriveEvent::Started { sequence }, now), []);
    let token = DriveEvent::Token { sequence, position: prompt.len(), sampled: sampled(4), end: None };
    let event = RunEvent::Started { cached_tokens: 2 * BLOCK_TOKENS };
    assert_eq!(scheduler.on_drive(token, now)[0], Effect::Emit { request: RequestId(2), event });
    for sequence in [1, 2, 3].map(SequenceId) {
        scheduler.on_drive(DriveEvent::Closed { sequence }, now);
    }
    let statistics = scheduler.statistics();
    assert_eq!((statistics.prompts.blocks_in_memory, statistics.reserved_tokens), (2, 0));
}

#[test]
fn a_request_whose_blocks_are_missing_is_computed_anew_and_nobody_notices() {
    let now = Instant::now();
    let (mut scheduler, prompt) = with_blocks(10, now);
    let spec = spec(prompt.len(), 1);
    scheduler.submit(RequestId(1), "a", prompt.clone(), spec.clone(), None, now);
    let token = |sequence| DriveEvent::Token {
        sequence,
        position: prompt.len(),
        sampled: sampled(4),
        end: Some(SequenceEnd::Length),
    };
    scheduler.on_drive(token(SequenceId(1)), now);
    let closed = scheduler.on_drive(DriveEvent::Closed { sequence: SequenceId(1) }, now);
    let is_spill = |effect: &&Effect| matches!(effect, Effect::Blocks(BlockOrder::Spill { .. }));
    assert_eq!(closed.iter().filter(is_spill).count(), 2, "written when it is over");
    let warm = scheduler.submit(RequestId(2), "a", prompt.clone(), spec.clone(), None, now);
    assert_eq!(plan_of(&warm).reuse.len(), 2);
    assert!(scheduler.stored_prompts().is_some());
    scheduler.on_drive(DriveEvent::Started { sequence: SequenceId(2) }, now);
    let again = scheduler.on_drive(DriveEvent::Missing { sequence: SequenceId(2) }, now);
    assert_eq!(opened(&again), [3]);
    let plan = plan_of(&again);
    assert_eq!((plan.reuse.len(), plan.keep.len()), (0, 2));
    assert_eq!(ends(&scheduler.on_drive(DriveEvent::Closed { sequence: SequenceId(2) }, now)), []);
    scheduler.on_drive(DriveEvent::Started { sequence: SequenceId(3) }, now);
    assert_eq!(ends(&scheduler.on_drive(token(SequenceId(3)), now)), [(2, Ok(SequenceEnd::Length))]);
    scheduler.on_drive(DriveEvent::Closed { sequence: SequenceId(3) }, now);
    // Scores need every token of the prompt.
    let scored = SequenceSpec { prompt_logprobs: Some(LogprobRequest { top: 0 }), ..spec };
    let effects = scheduler.submit(RequestId(4), "a", prompt, scored, None, now);
    assert!(plan_of(&effects).is_empty());
    assert_eq!(scheduler.statistics().open_sequences, 1);
}

// --- any order of events ---

#[derive(Clone, Debug)]
enum Action {
    Submit {
        prompt: usize,
        max_tokens: usize,
        deadline: Option<u64>,
    },
    Cancel(usize),
    /// One step of one sequence in the pipeline.
    Step(usize),
    Fail(usize),
    Repeat(usize),
    Wait(u64),
    LoseDriver,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        6 => (1usize..30, 1usize..12, proptest::option::weighted(0.2, 1u64..3000))
            .prop_map(|(prompt, max_tokens, deadline)| Action::Submit { prompt, max_tokens, deadline }),
        2 => (0usize..40).prop_map(Action::Cancel),
        20 => (0usize..8).prop_map(Action::Step),
        1 => (0usize..8).prop_map(Action::Fail),
        1 => (0usize..8).prop_map(Action::Repeat),
        2 => (1u64..2000).prop_map(Action::Wait),
    ];
    let lost = prop_oneof![8 => Just(None), 1 => (0usize..200).prop_map(Some)];
    (proptest::collection::vec(action, 0..200), lost).prop_map(|(mut actions, lost)| {
        if let Some(place) = lost.filter(|place| *place < actions.len()) {
            actions.insert(place, Action::LoseDriver);
        }
        actions
    })
}

/// Does as the workers do, with the memory that they have.
#[derive(Default)]
struct Pipeline {
    open: BTreeMap<SequenceId, Row>,
}

struct Row {
    prompt: usize,
    max_tokens: usize,
    produced: usize,
    started: bool,
    cancelled: bool,
    ended: bool,
}

impl Pipeline {
    fn step(&mut self, nth: usize) -> Option<DriveEvent> {
        let sequence = *self.open.keys().nth(nth % self.open.len().max(1))?;
        let row = self.open.get_mut(&sequence)?;
        if row.cancelled || row.ended {
            self.open.remove(&sequence);
            return Some(DriveEvent::Closed { sequence });
        }
        if !std::mem::replace(&mut row.started, true) {
            return Some(DriveEvent::Started { sequence });
        }
        let position = row.prompt + row.produced;
        row.produced += 1;
        row.ended = row.produced == row.max_tokens;
        let end = row.ended.then_some(SequenceEnd::Length);
        Some(DriveEvent::Token { sequence, position, sampled: sampled(position as u32), end })
    }
}

#[derive(Default)]
struct World {
    pipeline: Pipeline,
    /// Submitted and neither refused nor ended, in order.
    live: Vec<u64>,
    request_of: BTreeMap<SequenceId, u64>,
    prompts: BTreeMap<u64, usize>,
    received: BTreeMap<u64, Vec<usize>>,
    ended: BTreeSet<u64>,
    first_come: Vec<u64>,
}

impl World {
    fn apply(&mut self, effects: Vec<Effect>, limits: &Limits) -> Result<(), TestCaseError> {
        for effect in effects {
            match effect {
                Effect::Open { sequence, prompt, spec, blocks } => {
                    prop_assert!(blocks.is_empty(), "the workers did not say that they keep blocks");
                    // The prompt's tokens carry the request's number, so that nothing can be mixed up.
                    let request = u64::from(prompt[0]);
                    prop_assert!(!self.request_of.contains_key(&sequence), "a sequence id was used twice");
                    prop_assert!(self.first_come.last().is_none_or(|last| *last < request), "overtaken");
                    self.first_come.push(request);
                    self.request_of.insert(sequence, request);
                    let row = Row {
                        prompt: prompt.len(),
                        max_tokens: spec.max_tokens,
                        produced: 0,
                        started: false,
                        cancelled: false,
                        ended: false,
                    };
                    self.pipeline.open.insert(sequence, row);
                }
                Effect::Keep { .. } | Effect::Blocks(_) => prop_assert!(false, "no blocks"),
                Effect::Cancel { sequence } => {
                    if let Some(row) = self.pipeline.open.get_mut(&sequence) {
                        row.cancelled = true;
                    }
                }
                Effect::Emit { request, event } => {
                    prop_assert!(!self.ended.contains(&request.0), "an event after the end");
                    if let RunEvent::Token { position, sampled, .. } = event {
                        prop_assert_eq!(position as u32, sampled.token);
                        let received = self.received.entry(request.0).or_default();
                        prop_assert_eq!(
                            position,
                            self.prompts[&request.0] + received.len(),
                            "lost or repeated"
                        );
                        received.push(position);
                    }
                }
                Effect::End { request, .. } => {
                    prop_assert!(self.ended.insert(request.0), "ended twice");
                    self.live.retain(|live| *live != request.0);
                }
            }
        }
        let reserved: usize = self.pipeline.open.values().map(|row| row.prompt + row.max_tokens).sum();
        prop_assert!(self.pipeline.open.len() <= limits.max_sequences);
        prop_assert!(reserved <= limits.kv_tokens, "{} of {} tokens", reserved, limits.kv_tokens);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_ends_once_with_all_its_tokens_in_order(actions in actions()) {
        let limits = limits();
        let mut now = Instant::now();
        let mut scheduler = Scheduler::new(limits.clone(), now);
        let mut world = World::default();
        let mut is_lost = false;
        let mut submitted = 0u64;
        for action in actions {
            let effects = match action {
                Action::Submit { prompt, max_tokens, deadline } => {
                    let request = submitted;
                    submitted += 1;
                    world.prompts.insert(request, prompt);
                    world.live.push(request);
                    let deadline = deadline.map(|millis| now + Duration::from_millis(millis));
                    let tokens = vec![request as u32; prompt];
                    scheduler.submit(RequestId(request), "", tokens, spec(prompt, max_tokens), deadline, now)
                }
                Action::Cancel(request) => {
                    let effects = scheduler.cancel(RequestId(request as u64), now);
                    prop_assert!(!world.live.contains(&(request as u64)) || !ends(&effects).is_empty());
                    effects
                }
                Action::Step(nth) => match world.pipeline.step(nth) {
                    Some(event) if !is_lost => scheduler.on_drive(event, now),
                    _ => vec![],
                },
                Action::Fail(nth) => match world.pipeline.open.keys().nth(nth).copied() {
                    Some(sequence) if !is_lost => {
                        if let Some(row) = world.pipeline.open.get_mut(&sequence) {
                            row.cancelled = true;
                        }
                        scheduler.on_drive(DriveEvent::Failed { sequence, reason: "failed".into() }, now)
                    }
                    _ => vec![],
                },
                Action::Repeat(nth) => match world.pipeline.open.iter().nth(nth) {
                    Some((sequence, row)) if !is_lost && row.produced > 0 => {
                        let position = row.prompt + row.produced - 1;
                        let sampled = sampled(position as u32);
                        scheduler.on_drive(DriveEvent::Token { sequence: *sequence, position, sampled, end: None }, now)
                    }
                    _ => vec![],
                },
                Action::Wait(millis) => {
                    // The pipeline closes what failed well within the grace, as the workers do.
                    while let Some(position) = world.pipeline.open.values().position(|row| row.cancelled || row.ended) {
                        let event = world.pipeline.step(position).unwrap();
                        let effects = if is_lost { vec![] } else { scheduler.on_drive(event, now) };
                        world.apply(effects, &limits)?;
                    }
                    now += Duration::from_millis(millis);
                    scheduler.tick(now)
                }
                Action::LoseDriver => {
                    is_lost = true;
                    world.pipeline.open.clear();
                    let effects = scheduler.on_driver_lost("killed");
                    world.apply(effects, &limits)?;
                    prop_assert!(world.live.is_empty());
                    vec![]
                }
            };
            world.apply(effects, &limits)?;
            let statistics = scheduler.statistics();
            prop_assert!(statistics.queued <= limits.max_queued);
            prop_assert_eq!(statistics.active + statistics.queued, world.live.len());
        }
        // The workers go on until nothing is left: nobody starves.
        let mut steps = 0;
        loop {
            while let Some(event) = world.pipeline.step(steps) {
                steps += 1;
                prop_assert!(steps < 10_000, "the pipeline never empties");
                let effects = scheduler.on_drive(event, now);
                world.apply(effects, &limits)?;
            }
            let Some(wake) = scheduler.next_wake() else { break };
            now = now.max(wake);
            let effects = scheduler.tick(now);
            world.apply(effects, &limits)?;
        }
        prop_assert_eq!(world.ended.len() as u64, submitted);
        prop_assert_eq!(scheduler.statistics(), Default::default());
        prop_assert_eq!(scheduler.next_wake(), None);
    }
}
