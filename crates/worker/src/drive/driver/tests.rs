//! A whole pipeline without network, threads or time: the driver and the stages of a replica, each moving when the test says.

use super::*;
use crate::queue::StepQueue;
use crate::shard::Shard;
use mlxnode_compute::simulated::SimulatedStage;
use mlxnode_compute::{ByteCount, Dtype, LayerRange, Sampling, SequenceEnd, StageInfo};
use proptest::prelude::*;
use std::collections::HashMap;
use std::time::Duration;

const VOCABULARY: usize = 50;

fn limits(prefill_chunk: usize) -> Limits {
    Limits { context_tokens: 64, max_sequences: 4, prefill_chunk, vocabulary: VOCABULARY }
}

fn spec(max_tokens: usize, stop_tokens: Vec<u32>) -> SequenceSpec {
    SequenceSpec { stop_tokens, ..SequenceSpec::new(0, max_tokens, Sampling::default()) }
}

/// What a sequence should generate: to its stop token, its `max_tokens` or the end of the context.
fn expected(prompt: &[u32], max_tokens: usize, stop_tokens: &[u32]) -> (Vec<u32>, SequenceEnd) {
    let count = max_tokens.min(limits(1).context_tokens - prompt.len());
    let mut tokens = SimulatedStage::expected_tokens(prompt, count, VOCABULARY);
    match tokens.iter().position(|token| stop_tokens.contains(token)) {
        Some(at) => {
            tokens.truncate(at + 1);
            (tokens, SequenceEnd::Stop)
        }
        None => (tokens, SequenceEnd::Length),
    }
}

struct Pipeline {
    driver: Driver,
    stages: Vec<(StepQueue<()>, Shard)>,
    ring: VecDeque<Message>,
    heard: HashMap<u64, Heard>,
}

#[derive(Debug, Default)]
struct Heard {
    started: usize,
    tokens: Vec<u32>,
    end: Option<SequenceEnd>,
    failures: Vec<String>,
    closed: usize,
}

impl Pipeline {
    fn new(stage_count: usize, prefill_chunk: usize) -> Self {
        let stage = |index: usize| {
            let info = StageInfo {
                layers: LayerRange::new(index, index + 1),
                layer_count: stage_count,
                hidden: 2,
                dtype: Dtype::F32,
                vocabulary: VOCABULARY,
                weights: ByteCount(0),
            };
            let limit = limits(prefill_chunk).max_sequences;
            (StepQueue::new(), Shard::new(Box::new(SimulatedStage::new(info, Duration::ZERO)), limit))
        };
        Self {
            driver: Driver::new(limits(prefill_chunk)),
            stages: (0..stage_count).map(stage).collect(),
            ring: VecDeque::new(),
            heard: HashMap::new(),
        }
    }

    fn open(&mut self, sequence: u64, prompt: Vec<u32>, spec: SequenceSpec) {
        let sequence = SequenceId(sequence);
        self.driver.command(DriveCommand::Open { sequence, prompt, spec }).unwrap();
    }

    fn cancel(&mut self, sequence: u64) {
        self.driver.command(DriveCommand::Cancel { sequence: SequenceId(sequence) }).unwrap();
    }

    /// Lets part number `part` do one thing: the driver's work, a stage, the ring, or the scheduler's reading. Did it?
    fn advance(&mut self, part: usize) -> bool {
        let last = self.stages.len();
        if part == last {
            let Some(message) = self.ring.pop_front() else { return false };
            self.driver.ring(message).unwrap();
        } else if part == last + 1 {
            let Some(work) = self.driver.next_work() else { return false };
            self.stages[0].0.push(work, ());
            assert!(self.driver.chunks_on_their_way <= last + 1, "more chunks than stages and one");
        } else if part == last + 2 {
            let Some(event) = self.driver.next_event() else { return false };
            self.hear(event);
        } else {
            let (queue, shard) = &mut self.stages[part];
            let Some((message, ())) = queue.pop() else { return false };
            if let Some(message) = shard.handle(message).unwrap() {
                match self.stages.get_mut(part + 1) {
                    Some((queue, _)) => queue.push(message, ()),
                    None => self.ring.push_back(message),
                }
            }
        }
        true
    }

    fn hear(&mut self, event: DriveEvent) {
        match event {
            DriveEvent::Started { sequence, .. } => self.heard.entry(sequence.0).or_default().started += 1,
            DriveEvent::Token(token) => {
                let heard = self.heard.entry(token.sequence.0).or_default();
                assert_eq!((heard.started, heard.closed, heard.end), (1, 0, None), "{token:?}");
                heard.tokens.push(token.sampled.token);
                heard.end = token.end;
            }
            DriveEvent::Scores { .. } | DriveEvent::Embedding { .. } => panic!("nobody asked: {event:?}"),
            DriveEvent::Failed { sequence, reason } => {
                self.heard.entry(sequence.0).or_default().failures.push(reason);
            }
            DriveEvent::Closed { sequence } => self.heard.entry(sequence.0).or_default().closed += 1,
        }
    }

