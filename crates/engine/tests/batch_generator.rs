//! Rows of a batch get the tokens that they get alone, whoever joins or leaves, in every family and with every cache.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod random_model;
mod support;

use mlxnode_compute::{CacheOptions, LogprobRequest, Penalty, Sampled, Sampling, SequenceEnd, SequenceSpec};
use mlxnode_engine::{
    BatchEvent, BatchGenerator, BatchOptions, GenerateError, Generator, GeneratorOptions, PromptCache, RowId,
};
use random_model::VOCABULARY;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use support::{folder, prompt};

fn penalised() -> Sampling {
    Sampling { repetition: Some(Penalty { strength: 1.8, context: 16 }), ..Sampling::default() }
}

fn drawn(seed: u64) -> Sampling {
    Sampling { temperature: 0.9, top_p: 0.95, seed, ..Sampling::default() }
}

fn spec(prompt: &[u32], max_tokens: usize, sampling: Sampling) -> SequenceSpec {
    SequenceSpec::new(prompt.len(), max_tokens, sampling)
}

/// Rows of several lengths and kinds: prompt, and what to generate.
fn rows() -> Vec<(Vec<u32>, SequenceSpec)> {
    let samplings = [
        Sampling::default(),
        penalised(),
        drawn(1),
        Sampling { presence: Some(Penalty { strength: 0.5, context: 0 }), ..drawn(2) },
        Sampling { logprobs: Some(LogprobRequest { top: 2 }), ..Sampling::default() },
        Sampling::default(),
    ];
    let lengths = [1, 40, 7, 23, 2, 15];
    let tokens = [12, 30, 5, 18, 1, 25];
    samplings
        .into_iter()
        .zip(lengths)
        .zip(tokens)
        .map(|((sampling, length), tokens)| {
            let input = prompt(length, VOCABULARY as u64, length as u64);
            let spec = spec(&input, tokens, sampling);
            (input, spec)
        })
        .collect()
}

fn alone(folder: &Path, cache: CacheOptions, prompt: &[u32], spec: &SequenceSpec) -> Vec<Sampled> {
    let options = GeneratorOptions { cache, ..GeneratorOptions::default() };
    let mut generator = Generator::new(random_model::load(folder), options).unwrap();
    let mut all = Vec::new();
    generator
        .generate(prompt, spec, &mut |event| {
            all.push(event.sampled);
            ControlFlow::Continue(())
        })
        .unwrap();
    all
}

/// What rows got until the batch had nothing more to do, and their caches.
#[derive(Default)]
struct Outcome {
    tokens: HashMap<RowId, Vec<Sampled>>,
    ends: HashMap<RowId, SequenceEnd>,
    caches: HashMap<RowId, PromptCache>,
}

impl Outcome {
    /// One step. False when there was nothing to do.
    fn step(&mut self, batch: &mut BatchGenerator) -> bool {
        let events = batch.step().unwrap();
        let happened = !events.is_empty();
        for event in events {
            match event {
                BatchEvent::Prompt { done, of, .. } => assert!(done < of),
                BatchEvent::Token { row, event } => {
                    let tokens = self.tokens.entry(row).or_default();
                    assert_eq!(event.index, tokens.len());
                    tokens.push(event.sampled);
                }
                BatchEvent::Ended { row, end, cache } => {
                    self.ends.insert(row, end);
                    self.caches.insert(row, cache);
                }
                BatchEvent::Failed { row, error } => panic!("{row:?}: {error}"),
            }
        }
        happened
    }
}

fn assert_close(actual: &[Sampled], expected: &[Sampled], place: &str) {
    let ids = |all: &[Sampled]| all.iter().map(|sampled| sampled.token).collect::<Vec<_>>();
    assert_eq!(ids(actual), ids(expected), "{place}");
    for (actual, expected) in actual.iter().zip(expected) {
        match (actual.logprob, expected.logprob) {
            (Some(actual), Some(expected)) => assert!((actual - expected).abs() < 1e-3, "{place}"),
            (actual, expected) => assert_eq!(actual, expected, "{place}"),
        }
        assert_eq!(actual.top.len(), expected.top.len(), "{place}");
    }
}

#[test]
fn a_row_gets_what_it_gets_alone() {
    let root = folder();
    let bits = CacheOptions {
        kv_bits: Some(8),
        kv_group_size: 32,
        quantized_kv_start: 10,
        ..CacheOptions::default()
    };
    let most = CacheOptions { max_kv_size: Some(14), ..CacheOptions::default() };
    for (name, config) in random_model::more_families().into_iter().chain(random_model::sharing_families()) {
        let folder = root.path().join(name);
        random_model::write(&folder, &config, 5);
        // Not all heads here are as wide as a group.
        let fits = random_model::load(&folder).check_cache(&bits).is_ok();
        for cache in [CacheOptions::default(), most, bits].into_iter().take(if fits { 3 } else { 2 }) {
            // In mlx-lm too a limit shows chunks other masks than whole prompts, and the second chunk sees packed keys.
            let step_tokens = if cache == CacheOptions::default() { 11 } else { 4096 };
            let options = BatchOptions { max_rows: 4, step_tokens, cache };
            let mut batch = BatchGenerator::new(random_model::load(&folder), options).unwrap();
            let rows = rows();
            let mut outcome = Outcome::default();
            let mut ids = Vec::new();
            for (prompt, spec) in &rows {
                ids.push(batch.insert(prompt, spec).unwrap());
                // The next one joins in the middle.
                for _ in 0..2 {
                    outcome.step(&mut batch);
                }
            }
            while outcome.step(&mut batch) {}
            assert_eq!(batch.rows(), 0);
            for (id, (prompt, spec)) in ids.iter().zip(&rows) {
                let place = format!("{name} {cache:?} {id:?}");
                assert_close(&outcome.tokens[id], &alone(&folder, cache, prompt, spec), &place);
                assert_eq!(outcome.ends[id], SequenceEnd::Length, "{place}");
                assert_eq!(outcome.caches[id].tokens(), prompt.len() + spec.max_tokens - 1, "{place}");
            }
        }
    }
}

