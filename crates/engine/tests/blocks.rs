//! A sequence that begins with the blocks of another one gives what it would give from its first token.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod random_model;
mod support;

use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{
    BLOCK_TOKENS, BlockHash, BlockId, BlockOrder, ByteCount, CacheOptions, Keep, LayerRange, Penalty,
    Sampling, SequenceId, SequenceSpec, Stage, StageError, Step, StepInput, StepOutput,
};
use mlxnode_engine::{EngineStage, StageOptions};
use serde_json::{Value, json};
use std::path::Path;
use support::{folder, prompt};

const B: usize = BLOCK_TOKENS;
/// Largest difference of logits, relative to the largest of them.
const TOLERANCE: f32 = 1e-4;

/// Stages of one model in this process.
struct Pipeline {
    stages: Vec<EngineStage>,
}

/// What came out: the tokens, and the logits of a model that is a single stage.
#[derive(Debug, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

impl Pipeline {
    fn load(folder: &Path, cuts: &[usize], cache: CacheOptions) -> Self {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let all = checkpoint.spec().layer_count();
        let bounds: Vec<usize> = [0].iter().chain(cuts).chain(&[all]).copied().collect();
        let options = StageOptions { cache, ..StageOptions::default() };
        let stages = bounds.windows(2).map(|pair| {
            let layers = LayerRange::new(pair[0], pair[1]);
            EngineStage::load(&checkpoint, layers, options, &mut |_, _| {}).unwrap()
        });
        Self { stages: stages.collect() }
    }

    fn order(&mut self, order: BlockOrder) {
        self.stages.iter_mut().for_each(|stage| stage.blocks().unwrap().order(order).unwrap());
    }

    fn blocks(&mut self) -> usize {
        self.stages[0].blocks().unwrap().usage().blocks
    }

    fn step(&mut self, step: &Step) -> StepOutput {
        let mut input = StepInput::Tokens;
        for stage in &mut self.stages {
            match stage.step(Step { input: input.clone(), ..step.clone() }).unwrap() {
                StepOutput::Activation(activation) => input = StepInput::Activation(activation),
                output => return output,
            }
        }
        panic!("the last stage answered with an activation")
    }

    /// Opens a sequence that begins with `reuse` and keeps `keep`, runs the prompt in chunks that end at each of `ends`, and
    /// generates.
    fn run(
        &mut self,
        id: u64,
        tokens: &[u32],
        (reuse, keep): (&[BlockId], &[Keep]),
        ends: &[usize],
        generate: usize,
    ) -> Result<Answer, StageError> {
        let sequence = SequenceId(id);
        let sampling =
            Sampling { repetition: Some(Penalty { strength: 1.2, context: 0 }), ..Sampling::default() };
        for stage in &mut self.stages {
            let spec = SequenceSpec::new(tokens.len(), generate, sampling.clone());
            stage.open(sequence, spec).unwrap();
            let begun = stage.blocks().unwrap().begin_with(sequence, reuse);
            if let Err(error) = begun {
                self.stages.iter_mut().for_each(|stage| stage.close(sequence));
                return Err(error);
            }
            for keep in keep {
                stage.blocks().unwrap().keep(sequence, *keep).unwrap();
            }
        }
        let mut position = reuse.len() * B;
        let mut answer = Answer { tokens: Vec::new(), logits: Vec::new() };
        for end in ends.iter().copied().chain([tokens.len()]).filter(|end| *end > reuse.len() * B) {
            let step = Step {
                sequence,
                position,
                tokens: tokens[position..end].to_vec(),
                input: StepInput::Tokens,
                sample: end == tokens.len(),
            };
            position = end;
            if let StepOutput::Sampled(sampled) = self.step(&step) {
                answer.tokens.push(sampled.token);
            }
        }
        while answer.tokens.len() < generate {
            let last = *answer.tokens.last().unwrap();
            let step =
                Step { sequence, position, tokens: vec![last], input: StepInput::Tokens, sample: true };
            position += 1;
            let StepOutput::Sampled(sampled) = self.step(&step) else { panic!("not sampled") };
            answer.tokens.push(sampled.token);
        }
        if let [only] = self.stages.as_mut_slice() {
            let last = *answer.tokens.last().unwrap();
            let step =
                Step { sequence, position, tokens: vec![last], input: StepInput::Tokens, sample: true };
            answer.logits = only.logits(step).unwrap();
        }
        self.stages.iter_mut().for_each(|stage| stage.close(sequence));
        Ok(answer)
    }
}