    /// Everything that can still happen, in a fixed order.
    fn finish(&mut self) {
        while (0..self.stages.len() + 3).any(|part| self.advance(part)) {}
        assert_eq!(self.driver.chunks_on_their_way, 0);
        assert!(self.driver.sequences.is_empty());
        assert!(self.stages.iter().all(|(_, shard)| shard.open_sequences() == 0));
    }
}

#[test]
fn a_prompt_enters_in_chunks_and_its_tokens_come_back() {
    for (stage_count, prompt_tokens, chunk) in [(1, 1, 4), (1, 9, 4), (2, 8, 4), (3, 31, 1), (4, 30, 64)] {
        let mut pipeline = Pipeline::new(stage_count, chunk);
        let prompt: Vec<u32> = (0..prompt_tokens).map(|at| at % 7).collect();
        pipeline.open(1, prompt.clone(), spec(12, vec![]));
        pipeline.finish();
        let heard = &pipeline.heard[&1];
        let (tokens, end) = expected(&prompt, 12, &[]);
        assert_eq!((&heard.tokens, heard.end), (&tokens, Some(end)));
        assert_eq!((heard.started, heard.closed, heard.failures.len()), (1, 1, 0));
    }
}

#[test]
fn what_cannot_run_is_refused_with_numbers() {
    let cases = [
        (vec![], spec(1, vec![]), "the prompt has no tokens"),
        (
            vec![1; 64],
            spec(1, vec![]),
            "the prompt has 64 tokens, but the model is loaded with a context of 64",
        ),
        (vec![1], spec(0, vec![]), "max_tokens is 0"),
        (vec![3, 50], spec(1, vec![]), "the prompt has token 50, but the vocabulary has 50"),
        (
            vec![1],
            SequenceSpec { sampling: Sampling { top_p: 2.0, ..Sampling::default() }, ..spec(1, vec![]) },
            "top_p is 2",
        ),
    ];
    let mut pipeline = Pipeline::new(2, 8);
    for (sequence, (prompt, spec, _)) in cases.iter().enumerate() {
        pipeline.open(sequence as u64, prompt.clone(), spec.clone());
        pipeline.finish();
    }
    for (sequence, (_, _, reason)) in cases.iter().enumerate() {
        let heard = &pipeline.heard[&(sequence as u64)];
        assert_eq!((heard.failures.len(), heard.closed, heard.tokens.len()), (1, 1, 0));
        assert!(heard.failures[0].starts_with(reason), "{:?}", heard.failures);
    }
    for sequence in 10..15 {
        pipeline.open(sequence, vec![1], spec(1, vec![]));
    }
    pipeline.finish();
    assert_eq!(pipeline.heard[&14].failures, ["4 sequences are running, which is all there is room for"]);
    assert!((10..14).all(|sequence| pipeline.heard[&sequence].tokens.len() == 1));
}

#[test]
fn the_context_ends_a_sequence() {
    let mut pipeline = Pipeline::new(2, 8);
    pipeline.open(1, vec![1; 60], spec(1000, vec![]));
    pipeline.finish();
    assert_eq!((pipeline.heard[&1].tokens.len(), pipeline.heard[&1].end), (4, Some(SequenceEnd::Length)));
}

#[test]
fn a_slow_scheduler_stops_the_pipeline() {
    let mut pipeline = Pipeline::new(1, 8);
    for sequence in 0..4 {
        pipeline.open(sequence, vec![1], spec(60, vec![]));
    }
    while (0..3).any(|part| pipeline.advance(part)) {} // everybody moves but the scheduler
    assert!(pipeline.driver.events.len() < WAITING_EVENTS + 4, "{} events", pipeline.driver.events.len());
    assert!(!pipeline.driver.accepts_commands());
    pipeline.finish();
    assert!((0..4).all(|sequence| pipeline.heard[&sequence].tokens.len() == 60));
}

#[test]
fn sequences_of_a_scheduler_that_left_are_closed_silently() {
    let mut pipeline = Pipeline::new(2, 2);
    pipeline.open(1, vec![1; 9], spec(60, vec![]));
    pipeline.open(2, vec![2], spec(60, vec![]));
    for part in [3, 3, 3, 3, 0, 0, 1, 0, 2] {
        pipeline.advance(part);
    }
    pipeline.driver.cancel_all();
    pipeline.open(3, vec![5], spec(2, vec![]));
    pipeline.finish();
    assert_eq!(pipeline.heard.keys().collect::<Vec<_>>(), [&3]);
    assert_eq!(pipeline.heard[&3].tokens.len(), 2);
}

