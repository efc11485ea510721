//! What a developer runs: `cargo xtask setup | demo | test | parity | fuzz | lint | build | install | dist | doc | …`.
//!
//! One file per command. Every command that needs MLX sets it up first (`setup`), so on a fresh clone `cargo xtask demo`
//! and `cargo xtask test` are all one has to know. Facts go to stdout, progress and hints to stderr.

mod bench;
mod bindings;
mod build;
mod check_macos;
mod command;
mod demo;
mod doc;
mod environment;
mod fuzz;
mod install;
mod lint;
mod lm_eval;
mod node;
mod parity;
mod places;
mod setup;
mod soak;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use places::Places;
use std::path::PathBuf;
use std::process::ExitCode;

/// What a developer runs in this repository. The first call on a machine fetches and builds MLX (about two minutes).
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Xtask {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Get MLX ready for this machine. Every other command does this by itself
    Setup {
        /// Do it all again, even when it is complete
        #[arg(long)]
        again: bool,
    },
    /// Two nodes on this machine pair, split the demo model, and answer a question
    Demo {
        /// Build with optimizations first
        #[arg(long)]
        release: bool,
    },
    /// Run the tests; arguments go to cargo nextest, or to cargo test where that is not installed
    Test {
        /// For example: -E 'package(mlxnode-engine)', or the part of a test's name
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Compare every architecture with mlx-lm on tiny random models, or those that are named; --help lists the options
    #[command(disable_help_flag = true)]
    Parity {
        /// For example: llama qwen3 --full
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Feed hostile bytes to everything that reads files of strangers, ten minutes each; fails on a finding
    Fuzz(fuzz::Fuzz),
    /// Tests that take chances, as often as one likes: jobs whose processes are killed
    Soak(soak::Soak),
    /// Check format, lints, documentation, licences and the macOS build; all of it, then fail if anything failed
    Lint {
        /// Leave the type-check for macOS out
        #[arg(long)]
        without_macos: bool,
    },
    /// Type-check the code as it is on macOS, on a Debian machine
    CheckMacos {
        /// Lint it with clippy as well
        #[arg(long)]
        clippy: bool,
        /// Arguments of cargo check instead of: --workspace --all-targets
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Measure against mlx-lm and against the targets; without a subject: everything (about half an hour)
    Bench(bench::Bench),
    /// Run lm-evaluation-harness through a node's /v1/completions and on mlx-lm itself: both must find the same
    LmEval {
        /// Build with optimizations first
        #[arg(long)]
        release: bool,
    },
    /// Build mlxnode
    Build {
        /// With optimizations
        #[arg(long)]
        release: bool,
    },
    /// Build mlxnode with optimizations and install it with the MLX library it needs
    Install {
        /// Folder that gets bin/mlxnode and lib/mlxnode
        #[arg(long, value_name = "DIR")]
        prefix: Option<PathBuf>,
    },
    /// Make a release folder that runs from any place, and a .tar.gz of it
    Dist {
        /// Folder to put them in [default: target/dist]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Build the documentation of all crates
    Doc {
        /// And show it in the browser
        #[arg(long)]
        open: bool,
    },
    /// Get the Python environment with mlx-lm ready that the tests compare with, and print its interpreter
    Oracle,
    /// Generate crates/mlx/bindings anew, after a change of mlx-sys's version
    Bindings,
}

fn main() -> ExitCode {
    match run(Xtask::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}"); // without the backtrace that `?` in main would add
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let places = Places::find()?;
    match task {
        Task::Setup { again } => setup::run(&places, again),
        Task::Demo { release } => demo::run(&places, release),
        Task::Test { arguments } => test::run(&places, &arguments),
        Task::Parity { arguments } => parity::run(&places, &arguments),
        Task::Fuzz(fuzz) => fuzz.run(&places),
        Task::Soak(soak) => soak.run(&places),
        Task::Lint { without_macos } => lint::run(&places, without_macos),
        Task::CheckMacos { clippy, arguments } => check_macos::run(&places, clippy, &arguments),
        Task::Bench(bench) => bench.run(&places),
        Task::LmEval { release } => lm_eval::run(&places, release),
        Task::Build { release } => build::run(&places, release),
        Task::Install { prefix } => install::run(&places, prefix),
        Task::Dist { out } => install::dist(&places, out),
        Task::Doc { open } => doc::run(&places, open),
        Task::Oracle => setup::oracle::run(&places),
        Task::Bindings => bindings::run(&places),
    }
}

/// Prints a fact: the only way to stdout.
#[expect(clippy::print_stdout, reason = "the one place of this program that writes to stdout")]
fn print(fact: impl std::fmt::Display) {
    println!("{fact}");
}
