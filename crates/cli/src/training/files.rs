//! The adapter's files, as mlx-lm writes them: adapters.safetensors, NNNNNNN_adapters.safetensors, adapter_config.json.

use anyhow::{Context as _, Result};
use mlxnode_training::{ADAPTER_CONFIG, ADAPTER_FILE, FineTuning, TrainingConfig};
use std::path::{Path, PathBuf};

/// An adapter's folder.
pub struct Files {
    folder: PathBuf,
}

impl Files {
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Makes the folder, and writes what does not change.
    pub fn prepare(&self, config: &TrainingConfig) -> Result<()> {
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make the folder {}", self.folder.display()))?;
        let path = self.folder.join(ADAPTER_CONFIG);
        std::fs::write(&path, config.adapter_config())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes the adapter as it is after so many iterations: the path of what stays.
    pub fn save(&self, job: &mut FineTuning, iteration: u64) -> Result<PathBuf> {
        self.finish(job)?;
        let path = self.folder.join(format!("{iteration:07}_{ADAPTER_FILE}"));
        job.trainer().write_parameters(&path)?;
        Ok(path)
    }

    /// Writes the adapter.
    pub fn finish(&self, job: &mut FineTuning) -> Result<()> {
        Ok(job.trainer().write_parameters(&self.path())?)
    }

    /// The adapter's file.
    pub fn path(&self) -> PathBuf {
        self.folder.join(ADAPTER_FILE)
    }
}
