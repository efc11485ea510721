//! One file per command. Each has its arguments (a clap struct whose comments are the help text) and a `run`.

pub mod adapters;
pub mod benchmark;
pub mod cache_prompt;
pub mod chat;
pub mod completions;
pub mod forget;
pub mod fuse;
pub mod generate;
pub mod invite;
pub mod join;
pub mod keys;
pub mod leave;
pub mod load;
pub mod lora;
pub mod models;
pub mod perplexity;
pub mod plan;
pub mod sandbox;
pub mod status;
pub mod top;
pub mod unload;
pub mod worker;

use crate::arguments::{Arguments, Command, Global};
use anyhow::{Context as _, Result};
use mlxnode_node::DataDir;
use std::process::ExitCode;

/// Runs the command that was asked for.
pub fn run(arguments: Arguments) -> Result<ExitCode> {
    let global = &arguments.global;
    match arguments.command {
        Command::Join(command) => asynchronous(command.run(global))?,
        Command::Invite(command) => asynchronous(command.run(global))?,
        Command::Leave(command) => asynchronous(command.run(global))?,
        Command::Forget(command) => asynchronous(command.run(global))?,
        Command::Status(command) => asynchronous(command.run(global))?,
        Command::Top(command) => asynchronous(command.run(global))?,
        Command::Plan(command) => asynchronous(command.run(global))?,
        Command::Load(command) => asynchronous(command.run(global))?,
        Command::Unload(command) => asynchronous(command.run(global))?,
        Command::Keys(command) => asynchronous(command.run(global))?,
        Command::Models(command) => command.run(global)?,
        Command::Adapters(command) => asynchronous(command.run(global))?,
        Command::Generate(command) => return command.run(global),
        Command::Chat(command) => return command.run(global),
        Command::Benchmark(command) => command.run(global)?,
        Command::Perplexity(command) => command.run(global)?,
        Command::CachePrompt(command) => command.run(global)?,
        Command::Lora(command) => return command.run(global),
        Command::Fuse(command) => command.run(global)?,
        Command::Completions(command) => command.run()?,
        Command::Sandbox(command) => command.run()?,
        Command::Worker(command) => return command.run(),
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a command that talks to the network.
pub fn asynchronous<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()
        .context("cannot start the asynchronous runtime")?;
    let result = runtime.block_on(work);
    // Blocking reads of the terminal cannot be cancelled; do not wait for them.
    runtime.shutdown_background();
    result
}

/// The data directory that the command line names, or the platform's place.
pub fn data_dir(global: &Global) -> Result<DataDir> {
    if let Some(folder) = &global.data_dir {
        // Worker processes and other commands may run elsewhere.
        return Ok(DataDir::new(std::path::absolute(folder).context("cannot use --data-dir")?));
    }
    let places = directories::ProjectDirs::from("", "", "mlxnode")
        .context("this user has no home folder; name a folder with --data-dir")?;
    Ok(DataDir::new(places.data_dir()))
}
