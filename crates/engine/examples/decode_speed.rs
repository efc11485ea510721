//! How fast a model folder prefills and decodes in this process; the counterpart of `decode_speed.py` beside the oracle.
//!
//!     decode_speed FOLDER PROMPT_TOKENS NEW_TOKENS
//!
//! Prints one line of JSON: tokens per second and CPU milliseconds per token (of the whole process) for prompt and generation,
//! array operations and reads by the host per generated token, the peak of MLX's memory, and a digest of the tokens, which must
//! equal the counterpart's.

use anyhow::{Context, Result};
use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{Sampling, SequenceSpec};
use mlxnode_engine::{Generator, GeneratorOptions, Model};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompt_tokens, new_tokens] = arguments.as_slice() else {
        anyhow::bail!("usage: decode_speed FOLDER PROMPT_TOKENS NEW_TOKENS");
    };
    let (prompt_tokens, new_tokens): (u64, usize) = (prompt_tokens.parse()?, new_tokens.parse()?);
    let start = Instant::now();
    let checkpoint = Checkpoint::open(Path::new(folder)).context("opening the model")?;
    let model = Model::load_whole(&checkpoint, &mut |_, _| {})?;
    let load = start.elapsed();
    let vocabulary = model.info().vocabulary as u64;
    let mut generator = Generator::new(model, GeneratorOptions::default())?;
    let prompt: Vec<u32> = (0..prompt_tokens).map(|i| ((i * 7919 + 13) % vocabulary) as u32).collect();
    let spec = |max_tokens| SequenceSpec::new(prompt.len(), max_tokens, Sampling::default());
    generator.generate(&prompt[..prompt.len().min(8)], &spec(8), &mut |_| ControlFlow::Continue(()))?;
    let mut digest = 0_u64;
    let mut first = (0.0, Instant::now());
    let mut last = first;
    let begin = (cpu_ms()?, Instant::now());
    let mut failure = None;
    generator.generate(&prompt, &spec(new_tokens), &mut |event| {
        digest = (digest * 31 + u64::from(event.sampled.token) + 1) % (1 << 32);
        match cpu_ms() {
            Ok(cpu) => last = (cpu, Instant::now()),
            Err(error) => failure = Some(error),
        }
        if event.index == 0 {
            first = last;
        }
        ControlFlow::Continue(())
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    let decoded = (new_tokens - 1) as f64;
    let peak = generator.model().device().memory()?.peak;
    let (operations, reads) = count(&mut generator, &prompt)?;
    let report = serde_json::json!({
        "operations": operations,
        "reads": reads,
        "load_s": load.as_secs_f64(),
        "prompt_tps": prompt_tokens as f64 / (first.1 - begin.1).as_secs_f64(),
        "prompt_cpu_ms": (first.0 - begin.0) / prompt_tokens as f64,
        "generation_tps": decoded / (last.1 - first.1).as_secs_f64(),
        "generation_cpu_ms": (last.0 - first.0) / decoded,
        "peak_mb": peak as f64 / 1e6,
        "digest": digest,
    });
    Ok(writeln!(std::io::stdout(), "{report}")?)
}

/// Operations and reads per generated token, in the ways that suit a GPU: chains of operations are one kernel, on both sides.
fn count(generator: &mut Generator, prompt: &[u32]) -> Result<(f64, f64)> {
    let device = generator.model().device().clone();
    device.set_fusing(true);
    let mut counts = Vec::new();
    let prompt = &prompt[..prompt.len().min(8)];
    let spec = SequenceSpec::new(prompt.len(), 6, Sampling::default());
    generator.generate(prompt, &spec, &mut |_| {
        counts.push(device.counts());
        ControlFlow::Continue(())
    })?;
    device.set_fusing(false);
    let [first, .., last, _] = counts.as_slice() else { anyhow::bail!("too few tokens to count") };
    let (counted, steps) = (*last - *first, (counts.len() - 2) as f64); // the last step launches nothing
    Ok((counted.operations as f64 / steps, counted.reads as f64 / steps))
}

/// CPU time of all threads of this process.
fn cpu_ms() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok((usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e3)
}