fn keep(number: usize, block: u64, checkpoint: bool) -> Keep {
    Keep { number, block: BlockId(block), checkpoint }
}

/// Families and where their layers may be cut; windows are shorter and longer than a block.
fn cases() -> Vec<(&'static str, Value, Vec<usize>)> {
    let mut cases: Vec<_> = random_model::more_families()
        .into_iter()
        .filter(|(name, _)| *name != "gpt2" && *name != "llama-dynamic")
        .chain(random_model::sharing_families())
        .map(|(name, config)| (name, config, vec![]))
        .collect();
    for (window, name) in [(1, "gemma3-1"), (300, "gemma3-300"), (600, "gemma3-600")] {
        let extra = json!({"query_pre_attn_scalar": 20, "sliding_window": window, "sliding_window_pattern": 3, "rope_theta": 1e6});
        cases.push((name, random_model::config("gemma3_text", extra), vec![1]));
    }
    let llama = random_model::config("llama", json!({}));
    cases.push(("llama", llama, vec![1, 2]));
    cases.push(("qwen3_next", random_model::parity_config("qwen3_next"), vec![2]));
    cases.push(("deepseek_v32", random_model::parity_config("deepseek_v32"), vec![1]));
    cases
}

#[test]
fn every_family_goes_on_after_blocks_as_if_it_had_computed_them() {
    let root = folder();
    for (name, config, cuts) in cases() {
        let path = root.path().join(name);
        random_model::write(&path, &config, 5);
        let mut pipeline = Pipeline::load(&path, &cuts, CacheOptions::default());
        check(name, &mut pipeline);
        check_capacity(name, &mut pipeline, false);
    }
}

#[test]
fn packed_and_limited_caches_go_on_as_well() {
    let root = folder();
    let packed = |bits, start| CacheOptions {
        kv_bits: Some(bits),
        kv_group_size: 32,
        quantized_kv_start: start,
        ..CacheOptions::default()
    };
    let limited = CacheOptions { max_kv_size: Some(700), ..CacheOptions::default() };
    let gemma = json!({"query_pre_attn_scalar": 20, "sliding_window": 300, "sliding_window_pattern": 3, "rope_theta": 1e6});
    for (family, extra) in [("llama", json!({})), ("gemma3_text", gemma)] {
        let path = root.path().join(family);
        random_model::write(&path, &random_model::config(family, extra), 6);
        for options in [packed(8, 0), packed(4, 300), packed(4, 512), limited] {
            let mut pipeline = Pipeline::load(&path, &[1], options);
            check(&format!("{family} {options:?}"), &mut pipeline);
            check_capacity(&format!("{family} {options:?}"), &mut pipeline, true);
        }
    }
}

