//! `mlxnode-parity`: what `cargo xtask parity` runs after it has prepared MLX, the oracle and this binary.

use anyhow::{Result, bail};
use clap::Parser;
use mlxnode_parity::{CASES, CaseReport, Depth, Golden, Options, load, run, select};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Compare the engine with mlx-lm on tiny random models.
#[derive(Parser)]
#[command(name = "cargo xtask parity", bin_name = "cargo xtask parity")]
struct Arguments {
    /// Architectures; without one: all
    architectures: Vec<String>,
    /// Only these cases, by name ("f32")
    #[arg(long = "case", value_name = "NAME")]
    cases: Vec<String>,
    /// List the cases and run none
    #[arg(long)]
    list: bool,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
    /// Keep the models and mlx-lm's answers in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["golden", "rebuild_golden"])]
    keep: Option<PathBuf>,
    /// Take mlx-lm's answers from this folder instead of asking it
    #[arg(long, value_name = "DIR", conflicts_with = "rebuild_golden")]
    golden: Option<PathBuf>,
    /// Ask mlx-lm anew, write its answers into this folder, and say which of them changed
    #[arg(long, value_name = "DIR")]
    rebuild_golden: Option<PathBuf>,
    /// Also long prompts, more tokens, and every pipeline of up to three stages
    #[arg(long, conflicts_with = "sample")]
    full: bool,
    /// Only each architecture's first case, and little of it: what the tests run
    #[arg(long)]
    sample: bool,
    /// Cases at once [default: one per core]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// A Python with mlx-lm 0.32.2
    #[arg(long, value_name = "PATH", hide = true)]
    python: Option<PathBuf>,
}

fn main() -> ExitCode {
    match parity(Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}"); // without the backtrace that `?` in main would add
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing differs.
fn parity(arguments: Arguments) -> Result<bool> {
    let folder = Path::new(CASES);
    let mut cases = Vec::new();
    for architecture in select(folder, &arguments.architectures)? {
        let of_one = load(folder, &architecture)?;
        let count = if arguments.sample { 1 } else { of_one.len() };
        cases.extend(of_one.into_iter().take(count));
    }
    if !arguments.cases.is_empty() {
        cases.retain(|case| arguments.cases.contains(&case.name));
        if cases.is_empty() {
            bail!("no case has that name; `cargo xtask parity --list` shows them");
        }
    }
    if arguments.list {
        for case in &cases {
            print(case.path());
        }
        return Ok(true);
    }
    let golden = match (arguments.golden, arguments.rebuild_golden) {
        (Some(folder), _) => Some(Golden::Use(folder)),
        (None, folder) => folder.map(Golden::Rebuild),
    };
    let depth = match (arguments.full, arguments.sample) {
        (true, _) => Depth::Full,
        (false, true) => Depth::Sample,
        (false, false) => Depth::Normal,
    };
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let jobs = arguments.jobs.unwrap_or_else(cores);
    let options = Options { python: arguments.python, jobs, depth, keep: arguments.keep, golden };
    let (total, mut finished) = (cases.len(), 0);
    let report = run(&cases, &options, &mut |case: &CaseReport| {
        finished += 1;
        let verdict = if case.wrong.is_empty() { "equal" } else { "DIFFERS" };
        eprintln!("{finished}/{total} {}/{} {verdict} ({:.1} s)", case.architecture, case.name, case.seconds);
    })?;
    if arguments.json {
        print(serde_json::to_string_pretty(&report)?);
    } else {
        print(format_args!("\n{report}"));
        for note in report.notes() {
            print(format_args!("note: {note}"));
        }
        let wrong = report.cases.iter().filter(|case| !case.wrong.is_empty()).count();
        let verdict = match wrong {
            0 => "all equal to mlx-lm 0.32.2".to_owned(),
            _ => format!("{wrong} differ from mlx-lm 0.32.2"),
        };
        print(format_args!("{total} cases in {:.0} s: {verdict}", report.seconds));
    }
    for difference in report.differences() {
        eprintln!("error: {difference}");
    }
    if !report.passed && options.keep.is_none() && options.golden.is_none() {
        eprintln!("hint: --keep DIR leaves the models and mlx-lm's answers for a closer look");
    }
    Ok(report.passed)
}

/// Prints a fact: the only way to stdout.
#[expect(clippy::print_stdout, reason = "the one place of this program that writes to stdout")]
fn print(fact: impl std::fmt::Display) {
    println!("{fact}");
}
