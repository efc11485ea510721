//! `mlxnode benchmark`: how fast a model runs on this machine.

use crate::adapter::AdapterFlag;
use crate::arguments::{Global, within};
use crate::familiar::FamiliarFlags;
use crate::prefill::PrefillFlags;
use crate::{hub, loading, output, warnings};
use anyhow::{Context as _, Result};
use clap::Args;
use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{Sampling, SequenceSpec};
use mlxnode_engine::{BatchEvent, BatchGenerator, BatchOptions, Generator, GeneratorOptions, Model};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::Serialize;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Most tokens of a prompt or an answer.
const MOST_TOKENS: i64 = 1 << 20;

/// Measure how fast a model runs here.
///
/// Prompts are random tokens, and answers go on for as long as they are asked to: nothing ends them. The first run warms up and is
/// not counted. Runs in this process; prints what mlx-lm's benchmark prints.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode benchmark --model mlx-community/Qwen3-0.6B-4bit
  mlxnode benchmark --model mlx-community/Qwen3-0.6B-4bit -p 2048 -g 128 --batch-size 8 --json")]
pub struct Benchmark {
    /// A folder, a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION), or demo.
    #[arg(long, value_name = "MODEL", default_value = "demo")]
    model: String,
    /// Tokens of each prompt.
    #[arg(
        short,
        long,
        value_name = "N",
        default_value = "512",
        value_parser = within(1..=MOST_TOKENS),
        allow_negative_numbers = true
    )]
    prompt_tokens: u32,
    /// Tokens of each answer.
    #[arg(
        short,
        long,
        value_name = "N",
        default_value = "1024",
        value_parser = within(1..=MOST_TOKENS),
        allow_negative_numbers = true
    )]
    generation_tokens: u32,
    /// Answers at the same time.
    #[arg(
        short,
        long,
        value_name = "N",
        default_value = "1",
        value_parser = within(1..=1024),
        allow_negative_numbers = true
    )]
    batch_size: u32,
    /// How often it is measured.
    #[arg(
        short,
        long,
        value_name = "N",
        default_value = "5",
        value_parser = within(1..=10_000),
        allow_negative_numbers = true
    )]
    num_trials: u32,
    #[command(flatten)]
    prefill: PrefillFlags,
    /// Seconds to wait between two trials.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "0",
        value_parser = within(0..=3600),
        allow_negative_numbers = true
    )]
    delay: u32,
    #[command(flatten)]
    adapter: AdapterFlag,
    #[command(flatten)]
    familiar: FamiliarFlags,
}

/// One trial, or the mean of all.
#[derive(Clone, Copy, Debug, Serialize)]
struct Trial {
    prompt_tps: f64,
    generation_tps: f64,
    peak_memory_bytes: u64,
    total_seconds: f64,
}

/// What `--json` prints. The names are a contract: scripts rely on them.
#[derive(Serialize)]
struct Report {
    model: String,
    prompt_tokens: u32,
    generation_tokens: u32,
    batch_size: u32,
    trials: Vec<Trial>,
    average: Trial,
}

/// A model that answers one prompt or several.
enum Runner {
    One(Box<Generator>),
    Several(Box<BatchGenerator>),
}

impl Benchmark {
    pub fn run(self, global: &Global) -> Result<()> {
        self.familiar.check(global)?;
        let folder = hub::folder(&self.model, global.quiet)?;
        let unusable = || format!("cannot use the model in {}", folder.display());
        let checkpoint = Checkpoint::open(&folder).with_context(unusable)?;
        let adapter = self.adapter.open(&checkpoint)?;
        let mut model = loading::weights(&checkpoint, global.quiet).with_context(unusable)?;
        self.adapter.apply(adapter.as_ref(), &checkpoint, &mut model)?;
        let prompts = self.prompts(model.info().vocabulary);
        let mut runner = self.runner(model)?;

        let say = |words: &str| match global.json || global.quiet {
            true => {}
            false => warnings::text(words),
        };
        say("Running warmup..\n");
        self.trial(&mut runner, &prompts)?;
        say(&format!(
            "Timing with prompt_tokens={}, generation_tokens={}, batch_size={}.\n",
            self.prompt_tokens, self.generation_tokens, self.batch_size
        ));
        let mut trials = Vec::new();
        for number in 1..=self.num_trials {
            std::thread::sleep(Duration::from_secs(u64::from(self.delay)));
            let trial = self.trial(&mut runner, &prompts)?;
            if !global.json {
                let total = trial.total_seconds;
                output::line(&format!("Trial {number}:  {}, total_time={total:.3}", trial.line()))?;
            }
            trials.push(trial);
        }
        let average = Trial::mean(&trials);
        if !global.json {
            return output::line(&format!("Averages: {}", average.line()));
        }
        output::json(&Report {
            model: self.model,
            prompt_tokens: self.prompt_tokens,
            generation_tokens: self.generation_tokens,
            batch_size: self.batch_size,
            trials,
            average,
        })
    }

