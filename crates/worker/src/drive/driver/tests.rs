//! A whole pipeline without network, threads or time: the driver and the stages of a replica, each moving when the test says.

use super::*;
use crate::message::StageTimes;
use crate::queue::StepQueue;
use crate::shard::Shard;
use mlxnode_compute::simulated::SimulatedStage;
use mlxnode_compute::{
    BlockCapacity, BlockPlan, ByteCount, Dtype, LayerRange, LogprobRequest, Sampled, Sampling, SequenceEnd,
    StageInfo,
};
use proptest::prelude::*;
use std::collections::HashMap;
use std::time::Duration;

mod blocks;

const VOCABULARY: usize = 50;

fn limits(prefill_chunk: usize) -> Limits {
    Limits { context_tokens: 64, max_sequences: 4, prefill_chunk, vocabulary: VOCABULARY }
}

fn spec(max_tokens: usize, stop_tokens: Vec<u32>) -> SequenceSpec {
    SequenceSpec { stop_tokens, ..SequenceSpec::new(0, max_tokens, Sampling::default()) }
}

/// For a prompt of three tokens.
fn three(max_tokens: usize) -> SequenceSpec {
    SequenceSpec { prompt_tokens: 3, ..spec(max_tokens, vec![]) }
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

/// What a batch of these rows takes.
fn times([fixed, single, token]: [u64; 3], rows: &[Row]) -> StageTimes {
    let singles = rows.iter().filter(|row| row.tokens.len() == 1).count() as u64;
    let tokens: usize = rows.iter().map(|row| row.tokens.len()).filter(|tokens| *tokens > 1).sum();
    let compute = Duration::from_micros(fixed + single * singles + token * tokens as u64);
    StageTimes { compute, ..StageTimes::default() }
}

struct Pipeline {
    driver: Driver,
    stages: Vec<(StepQueue<()>, Shard)>,
    /// What a batch, a row of a single token and a token of a chunk take in each stage, in microseconds. Nothing is waited for.
    costs: Vec<[u64; 3]>,
    ring: VecDeque<Message>,
    heard: HashMap<u64, Heard>,
    /// What each scheduler was told of the stages' room for blocks.
    capacities: Vec<Vec<BlockCapacity>>,
}

#[derive(Debug, Default)]
struct Heard {
    started: usize,
    tokens: Vec<u32>,
    scores: Vec<Sampled>,
    embeddings: Vec<Vec<f32>>,
    end: Option<SequenceEnd>,
    failures: Vec<String>,
    progress: Vec<usize>,
    missing: usize,
    closed: usize,
}

impl Pipeline {
    fn new(stage_count: usize, prefill_chunk: usize) -> Self {
        Self::guessing(stage_count, prefill_chunk, 0)
    }

    /// With a first stage that guesses so many tokens at once.
    fn guessing(stage_count: usize, prefill_chunk: usize, guesses: usize) -> Self {
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
            let stage = SimulatedStage::new(info, Duration::ZERO).guessing(guesses);
            (StepQueue::new(), Shard::new(Box::new(stage), limit))
        };
        Self {
            driver: Driver::new(limits(prefill_chunk)),
            stages: (0..stage_count).map(stage).collect(),
            costs: vec![[1000, 100, 20]; stage_count],
            ring: VecDeque::new(),
            heard: HashMap::new(),
            capacities: Vec::new(),
        }
    }

    fn open(&mut self, sequence: u64, prompt: Vec<u32>, spec: SequenceSpec) {
        self.open_with(sequence, prompt, spec, BlockPlan::default());
    }

    /// A spec without a prompt's length gets that of the whole prompt.
    fn open_with(&mut self, sequence: u64, prompt: Vec<u32>, spec: SequenceSpec, blocks: BlockPlan) {
        let spec = match spec.prompt_tokens {
            0 => SequenceSpec { prompt_tokens: prompt.len(), ..spec },
            _ => spec,
        };
        self.open_as_it_is(sequence, prompt, spec, blocks);
    }

    fn open_as_it_is(&mut self, sequence: u64, prompt: Vec<u32>, spec: SequenceSpec, blocks: BlockPlan) {
        let sequence = SequenceId(sequence);
        self.driver.command(DriveCommand::Open { sequence, prompt, spec, blocks }).unwrap();
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
            if let Message::Batch(batch) = &work {
                // What links admit, without guesses.
                let limits = &self.driver.limits;
                assert!(batch.micro.tokens() <= limits.prefill_chunk.max(2) + limits.max_sequences);
            }
            self.stages[0].0.push(work, ());
            assert!(self.driver.flights.len() <= last + 1, "more batches than stages and one");
        } else if part == last + 2 {
            let Some(event) = self.driver.next_event() else { return false };
            self.hear(event);
        } else {
            let (queue, shard) = &mut self.stages[part];
            let Some((message, ())) = queue.pop() else { return false };
            let times = match &message {
                Message::Batch(batch) => times(self.costs[part], &batch.micro.rows),
                _ => StageTimes::default(),
            };
            for mut message in shard.handle(message).unwrap() {
                message.took(times);
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
            DriveEvent::Scores { sequence, position, scores } => {
                let heard = self.heard.entry(sequence.0).or_default();
                assert_eq!((heard.started, position), (1, 1 + heard.scores.len()));
                heard.scores.extend(scores);
            }
            DriveEvent::Embedding { sequence, values } => {
                self.heard.entry(sequence.0).or_default().embeddings.push(values);
            }
            DriveEvent::Failed { sequence, reason } => {
                self.heard.entry(sequence.0).or_default().failures.push(reason);
            }
            DriveEvent::Closed { sequence } => self.heard.entry(sequence.0).or_default().closed += 1,
            DriveEvent::Capacity { stages } => self.capacities.push(stages),
            DriveEvent::Progress { sequence, tokens } => {
                let heard = self.heard.entry(sequence.0).or_default();
                assert_eq!((heard.started, heard.closed, heard.tokens.len()), (1, 0, 0));
                heard.progress.push(tokens);
            }
            DriveEvent::Missing { sequence } => self.heard.entry(sequence.0).or_default().missing += 1,
        }
    }

    /// Everything that can still happen, in a fixed order.
    fn finish(&mut self) {
        while (0..self.stages.len() + 3).any(|part| self.advance(part)) {}
        assert_eq!(self.driver.flights.len(), 0);
        assert!(self.driver.sequences.is_empty());
        assert!(self.stages.iter().all(|(_, shard)| shard.open_sequences() == 0));
    }
}

