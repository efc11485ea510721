//! The Python environment that the tests take as judge: mlx-lm on the same libmlx, and a gRPC client.

use super::python_environment::PythonEnvironment;
use crate::command;
use crate::places::Places;
use anyhow::{Result, ensure};
use std::path::PathBuf;
use std::process::Command;

/// Every package with its version, so that a golden value does not move by itself.
const REQUIREMENTS: &str = include_str!("../../oracle-requirements.txt");

/// Is everything there, and of the version of MLX that we link?
const PROOF: &str = "import mlx.core, mlx_lm, grpc, grpc_reflection; print(mlx.core.__version__)";

/// `cargo xtask oracle`: makes it and prints its Python.
pub(crate) fn run(places: &Places) -> Result<()> {
    crate::print(ensure(places)?.display());
    Ok(())
}

/// Makes the environment when it is missing; returns its Python.
pub(crate) fn ensure(places: &Places) -> Result<PathBuf> {
    let environment = PythonEnvironment {
        name: "oracle",
        requirements: REQUIREMENTS,
        what_for: "mlx-lm and a gRPC client, with which the tests compare",
    };
    environment.ensure(places, &|python| {
        let found = command::output(Command::new(python).args(["-c", PROOF]))?;
        ensure!(
            found.trim() == super::pins::MLX_VERSION,
            "the oracle runs on MLX {}, not {}; change crates/xtask/oracle-requirements.txt with the pins",
            found.trim(),
            super::pins::MLX_VERSION
        );
        Ok(())
    })
}