#[test]
fn stops_removals_and_caches_leave_the_others_alone() {
    let root = folder();
    for (name, config) in random_model::families() {
        let folder = root.path().join(name);
        random_model::write(&folder, &config, 6);
        let rows = rows();
        let plain = CacheOptions::default();
        let expected: Vec<_> =
            rows.iter().map(|(prompt, spec)| alone(&folder, plain, prompt, spec)).collect();
        let mut batch = BatchGenerator::new(random_model::load(&folder), BatchOptions::default()).unwrap();
        let mut outcome = Outcome::default();
        // The second row stops where its ninth token comes first, the fourth is taken out after some steps.
        let stop = expected[1][8].token;
        let stops_at = expected[1].iter().position(|sampled| sampled.token == stop).unwrap();
        let mut ids = Vec::new();
        for (row, (prompt, spec)) in rows.iter().enumerate() {
            let stop_tokens = if row == 1 { vec![stop] } else { vec![] };
            ids.push(batch.insert(prompt, &SequenceSpec { stop_tokens, ..spec.clone() }).unwrap());
        }
        for _ in 0..6 {
            outcome.step(&mut batch);
        }
        let taken = batch.remove(ids[3]).unwrap().unwrap();
        assert!(batch.remove(ids[3]).unwrap().is_none());
        let seen = outcome.tokens[&ids[3]].len();
        assert_eq!(taken.tokens(), rows[3].0.len() + seen - 1);
        while outcome.step(&mut batch) {}
        assert_eq!(outcome.ends[&ids[1]], SequenceEnd::Stop);
        assert_close(&outcome.tokens[&ids[1]], &expected[1][..=stops_at], name);
        assert_close(&outcome.tokens[&ids[0]], &expected[0], name);
        assert_close(&outcome.tokens[&ids[5]], &expected[5], name);
        // The row that was taken out, and the one that was stopped, go on from their caches as if nothing had happened.
        for (row, cache, seen) in [(3, taken, seen), (1, outcome.caches[&ids[1]].clone(), stops_at + 1)] {
            let (prompt, spec) = &rows[row];
            let mut spec = SequenceSpec { max_tokens: spec.max_tokens - seen, ..spec.clone() };
            spec.sampling.repetition = None;
            spec.sampling.presence = None;
            let token = [expected[row][seen - 1].token];
            // Its number counts from the prompt, of which only the last generated token is new.
            spec.prompt_tokens = 0;
            let whole: Vec<u32> =
                prompt.iter().copied().chain(expected[row][..seen].iter().map(|s| s.token)).collect();
            let again = SequenceSpec { prompt_tokens: whole.len() - 1, ..spec.clone() };
            let fresh = alone(&folder, plain, &whole, &again);
            let id = batch.insert_after(cache, &token, &spec).unwrap();
            let mut outcome = Outcome::default();
            while outcome.step(&mut batch) {}
            assert_close(&outcome.tokens[&id], &fresh, name);
        }
    }
}

/// Sequences that run together are one step of the device, not one each.
#[test]
fn rows_side_by_side_take_few_more_operations_than_one() {
    let root = folder();
    // Frequencies and factors that depend on the position, and an indexer's choice, are a sequence's own.
    let apart = ["llama-dynamic", "llama4"];
    for (name, config) in random_model::more_families().into_iter().chain(random_model::sharing_families()) {
        let folder = root.path().join(name);
        random_model::write(&folder, &config, 5);
        let operations = |lengths: &[usize]| {
            let mut batch =
                BatchGenerator::new(random_model::load(&folder), BatchOptions::default()).unwrap();
            for length in lengths {
                let input = prompt(*length, VOCABULARY as u64, *length as u64);
                batch.insert(&input, &spec(&input, 12, Sampling::default())).unwrap();
            }
            let mut counts = vec![batch.model().device().counts()];
            while !batch.step().unwrap().is_empty() {
                counts.push(batch.model().device().counts());
            }
            let last = counts[8] - counts[7];
            assert_eq!(last.reads, 1, "{name}");
            last.operations
        };
        let (one, several) = (operations(&[9]), operations(&[3, 9, 5, 17, 8]));
        let most = if apart.contains(&name) { 5 * one } else { one + one / 2 };
        assert!(several <= most, "{name}: {one} operations for one row, {several} for five");
    }
}

#[test]
fn what_cannot_be_generated_is_said_before_it_joins() {
    let root = folder();
    random_model::write(root.path(), &random_model::families()[0].1, 5);
    let mut batch = BatchGenerator::new(random_model::load(root.path()), BatchOptions::default()).unwrap();
    let spec = |max_tokens| spec(&[1], max_tokens, Sampling::default());
    assert!(matches!(batch.insert(&[], &spec(3)), Err(GenerateError::EmptyPrompt)));
    assert!(matches!(batch.insert(&[VOCABULARY as u32], &spec(3)), Err(GenerateError::Token { .. })));
    assert!(matches!(batch.insert(&[1], &spec(0)), Err(GenerateError::NoTokens)));
    assert_eq!(batch.rows(), 0);
    assert!(batch.step().unwrap().is_empty());
}
