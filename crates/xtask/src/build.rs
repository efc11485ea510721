//! `cargo xtask build`: the binary `mlxnode`.

use crate::command;
use crate::places::Places;
use crate::setup;
use anyhow::{Result, ensure};
use std::path::PathBuf;

/// Builds and prints where the binary is.
pub(crate) fn run(places: &Places, release: bool) -> Result<()> {
    let binary = binary(places, release)?;
    crate::print(binary.display());
    Ok(())
}

/// Builds `mlxnode`; returns its path.
pub(crate) fn binary(places: &Places, release: bool) -> Result<PathBuf> {
    setup::ensure(places)?;
    let mut cargo = command::cargo(&places.repository);
    cargo.args(["build", "--package", "mlxnode"]).args(command::lock_arguments());
    if release {
        cargo.arg("--release");
    }
    command::run(&mut cargo)?;
    let binary = places.target().join(if release { "release" } else { "debug" }).join("mlxnode");
    ensure!(binary.is_file(), "cargo built no {}", binary.display());
    Ok(binary)
}
