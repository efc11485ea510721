//! Logs go to stderr. `RUST_LOG` decides how much when it is set; otherwise the command and the flags do.

use crate::arguments::{Arguments, Command};
use std::io::IsTerminal as _;
use tracing_subscriber::EnvFilter;

/// Starts logging for the whole process.
pub fn start(arguments: &Arguments) {
    let global = &arguments.global;
    // A node and its workers run for days and tell the operator's story; other commands answer and are silent.
    let is_worker = matches!(arguments.command, Command::Worker(_));
    let runs_long = is_worker || matches!(arguments.command, Command::Join(_));
    let level = match (global.quiet, global.verbose_log, runs_long) {
        (true, ..) => "error",
        (false, 0, false) => "warn",
        (false, 0, true) => "warn,mlxnode=info",
        (false, 1, _) => "info,mlxnode=debug",
        (false, ..) => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let logger = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    // A worker's lines become part of its node's log, which has the time and the level.
    match is_worker {
        true => logger.without_time().with_level(false).init(),
        false => logger.init(),
    }
}