/// What the stages say of a block is what it takes, or a little more.
fn check_capacity(name: &str, pipeline: &mut Pipeline, has_packing: bool) {
    let stages = std::mem::take(&mut pipeline.stages);
    for stage in stages {
        let mut stage = stage.with_blocks(ByteCount(1 << 30), None).unwrap();
        let capacity = stage.blocks().unwrap().reset();
        assert_eq!((capacity.memory.0, capacity.disk.0), (1 << 30, 0));
        pipeline.stages.push(stage);
    }
    let tokens = prompt(2 * B, 300, 17);
    pipeline.run(9, &tokens, (&[], &[keep(0, 1, false), keep(1, 2, true)]), &[B], 1).unwrap();
    for stage in &mut pipeline.stages {
        let store = stage.blocks().unwrap();
        let found = store.usage().memory.0;
        let capacity = store.reset();
        let said = 2 * capacity.block.0 + capacity.checkpoint.0;
        assert!(found <= said, "{name}: {found} of {said} bytes");
        assert!(has_packing || 2 * found >= said, "{name}: {found} of {said} bytes");
        assert_eq!(store.usage().blocks, 0);
    }
}

/// Cold, then warm after one and after two blocks, then a different rest; all equal to a run without blocks.
fn check(name: &str, pipeline: &mut Pipeline) {
    let mut tokens = prompt(2 * B + 40, 300, 11);
    let keeps = [keep(0, 1, true), keep(1, 2, true)];
    let ends = [100, B, 2 * B];
    let alone = pipeline.run(1, &tokens, (&[], &[]), &ends, 24).unwrap();
    let cold = pipeline.run(2, &tokens, (&[], &keeps), &ends, 24).unwrap();
    assert_eq!(cold, alone, "{name}: keeping changes nothing");
    assert_eq!(pipeline.blocks(), 2, "{name}");
    let equal = |warm: &Answer, cold: &Answer| {
        assert_eq!(warm.tokens, cold.tokens, "{name}");
        for (warm, cold) in warm.logits.iter().flatten().zip(cold.logits.iter().flatten()) {
            let largest = cold.abs().max(1.0);
            assert!((warm - cold).abs() <= TOLERANCE * largest, "{name}: {warm} and {cold}");
        }
    };
    for reuse in [&[BlockId(1)][..], &[BlockId(1), BlockId(2)]] {
        let warm = pipeline.run(3, &tokens, (reuse, &[]), &ends, 24).unwrap();
        equal(&warm, &cold);
    }
    tokens[2 * B + 3] ^= 1;
    let cold = pipeline.run(4, &tokens, (&[], &[]), &ends, 24).unwrap();
    let warm = pipeline.run(5, &tokens, (&[BlockId(1), BlockId(2)], &[]), &ends, 24).unwrap();
    equal(&warm, &cold);
    for block in [1, 2] {
        pipeline.order(BlockOrder::Drop { block: BlockId(block) });
    }
    assert_eq!(pipeline.blocks(), 0, "{name}");
    assert!(pipeline.stages.iter_mut().all(|stage| stage.blocks().unwrap().usage().memory.0 == 0));
}

#[test]
fn blocks_of_answers_and_blocks_after_blocks_are_kept_too() {
    let root = folder();
    for name in ["llama", "lfm2"] {
        let path = root.path().join(name);
        let config = match name {
            "lfm2" => random_model::parity_config("lfm2"),
            name => random_model::config(name, json!({})),
        };
        random_model::write(&path, &config, 7);
        let mut pipeline = Pipeline::load(&path, &[], CacheOptions::default());
        let tokens = prompt(2 * B - 20, 300, 12);
        let keeps = [keep(0, 1, true), keep(1, 2, true)];
        let answer = pipeline.run(1, &tokens, (&[], &keeps), &[B], 60).unwrap();
        let turn: Vec<u32> = tokens.iter().chain(&answer.tokens).copied().chain(prompt(B, 300, 13)).collect();
        let ends = [2 * B];
        let cold = pipeline.run(2, &turn, (&[], &[]), &ends, 10).unwrap();
        let more = [keep(2, 3, false)];
        let warm = pipeline.run(3, &turn, (&[BlockId(1), BlockId(2)], &more), &ends, 10).unwrap();
        assert_eq!(warm.tokens, cold.tokens, "{name}");
        assert_eq!(pipeline.blocks(), 3);
        // Without states a recurrent model cannot go on after the third.
        let all = [1, 2, 3].map(BlockId);
        match (name, pipeline.run(4, &turn, (&all, &[]), &ends, 10)) {
            ("lfm2", again) => assert!(matches!(again, Err(StageError::MissingBlock(BlockId(3))))),
            (_, again) => assert_eq!(again.unwrap().tokens, cold.tokens),
        }
    }
}

