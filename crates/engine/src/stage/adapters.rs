//! Adapters of a stage that serves: they come and go while sequences run.
//!
//! A sequence keeps the adapter that it was opened with. An adapter that is unloaded is retired: nobody gets it by its name any more,
//! and another one may take that name; its changes stay in the maps until the last sequence that has it is closed.

use super::EngineStage;
use super::sequence::Sequence;
use crate::adapters::{AdapterId, Segment};
use mlxnode_checkpoint::{Adapter, Checkpoint};
use mlxnode_compute::{SequenceId, StageError};
use std::path::Path;

/// Adapters that are only there for the sequences that have them.
#[derive(Debug, Default)]
pub(super) struct Retired(Vec<AdapterId>);

impl EngineStage {
    /// Reads the adapter's changes of these layers, checked against the model's files.
    pub(super) fn read_adapter(&mut self, name: &str, folder: &Path) -> Result<(), StageError> {
        let Some(own) = &self.folder else {
            return Err(StageError::Adapter("the stage was made without the files of its model".to_owned()));
        };
        // Read anew: the index of a large model's tensors is not worth keeping for this.
        let checkpoint = Checkpoint::open(own).map_err(|error| refused(&error))?;
        let adapter = Adapter::open(folder, &checkpoint).map_err(|error| refused(&error))?;
        let contents = contents(&adapter).map_err(|error| refused(&error))?;
        self.model.add_adapter(&checkpoint, name, &adapter).map_err(|error| refused(&error))?;
        if let Some(id) = self.adapter_named(Some(name))? {
            self.adapter_files.insert(id, contents);
        }
        Ok(())
    }

    /// Nobody gets the adapter from now on.
    pub(super) fn retire_adapter(&mut self, name: &str) {
        if let Some(adapter) = self.model.adapters.retire(name) {
            self.retired.0.push(adapter);
            self.let_go(adapter);
        }
    }

    /// Frees a retired adapter that no sequence has any more.
    pub(super) fn let_go(&mut self, adapter: AdapterId) {
        let is_used = self.sequences.values().any(|sequence| sequence.adapter == Some(adapter));
        let Some(place) = self.retired.0.iter().position(|retired| *retired == adapter) else { return };
        if is_used {
            return;
        }
        self.retired.0.swap_remove(place);
        self.adapter_files.remove(&adapter);
        // What could not be taken out stays in memory and changes nothing: no sequence asks for it.
        if let Err(error) = self.model.adapters.take_out(&self.model.device, adapter) {
            tracing::warn!(%error, "an adapter's memory is not freed");
        }
    }

    /// The adapter that a sequence asks for.
    pub(super) fn adapter_named(&self, name: Option<&str>) -> Result<Option<AdapterId>, StageError> {
        self.model.adapters.named(name).map_err(|error| StageError::Adapter(error.to_string()))
    }

    /// What is computed from now on are these sequences' tokens, so many of each, in this order.
    pub(super) fn activate(&self, rows: impl Iterator<Item = (SequenceId, i32)>) {
        let of = |id: SequenceId| self.sequences.get(&id).and_then(|sequence: &Sequence| sequence.adapter);
        self.model.adapters.active.set(rows.map(|(id, tokens)| Segment { adapter: of(id), tokens }));
    }
}

/// What tells an adapter from every other one: the tensors, and how they are applied.
fn contents(adapter: &Adapter) -> std::io::Result<blake3::Hash> {
    let Adapter { file, scale, changes } = adapter;
    let mut hasher = blake3::Hasher::new_derive_key("mlxnode adapter v1");
    hasher.update_reader(std::fs::File::open(file)?)?;
    hasher.update(&scale.to_le_bytes());
    hasher.update(format!("{changes:?}").as_bytes());
    Ok(hasher.finalize())
}

fn refused(error: &dyn std::error::Error) -> StageError {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    StageError::Adapter(text)
}
