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
use mlxnode_engine::{BatchEvent, BatchGenerator, BatchOptions, Model};
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
    let (mut first, mut steps) = (None, 0_u64);
    let mut middle = [batch.model().device().counts(); 2];
    loop {
        let events = batch.step()?;
        if events.is_empty() {
            break;
        }
        let mut is_decode = false;
        for event in events {
            if let BatchEvent::Token { row, event } = event {
                is_decode = true;
                let digest = digests.entry(row).or_default();
                *digest = (*digest * 31 + u64::from(event.sampled.token) + 1) % (1 << 32);
            }
        }
        if is_decode {
            steps += 1;
            let counts = batch.model().device().counts();
            match steps {
                1 => first = Some((Instant::now(), cpu_ms()?)),
                3 => middle[0] = counts,
                6 => middle[1] = counts,
                _ => {}
            }
        }
    }
    let (start, cpu) = first.context("nothing was generated")?;
    let (time, cpu) = (start.elapsed().as_secs_f64(), cpu_ms()? - cpu);
    let counts = middle[1] - middle[0];
    let per_step = |count: u64| count as f64 / 3.0;
    let tokens = rows as f64 * (new_tokens - 1) as f64;
    let report = serde_json::json!({
        "generation_tps": tokens / time,
        "generation_cpu_ms": cpu / tokens,
        "operations_per_step": per_step(counts.operations),
        "reads_per_step": per_step(counts.reads),
        "peak_mb": batch.model().device().memory()?.peak as f64 / 1e6,
        "digest": digests.values().fold(0_u64, |all, digest| (all * 31 + digest) % (1 << 32)),
    });
    Ok(writeln!(std::io::stdout(), "{report}")?)
}

/// CPU time of all threads of this process.
fn cpu_ms() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok((usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e3)
}
