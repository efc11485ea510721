//! Fine-tuning: `mlxnode lora` against `mlx_lm.lora` on the same libmlx, BLAS, model and rows, in turns; and jobs of a cluster.
//!
//! - Speed and memory: two epochs over the same rows, of which the second counts, following mlx-lm (`--parity mlx-lm`: the same batches, whose
//!   losses must agree) and in our own order. Tokens are the rows' own, whoever fills them up to what.
//! - [`together`]: two nodes on a core each against one; what a checkpoint takes and how long a killed job needs to go on
//! - [`survival`]: what of a job's time is training, by a simulated clock over those times

mod material;
mod survival;
mod together;

use super::models::{Dtype, Model, Named, Shape, Size, chosen};
use super::process::{self, Measured, measure};
use super::report::{Collected, Report, Row, Target, Unit};
use super::{Limits, binary, pipeline, reduce};
use crate::places::Places;
use crate::setup;
use anyhow::{Context as _, Result, ensure};
use clap::Args;
use material::{BATCH, Material};
use serde::Deserialize;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Longest that one run may take.
const PATIENCE: Duration = Duration::from_secs(900);
/// Losses of the same batches differ by so much at most: sums of single-precision numbers in another order.
const NEAR: f64 = 2e-3;
const MEBIBYTE: f64 = 1_048_576.0;

/// What is measured: models of llama's shape, t and s, f32 and q4, unless some are named.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    models: Named,
    /// Only one process against mlx-lm
    #[arg(long, conflicts_with = "only_jobs")]
    no_jobs: bool,
    /// Only jobs of a cluster and adding up
    #[arg(long)]
    only_jobs: bool,
}

impl Options {
    fn models(&self) -> Vec<(Shape, Size, Dtype)> {
        let mut models = Vec::new();
        for shape in chosen(&self.models.shapes, &[Shape::Llama]) {
            for size in chosen(&self.models.sizes, &[Size::T, Size::S]) {
                for dtype in chosen(&self.models.dtypes, &[Dtype::F32, Dtype::Q4]) {
                    models.push((shape, size, dtype));
                }
            }
        }
        models
    }
}

/// A step as both sides tell of it.
#[derive(Debug, Deserialize)]
struct Step {
    iteration: u64,
    loss: f64,
    iterations_per_second: f64,
    trained_tokens: u64,
    peak_memory_bytes: f64,
}

/// A run of one side.
struct Run {
    /// Losses of all steps.
    losses: Vec<f64>,
    trained_tokens: u64,
    /// Of the second epoch.
    seconds: f64,
    peak: f64,
    peak_process: f64,
}

/// Measures all.
pub(super) fn run(places: &Places, options: &Options, limits: Limits) -> Result<Report> {
    let binary = binary(places, limits)?;
    let oracle = setup::oracle::ensure(places)?;
    let environment = process::environment(&places.cache.join("bench-kernels"))?;
    let folder = pipeline::Folder::new()?;
    let bench = Bench {
        binary: &binary,
        peer: [&oracle, &places.repository.join("crates/testkit/oracle/training_speed.py")],
        environment: &environment,
        folder: folder.path(),
        limits,
    };
    let mut rows = Collected::new("mlxnode", "base");
    if !options.only_jobs {
        for (shape, size, dtype) in options.models() {
            let model = Model::provide(places, &oracle, shape, size, dtype)?;
            rows.add(bench.against_mlx_lm(&model)?);
        }
    }
    if !options.no_jobs {
        let model = Model::llama(places, &oracle, if limits.quick { Size::T } else { Size::S }, Dtype::F32)?;
        rows.add(together::rows(&binary, &environment, folder.path(), &model, limits)?);
        rows.add(reduce::run(places, limits)?.rows);
    }
    let notes = vec![
        "One process: runs in turns (A B C A B C), after one of each that does not count; the second of two epochs over the same \
         rows of 16 to 256 words in batches of 4, LoRA of rank 8 on all linear maps of all layers, Adam; tokens are the rows' own."
            .into(),
        "mlx-lm's clock runs during its steps only; ours includes bringing rows together.".into(),
        "parity: mlx-lm's batches, whose losses agreed with its own in every step. default: rows of like length together.".into(),
        "Two nodes: each with its worker on a core of its own, against one on one; both made the same adapter, bit by bit.".into(),
        "Checkpoint and kills: at the default cadence, from measured times of a step, a checkpoint, and from a kill to the next step."
            .into(),
    ];
    Ok(rows.into_report("lora", notes))
}

struct Bench<'a> {
    binary: &'a Path,
    peer: [&'a Path; 2],
    environment: &'a [(&'static str, OsString)],
    folder: &'a Path,
    limits: Limits,
}

