//! The adapter's files, as mlx-lm writes them: adapters.safetensors, NNNNNNN_adapters.safetensors, adapter_config.json.
//!
//! A file is written beside the one that it takes the place of: a process that is killed and a disk that is full leave the one before.

use anyhow::{Context as _, Result};
use mlxnode_training::{ADAPTER_CONFIG, ADAPTER_FILE, FineTuning, TrainingConfig};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// An adapter's folder.
pub struct Files {
    folder: PathBuf,
}

/// A file that is written whole, and not yet under its name.
struct Fresh {
    fresh: PathBuf,
    target: PathBuf,
}

impl Files {
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Makes the folder, and writes what does not change. An adapter that is there keeps its own configuration until another one is.
    pub fn prepare(&self, config: &TrainingConfig) -> Result<()> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make the folder {}", self.folder.display()))?;
        let written = self.config(config)?;
        if self.path().exists() { written.discard() } else { self.name([written]) }
    }

    /// Writes the adapter as it is after so many iterations: the path of what stays.
    pub fn save(&self, job: &mut FineTuning, iteration: u64) -> Result<PathBuf> {
        self.finish(job)?;
        let path = self.folder.join(format!("{iteration:07}_{ADAPTER_FILE}"));
        self.name([Fresh::write(&path, |fresh| Ok(job.trainer().write_parameters(fresh)?))?])?;
        Ok(path)
    }

    /// Writes the adapter.
    pub fn finish(&self, job: &mut FineTuning) -> Result<()> {
        let adapter = Fresh::write(&self.path(), |fresh| Ok(job.trainer().write_parameters(fresh)?))?;
        let config = self.config(job.config())?;
        self.name([adapter, config])
    }

    /// The adapter's file.
    pub fn path(&self) -> PathBuf {
        self.folder.join(ADAPTER_FILE)
    }

    fn config(&self, config: &TrainingConfig) -> Result<Fresh> {
        Fresh::write(&self.folder.join(ADAPTER_CONFIG), |fresh| {
            Ok(fs::write(fresh, config.adapter_config())?)
        })
    }

    /// Gives files their names, one right after the other.
    fn name<const COUNT: usize>(&self, files: [Fresh; COUNT]) -> Result<()> {
        for Fresh { fresh, target } in files {
            fs::rename(&fresh, &target).with_context(|| format!("cannot write {}", target.display()))?;
        }
        File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .with_context(|| format!("cannot write to {}", self.folder.display()))
    }
}

impl Fresh {
    /// Writes beside `target`, down to the disk. Nothing of it stays when that fails.
    fn write(target: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let fresh = target.with_extension("fresh");
        let written = write(&fresh).and_then(|()| Ok(File::open(&fresh)?.sync_all()?));
        if written.is_err() {
            let _ = fs::remove_file(&fresh); // the first error says more
        }
        written.with_context(|| format!("cannot write {}", target.display()))?;
        Ok(Self { fresh, target: target.to_owned() })
    }

    fn discard(self) -> Result<()> {
        fs::remove_file(&self.fresh).with_context(|| format!("cannot remove {}", self.fresh.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_training::TrainingConfig;

    #[test]
    fn what_is_there_stays_until_the_next_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::new(folder.path());
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        fs::write(files.path(), "the one before").unwrap();
        let torn = Fresh::write(&files.path(), |fresh| {
            fs::write(fresh, "half of")?;
            anyhow::bail!("no room")
        });
        let error = format!("{:#}", torn.err().unwrap());
        assert!(error.contains(ADAPTER_FILE) && error.contains("no room"), "{error}");
        assert_eq!(fs::read_to_string(files.path()).unwrap(), "the one before");
        assert_eq!(names(), [ADAPTER_FILE]);
        let whole = Fresh::write(&files.path(), |fresh| Ok(fs::write(fresh, "the next one")?)).unwrap();
        assert_eq!(fs::read_to_string(files.path()).unwrap(), "the one before");
        files.name([whole]).unwrap();
        assert_eq!(fs::read_to_string(files.path()).unwrap(), "the next one");
        assert_eq!(names(), [ADAPTER_FILE]);
    }

    #[test]
    fn an_adapter_keeps_its_configuration_until_another_one_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::new(folder.path());
        let config =
            |iters: u64| TrainingConfig::from_yaml(&format!("train: true\niters: {iters}\n"), "a").unwrap();
        let iters = || {
            let text = fs::read_to_string(folder.path().join(ADAPTER_CONFIG)).unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap()["iters"].as_u64().unwrap()
        };
        files.prepare(&config(3)).unwrap();
        assert_eq!(iters(), 3);
        fs::write(files.path(), "an adapter").unwrap();
        files.prepare(&config(5)).unwrap();
        assert_eq!(iters(), 3);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