#[test]
fn a_block_holds_no_more_memory_than_it_says() {
    let root = folder();
    random_model::write(root.path(), &random_model::config("llama", json!({"num_key_value_heads": 1})), 8);
    let mut pipeline = Pipeline::load(root.path(), &[], CacheOptions::default());
    let tokens = prompt(6 * B, 300, 14);
    let keeps = [keep(1, 1, false), keep(2, 2, false)];
    pipeline.run(1, &tokens, (&[], &keeps), &[], 2).unwrap();
    let usage = pipeline.stages[0].blocks().unwrap().usage();
    // Three layers, keys and values of one head of 32 numbers, and the ids.
    let arrays = 2 * 3 * 2 * 32 * B as u64 * 4;
    assert_eq!(usage.memory.0, arrays + 2 * 4 * B as u64);
    let active = |pipeline: &Pipeline| pipeline.stages[0].memory().active.0;
    let with_blocks = active(&pipeline);
    for block in [1, 2] {
        pipeline.order(BlockOrder::Drop { block: BlockId(block) });
    }
    let freed = with_blocks - active(&pipeline);
    assert!((arrays..=arrays + 4096).contains(&freed), "{freed} bytes were held by {arrays}");
}

#[test]
fn blocks_come_back_from_the_disk_and_what_is_damaged_is_missing() {
    let (model, cache) = (folder(), folder());
    random_model::write(model.path(), &random_model::parity_config("qwen3_next"), 9);
    let tokens = prompt(2 * B + 5, 300, 15);
    let hashes = [BlockHash([1; 32]), BlockHash([2; 32])];
    let files = cache.path().join("blocks");
    let load = |limit: u64| {
        let mut pipeline = Pipeline::load(model.path(), &[], CacheOptions::default());
        let stage = pipeline.stages.pop().unwrap();
        pipeline
            .stages
            .push(stage.with_blocks(ByteCount(1 << 30), Some((&files, ByteCount(limit)))).unwrap());
        pipeline
    };
    let spill = |pipeline: &mut Pipeline| {
        for (block, hash) in [1, 2].map(BlockId).into_iter().zip(hashes) {
            pipeline.order(BlockOrder::Spill { block, hash });
        }
        for stage in &mut pipeline.stages {
            while stage.blocks().unwrap().rest().unwrap() {}
        }
        for block in [1, 2].map(BlockId) {
            pipeline.order(BlockOrder::Drop { block });
        }
    };
    let restore = |pipeline: &mut Pipeline| {
        for (block, hash) in [11, 12].map(BlockId).into_iter().zip(hashes) {
            pipeline.order(BlockOrder::Restore { block, hash });
        }
    };
    let reused = [BlockId(11), BlockId(12)];
    let mut pipeline = load(1 << 30);
    let keeps = [keep(0, 1, false), keep(1, 2, true)];
    let cold = pipeline.run(1, &tokens, (&[], &keeps), &[2 * B], 10).unwrap();
    spill(&mut pipeline);
    restore(&mut pipeline);
    assert_eq!(pipeline.run(2, &tokens, (&reused, &[]), &[], 10).unwrap().tokens, cold.tokens);
    // The process ends, and with it what waits to be written is written.
    drop(pipeline);
    let mut pipeline = load(1 << 30);
    restore(&mut pipeline);
    assert_eq!(pipeline.run(1, &tokens, (&reused, &[]), &[], 10).unwrap().tokens, cold.tokens);
    let sizes = |files: &Path| {
        let all = std::fs::read_dir(files).unwrap().map(|entry| entry.unwrap());
        let all = all.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "safetensors"));
        all.map(|entry| (entry.path(), entry.metadata().unwrap().len())).collect::<Vec<_>>()
    };
    let written = sizes(&files);
    assert_eq!(written.len(), 2);
    let bytes: u64 = written.iter().map(|(_, size)| size).sum();
    assert_eq!(pipeline.stages[0].blocks().unwrap().usage().disk.0, bytes);
    drop(pipeline);
    // Each kind of damage is a miss, and the file goes.
    for damage in 0..4 {
        for (path, _) in &written {
            let mut contents = std::fs::read(path).unwrap();
            match damage {
                0 => contents.truncate(contents.len() / 2),
                1 => *contents.last_mut().unwrap() ^= 1,
                2 => contents.clear(),
                _ => contents[..8].fill(0xff),
            }
            std::fs::write(path, contents).unwrap();
        }
        let mut pipeline = load(1 << 30);
        restore(&mut pipeline);
        let missing = pipeline.run(1, &tokens, (&reused, &[]), &[], 10);
        assert!(matches!(missing, Err(StageError::MissingBlock(BlockId(11)))), "{missing:?}");
        let cold = pipeline.run(2, &tokens, (&[], &keeps), &[2 * B], 10).unwrap();
        spill(&mut pipeline);
        restore(&mut pipeline);
        assert_eq!(pipeline.run(3, &tokens, (&reused, &[]), &[], 10).unwrap().tokens, cold.tokens);
    }
    // Another name, another stage: not this one's.
    let name = |hash: &BlockHash| {
        written.iter().find(|(path, _)| path.to_str().unwrap().contains(&hash.to_string()))
    };
    std::fs::copy(&name(&hashes[0]).unwrap().0, &name(&hashes[1]).unwrap().0).unwrap();
    let mut pipeline = load(1 << 30);
    restore(&mut pipeline);
    let missing = pipeline.run(1, &tokens, (&reused, &[]), &[], 10);
    assert!(matches!(missing, Err(StageError::MissingBlock(BlockId(12)))), "{missing:?}");
    drop(pipeline);
    // A smaller limit holds at once, whoever wrote the files.
    let mut pipeline = load(bytes * 2 / 3);
    assert!(sizes(&files).iter().map(|(_, size)| size).sum::<u64>() <= bytes * 2 / 3);
    pipeline.run(1, &tokens, (&[], &keeps), &[2 * B], 10).unwrap();
    spill(&mut pipeline);
    drop(pipeline);
    assert_eq!(sizes(&files).len(), 1);
}

