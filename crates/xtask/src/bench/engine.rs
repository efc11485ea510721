//! One Mac, one model: our engine against mlx-lm on the same libmlx, the same BLAS, weights and prompt, in turns.
//!
//! - Decode, prefill, load, memory: `decode_speed` of the engine against `decode_speed.py`, which both time inside the
//!   process, on the wall and in CPU time of all threads. Greedy; the tokens of both must be equal.
//! - Guessing ahead: `speculation_speed` of the engine with and without, on a model whose draft always agrees.
//! - Start to first token: `mlxnode generate --max-tokens 1` against `bench_peer.py`, from outside. The peer does what
//!   `mlx_lm generate` does and imports less, so the comparison is kind to it.

use super::models::{self, Dtype, Model, Named, Pair, Shape, Size, chosen};
use super::process::{self, measure};
use super::report::{Collected, Report, Row, Target, Unit};
use super::{Limits, binary, example};
use crate::places::Places;
use crate::setup;
use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde::Deserialize;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Longest that one run may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// Which models: all shapes at size s, and llama at all sizes, unless some are named.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    models: Named,
}

/// What both sides print about a run inside the process.
#[derive(Debug, Deserialize)]
struct Speed {
    load_s: f64,
    prompt_tps: f64,
    /// CPU time per token, all threads.
    prompt_cpu_ms: f64,
    generation_tps: f64,
    generation_cpu_ms: f64,
    /// Array operations per generated token.
    operations: f64,
    /// Times that the host read numbers, per generated token.
    reads: f64,
    /// The most that arrays held, in units of a million bytes.
    peak_mb: f64,
    /// Of the generated tokens.
    digest: u64,
}

/// What both sides print about a batch.
#[derive(Debug, Deserialize)]
struct BatchSpeed {
    /// Of all rows together.
    generation_tps: f64,
    /// CPU time per token, all threads.
    generation_cpu_ms: f64,
    /// Of a step of all rows.
    operations_per_step: f64,
    reads_per_step: f64,
    digest: u64,
}

/// What `speculation_speed` prints.
#[derive(Debug, Deserialize)]
struct SpeculationSpeed {
    plain_tps: f64,
    draft_tps: f64,
    lookup_tps: f64,
}

/// The programs of one side.
struct Side {
    name: &'static str,
    /// Takes a folder, the prompt's length and the number of new tokens.
    speed: Vec<PathBuf>,
    /// Takes a folder, the number of rows, and the same.
    batch: Vec<PathBuf>,
}

/// Measures all.
pub(super) fn run(places: &Places, options: &Options, limits: Limits) -> Result<Report> {
    let binary = binary(places, limits)?;
    let decode_speed = example(places, "mlxnode-engine", "decode_speed", limits)?;
    let oracle = setup::oracle::ensure(places)?;
    let scripts = places.repository.join("crates/testkit/oracle");
    let batch_speed = example(places, "mlxnode-engine", "batch_speed", limits)?;
    let ours = Side { name: "mlxnode", speed: vec![decode_speed], batch: vec![batch_speed] };
    let script = |name: &str| vec![oracle.clone(), scripts.join(name)];
    let theirs = Side { name: "mlx-lm", speed: script("decode_speed.py"), batch: script("batch_speed.py") };
    let bench = Bench {
        sides: [ours, theirs],
        binary,
        peer: [oracle.clone(), scripts.join("bench_peer.py")],
        speculation_speed: [example(places, "mlxnode-engine", "speculation_speed", limits)?],
        environment: process::environment(&places.cache.join("bench-kernels"))?,
        scratch: places.cache.join("bench-scratch"),
        limits,
    };
    let mut rows = Collected::new("mlxnode", "mlx-lm");
    for (shape, size, dtype) in options.models() {
        let model = Model::provide(places, &oracle, shape, size, dtype)?;
        eprintln!("engine: {}", model.name());
        let mut measured = bench.speed(&model)?;
        measured.extend(bench.batch(&model)?);
        measured.extend(bench.start(&model)?);
        if shape == Shape::Llama && size != Size::T {
            measured.extend(bench.speculation(&Pair::provide(places, &oracle, size, dtype)?, &model)?);
        }
        rows.add(measured);
    }
    let blas = match process::blas() {
        Some(_) => "both with OpenBLAS, one thread",
        None => "both with the BLAS that libmlx brings",
    };
    let notes = vec![
        format!("Runs in turns (A B A B), after one of each that does not count; {blas}."),
        "The ratio is of mlxnode to mlx-lm, the median of the pairs' ratios with the smallest and the largest.".into(),
        "tok/CPU-s: tokens per second of CPU time of the whole process; steadier than the wall on a busy machine.".into(),
        "Both generated the same tokens in every run.".into(),
        "Rows of guesses compare mlxnode with itself: with guesses and without.".into(),
    ];
    Ok(rows.into_report("engine", notes))
}

