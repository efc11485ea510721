//! The Python environment whose numbers are the judge (mlx-lm, grpcio, …). `cargo xtask test` makes it and names it.

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Python interpreter of the oracle's environment.
pub fn python() -> Result<PathBuf> {
    std::env::var_os("MLXNODE_ORACLE_PYTHON").map(PathBuf::from).context(
        "MLXNODE_ORACLE_PYTHON does not name the oracle's Python; run the tests by `cargo xtask test`, which prepares it",
    )
}

/// Runs one of the oracle's scripts (`crates/testkit/oracle/<script>`) and reads the JSON that it prints.
pub fn run<T: DeserializeOwned>(script: &str, arguments: &[&str]) -> Result<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("oracle").join(script);
    let output = Command::new(python()?)
        .arg(&path)
        .args(arguments)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .with_context(|| format!("cannot run {}", path.display()))?;
    if !output.status.success() {
        bail!("{script} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{script} did not print JSON: {}", String::from_utf8_lossy(&output.stdout)))
}