#[test]
fn a_prompt_enters_in_chunks_and_its_tokens_come_back() {
    let shapes = [(1, 1, 4), (1, 9, 4), (2, 8, 4), (3, 31, 1), (4, 30, 64)];
    for ((stage_count, prompt_tokens, chunk), guesses) in shapes.into_iter().flat_map(|it| [(it, 0), (it, 4)])
    {
        let mut pipeline = Pipeline::guessing(stage_count, chunk, guesses);
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
fn a_sequence_that_is_continued_ends_as_the_whole_one() {
    for (stage_count, guesses) in [(1, 0), (3, 0), (1, 3), (3, 3)] {
        for stops in [vec![], vec![expected(&[1, 2, 3], 12, &[]).0[9]]] {
            let (whole, end) = expected(&[1, 2, 3], 12, &stops);
            for told in 0..whole.len() {
                let mut pipeline = Pipeline::guessing(stage_count, 4, guesses);
                let prompt = [&[1, 2, 3], &whole[..told]].concat();
                pipeline.open(1, prompt, SequenceSpec { prompt_tokens: 3, ..spec(12, stops.clone()) });
                pipeline.finish();
                let heard = &pipeline.heard[&1];
                assert_eq!((&heard.tokens[..], heard.end), (&whole[told..], Some(end)), "after {told}");
            }
        }
    }
}

#[test]
fn a_continued_sequence_must_have_a_prompt_and_something_to_generate() {
    let cases = [
        (SequenceSpec { prompt_tokens: 0, ..spec(5, vec![]) }, "prompt_tokens is 0, but must be 1 to 4"),
        (SequenceSpec { prompt_tokens: 5, ..spec(5, vec![]) }, "prompt_tokens is 5, but must be 1 to 4"),
        (SequenceSpec { prompt_tokens: 2, ..spec(2, vec![]) }, "all of max_tokens (2) were generated before"),
    ];
    for (spec, reason) in cases {
        let mut pipeline = Pipeline::new(1, 4);
        pipeline.open_as_it_is(1, vec![1, 2, 3, 4], spec, BlockPlan::default());
        pipeline.finish();
        let heard = &pipeline.heard[&1];
        assert!(heard.failures[0].contains(reason), "{:?}", heard.failures);
        assert_eq!((heard.closed, heard.tokens.len()), (1, 0));
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
    let token = Some((Sampled { token: 1, logprob: None, top: vec![] }, None));
    let row = |position, token: &Option<_>| RowResult {
        sequence,
        position,
        token: Option::clone(token),
        further: vec![],
        scores: vec![],
        embedding: None,
    };
    let results = |number, rows| Message::Results(Results { number, rows, times: vec![] });
    let run = |results: &[Message]| {
        let mut driver = Driver::new(limits(2));
        driver
            .command(DriveCommand::Open {
                sequence,
                prompt: vec![1; 3],
                spec: three(5),
                blocks: BlockPlan::default(),
            })
            .unwrap();
        while driver.next_work().is_some() {}
        results.iter().try_for_each(|message| driver.ring(message.clone()))
    };
    assert_eq!(
        driver.ring(results(1, vec![row(1, &token)])),
        Err(Violation::Batch { expected: None, actual: 1 })
    );
    // Batch 1 has two tokens of the prompt, batch 2 the third one.
    let first = results(1, vec![row(2, &None)]);
    assert_eq!(run(&[first.clone(), results(2, vec![row(3, &token)])]), Ok(()));
    let wrong = [
        (vec![results(2, vec![row(3, &token)])], "a batch was lost"),
        (vec![first.clone(), first.clone()], "twice"),
        (vec![results(1, vec![row(2, &token)])], "a token before the prompt went in"),
        (vec![first.clone(), results(2, vec![row(4, &token)])], "another position"),
        (vec![first.clone(), results(2, vec![row(3, &None)])], "no token"),
        (vec![results(1, vec![])], "without its row"),
        (vec![first, results(2, vec![row(3, &token), row_of_another()])], "a row too many"),
        (vec![Message::Close { sequence }], "a close that nobody asked for"),
    ];
    for (messages, what) in wrong {
        assert!(run(&messages).is_err(), "{what}");
    }
    driver
        .command(DriveCommand::Open {
            sequence,
            prompt: vec![1; 3],
            spec: three(5),
            blocks: BlockPlan::default(),
        })
        .unwrap();
    let again =
        DriveCommand::Open { sequence, prompt: vec![1], spec: spec(1, vec![]), blocks: BlockPlan::default() };
    assert_eq!(driver.command(again), Err(Violation::OpenedTwice(1)));
}

fn row_of_another() -> RowResult {
    RowResult {
        sequence: SequenceId(7),
        position: 1,
        token: None,
        further: vec![],
        scores: vec![],
        embedding: None,
    }
}

#[test]
fn prompts_are_scored_and_embedded_chunk_by_chunk() {
    let prompt: Vec<u32> = (0..23).map(|at| at * 3 % 17).collect();
    for (stage_count, chunk) in [(1, 64), (2, 4), (3, 1)] {
        let mut pipeline = Pipeline::new(stage_count, chunk);
        let scored = SequenceSpec { prompt_logprobs: Some(LogprobRequest { top: 0 }), ..spec(4, vec![]) };
        pipeline.open(1, prompt.clone(), scored);
        pipeline.open(2, prompt.clone(), SequenceSpec { output: Output::Embedding, ..spec(1, vec![]) });
        pipeline.finish();
        let heard = &pipeline.heard[&1];
        assert_eq!(heard.tokens, expected(&prompt, 4, &[]).0);
        let mut digest = 0;
        let mut scores = Vec::new();
        for token in &prompt {
            scores.push(SimulatedStage::score(digest, *token));
            digest = SimulatedStage::digest(digest, *token);
        }
        assert_eq!(heard.scores, scores[1..]);
        let heard = &pipeline.heard[&2];
        let mean = prompt.iter().sum::<u32>() as f32 / prompt.len() as f32;
        assert_eq!((&heard.embeddings, heard.tokens.len(), heard.closed), (&vec![vec![mean; 2]], 0, 1));
    }
}

/// Runs a pipeline by the clock that its costs give: stages work at the same time, each on one batch. Returns the times at which
/// tokens came, by sequence.
fn timed(
    pipeline: &mut Pipeline,
    mut openings: Vec<(u64, u64, Vec<u32>, SequenceSpec)>,
) -> HashMap<u64, Vec<u64>> {
    let mut tokens: HashMap<u64, Vec<u64>> = HashMap::new();
    let stage_count = pipeline.stages.len();
    // When each stage is free, and what it hands on then.
    let mut busy: Vec<Option<(u64, Vec<Message>)>> = (0..stage_count).map(|_| None).collect();
    let mut now = 0;
    loop {
        while let Some(at) = openings.iter().position(|(at, ..)| *at <= now) {
            let (_, sequence, prompt, spec) = openings.remove(at);
            pipeline.open(sequence, prompt, spec);
        }
        let mut moved = true;
        while moved {
            moved = false;
            while pipeline.advance(stage_count) || pipeline.advance(stage_count + 1) {
                moved = true;
            }
            let heard: HashMap<u64, usize> =
                pipeline.heard.iter().map(|(sequence, heard)| (*sequence, heard.tokens.len())).collect();
            while pipeline.advance(stage_count + 2) {
                moved = true;
            }
            for (sequence, now_heard) in &pipeline.heard {
                let before = heard.get(sequence).copied().unwrap_or(0);
                tokens.entry(*sequence).or_default().extend(vec![now; now_heard.tokens.len() - before]);
            }
            for (part, busy) in busy.iter_mut().enumerate() {
                if busy.as_ref().is_some_and(|(free, _)| *free <= now)
                    && let Some((_, messages)) = busy.take()
                {
                    moved = true;
                    for message in messages {
                        match pipeline.stages.get_mut(part + 1) {
                            Some((queue, _)) => queue.push(message, ()),
                            None => pipeline.ring.push_back(message),
                        }
                    }
                }
                let (queue, shard) = &mut pipeline.stages[part];
                if busy.is_none()
                    && let Some((message, ())) = queue.pop()
                {
                    moved = true;
                    let times = match &message {
                        Message::Batch(batch) => times(pipeline.costs[part], &batch.micro.rows),
                        _ => StageTimes::default(),
                    };
                    let mut messages = shard.handle(message).unwrap();
                    messages.iter_mut().for_each(|message| message.took(times));
                    *busy = Some((now + times.compute.as_micros() as u64, messages));
                }
            }
        }
        let next =
            busy.iter().flatten().map(|(free, _)| *free).chain(openings.iter().map(|(at, ..)| *at)).min();
        match next {
            Some(next) => now = next,
            None => return tokens,
        }
    }
}

fn roomy() -> Limits {
    Limits { context_tokens: 100_000, max_sequences: 32, prefill_chunk: 512, vocabulary: VOCABULARY }
}

fn roomy_pipeline(costs: &[[u64; 3]]) -> Pipeline {
    pipeline_with(costs, roomy())
}

fn pipeline_with(costs: &[[u64; 3]], limits: Limits) -> Pipeline {
    let mut pipeline = Pipeline::new(costs.len(), 512);
    let max_sequences = limits.max_sequences;
    pipeline.driver = Driver::new(limits);
    for (_, shard) in &mut pipeline.stages {
        let stage = SimulatedStage::new(shard.info().clone(), Duration::ZERO);
        *shard = Shard::new(Box::new(stage), max_sequences);
    }
    pipeline.costs = costs.to_vec();
    pipeline
}

#[test]
fn a_long_prompt_makes_the_others_wait_at_most_twice_as_long() {
    let shapes: [&[[u64; 3]]; 4] = [
        &[[10_000, 100, 200]],
        &[[5_000, 500, 100], [5_000, 500, 100]],
        &[[4_000, 50, 150], [9_000, 90, 300], [2_000, 20, 80]],
        &[[1_000, 800, 400]; 4],
    ];
    for costs in shapes {
        for (rows, beside) in [(1_u64, 0_u64), (8, 0), (1, 20), (8, 20)] {
            let mut pipeline = roomy_pipeline(costs);
            let short = |seed: u64| (0..5).map(|at| ((at + seed) % 50) as u32).collect::<Vec<_>>();
            let mut openings: Vec<_> = (0..rows)
                .map(|sequence| (sequence * 40_000, sequence, short(sequence), spec(400, vec![])))
                .collect();
            let arrival = 2_500_000;
            openings.push((arrival, 100, vec![1; 4000], spec(1, vec![])));
            // Short ones that come meanwhile do not change what is promised.
            let shorts = (0..beside).map(|short| (arrival + short * 100_000, 200 + short, vec![2; 40]));
            openings.extend(shorts.map(|(at, sequence, prompt)| (at, sequence, prompt, spec(1, vec![]))));
            let tokens = timed(&mut pipeline, openings);
            let loaded = tokens[&100][0];
            let gaps = |from: u64, to: u64| {
                let of = |times: &Vec<u64>| {
                    let pairs = times.windows(2).filter(|pair| pair[0] >= from && pair[1] <= to);
                    pairs.map(|pair| pair[1] - pair[0]).collect::<Vec<_>>()
                };
                let mut all: Vec<u64> = (0..rows).flat_map(|sequence| of(&tokens[&sequence])).collect();
                all.sort_unstable();
                all
            };
            let (before, during) = (gaps(arrival - 1_000_000, arrival), gaps(arrival, loaded));
            assert!(
                before.len() > 20 && during.len() > 20,
                "{costs:?}: {} and {}",
                before.len(),
                during.len()
            );
            let usual = before[before.len() / 2];
            // The very first chunk may be a guess.
            let worst = during[during.len() * 98 / 100];
            assert!(
                worst <= 2 * usual,
                "{costs:?}, {rows} rows, {beside} short ones: {usual} us became {worst} us"
            );
            let total: usize = pipeline.heard.values().map(|heard| heard.tokens.len()).sum();
            assert_eq!(total as u64, rows * 400 + 1 + beside);
        }
    }
}

#[test]
fn short_prompts_that_come_together_are_answered_one_after_the_other_and_hold_up_nobody_for_long() {
    let [fixed, row, token] = [10_000, 1_000, 1_000];
    let mut pipeline = roomy_pipeline(&[[fixed, row, token]]);
    let prompt = |seed: u64| (0..64).map(|at| ((at + seed) % 50) as u32).collect::<Vec<_>>();
    // One that has been there for a while, then eight at once.
    let mut openings = vec![(0, 100, prompt(9), spec(200, vec![]))];
    let arrival = 2_000_000;
    openings.extend((0..8_u64).map(|sequence| (arrival, sequence, prompt(sequence), spec(32, vec![]))));
    let tokens = timed(&mut pipeline, openings);
    let mut first: Vec<u64> = (0..8).map(|sequence| tokens[&sequence][0] - arrival).collect();
    assert!(first.is_sorted(), "in the order in which they came: {first:?}");
    first.sort_unstable();
    let prompts = 8 * 64 * token;
    assert!(first[3] < prompts * 3 / 4, "half of them wait for their own prompts and few more: {first:?}");
    let end = (0..8).map(|sequence| *tokens[&sequence].last().unwrap()).max().unwrap() - arrival;
    let work = prompts + 32 * (fixed + 9 * row);
    assert!(end < work * 13 / 10, "{end} us, {work} us would do");
    let pauses = tokens[&100].windows(2).map(|pair| pair[1] - pair[0]);
    let longest = pauses.max().unwrap();
    assert!(longest < 6 * (fixed + 9 * row), "{longest} us");
}

#[test]
fn a_batch_of_prompts_is_never_larger_than_links_admit() {
    // Tokens that are cheap beside a step make prompts of nearly a chunk short.
    for costs in [&[[100_000, 1_000, 100]][..], &[[100_000, 1_000, 100]; 3]] {
        let mut pipeline = roomy_pipeline(costs);
        let mut openings = vec![(0, 100, vec![1; 5], spec(20, vec![]))];
        for (number, length) in [500, 900, 490, 2000, 480].into_iter().enumerate() {
            openings.push((20_000_000, number as u64, vec![2; length], spec(1, vec![])));
        }
        let tokens = timed(&mut pipeline, openings);
        assert!((0..5).all(|sequence| tokens[&sequence].len() == 1));
    }
}

#[test]
fn a_long_prompt_gets_on_while_short_ones_keep_coming() {
    for costs in [&[[10_000, 1_000, 1_000]][..], &[[5_000, 500, 500]; 2]] {
        let mut pipeline = pipeline_with(costs, Limits { max_sequences: 1024, ..roomy() });
        let prompt =
            |seed: u64, length: u64| (0..length).map(|at| ((at + seed) % 50) as u32).collect::<Vec<_>>();
        // One that decodes all the time, a long prompt, and short ones faster than they can be computed: there is always one that waits.
        let mut openings = vec![(0, 1000, prompt(9, 64), spec(1000, vec![]))];
        openings.push((2_000_000, 1001, prompt(3, 700), spec(1, vec![])));
        let arrivals = (0..200_u64)
            .map(|number| (2_000_000 + number * 40_000, number, prompt(number, 64), spec(1, vec![])));
        openings.extend(arrivals);
        let tokens = timed(&mut pipeline, openings);
        let loaded = tokens[&1001][0];
        let last_short = tokens[&199][0];
        assert!(
            loaded < last_short,
            "{costs:?}: it was done at {loaded} us, when no more came after {last_short} us"
        );
    }
}

#[test]
fn rows_go_together_and_split_only_where_that_is_faster() {
    // Tokens in the same time, with a pipeline that is nearly all weights and one that is nearly all rows.
    for (costs, most_batches) in [([10_000, 10, 10], 1), ([10, 1_000, 100], 4)] {
        let mut pipeline = roomy_pipeline(&[costs; 4]);
        let openings = (0..12_u64).map(|sequence| (sequence * 1000, sequence, vec![1, 2], spec(200, vec![])));
        let tokens = timed(&mut pipeline, openings.collect());
        let end = tokens.values().filter_map(|times| times.last()).max().unwrap();
        let [fixed, row, _] = costs;
        // From token to token: all stages one after the other, or the slowest one for all batches.
        let share = 12 / most_batches;
        let cycle = (4 * (fixed + row * share)).max(most_batches * (fixed + row * share));
        let ideal = 200 * cycle;
        assert!(*end < ideal * 13 / 10, "{costs:?}: {end} us, {ideal} us would do");
    }
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
        guesses in 0_usize..5,
        moves in prop::collection::vec(0_usize..7, 0..500),
    ) {
        let mut pipeline = Pipeline::guessing(stage_count, chunk, guesses);
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