impl Options {
    fn models(&self) -> Vec<(Shape, Size, Dtype)> {
        let mut models = Vec::new();
        let shapes = [Shape::Llama, Shape::Qwen3Moe, Shape::Gemma3, Shape::GptOss, Shape::DeepseekV3];
        for shape in chosen(&self.models.shapes, &shapes) {
            let sizes: &[Size] =
                if shape == Shape::Llama { &[Size::T, Size::S, Size::L] } else { &[Size::S] };
            for size in chosen(&self.models.sizes, sizes) {
                for dtype in chosen(&self.models.dtypes, &[Dtype::F32, Dtype::Bf16, Dtype::Q4]) {
                    // MLX has no kernel for unpacked experts in half precision on the CPU backend.
                    if dtype != Dtype::Bf16 || !shape.has_experts() || cfg!(target_os = "macos") {
                        models.push((shape, size, dtype));
                    }
                }
            }
        }
        models
    }
}

struct Bench {
    sides: [Side; 2],
    binary: PathBuf,
    peer: [PathBuf; 2],
    speculation_speed: [PathBuf; 1],
    environment: Vec<(&'static str, OsString)>,
    /// A data directory without a node.
    scratch: PathBuf,
    limits: Limits,
}

impl Bench {
    fn speed(&self, model: &Model) -> Result<Vec<Row>> {
        let (prompt, new) = lengths(model.size, model.dtype, self.limits.quick);
        let mut runs: [Vec<(Speed, f64)>; 2] = [Vec::new(), Vec::new()];
        for turn in 0..=self.limits.runs {
            for (side, runs) in self.sides.iter().zip(&mut runs) {
                let mut command = self.command(&side.speed);
                command.arg(&model.folder).arg(prompt.to_string()).arg(new.to_string());
                let measured = measure(&mut command, PATIENCE).with_context(|| side.name.to_owned())?;
                let speed: Speed = serde_json::from_str(&measured.stdout)
                    .with_context(|| format!("{} printed no figures: {}", side.name, measured.stdout))?;
                if turn > 0 {
                    runs.push((speed, measured.peak_rss as f64 / MEBIBYTE)); // the first one warms up
                }
            }
        }
        let [ours, theirs] = &runs;
        for ((ours, _), (theirs, _)) in ours.iter().zip(theirs) {
            ensure!(
                ours.digest == theirs.digest,
                "the tokens of {} differ from mlx-lm's, so nothing can be compared; find out why by cargo xtask test -p mlxnode-engine",
                model.name()
            );
        }
        let name = model.name();
        let decode = Some(Target::AtLeast(match (model.shape, model.size) {
            (Shape::Llama, Size::T) => 1.2,
            (Shape::Llama, Size::S) => 1.05,
            _ => 1.0,
        }));
        let no_more = Some(Target::AtMost(1.0));
        let prefill = Some(Target::AtLeast(1.0));
        let row = |measure: &str, unit, value: &dyn Fn(&(Speed, f64)) -> f64, target| {
            let values = |runs: &[(Speed, f64)]| runs.iter().map(value).collect::<Vec<_>>();
            Row::compared(&name, measure, unit, (&values(ours), &values(theirs)), target)
        };
        Ok(vec![
            row(&format!("decode {new}"), Unit::TokensPerSecond, &|(speed, _)| speed.generation_tps, decode)?,
            row(
                "decode, CPU",
                Unit::TokensPerCpuSecond,
                &|(speed, _)| 1e3 / speed.generation_cpu_ms,
                decode,
            )?,
            row(
                &format!("prefill {prompt}"),
                Unit::TokensPerSecond,
                &|(speed, _)| speed.prompt_tps,
                prefill,
            )?,
            row("prefill, CPU", Unit::TokensPerCpuSecond, &|(speed, _)| 1e3 / speed.prompt_cpu_ms, prefill)?,
            row("load", Unit::Milliseconds, &|(speed, _)| speed.load_s * 1e3, no_more)?,
            row("operations per token", Unit::Count, &|(speed, _)| speed.operations, no_more)?,
            row("reads per token", Unit::Count, &|(speed, _)| speed.reads, no_more)?,
            row("peak of MLX", Unit::Mebibytes, &|(speed, _)| speed.peak_mb * 1e6 / MEBIBYTE, no_more)?,
            row("peak of process", Unit::Mebibytes, &|(_, peak_rss)| *peak_rss, no_more)?,
        ])
    }

