//! How fast a model generates when tokens are guessed ahead, and when not.
//!
//!     speculation_speed FOLDER DRAFT_FOLDER NEW_TOKENS GUESSED
//!
//! The prompt is a text that the model wrote itself, so that what comes next may have come before. Prints one line of JSON: tokens per
//! second without guesses, with those of the draft model and with those of the prompt, GUESSED at a time, and how many of the tokens were
//! guessed. Every way must give the same tokens.

use anyhow::{Context, Result, ensure};
use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{Sampling, SequenceSpec};
use mlxnode_engine::{Generator, GeneratorOptions, Model, Speculation};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

/// Tokens of the text that becomes the prompt.
const TEXT: usize = 192;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, draft, new_tokens, guessed] = arguments.as_slice() else {
        anyhow::bail!("usage: speculation_speed FOLDER DRAFT_FOLDER NEW_TOKENS GUESSED");
    };
    let (new_tokens, guessed): (usize, usize) = (new_tokens.parse()?, guessed.parse()?);
    let load = |folder: &str| -> Result<Model> {
        let checkpoint = Checkpoint::open(Path::new(folder)).context("opening the model")?;
        Ok(Model::load_whole(&checkpoint, &mut |_, _| {})?)
    };
    let mut generator = Generator::new(load(folder)?, GeneratorOptions::default())?;
    let start: Vec<u32> = (0..8).map(|index| index * 31 + 13).collect();
    let text = generate(&mut generator, &start, TEXT)?.tokens;
    let prompt: Vec<u32> = start.into_iter().chain(text).collect();
    let plain = generate(&mut generator, &prompt, new_tokens)?;
    let with_draft = Speculation::Draft { model: Box::new(load(draft)?), tokens: guessed };
    let mut generator = generator.with_speculation(with_draft)?;
    generate(&mut generator, &prompt[..8], 8)?; // the draft model's first run
    let drafted = generate(&mut generator, &prompt, new_tokens)?;
    let mut generator =
        generator.with_speculation(Speculation::PromptLookup { ngram: 3, tokens: guessed })?;
    let looked_up = generate(&mut generator, &prompt, new_tokens)?;
    for run in [&drafted, &looked_up] {
        ensure!(run.tokens == plain.tokens, "guessing changed the tokens");
    }
    let report = serde_json::json!({
        "plain_tps": plain.tps,
        "draft_tps": drafted.tps,
        "lookup_tps": looked_up.tps,
        "draft_accepted": drafted.accepted,
        "lookup_accepted": looked_up.accepted,
    });
    Ok(writeln!(std::io::stdout(), "{report}")?)
}

struct Run {
    tokens: Vec<u32>,
    /// Tokens per second after the first.
    tps: f64,
    /// Part of the tokens that had been guessed.
    accepted: f64,
}

fn generate(generator: &mut Generator, prompt: &[u32], new_tokens: usize) -> Result<Run> {
    let spec = SequenceSpec::new(prompt.len(), new_tokens, Sampling::default());
    let mut tokens = Vec::with_capacity(new_tokens);
    let summary = generator.generate(prompt, &spec, &mut |event| {
        tokens.push(event.sampled.token);
        ControlFlow::Continue(())
    })?;
    let accepted = summary.accepted_tokens as f64 / tokens.len().max(1) as f64;
    Ok(Run { tokens, tps: (new_tokens - 1) as f64 / summary.generation_time.as_secs_f64(), accepted })
}
