//! A model with a table of positions ends where the table does: a prompt that does not fit is refused, an answer stops, and nobody
//! else in a batch notices.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod random_model;
mod support;

use mlxnode_compute::{Sampling, SequenceEnd, SequenceSpec};
use mlxnode_engine::{
    BatchEvent, BatchGenerator, BatchOptions, GenerateError, Generator, GeneratorOptions, Model,
};
use random_model::VOCABULARY;
use std::ops::ControlFlow;
use support::{folder, prompt};

const POSITIONS: usize = 24;

fn model(root: &std::path::Path) -> Model {
    let mut config = random_model::parity_config("gpt2");
    config["n_ctx"] = POSITIONS.into();
    config["n_positions"] = POSITIONS.into();
    random_model::write(root, &config, 3);
    random_model::load(root)
}

fn spec(prompt: &[u32]) -> SequenceSpec {
    let sampling = Sampling::default();
    SequenceSpec::new(prompt.len(), 100, sampling)
}

fn of_length(length: usize) -> Vec<u32> {
    prompt(length, VOCABULARY as u64, length as u64)
}

#[test]
fn an_answer_ends_with_the_table_and_a_longer_prompt_is_refused() {
    let folder = folder();
    let mut generator = Generator::new(model(folder.path()), GeneratorOptions::default()).unwrap();
    // The last token needs no position.
    for (length, tokens) in [(20, 5), (POSITIONS, 1)] {
        let prompt = of_length(length);
        let summary =
            generator.generate(&prompt, &spec(&prompt), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!((summary.generation_tokens, summary.end), (tokens, Some(SequenceEnd::Length)));
    }
    let prompt = of_length(POSITIONS + 1);
    let error = generator.generate(&prompt, &spec(&prompt), &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, GenerateError::TooLong { tokens: 25, positions: 24 }), "{error}");
    // Of a cache and a prompt together.
    let mut cache = generator.new_cache().unwrap();
    generator.fill(&mut cache, &of_length(20), &mut |_, _| {}).unwrap();
    let more = generator.fill(&mut cache, &of_length(5), &mut |_, _| {}).unwrap_err();
    assert!(matches!(more, GenerateError::TooLong { tokens: 25, positions: 24 }), "{more}");
    assert_eq!(cache.tokens(), 20);
}

#[test]
fn a_row_that_reaches_the_end_of_the_table_ends_alone() {
    let folder = folder();
    let mut batch = BatchGenerator::new(model(folder.path()), BatchOptions::default()).unwrap();
    let (long, short) = (of_length(20), of_length(3));
    let long = batch.insert(&long, &spec(&long)).unwrap();
    let short = batch.insert(&short, &spec(&short)).unwrap();
    let refused = batch.insert(&of_length(30), &spec(&of_length(30))).unwrap_err();
    assert!(matches!(refused, GenerateError::TooLong { tokens: 30, .. }), "{refused}");
    let (mut tokens, mut ends) = (std::collections::HashMap::new(), Vec::new());
    while batch.rows() > 0 {
        for event in batch.step().unwrap() {
            match event {
                BatchEvent::Token { row, .. } => *tokens.entry(row).or_insert(0) += 1,
                BatchEvent::Ended { row, end, .. } => ends.push((row, end)),
                BatchEvent::Prompt { .. } => {}
                BatchEvent::Failed { error, .. } => panic!("{error}"),
            }
        }
    }
    assert_eq!((tokens[&long], tokens[&short]), (5, 22));
    assert_eq!(ends, [(long, SequenceEnd::Length), (short, SequenceEnd::Length)]);
}
