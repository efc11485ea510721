//! How fast a model folder decodes several sequences at once; the counterpart of `batch_speed.py` beside the oracle.
//!
//!     batch_speed FOLDER ROWS PROMPT_TOKENS NEW_TOKENS
//!
//! Row n has a prompt of PROMPT_TOKENS + 7 n tokens. Prints one line of JSON: tokens per second of all rows together once all of
//! them run, CPU milliseconds per token (of the whole process), operations and host reads per step while the same rows run, the peak of MLX's memory, and a digest of the tokens, which must equal the
//! counterpart's.

use anyhow::{Context, Result};
use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{Sampling, SequenceSpec};
use mlxnode_engine::{BatchEvent, BatchGenerator, BatchOptions, Model, RowId};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, rows, prompt_tokens, new_tokens] = arguments.as_slice() else {
        anyhow::bail!("usage: batch_speed FOLDER ROWS PROMPT_TOKENS NEW_TOKENS");
    };
    let (rows, prompt_tokens, new_tokens): (u64, u64, usize) =
        (rows.parse()?, prompt_tokens.parse()?, new_tokens.parse()?);
    let checkpoint = Checkpoint::open(Path::new(folder)).context("opening the model")?;
    let model = Model::load_whole(&checkpoint, &mut |_, _| {})?;
    let vocabulary = model.info().vocabulary as u64;
    let mut batch =
        BatchGenerator::new(model, BatchOptions { step_tokens: 1 << 20, ..BatchOptions::default() })?;
    let prompt = |row: u64| -> Vec<u32> {
        (0..prompt_tokens + 7 * row).map(|i| ((i * 7919 + 13 + row) % vocabulary) as u32).collect()
    };
    let spec = |prompt: &[u32], max_tokens| SequenceSpec::new(prompt.len(), max_tokens, Sampling::default());
    for row in 0..rows {
        let prompt = prompt(row);
        batch.insert(&prompt[..8.min(prompt.len())], &spec(&prompt, 4))?;
    }
    while !batch.step()?.is_empty() {}
    let mut digests = BTreeMap::new();
    for row in 0..rows {
        let prompt = prompt(row);
        digests.insert(batch.insert(&prompt, &spec(&prompt, new_tokens))?, 0_u64);
    }
    let mut first = None;
    while let Some(tokens) = tokens_of_step(&mut batch)? {
        for (row, token) in &tokens {
            let digest = digests.entry(*row).or_default();
            *digest = (*digest * 31 + u64::from(*token) + 1) % (1 << 32);
        }
        if !tokens.is_empty() && first.is_none() {
            first = Some((Instant::now(), cpu_ms()?));
        }
    }
    let (start, cpu) = first.context("nothing was generated")?;
    let (time, cpu) = (start.elapsed().as_secs_f64(), cpu_ms()? - cpu);
    let peak = batch.model().device().memory()?.peak;
    let shortened = |row| prompt(row).into_iter().take(8 + 7 * row as usize).collect::<Vec<_>>();
    let prompts: Vec<_> = (0..rows).map(shortened).collect();
    let (operations, reads) = count(&mut batch, &prompts)?;
    let tokens = rows as f64 * (new_tokens - 1) as f64;
    let report = serde_json::json!({
        "generation_tps": tokens / time,
        "generation_cpu_ms": cpu / tokens,
        "operations_per_step": operations,
        "reads_per_step": reads,
        "peak_mb": peak as f64 / 1e6,
        "digest": digests.values().fold(0_u64, |all, digest| (all * 31 + digest) % (1 << 32)),
    });
    Ok(writeln!(std::io::stdout(), "{report}")?)
}

/// The rows and tokens of a step, none in one that only reads prompts; None when all rows have ended.
fn tokens_of_step(batch: &mut BatchGenerator) -> Result<Option<Vec<(RowId, u32)>>> {
    let events = batch.step()?;
    if events.is_empty() {
        return Ok(None);
    }
    let tokens = events.into_iter().filter_map(|event| match event {
        BatchEvent::Token { row, event } => Some((row, event.sampled.token)),
        _ => None,
    });
    Ok(Some(tokens.collect()))
}

/// Operations and reads of a step from one in the middle to another, in the ways that suit a GPU: chains of operations are one
/// kernel, on both sides, and products are MLX's own.
fn count(batch: &mut BatchGenerator, prompts: &[Vec<u32>]) -> Result<(f64, f64)> {
    batch.model().device().set_fusing(true);
    for prompt in prompts {
        batch.insert(prompt, &SequenceSpec::new(prompt.len(), 8, Sampling::default()))?;
    }
    let mut counts = Vec::new();
    while let Some(tokens) = tokens_of_step(batch)? {
        if !tokens.is_empty() {
            counts.push(batch.model().device().counts());
        }
    }
    batch.model().device().set_fusing(false);
    let (Some(first), Some(last)) = (counts.get(2), counts.get(5)) else {
        anyhow::bail!("too few steps to count");
    };
    let counted = *last - *first;
    Ok((counted.operations as f64 / 3.0, counted.reads as f64 / 3.0))
}

/// CPU time of all threads of this process.
fn cpu_ms() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok((usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e3)
}
