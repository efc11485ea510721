//! Models by the name that a person gives: where they come from, as the environment says it, and where they lie.

use crate::progress::Bar;
use anyhow::Result;
use mlxnode_checkpoint::{Checkpoint, Note};
use mlxnode_hub::{Hub, ModelSource};
use std::path::PathBuf;

/// Reads HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
pub fn options() -> mlxnode_hub::Options {
    mlxnode_hub::Options::from_lookup(|name| std::env::var(name).ok())
}

/// The folder of a model, downloaded if need be, with a bar on stderr.
pub fn folder(model: &str, quiet: bool) -> Result<PathBuf> {
    let source = ModelSource::parse(model)?;
    let bar = Bar::new("downloading", quiet);
    let folder = Hub::new(options()).resolve(&source, &|progress| {
        bar.say(progress.file);
        bar.show(progress.done_bytes, progress.total_bytes);
    })?;
    Ok(folder)
}

/// What a person should know about a model, when it is on this machine: nothing is downloaded for it.
pub fn notes(model: &str) -> Vec<Note> {
    let Ok(source) = ModelSource::parse(model) else { return Vec::new() };
    let here = Hub::new(mlxnode_hub::Options { offline: true, ..options() });
    let checkpoint = here.resolve(&source, &|_| {}).ok().and_then(|folder| Checkpoint::open(&folder).ok());
    checkpoint.map_or_else(Vec::new, |checkpoint| checkpoint.notes().to_vec())
}
