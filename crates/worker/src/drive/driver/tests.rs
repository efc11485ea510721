//! Sequences through a whole pipeline ([`pipeline`]): what comes of them, whoever moves when. How long they take: [`timing`].

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
mod pipeline;
mod timing;

use pipeline::{Pipeline, VOCABULARY, expected, limits, spec, three, times};

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
