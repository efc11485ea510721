//! The Python environment with lm-evaluation-harness, and with mlx-lm, on which it gives the scores to compare with.

use super::python_environment::PythonEnvironment;
use crate::command;
use crate::places::Places;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// Every package with its version, so that the scores do not move by themselves.
const REQUIREMENTS: &str = include_str!("../../evaluation-requirements.txt");

/// Makes the environment when it is missing; returns its Python.
pub(crate) fn ensure(places: &Places) -> Result<PathBuf> {
    let what_for = "lm-evaluation-harness and mlx-lm (about 1 GB, once)";
    let environment = PythonEnvironment { name: "evaluation", requirements: REQUIREMENTS, what_for };
    environment.ensure(places, &|python| {
        command::output(Command::new(python).args(["-c", "import lm_eval, mlx_lm.evaluate"])).map(drop)
    })
}