    /// Random tokens, the same each time.
    fn prompts(&self, vocabulary: usize) -> Vec<Vec<u32>> {
        let mut random = StdRng::seed_from_u64(0);
        let most = u32::try_from(vocabulary).unwrap_or(u32::MAX).max(1);
        let mut prompt = || (0..self.prompt_tokens).map(|_| random.random_range(0..most)).collect();
        (0..self.batch_size).map(|_| prompt()).collect()
    }

    fn runner(&self, model: Model) -> Result<Runner> {
        let prefill_step = self.prefill.step();
        Ok(if self.batch_size == 1 {
            let options = GeneratorOptions { prefill_step, ..GeneratorOptions::default() };
            Runner::One(Box::new(Generator::new(model, options)?))
        } else {
            let options = BatchOptions {
                max_rows: self.batch_size as usize,
                step_tokens: prefill_step,
                ..BatchOptions::default()
            };
            Runner::Several(Box::new(BatchGenerator::new(model, options)?))
        })
    }

    fn trial(&self, runner: &mut Runner, prompts: &[Vec<u32>]) -> Result<Trial> {
        let spec = SequenceSpec::new(
            self.prompt_tokens as usize,
            self.generation_tokens as usize,
            Sampling::default(),
        );
        let started = Instant::now();
        let (prompt_tps, generation_tps, peak) = match runner {
            Runner::One(generator) => {
                let prompt = prompts.first().map(Vec::as_slice).unwrap_or_default();
                let summary = generator.generate(prompt, &spec, &mut |_| ControlFlow::Continue(()))?;
                (summary.prompt_tps(), summary.generation_tps(), summary.peak_memory.0)
            }
            Runner::Several(generator) => {
                let (prompt_tps, generation_tps) = several(generator, prompts, &spec)?;
                (prompt_tps, generation_tps, generator.model().device().memory()?.peak as u64)
            }
        };
        let total_seconds = started.elapsed().as_secs_f64();
        Ok(Trial { prompt_tps, generation_tps, peak_memory_bytes: peak, total_seconds })
    }
}

/// Tokens per second of prompts and of answers. The answers' time begins when the last prompt is through: what the first rows
/// generate while others still wait counts for nobody.
fn several(generator: &mut BatchGenerator, prompts: &[Vec<u32>], spec: &SequenceSpec) -> Result<(f64, f64)> {
    let started = Instant::now();
    for prompt in prompts {
        generator.insert(prompt, spec)?;
    }
    let mut waiting = prompts.len();
    let mut answering = None;
    let mut generated = 0_usize;
    while generator.rows() > 0 {
        let mut tokens = 0;
        for event in generator.step()? {
            match event {
                BatchEvent::Token { event, .. } => {
                    tokens += 1;
                    waiting -= usize::from(event.index == 0);
                }
                BatchEvent::Failed { error, .. } => return Err(error.into()),
                BatchEvent::Prompt { .. } | BatchEvent::Ended { .. } => {}
            }
        }
        match answering {
            Some(_) => generated += tokens,
            None if waiting == 0 => answering = Some(Instant::now()),
            None => {}
        }
    }
    let end = Instant::now();
    let answering = answering.unwrap_or(end);
    let prompt_tokens: usize = prompts.iter().map(Vec::len).sum();
    let rate = |tokens: usize, time: Duration| match time.as_secs_f64() {
        seconds if seconds > 0.0 => tokens as f64 / seconds,
        _ => 0.0,
    };
    Ok((rate(prompt_tokens, answering - started), rate(generated, end - answering)))
}

impl Trial {
    /// mlx-lm's words.
    fn line(&self) -> String {
        format!(
            "prompt_tps={:.3}, generation_tps={:.3}, peak_memory={:.3}",
            self.prompt_tps,
            self.generation_tps,
            self.peak_memory_bytes as f64 / 1e9
        )
    }

    fn mean(trials: &[Self]) -> Self {
        let count = trials.len().max(1) as f64;
        let mean = |of: fn(&Self) -> f64| trials.iter().map(of).sum::<f64>() / count;
        Self {
            prompt_tps: mean(|trial| trial.prompt_tps),
            generation_tps: mean(|trial| trial.generation_tps),
            peak_memory_bytes: mean(|trial| trial.peak_memory_bytes as f64) as u64,
            total_seconds: mean(|trial| trial.total_seconds),
        }
    }
}
