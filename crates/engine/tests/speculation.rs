//! Guessing ahead changes no token: greedy or sampled, with penalties, windows, limits and packed keys.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod random_model;
mod support;

use mlxnode_compute::{CacheOptions, Penalty, Sampling, SequenceEnd, SequenceSpec};
use mlxnode_engine::{Generator, GeneratorOptions, PromptCache, Speculation, Summary};
use random_model::VOCABULARY;
use std::ops::ControlFlow;
use std::path::Path;
use support::{folder, prompt};

const NEW_TOKENS: usize = 24;

fn run(
    folder: &Path,
    cache: CacheOptions,
    speculation: Option<Speculation>,
    prompt: &[u32],
    sampling: &Sampling,
    stop_tokens: &[u32],
) -> (Vec<u32>, Summary, PromptCache) {
    let options = GeneratorOptions { cache, prefill_step: 16 };
    let mut generator = Generator::new(random_model::load(folder), options).unwrap();
    if let Some(speculation) = speculation {
        generator = generator.with_speculation(speculation).unwrap();
    }
    let spec = SequenceSpec {
        stop_tokens: stop_tokens.to_vec(),
        ..SequenceSpec::new(prompt.len(), NEW_TOKENS, sampling.clone())
    };
    let (mut tokens, mut accepted) = (Vec::new(), 0);
    let mut cache = generator.new_cache().unwrap();
    let summary = generator
        .generate_from(&mut cache, prompt, &spec, &mut |event| {
            tokens.push(event.sampled.token);
            accepted += usize::from(event.from_draft);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(summary.accepted_tokens, accepted);
    assert!(accepted <= summary.drafted_tokens);
    (tokens, summary, cache)
}

#[test]
fn no_guess_changes_a_token() {
    let root = folder();
    let plain = CacheOptions::default();
    let caches = [
        plain,
        CacheOptions { max_kv_size: Some(50), ..plain },
        CacheOptions { kv_bits: Some(8), kv_group_size: 32, quantized_kv_start: 45, ..plain },
    ];
    let samplings = [
        Sampling::default(),
        Sampling { repetition: Some(Penalty { strength: 1.5, context: 20 }), ..Sampling::default() },
        Sampling { temperature: 0.8, seed: 4, ..Sampling::default() },
        Sampling {
            temperature: 1.0,
            min_p: 0.05,
            frequency: Some(Penalty { strength: 0.3, context: 0 }),
            seed: 9,
            ..Sampling::default()
        },
    ];
    // A repeating prompt, so that looking up finds something.
    let mut input = prompt(13, VOCABULARY as u64, 3);
    input.extend_from_within(..);
    input.extend_from_within(..10);
    let mut accepted = [0; 3];
    let recurrent = random_model::recurrent_families();
    let all = random_model::families().into_iter().map(|family| (family, 1));
    // States are the same matter whatever the sampling.
    let recurrent = recurrent.into_iter().map(|family| (family, 3));
    for ((name, config), step) in all.chain(recurrent) {
        let folder = root.path().join(name);
        random_model::write(&folder, &config, 5);
        // A draft model that is nearly always wrong; the model itself, which is always right when greedy.
        let other = root.path().join(format!("{name}-draft"));
        random_model::write(&other, &config, 8);
        // Not all heads here are as wide as a group.
        let fits = |cache: &CacheOptions| random_model::load(&folder).check_cache(cache).is_ok();
        for cache in caches.into_iter().filter(fits) {
            let is_plain = cache == plain;
            for sampling in samplings.iter().skip(if is_plain { 0 } else { 3 }).step_by(step) {
                let (expected, ..) = run(&folder, cache, None, &input, sampling, &[]);
                let guesses = [
                    Speculation::Draft { model: Box::new(random_model::load(&folder)), tokens: 3 },
                    Speculation::Draft { model: Box::new(random_model::load(&other)), tokens: 4 },
                    Speculation::PromptLookup { ngram: 2, tokens: 5 },
                ];
                for (kind, speculation) in guesses.into_iter().enumerate() {
                    let (tokens, summary, cache) =
                        run(&folder, cache, Some(speculation), &input, sampling, &[]);
                    assert_eq!(tokens, expected, "{name} {sampling:?} {:?} kind {kind}", cache.options());
                    assert_eq!(cache.tokens(), input.len() + NEW_TOKENS - 1);
                    assert_eq!(summary.end, Some(SequenceEnd::Length));
                    accepted[kind] += summary.accepted_tokens;
                    if kind == 0 && is_plain {
                        assert!(summary.accepted_tokens > NEW_TOKENS / 2, "{name} {sampling:?} {summary:?}");
                    }
                }
            }
        }
    }
    assert!(accepted.iter().all(|accepted| *accepted > 0), "{accepted:?}");
}

#[test]
fn a_stop_among_the_guesses_ends_there() {
    let root = folder();
    random_model::write(root.path(), &random_model::families()[1].1, 5);
    let input = prompt(20, VOCABULARY as u64, 3);
    let sampling =
        Sampling { repetition: Some(Penalty { strength: 1.8, context: 20 }), ..Sampling::default() };
    let (all, ..) = run(root.path(), CacheOptions::default(), None, &input, &sampling, &[]);
    for place in [0, 1, 2, 5, 6, 7] {
        let first = all.iter().position(|token| *token == all[place]).unwrap();
        let draft = Speculation::Draft { model: Box::new(random_model::load(root.path())), tokens: 4 };
        let (tokens, summary, cache) =
            run(root.path(), CacheOptions::default(), Some(draft), &input, &sampling, &[all[place]]);
        assert_eq!(tokens, all[..=first]);
        assert_eq!(summary.end, Some(SequenceEnd::Stop));
        assert_eq!(cache.tokens(), input.len() + first);
    }
}

#[test]
fn guesses_that_cannot_be_are_refused() {
    let root = folder();
    random_model::write(root.path(), &random_model::families()[0].1, 5);
    let cases = [
        (Speculation::PromptLookup { ngram: 0, tokens: 2 }, "the n-gram cannot be 0; 1 to 16 are possible"),
        (
            Speculation::PromptLookup { ngram: 2, tokens: 33 },
            "draft tokens cannot be 33; 1 to 32 are possible",
        ),
    ];
    for (speculation, message) in cases {
        let generator = Generator::new(random_model::load(root.path()), GeneratorOptions::default()).unwrap();
        assert_eq!(generator.with_speculation(speculation).err().unwrap().to_string(), message);
    }
    let mut config = random_model::families()[0].1.clone();
    config["vocab_size"] = 3000.into();
    random_model::write(&root.path().join("draft"), &config, 5);
    let draft =
        Speculation::Draft { model: Box::new(random_model::load(&root.path().join("draft"))), tokens: 2 };
    let generator = Generator::new(random_model::load(root.path()), GeneratorOptions::default()).unwrap();
    let error = generator.with_speculation(draft).err().unwrap().to_string();
    assert!(error.starts_with("the draft model has 3000 tokens but the model has 300"), "{error}");
}
