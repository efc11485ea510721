//! Where a run's rows come from.

use crate::warnings;
use anyhow::{Result, bail};
use mlxnode_training::{Sets, TrainingConfig};
use std::path::{Path, PathBuf};

/// The folders or files with the rows that a configuration asks for.
pub fn folders(config: &TrainingConfig, _quiet: bool) -> Result<Vec<PathBuf>> {
    let names: Vec<&str> = match config.hf_dataset.is_empty() {
        true => vec![&config.data],
        false => config.hf_dataset.iter().map(|dataset| dataset.path.as_str()).collect(),
    };
    names.into_iter().map(folder).collect()
}

fn folder(name: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    if !path.exists() {
        bail!("there is no folder or file {name}; download the data set and name its folder with --data");
    }
    Ok(path.to_owned())
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
