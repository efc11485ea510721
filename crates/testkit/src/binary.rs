//! Finds the `mlxnode` executable of the build that the test belongs to.

use anyhow::{Context as _, Result, ensure};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// `target/<profile>/mlxnode`, beside the folder of the running test executable.
pub fn path() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let profile = test.ancestors().nth(2).context("a test executable lies in target/<profile>/deps")?;
    let binary = profile.join("mlxnode");
    ensure!(
        binary.is_file(),
        "{} is not there; build it first: cargo build --package mlxnode",
        binary.display()
    );
    Ok(binary)
}

/// A command that runs it, with nothing from the test's own environment that would change what it does.
pub fn command() -> Result<Command> {
    let mut command = Command::new(path()?);
    for name in ["MLXNODE_DATA_DIR", "HF_TOKEN", "HF_ENDPOINT", "RUST_LOG"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    Ok(command)
}
