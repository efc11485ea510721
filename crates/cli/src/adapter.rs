//! The flag that changes a model in this process by an adapter.

use anyhow::{Context as _, Result};
use clap::Args;
use mlxnode_checkpoint::{Adapter, Checkpoint};
use mlxnode_engine::Model;
use std::path::{Path, PathBuf};

/// The adapter's name in the model; there is only one.
const NAME: &str = "adapter";

/// Which adapter.
#[derive(Clone, Debug, Default, Args)]
pub struct AdapterFlag {
    /// A folder with a LoRA or DoRA adapter for the model, as mlx-lm or PEFT write it.
    #[arg(long, value_name = "FOLDER")]
    pub adapter_path: Option<PathBuf>,
}

impl AdapterFlag {
    /// Reads what says whether the adapter fits the model; its weights are read by [`Self::apply`].
    pub fn open(&self, checkpoint: &Checkpoint) -> Result<Option<Adapter>> {
        let Some(folder) = &self.adapter_path else { return Ok(None) };
        Ok(Some(Adapter::open(folder, checkpoint).with_context(|| unusable(folder))?))
    }

    /// Loads the adapter, which then works on everything that the model does.
    pub fn apply(&self, adapter: Option<&Adapter>, checkpoint: &Checkpoint, model: &mut Model) -> Result<()> {
        let (Some(adapter), Some(folder)) = (adapter, &self.adapter_path) else { return Ok(()) };
        model.add_adapter(checkpoint, NAME, adapter).with_context(|| unusable(folder))?;
        model.use_adapter(Some(NAME))?;
        Ok(())
    }
}

fn unusable(folder: &Path) -> String {
    format!("cannot use the adapter in {}", folder.display())
}
