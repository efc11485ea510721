//! Where a run's rows come from.

use crate::{hub, warnings};
use anyhow::Result;
use mlxnode_training::{Sets, TrainingConfig};
use std::path::PathBuf;

/// The folders or files with the rows that a configuration asks for, downloaded if need be.
pub fn folders(config: &TrainingConfig, quiet: bool) -> Result<Vec<PathBuf>> {
    if config.hf_dataset.is_empty() {
        return Ok(vec![hub::data(&config.data, None, quiet)?]);
    }
    let of = |dataset: &mlxnode_training::HubDataset| hub::data(&dataset.path, dataset.revision.as_deref(), quiet);
    config.hf_dataset.iter().map(of).collect()
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