impl Bench<'_> {
    fn against_mlx_lm(&self, model: &Model) -> Result<Vec<Row>> {
        let name = model.name();
        let blocks = blocks(model.size, self.limits.quick);
        let material = Material::make(&self.folder.join(&name), model, blocks)?;
        let mut runs: [Vec<Run>; 3] = [Vec::new(), Vec::new(), Vec::new()];
        for turn in 0..=self.limits.runs {
            eprintln!("lora: {name}, run {turn} of {}", self.limits.runs);
            let theirs = self.theirs(&material, blocks)?;
            let parity = self.ours(&material, blocks, &["--parity", "mlx-lm"])?;
            let usual = self.ours(&material, blocks, &[])?;
            agree(&name, &theirs, &parity)?;
            ensure!(
                usual.trained_tokens == 2 * material.tokens,
                "{} tokens of {} were trained on in two epochs over {}",
                usual.trained_tokens,
                name,
                material.tokens
            );
            if turn > 0 {
                for (runs, run) in runs.iter_mut().zip([theirs, parity, usual]) {
                    runs.push(run); // the first one warms up
                }
            }
        }
        let [theirs, parity, usual] = &runs;
        let mut rows = Vec::new();
        for (mode, ours) in [("parity", parity), ("default", usual)] {
            let row = |measure: &str, unit, value: &dyn Fn(&Run) -> f64, target| {
                let values = |runs: &[Run]| runs.iter().map(value).collect::<Vec<_>>();
                Row::compared(
                    &name,
                    &format!("{mode}, {measure}"),
                    unit,
                    (&values(ours), &values(theirs)),
                    target,
                )
            };
            let speed = |run: &Run| material.tokens as f64 / run.seconds;
            let no_more = Some(Target::AtMost(1.0));
            rows.push(row("training", Unit::TokensPerSecond, &speed, Some(Target::AtLeast(1.0)))?);
            rows.push(row("peak of MLX", Unit::Mebibytes, &|run| run.peak / MEBIBYTE, no_more)?);
            rows.push(row("peak of process", Unit::Mebibytes, &|run| run.peak_process / MEBIBYTE, no_more)?);
        }
        Ok(rows)
    }

    fn ours(&self, material: &Material, blocks: usize, more: &[&str]) -> Result<Run> {
        let mut command = Command::new(self.binary);
        command.arg("lora").arg("--json").arg("--data-dir").arg(self.folder.join("data")).args(more);
        let measured = self.measure(command, material, blocks).context("mlxnode lora")?;
        let lines = measured.stdout.lines().filter(|line| line.contains("\"event\":\"train\""));
        let steps = lines.map(serde_json::from_str).collect::<Result<Vec<Step>, _>>();
        let steps = steps.with_context(|| format!("no figures: {}", measured.stdout))?;
        Run::of(&steps, blocks, &measured)
    }

    fn theirs(&self, material: &Material, blocks: usize) -> Result<Run> {
        let [program, script] = self.peer;
        let mut command = Command::new(program);
        command.arg(script);
        let measured = self.measure(command, material, blocks).context("mlx_lm.lora")?;
        let steps: Vec<Step> = serde_json::from_str(&measured.stdout)
            .with_context(|| format!("mlx-lm printed no figures: {}", measured.stdout))?;
        Run::of(&steps, blocks, &measured)
    }

    /// Two epochs with the flags that both know.
    fn measure(&self, mut command: Command, material: &Material, blocks: usize) -> Result<Measured> {
        let adapter = self.folder.join("adapter");
        setup::wheel::remove(&adapter)?;
        command.arg("--train").arg("--model").arg(&material.model).arg("--data").arg(&material.data);
        command.arg("--adapter-path").arg(adapter);
        let numbers = [
            ("--batch-size", BATCH.to_string()),
            ("--iters", (2 * blocks).to_string()),
            ("--num-layers", "-1".to_owned()),
            ("--steps-per-report", "1".to_owned()),
            ("--steps-per-eval", "1000000".to_owned()),
            ("--save-every", "1000000".to_owned()),
            ("--learning-rate", "1e-4".to_owned()),
        ];
        for (flag, number) in numbers {
            command.arg(format!("{flag}={number}"));
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        measure(&mut command, PATIENCE)
    }
}

impl Run {
    fn of(steps: &[Step], blocks: usize, measured: &Measured) -> Result<Self> {
        ensure!(steps.len() == 2 * blocks, "{} steps instead of {}", steps.len(), 2 * blocks);
        let second = steps.iter().filter(|step| step.iteration > blocks as u64);
        Ok(Self {
            losses: steps.iter().map(|step| step.loss).collect(),
            trained_tokens: steps.last().map_or(0, |step| step.trained_tokens),
            seconds: second.map(|step| 1.0 / step.iterations_per_second).sum(),
            peak: steps.iter().map(|step| step.peak_memory_bytes).fold(0.0, f64::max),
            peak_process: measured.peak_rss as f64,
        })
    }
}

/// Did both train on the same?
fn agree(name: &str, theirs: &Run, ours: &Run) -> Result<()> {
    ensure!(
        theirs.trained_tokens == ours.trained_tokens,
        "mlx-lm trained on {} tokens of {name}, we on {}",
        theirs.trained_tokens,
        ours.trained_tokens
    );
    for (step, (theirs, ours)) in theirs.losses.iter().zip(&ours.losses).enumerate() {
        ensure!(
            (theirs - ours).abs() <= NEAR * theirs.abs(),
            "the loss of step {} of {name} is {ours}, mlx-lm's is {theirs}, so nothing can be compared; find out why by cargo xtask test -p \
             mlxnode-training",
            step + 1
        );
    }
    Ok(())
}

/// Batches of an epoch: as many as take a while on MLX's CPU backend.
fn blocks(size: Size, quick: bool) -> usize {
    let blocks: usize = match size {
        Size::T => 64,
        Size::S => 8,
        Size::M => 4,
        Size::L => 2,
    };
    if quick { blocks.div_ceil(2) } else { blocks }
}

/// Where a job's files lie.
fn text(path: PathBuf) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
}