    /// Eight prompts of different lengths at once, after the first token of each.
    fn batch(&self, model: &Model) -> Result<Vec<Row>> {
        const ROWS: usize = 8;
        let (prompt, new) = lengths(model.size, model.dtype, self.limits.quick);
        // Operations are counted over some steps in the middle.
        let (prompt, new) = (prompt / 4, (new / 2).max(8));
        let mut runs: [Vec<BatchSpeed>; 2] = [Vec::new(), Vec::new()];
        for turn in 0..=self.limits.runs {
            let mut digests = Vec::new();
            for (side, runs) in self.sides.iter().zip(&mut runs) {
                let mut command = self.command(&side.batch);
                command.arg(&model.folder).args([ROWS, prompt, new].map(|number| number.to_string()));
                let measured = measure(&mut command, PATIENCE).with_context(|| side.name.to_owned())?;
                let speed: BatchSpeed = serde_json::from_str(&measured.stdout)
                    .with_context(|| format!("{} printed no figures: {}", side.name, measured.stdout))?;
                digests.push(speed.digest);
                if turn > 0 {
                    runs.push(speed);
                }
            }
            ensure!(
                digests.windows(2).all(|pair| pair[0] == pair[1]),
                "the batches of {} differ",
                model.name()
            );
        }
        let [ours, theirs] = &runs;
        let name = model.name();
        let row = |measure: &str, unit, value: &dyn Fn(&BatchSpeed) -> f64, target| {
            let values = |runs: &[BatchSpeed]| runs.iter().map(value).collect::<Vec<_>>();
            let measure = format!("{ROWS} rows, {measure}");
            Row::compared(&name, &measure, unit, (&values(ours), &values(theirs)), Some(target))
        };
        let (faster, no_more) = (Target::AtLeast(1.1), Target::AtMost(1.0));
        Ok(vec![
            row(&format!("decode {new}"), Unit::TokensPerSecond, &|speed| speed.generation_tps, faster)?,
            row("decode, CPU", Unit::TokensPerCpuSecond, &|speed| 1e3 / speed.generation_cpu_ms, faster)?,
            row("operations per step", Unit::Count, &|speed| speed.operations_per_step, no_more)?,
            row("reads per step", Unit::Count, &|speed| speed.reads_per_step, no_more)?,
        ])
    }

