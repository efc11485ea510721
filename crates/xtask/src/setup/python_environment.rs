//! Python environments that tests need: made once from pinned requirements, kept in the cache under a name that changes with them.

use super::tools;
use super::wheel::{hex, remove};
use crate::command;
use crate::places::Places;
use anyhow::{Context as _, Result};
use ring::digest::{SHA256, digest};
use std::path::{Path, PathBuf};
use std::process::Command;

/// One of them.
pub(super) struct PythonEnvironment {
    /// First part of its folder's name.
    pub(super) name: &'static str,
    /// Every package with its version.
    pub(super) requirements: &'static str,
    /// For messages: what it has and why.
    pub(super) what_for: &'static str,
}

/// The oldest Python that these packages run on.
const PYTHON: &str = "import sys; sys.exit(sys.version_info < (3, 11))";

impl PythonEnvironment {
    /// Makes it when it is missing; returns its Python. `prove` looks at a new one before it counts as made.
    pub(super) fn ensure(&self, places: &Places, prove: &dyn Fn(&Path) -> Result<()>) -> Result<PathBuf> {
        let version = &hex(digest(&SHA256, self.requirements.as_bytes()).as_ref())[..12];
        let folder = places.cache.join(format!("{}-{version}", self.name));
        let python = folder.join("bin/python");
        let stamp = folder.join("ready");
        if stamp.is_file() {
            return Ok(python);
        }
        let lock = format!("{}.lock", self.name);
        let _lock = super::lock(&places.cache.join(lock), "set-up of a Python environment")?;
        if !stamp.is_file() {
            self.make(&folder, &python)?;
            prove(&python)?;
            std::fs::write(stamp, "")?;
        }
        Ok(python)
    }

    fn make(&self, folder: &Path, python: &Path) -> Result<()> {
        let Self { name, what_for, requirements } = self;
        eprintln!("{name}: installing {what_for}");
        let base = tools::pythons()
            .find(|python| command::succeeds(Command::new(python).args(["-c", PYTHON])))
            .with_context(|| {
                format!("{what_for}: this needs Python 3.11 or newer; install python3.11 or newer")
            })?;
        let pip =
            tools::python().with_context(|| format!("{what_for}: pip installs them; install python3-pip"))?;
        remove(folder)?;
        // Without pip inside: Debian's Python has no ensurepip unless python3-venv is there, and any pip can fill it.
        command::output(Command::new(&base).args(["-m", "venv", "--without-pip"]).arg(folder))?;
        let file = folder.join("requirements.txt");
        std::fs::write(&file, requirements)?;
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
                .arg(&file),
        )
        .with_context(|| {
            format!("cannot install the packages of {name}; is the Python package index reachable?")
        })?;
        Ok(())
    }
}
