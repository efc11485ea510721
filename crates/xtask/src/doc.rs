//! `cargo xtask doc`: the documentation of our crates, warnings denied.

use crate::command;
use crate::places::Places;
use crate::setup;
use anyhow::Result;

/// Builds the documentation; shows it when asked.
pub(crate) fn run(places: &Places, open: bool) -> Result<()> {
    setup::ensure(places)?;
    let mut cargo = command::cargo(&places.repository);
    cargo
        .args(["doc", "--no-deps", "--workspace"])
        .args(command::lock_arguments())
        .env("RUSTDOCFLAGS", "-D warnings");
    if open {
        cargo.arg("--open");
    }
    command::run(&mut cargo)?;
    crate::print(places.target().join("doc/mlxnode/index.html").display());
    Ok(())
}
