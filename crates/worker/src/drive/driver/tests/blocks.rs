//! Blocks of prompts on their way through a pipeline.

use super::*;
use mlxnode_compute::{BlockHash, BlockId, BlockOrder};

const B: usize = BLOCK_TOKENS;

fn pipeline(stage_count: usize, chunk: usize) -> Pipeline {
    let mut pipeline = Pipeline::new(stage_count, chunk);
    pipeline.driver.limits.context_tokens = 16 * B;
    pipeline.driver.welcome();
    pipeline
}

fn prompt(tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|at| at * 7 % VOCABULARY as u32).collect()
}

fn keep(number: usize, checkpoint: bool) -> Keep {
    Keep { number, block: BlockId(number as u64 + 1), checkpoint }
}

#[test]
fn a_sequence_goes_on_in_every_stage_after_the_blocks_of_another_one() {
    for (stage_count, chunk) in [(1, 4096), (2, 100), (3, 256)] {
        let mut pipeline = pipeline(stage_count, chunk);
        let tokens = prompt(2 * B + 9);
        let plan = BlockPlan { reuse: vec![], keep: vec![keep(0, true), keep(1, true)] };
        pipeline.open_with(1, tokens.clone(), spec(5, vec![]), plan);
        pipeline.finish();
        assert_eq!(pipeline.capacities.len(), 1);
        assert_eq!(pipeline.capacities[0].len(), stage_count);
        let cold = SimulatedStage::expected_tokens(&tokens, 5, VOCABULARY);
        assert_eq!(pipeline.heard[&1].tokens, cold);
        // A chunk ends where states are kept, and the scheduler hears of each block once.
        let progress = &pipeline.heard[&1].progress;
        assert_eq!(progress.iter().map(|tokens| tokens / B).collect::<Vec<_>>(), [1, 2]);
        for (sequence, reuse) in [(2, 1), (3, 2)] {
            let reuse = (0..reuse).map(|number| keep(number, true).block).collect();
            let plan = BlockPlan { reuse, keep: vec![] };
            pipeline.open_with(sequence, tokens.clone(), spec(5, vec![]), plan);
            pipeline.finish();
            let heard = &pipeline.heard[&sequence];
            assert_eq!((&heard.tokens, heard.started, heard.closed), (&cold, 1, 1));
        }
    }
}

#[test]
fn what_one_stage_misses_nobody_begins_with() {
    for (stage_count, poor) in [(1, 0), (3, 0), (3, 1), (3, 2)] {
        let mut pipeline = pipeline(stage_count, 512);
        let tokens = prompt(B + 1);
        let plan = BlockPlan { reuse: vec![], keep: vec![keep(0, false)] };
        pipeline.open_with(1, tokens.clone(), spec(2, vec![]), plan.clone());
        pipeline.finish();
        let drop = Message::Blocks(BlockOrder::Drop { block: BlockId(1) });
        pipeline.stages[poor].1.handle(drop).unwrap();
        pipeline.open_with(
            2,
            tokens.clone(),
            spec(2, vec![]),
            BlockPlan { reuse: vec![BlockId(1)], keep: vec![] },
        );
        pipeline.finish();
        let heard = &pipeline.heard[&2];
        assert_eq!((heard.missing, heard.tokens.len(), heard.failures.len(), heard.closed), (1, 0, 0, 1));
        pipeline.open_with(3, tokens.clone(), spec(2, vec![]), BlockPlan::default());
        pipeline.finish();
        assert_eq!(pipeline.heard[&3].tokens, SimulatedStage::expected_tokens(&tokens, 2, VOCABULARY));
    }
}

#[test]
fn a_new_scheduler_finds_no_block_in_memory_but_those_on_the_disk() {
    let mut pipeline = pipeline(2, 512);
    let (tokens, hash) = (prompt(B + 1), BlockHash([4; 32]));
    let plan = BlockPlan { reuse: vec![], keep: vec![keep(0, false)] };
    pipeline.open_with(1, tokens.clone(), spec(2, vec![]), plan);
    pipeline.finish();
    let spill = BlockOrder::Spill { block: BlockId(1), hash };
    pipeline.driver.command(DriveCommand::Blocks(spill)).unwrap();
    // Two come one after the other: only the second one's answer counts.
    pipeline.driver.cancel_all();
    pipeline.driver.welcome();
    pipeline.driver.welcome();
    let reuse = |block| BlockPlan { reuse: vec![BlockId(block)], keep: vec![] };
    pipeline.open_with(2, tokens.clone(), spec(2, vec![]), reuse(1));
    pipeline.finish();
    assert_eq!((pipeline.capacities.len(), pipeline.heard[&2].missing), (2, 1));
    let restore = BlockOrder::Restore { block: BlockId(9), hash };
    pipeline.driver.command(DriveCommand::Blocks(restore)).unwrap();
    pipeline.open_with(3, tokens.clone(), spec(2, vec![]), reuse(9));
    pipeline.finish();
    assert_eq!(pipeline.heard[&3].tokens, SimulatedStage::expected_tokens(&tokens, 2, VOCABULARY));
}

#[test]
fn a_plan_that_leaves_nothing_to_compute_is_refused() {
    let mut pipeline = pipeline(2, 512);
    for reuse in [1, 2] {
        let reuse = (0..reuse).map(BlockId).collect();
        let plan = BlockPlan { reuse, keep: vec![] };
        pipeline.open_with(7, prompt(B), spec(1, vec![]), plan);
        pipeline.finish();
    }
    let heard = &pipeline.heard[&7];
    assert_eq!((heard.failures.len(), heard.closed, heard.started), (2, 2, 0));
}
