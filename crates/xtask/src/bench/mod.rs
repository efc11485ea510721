//! `cargo xtask bench`: how fast and how small, in release builds, against what the project promises.
//!
//! - [`engine`]: one model in one process against mlx-lm
//! - [`lora`]: training against mlx_lm.lora; two processes against one; what saving and being killed cost
//! - [`hop`]: one hop between two stages against bare TLS
//! - [`pipeline`]: two stages on two cores against one on one; memory, start and answer times of nodes
//! - [`reduce`]: a gradient of 100 MB added up between two processes, against bare TCP and TLS
//! - [`serve`]: many clients against mlx_lm.server; overload
//!
//! What is compared runs in turns, so that a busy machine slows both. Medians and ratios go to stdout as a table, and with
//! `--json FILE` as data. Nothing fails because it is slow: a table says "met" or "missed".

mod engine;
mod hop;
mod lora;
mod models;
mod pipeline;
mod process;
mod reduce;
mod report;
mod serve;
mod statistics;

use crate::places::Places;
use crate::{build, command, setup};
use anyhow::{Context as _, Result, ensure};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Arguments of the command.
#[derive(Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    subject: Option<Subject>,
    /// Runs of each side, after one that does not count
    #[arg(long, global = true, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Fewer tokens: to see that it works, not how fast
    #[arg(long, global = true)]
    quick: bool,
    /// Measure what was built last, even when the sources have changed since
    #[arg(long, global = true)]
    no_build: bool,
    /// Write the figures here as well
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Subject {
    /// Decode, prefill, start, load and memory of one process, against mlx-lm: all shapes at size s, llama at all sizes
    Engine(engine::Options),
    /// One hop between two stages, against bare TLS
    Hop,
    /// Training against mlx_lm.lora (llama of sizes t and s, f32 and q4); two processes against one; what saving and being killed cost
    Lora(lora::Options),
    /// Two nodes with a stage each on two cores, against one; memory of a stage, start of a node, status
    Pipeline,
    /// A gradient of 100 MB added up between two processes, against bare TCP and TLS
    Reduce,
    /// 1 to 16 clients over HTTP, pauses by long prompts, shared beginnings, overload, against mlx_lm.server
    Serve(serve::Options),
}

/// How long it may measure, and what.
#[derive(Clone, Copy, Debug)]
struct Limits {
    runs: usize,
    quick: bool,
    no_build: bool,
}

impl Bench {
    /// Measures and prints.
    pub(crate) fn run(&self, places: &Places) -> Result<()> {
        setup::ensure(places)?;
        let limits = Limits { runs: self.runs.into(), quick: self.quick, no_build: self.no_build };
        let reports = match &self.subject {
            Some(Subject::Engine(options)) => vec![engine::run(places, options, limits)?],
            Some(Subject::Hop) => vec![hop::run(places, limits)?],
            Some(Subject::Lora(options)) => vec![lora::run(places, options, limits)?],
            Some(Subject::Pipeline) => vec![pipeline::run(places, limits)?],
            Some(Subject::Reduce) => vec![reduce::run(places, limits)?],
            Some(Subject::Serve(options)) => vec![serve::run(places, options, limits)?],
            None => vec![
                engine::run(places, &engine::Options::default(), limits)?,
                hop::run(places, limits)?,
                pipeline::run(places, limits)?,
                lora::run(places, &lora::Options::default(), limits)?,
                reduce::run(places, limits)?,
                serve::run(places, &serve::Options::all(), limits)?,
            ],
        };
        for report in &reports {
            crate::print(format_args!("{}\n{}", report.table(), report.notes.join("\n")));
        }
        let machine = machine();
        crate::print(format_args!("\n{machine}"));
        if let Some(file) = &self.json {
            let all = serde_json::json!({"machine": machine, "runs": self.runs, "quick": self.quick, "reports": reports});
            std::fs::write(file, format!("{all:#}\n"))
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }
}

/// What the figures depend on: cores, and how many processes wanted them at the end.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default(); // Linux only
    let load = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let load = if load.is_empty() { load } else { format!(", load average at the end {load}") };
    format!(
        "{} {}, {cores} cores{load}, mlxnode {}, MLX and mlx-lm {}",
        std::env::consts::OS,
        std::env::consts::ARCH,
        env!("CARGO_PKG_VERSION"),
        setup::pins::MLX_VERSION
    )
}

/// The release build of `mlxnode`.
fn binary(places: &Places, limits: Limits) -> Result<PathBuf> {
    if limits.no_build { built(places, "mlxnode") } else { build::binary(places, true) }
}

/// The release build of a crate's example.
fn example(places: &Places, package: &str, example: &str, limits: Limits) -> Result<PathBuf> {
    if !limits.no_build {
        let mut cargo = command::cargo(&places.repository);
        cargo.args(["build", "--release", "--package", package, "--example", example]);
        command::run(cargo.args(command::lock_arguments()))?;
    }
    built(places, &format!("examples/{example}"))
}

fn built(places: &Places, program: &str) -> Result<PathBuf> {
    let path = places.target().join("release").join(program);
    ensure!(path.is_file(), "{} was not built yet; leave --no-build out", path.display());
    Ok(path)
}