#[test]
fn orders_for_what_is_not_there_do_nothing() {
    let root = folder();
    random_model::write(root.path(), &random_model::config("llama", json!({})), 10);
    let mut pipeline = Pipeline::load(root.path(), &[], CacheOptions::default());
    let hash = BlockHash([3; 32]);
    for order in [
        BlockOrder::Drop { block: BlockId(5) },
        BlockOrder::Spill { block: BlockId(5), hash },
        BlockOrder::Restore { block: BlockId(5), hash },
        BlockOrder::Erase { hash },
    ] {
        pipeline.order(order);
    }
    let store = pipeline.stages[0].blocks().unwrap();
    let unknown = store.begin_with(SequenceId(7), &[]);
    assert!(matches!(unknown, Err(StageError::UnknownSequence(SequenceId(7)))));
    let tokens = prompt(2 * B, 300, 16);
    let missing = pipeline.run(1, &tokens, (&[BlockId(5)], &[]), &[], 3);
    assert!(matches!(missing, Err(StageError::MissingBlock(BlockId(5)))));
    // A block that the sequence never reaches is never taken.
    pipeline.run(2, &tokens, (&[], &[keep(2, 6, false), keep(usize::MAX, 7, true)]), &[], 3).unwrap();
    assert_eq!(pipeline.blocks(), 0);
}
