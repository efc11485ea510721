//! The official clients of the HTTP dialects, in a Python environment of their own. `cargo xtask test` makes it and names it.

use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Python interpreter of the clients' environment.
pub fn python() -> Result<PathBuf> {
    std::env::var_os("MLXNODE_CLIENTS_PYTHON").map(PathBuf::from).context(
        "MLXNODE_CLIENTS_PYTHON does not name the clients' Python; run the tests by `cargo xtask test`, which prepares it",
    )
}

/// Runs a suite (`crates/testkit/clients/<suite>`) against the listener at `url`; fails with what any of its checks did not like.
pub fn run(suite: &str, url: &str, model: &str, kind: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(suite);
    let output = Command::new(python()?)
        .arg(&path)
        .args([url, model, kind])
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("NO_PROXY", "*") // the listener is on this machine
        .output()
        .with_context(|| format!("cannot run {}", path.display()))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{suite} failed ({}): {stderr}", output.status);
    let results: BTreeMap<String, Option<String>> = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{suite} did not print JSON: {stderr}"))?;
    ensure!(!results.is_empty(), "{suite} checked nothing");
    let failed: Vec<String> =
        results.into_iter().filter_map(|(name, error)| Some(format!("{name}: {}", error?))).collect();
    ensure!(failed.is_empty(), "{suite}:\n{}", failed.join("\n"));
    Ok(())
}
