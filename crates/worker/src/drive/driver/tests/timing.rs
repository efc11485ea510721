//! Pipelines by the clock that their costs give: who waits for whom, and how long.

use super::*;

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
