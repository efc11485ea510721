//! The Python environment with the official clients that the HTTP listener is tested with.

use super::python_environment::PythonEnvironment;
use crate::command;
use crate::places::Places;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// Every package with its version, so that the tests do not change by themselves.
const REQUIREMENTS: &str = include_str!("../../client-requirements.txt");

/// Makes the environment when it is missing; returns its Python.
pub(crate) fn ensure(places: &Places) -> Result<PathBuf> {
    let what_for = "the official OpenAI and Anthropic clients, with which the HTTP listener is tested";
    let environment = PythonEnvironment { name: "clients", requirements: REQUIREMENTS, what_for };
    environment.ensure(places, &|python| {
        command::output(Command::new(python).args(["-c", "import anthropic, openai"])).map(drop)
    })
}