#[test]
fn a_lost_pipeline_fails_every_sequence() {
    let mut pipeline = Pipeline::new(2, 2);
    pipeline.open(1, vec![1; 9], spec(60, vec![]));
    pipeline.open(2, vec![2], spec(60, vec![]));
    pipeline.cancel(2);
    pipeline.driver.fail_all("gone");
    while pipeline.advance(4) {}
    assert_eq!(pipeline.heard[&1].failures, ["gone"]);
    assert_eq!((pipeline.heard[&1].closed, pipeline.heard[&2].closed), (1, 1));
    assert!(pipeline.heard[&2].failures.is_empty(), "it was cancelled");
}

#[test]
fn a_broken_ring_is_noticed() {
    let mut driver = Driver::new(limits(8));
    let sequence = SequenceId(1);
    let sampled = mlxnode_compute::Sampled { token: 1, logprob: None, top: vec![] };
    let token =
        |position| Message::Sampled(SampledToken { sequence, position, sampled: sampled.clone(), end: None });
    assert!(matches!(driver.ring(token(1)), Err(Violation::Unknown { .. })));
    driver.command(DriveCommand::Open { sequence, prompt: vec![1; 3], spec: spec(5, vec![]) }).unwrap();
    assert!(matches!(driver.ring(token(3)), Err(Violation::Position { .. })), "before the prompt went in");
    while driver.next_work().is_some() {}
    assert!(matches!(driver.ring(token(4)), Err(Violation::Position { expected: 3, actual: 4, .. })));
    assert_eq!(driver.ring(token(3)), Ok(()));
    assert!(matches!(driver.ring(token(3)), Err(Violation::Position { .. })), "twice");
    assert!(matches!(driver.ring(Message::Done { sequence, position: 3 }), Err(Violation::Position { .. })));
    assert!(
        matches!(driver.ring(Message::Close { sequence }), Err(Violation::Unknown { .. })),
        "not asked for"
    );
    let again = DriveCommand::Open { sequence, prompt: vec![1], spec: spec(1, vec![]) };
    assert_eq!(driver.command(again), Err(Violation::OpenedTwice(1)));
}

/// One sequence of the property test: when it is opened and, perhaps, cancelled, in moves.
#[derive(Clone, Debug)]
struct Plan {
    prompt: Vec<u32>,
    max_tokens: usize,
    stop_tokens: Vec<u32>,
    opened: usize,
    cancelled: Option<usize>,
}

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    let plan = (
        prop::collection::vec(0..VOCABULARY as u32, 1..40),
        1_usize..30,
        prop::collection::vec(0..VOCABULARY as u32, 0..3),
        0_usize..300,
        prop::option::of(0_usize..400),
    );
    let plan = plan.prop_map(|(prompt, max_tokens, stop_tokens, opened, cancelled)| Plan {
        prompt,
        max_tokens,
        stop_tokens,
        opened,
        cancelled,
    });
    prop::collection::vec(plan, 1..=4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whoever moves when: tokens are complete and in order, cancelled ones a prefix, everything is closed once.
    #[test]
    fn tokens_are_complete_and_in_order(
        plans in plans(),
        stage_count in 1_usize..4,
        chunk in 1_usize..20,
        moves in prop::collection::vec(0_usize..7, 0..500),
    ) {
        let mut pipeline = Pipeline::new(stage_count, chunk);
        for now in 0..=500 {
            for (sequence, plan) in plans.iter().enumerate() {
                if plan.opened == now {
                    let spec = spec(plan.max_tokens, plan.stop_tokens.clone());
                    pipeline.open(sequence as u64, plan.prompt.clone(), spec);
                }
                if plan.cancelled == Some(now) {
                    pipeline.cancel(sequence as u64);
                }
            }
            if let Some(part) = moves.get(now) {
                pipeline.advance(part % (stage_count + 3));
            }
        }
        pipeline.finish();
        for (sequence, plan) in plans.iter().enumerate() {
            let heard = &pipeline.heard[&(sequence as u64)];
            let (tokens, end) = expected(&plan.prompt, plan.max_tokens, &plan.stop_tokens);
            prop_assert_eq!((heard.closed, heard.failures.len()), (1, 0));
            prop_assert!(tokens.starts_with(&heard.tokens));
            let was_cancelled = plan.cancelled.is_some_and(|cancelled| cancelled >= plan.opened);
            if heard.end.is_some() || !was_cancelled {
                prop_assert_eq!((&heard.tokens, heard.end), (&tokens, Some(end)));
            }
        }
    }
}