    /// Guesses of a draft model that is always right, and of a text that repeats itself, to none.
    fn speculation(&self, pair: &Pair, model: &Model) -> Result<Vec<Row>> {
        let (_, new) = lengths(model.size, model.dtype, self.limits.quick);
        let mut runs = Vec::new();
        for turn in 0..=self.limits.runs {
            let mut command = self.command(&self.speculation_speed);
            command.arg(&pair.target).arg(&pair.draft).arg(new.max(8).to_string()).arg(GUESSED.to_string());
            let measured = measure(&mut command, PATIENCE).context("guessing ahead")?;
            let speed: SpeculationSpeed = serde_json::from_str(&measured.stdout)
                .with_context(|| format!("no figures: {}", measured.stdout))?;
            if turn > 0 {
                runs.push(speed);
            }
        }
        let row = |measure: &str, value: &dyn Fn(&SpeculationSpeed) -> f64| {
            let ours: Vec<f64> = runs.iter().map(value).collect();
            let base: Vec<f64> = runs.iter().map(|speed| speed.plain_tps).collect();
            let target = Some(Target::AtLeast(1.0));
            Row::compared(&pair.name, measure, Unit::TokensPerSecond, (&ours, &base), target)
        };
        Ok(vec![
            row(&format!("guesses of a draft, {GUESSED} at once"), &|speed| speed.draft_tps)?,
            row(&format!("guesses of the prompt, {GUESSED} at once"), &|speed| speed.lookup_tps)?,
        ])
    }

    /// From the start of the process to the end of an answer of one token.
    fn start(&self, model: &Model) -> Result<Vec<Row>> {
        let prompt = models::prompt(16, 0);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for turn in 0..=self.limits.runs {
            let mut command = self.command(std::slice::from_ref(&self.binary));
            command.args([
                "generate",
                "--local",
                "--json",
                "--ignore-chat-template",
                "--max-tokens",
                "1",
                "--prompt",
            ]);
            command.arg(&prompt).arg("--model").arg(&model.folder).arg("--data-dir").arg(&self.scratch);
            let our = measure(&mut command, PATIENCE).context("mlxnode generate")?;
            let mut command = self.command(&self.peer);
            command.arg(&model.folder).arg(&prompt).arg("1");
            let their = measure(&mut command, PATIENCE).context("mlx-lm")?;
            let tokens = [token_ids(&our.stdout)?, token_ids(&their.stdout)?];
            ensure!(tokens[0] == tokens[1], "the first tokens of {} differ: {tokens:?}", model.name());
            if turn > 0 {
                ours.push(our.wall.as_secs_f64() * 1e3);
                theirs.push(their.wall.as_secs_f64() * 1e3);
            }
        }
        let target = Some(Target::AtMost(0.3));
        Ok(vec![Row::compared(
            &model.name(),
            "start to first token",
            Unit::Milliseconds,
            (&ours, &theirs),
            target,
        )?])
    }

    fn command(&self, program: &[impl AsRef<Path>]) -> Command {
        let mut words = program.iter().map(|word| word.as_ref());
        let mut command = Command::new(words.next().unwrap_or(Path::new("")));
        command.args(words).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

/// Tokens that are guessed at a time.
const GUESSED: usize = 4;

const MEBIBYTE: f64 = 1_048_576.0;

/// The tokens of an answer that was printed with `--json`.
pub(super) fn token_ids(printed: &str) -> Result<Vec<u32>> {
    #[derive(Deserialize)]
    struct Answer {
        token_ids: Vec<u32>,
    }
    let answer: Answer = serde_json::from_str(printed).with_context(|| format!("no answer: {printed}"))?;
    Ok(answer.token_ids)
}

/// Tokens of the prompt and of the answer: as many as take a few seconds on MLX's CPU backend, where bf16 computes at about
/// 2 GFLOP/s and 4-bit prefill too, while f32 has a real BLAS.
fn lengths(size: Size, dtype: Dtype, quick: bool) -> (usize, usize) {
    let (prompt, new) = match (size, dtype) {
        (Size::T, _) => (256, 512),
        (Size::S, Dtype::F32) => (256, 128),
        (Size::S, _) => (64, 64),
        (Size::M, Dtype::F32) => (192, 64),
        (Size::M, _) => (32, 32),
        (Size::L, Dtype::F32) => (128, 32),
        (Size::L, _) => (16, 16),
    };
    if quick { (prompt / 4, new / 4) } else { (prompt, new) }
}
