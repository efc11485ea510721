//! Logs go to stderr. `RUST_LOG` decides when it is set; otherwise the flags do.

use crate::arguments::Global;
use tracing_subscriber::EnvFilter;

/// Starts logging for the whole process.
pub fn start(global: &Global) {
    let level = match (global.quiet, global.verbose_log) {
        (true, _) => "error",
        (false, 0) => "warn,mlxnode=info",
        (false, 1) => "info,mlxnode=debug",
        (false, _) => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
