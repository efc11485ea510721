//! model.safetensors.index.json: which file has which tensor. Not needed for loading; its promises are checked.

use crate::checkpoint::{CheckpointError, TensorEntry, read_text};
use crate::names;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

/// The index file.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// Largest index that is read: as large as a header may be.
const MAX_INDEX_BYTES: u64 = crate::header::MAX_HEADER_BYTES;

/// What it says.
#[derive(Debug, Deserialize)]
pub(crate) struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads the index of a folder; None when it has none.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>, CheckpointError> {
        let path = folder.join(INDEX_FILE);
        let Some(text) = read_text(&path, MAX_INDEX_BYTES)? else { return Ok(None) };
        let malformed = |reason: String| CheckpointError::Index { path: path.clone(), reason };
        let index: Self = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        for (tensor, file) in &index.weight_map {
            let mut parts = Path::new(file).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                let file: String = file.chars().take(80).collect();
                let tensor: String = tensor.chars().take(80).collect();
                return Err(malformed(format!(
                    "\"{file}\", given for tensor \"{tensor}\", is not a file's name"
                )));
            }
        }
        Ok(Some(index))
    }

    /// The file that has this tensor (as stored).
    pub(crate) fn file_of(&self, stored_name: &str) -> Option<&String> {
        self.weight_map.get(stored_name)
    }

    /// The files it lists.
    pub(crate) fn files(&self) -> Vec<String> {
        let files: BTreeSet<_> = self.weight_map.values().cloned().collect();
        files.into_iter().collect()
    }

    /// Every tensor it lists must be there. One that is in another file than listed will do: mlx-lm ignores the index,
    /// and some repositories carry one from before their conversion.
    pub(crate) fn check(
        &self,
        folder: &Path,
        tied_embeddings: bool,
        tensors: &BTreeMap<String, TensorEntry>,
    ) -> Result<(), CheckpointError> {
        let lacking = self.weight_map.iter().filter(|(stored, _)| {
            names::canonical(stored, tied_embeddings).is_some_and(|name| !tensors.contains_key(name.as_ref()))
        });
        let mut missing_files = BTreeSet::new();
        let mut broken = None;
        for (tensor, file) in lacking {
            match folder.join(file).is_file() {
                false => {
                    missing_files.insert(file.clone());
                }
                true => broken = broken.or(Some((tensor.clone(), file.clone()))),
            }
        }
        let path = folder.join(INDEX_FILE);
        if !missing_files.is_empty() {
            return Err(CheckpointError::MissingShards { path, files: missing_files.into_iter().collect() });
        }
        match broken {
            Some((tensor, file)) => Err(CheckpointError::BrokenPromise { path, tensor, file }),
            None => Ok(()),
        }
    }
}
