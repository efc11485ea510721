//! The Python environment that the tests take as judge: mlx-lm on the same libmlx, and a gRPC client.

use super::tools;
use super::wheel::{hex, remove};
use crate::command;
use crate::places::Places;
use anyhow::{Context as _, Result, ensure};
use ring::digest::{SHA256, digest};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every package with its version, so that a golden value does not move by itself.
const REQUIREMENTS: &str = include_str!("../../oracle-requirements.txt");

/// The oldest Python that these versions run on.
const PYTHON: &str = "import sys; sys.exit(sys.version_info < (3, 11))";

/// Is everything there, and of the version of MLX that we link?
const PROOF: &str = "import mlx.core, mlx_lm, grpc, grpc_reflection; print(mlx.core.__version__)";

/// `cargo xtask oracle`: makes it and prints its Python.
pub(crate) fn run(places: &Places) -> Result<()> {
    crate::print(ensure(places)?.display());
    Ok(())
}

/// Makes the environment when it is missing; returns its Python.
pub(crate) fn ensure(places: &Places) -> Result<PathBuf> {
    let version = &hex(digest(&SHA256, REQUIREMENTS.as_bytes()).as_ref())[..12];
    let folder = places.cache.join(format!("oracle-{version}"));
    let python = folder.join("bin/python");
    let stamp = folder.join("ready");
    if stamp.is_file() {
        return Ok(python);
    }
    let _lock = super::lock(&places.cache.join("oracle.lock"), "set-up of the oracle")?;
    if !stamp.is_file() {
        make(&folder, &python)?;
        std::fs::write(stamp, "")?;
    }
    Ok(python)
}

fn make(folder: &Path, python: &Path) -> Result<()> {
    eprintln!("oracle: installing mlx-lm and a gRPC client for the tests");
    let base = tools::pythons()
        .find(|python| command::succeeds(Command::new(python).args(["-c", PYTHON])))
        .context(
        "the tests compare with mlx-lm, which needs Python 3.11 or newer; install python3.11 or newer",
    )?;
    let pip =
        tools::python().context("the tests compare with mlx-lm, which pip installs; install python3-pip")?;
    remove(folder)?;
    // Without pip inside: Debian's Python has no ensurepip unless python3-venv is there, and any pip can fill it.
    command::output(Command::new(&base).args(["-m", "venv", "--without-pip"]).arg(folder))?;
    let requirements = folder.join("requirements.txt");
    std::fs::write(&requirements, REQUIREMENTS)?;
    command::output(
        Command::new(&pip)
            .args(["-m", "pip", "--python"])
            .arg(python)
            .args([
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--root-user-action=ignore",
                "--requirement",
            ])
            .arg(&requirements),
    )
    .context("cannot install the oracle's packages; is the Python package index reachable?")?;
    let found = command::output(Command::new(python).args(["-c", PROOF]))?;
    ensure!(
        found.trim() == super::pins::MLX_VERSION,
        "the oracle runs on MLX {}, not {}; change crates/xtask/oracle-requirements.txt with the pins",
        found.trim(),
        super::pins::MLX_VERSION
    );
    Ok(())
}
