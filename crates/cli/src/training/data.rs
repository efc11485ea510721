//! Where a run's rows come from.

use crate::progress::Bar;
use crate::{hub, warnings};
use anyhow::{Context as _, Result};
use mlxnode_hub::{Hub, HubId};
use mlxnode_training::{Sets, TrainingConfig};
use std::path::{Path, PathBuf};

/// The folders or files with the rows that a configuration asks for, downloaded if need be.
pub fn folders(config: &TrainingConfig, quiet: bool) -> Result<Vec<PathBuf>> {
    if config.hf_dataset.is_empty() {
        return Ok(vec![folder(&config.data, None, quiet)?]);
    }
    let datasets = config.hf_dataset.iter();
    datasets.map(|dataset| folder(&dataset.path, dataset.revision.as_deref(), quiet)).collect()
}

/// The folder or file of this name, or the folder of a data set of the hub, downloaded if need be with a bar on stderr.
fn folder(name: &str, revision: Option<&str>, quiet: bool) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let id = HubId::dataset(name, revision).with_context(|| {
        format!("there is no folder or file {name}, nor is it the name of a data set of the hub (OWNER/NAME)")
    })?;
    let bar = Bar::new("downloading", quiet);
    let folder = Hub::new(hub::options()).resolve_dataset(&id, &|progress| {
        bar.say(progress.file);
        bar.show(progress.done_bytes, progress.total_bytes);
    })?;
    Ok(folder)
}

/// Rows that were longer than the limit.
pub fn say_what_was_cut(sets: &Sets, config: &TrainingConfig, quiet: bool) {
    for (name, set) in [("training", &sets.train), ("validation", &sets.valid), ("test", &sets.test)] {
        let cut = set.cut();
        if cut.rows > 0 && !quiet {
            warnings::text(&format!(
                "note: {} of {} {name} rows are longer than {} tokens (the longest has {}); {} tokens were cut off\n",
                cut.rows,
                set.len(),
                config.max_seq_length,
                cut.longest,
                cut.tokens
            ));
        }
    }
    if config.train && sets.valid.is_empty() && !quiet {
        warnings::text("note: there is no validation set, so nothing is measured while training\n");
    }
}
