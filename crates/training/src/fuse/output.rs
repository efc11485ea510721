//! The fused model's folder: files of weights with their index, config, and what the base has beside its weights.
//!
//! All is written into a folder beside the wanted one, which gets its name at the end: there is a whole model or none.

use super::FuseError;
use super::error::disk;
use mlxnode_checkpoint::{Checkpoint, SafetensorsWriter, TensorDtype};
use serde::Serialize as _;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// mlx-lm's: a file of weights grows to this.
const SHARD_BYTES: u64 = 5 << 30;
/// Files beside the weights that belong to the model: tokenizer, templates, generation's defaults, text.
const KEPT: [&str; 8] = [".json", ".txt", ".model", ".tiktoken", ".jinja", ".jsonl", ".py", ".md"];
/// Those of them that are written anew, or are another model's.
const NOT_KEPT: [&str; 3] = ["config.json", "model.safetensors.index.json", "adapter_config.json"];

/// A folder that is being written.
pub(super) struct Folder {
    target: PathBuf,
    fresh: PathBuf,
    shard: SafetensorsWriter,
    shard_names: Vec<String>,
    shard_bytes: u64,
    most: u64,
    /// The names in each finished file.
    written: Vec<Vec<String>>,
    total_bytes: u64,
    parameters: u64,
}

impl Folder {
    /// Begins. The folder must not be there, or be empty.
    pub(super) fn begin(target: &Path) -> Result<Self, FuseError> {
        let taken = || FuseError::Taken { path: target.into() };
        let is_taken = match target.read_dir() {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) => error.kind() == std::io::ErrorKind::NotADirectory,
        };
        if is_taken {
            return Err(taken());
        }
        let target = std::path::absolute(target).map_err(disk(target))?;
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let fresh = target.with_file_name(format!(".{name}.partial-{}", std::process::id()));
        fs::create_dir_all(&fresh).map_err(disk(&fresh))?;
        Ok(Self {
            target,
            fresh,
            shard: SafetensorsWriter::new(),
            shard_names: Vec::new(),
            shard_bytes: 0,
            most: SHARD_BYTES,
            written: Vec::new(),
            total_bytes: 0,
            parameters: 0,
        })
    }

    /// Lets files of weights grow to this, for tests.
    #[cfg(test)]
    pub(super) fn with_shards_of(mut self, bytes: u64) -> Self {
        self.most = bytes;
        self
    }

    /// Adds a tensor; `parameters` is how many of the model's parameters it holds.
    pub(super) fn add(
        &mut self,
        name: &str,
        dtype: TensorDtype,
        shape: &[usize],
        bytes: Vec<u8>,
        parameters: u64,
    ) -> Result<(), FuseError> {
        let size = bytes.len() as u64;
        if !self.shard_names.is_empty() && self.shard_bytes + size > self.most {
            self.end_shard()?;
        }
        self.shard.add(name, dtype, shape, bytes)?;
        self.shard_names.push(name.to_owned());
        self.shard_bytes += size;
        self.total_bytes += size;
        self.parameters += parameters;
        Ok(())
    }

    /// Writes the rest and gives the folder its name.
    pub(super) fn finish(mut self, checkpoint: &Checkpoint, dequantized: bool) -> Result<(), FuseError> {
        self.end_shard()?;
        let count = self.written.len();
        let mut map = BTreeMap::new();
        for (index, names) in self.written.iter().enumerate() {
            let file = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            let path = self.fresh.join(&file);
            fs::rename(self.part(index), &path).map_err(disk(&path))?;
            map.extend(names.iter().map(|name| (name.clone(), file.clone())));
        }
        let metadata = json!({"total_size": self.total_bytes, "total_parameters": self.parameters});
        let index = json!({"metadata": metadata, "weight_map": map});
        self.write_json("model.safetensors.index.json", &index)?;
        self.write_json("config.json", &Value::Object(config(checkpoint.config().raw(), dequantized)))?;
        copy_beside(checkpoint.folder(), &self.fresh)?;
        if self.target.is_dir() {
            fs::remove_dir(&self.target).map_err(disk(&self.target))?;
        }
        fs::rename(&self.fresh, &self.target).map_err(disk(&self.target))
    }

    fn end_shard(&mut self) -> Result<(), FuseError> {
        let path = self.part(self.written.len());
        std::mem::take(&mut self.shard).write(&path)?;
        let file = fs::File::open(&path).map_err(disk(&path))?;
        file.sync_all().map_err(disk(&path))?;
        self.written.push(std::mem::take(&mut self.shard_names));
        self.shard_bytes = 0;
        Ok(())
    }

    /// A file of weights while it is not known how many there will be.
    fn part(&self, index: usize) -> PathBuf {
        self.fresh.join(format!("part-{index}"))
    }

    fn write_json(&self, name: &str, value: &Value) -> Result<(), FuseError> {
        let path = self.fresh.join(name);
        let mut bytes = Vec::new();
        let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
        let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
        value.serialize(&mut serializer).map_err(|error| disk(&path)(error.into()))?;
        fs::write(&path, bytes).map_err(disk(&path))
    }
}

impl Drop for Folder {
    /// What was not finished goes; a finished folder has another name.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.fresh);
    }
}

/// mlx-lm's rules: sorted, without where the model came from; what says how it is packed is there twice, or not at all.
fn config(raw: &Map<String, Value>, dequantized: bool) -> Map<String, Value> {
    let mut config = raw.clone();
    config.remove("_name_or_path");
    if dequantized {
        config.remove("quantization");
        config.remove("quantization_config");
    } else if let Some(quantization) = config.get("quantization").cloned() {
        config.insert("quantization_config".to_owned(), quantization);
    }
    // The vision tower is not written, so it is not announced.
    config.remove("vision_config");
    let sorted: BTreeMap<String, Value> = config.into_iter().collect();
    sorted.into_iter().collect()
}

fn copy_beside(from: &Path, to: &Path) -> Result<(), FuseError> {
    for entry in from.read_dir().map_err(disk(from))? {
        let entry = entry.map_err(disk(from))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_kept = KEPT.iter().any(|ending| name.ends_with(ending)) && !NOT_KEPT.contains(&name.as_str());
        // Files of the hub's cache are links.
        if is_kept && entry.path().is_file() {
            let target = to.join(&name);
            fs::copy(entry.path(), &target).map_err(disk(&target))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_hub::{Hub, ModelSource, Options};

    #[test]
    fn weights_that_are_too_much_for_one_file_are_several() {
        let place = tempfile::tempdir().unwrap();
        let hub = Hub::new(Options { cache: place.path().join("cache"), ..Options::from_lookup(|_| None) });
        let checkpoint = Checkpoint::open(&hub.resolve(&ModelSource::Demo, &|_| {}).unwrap()).unwrap();
        let target = place.path().join("out");
        fs::create_dir(&target).unwrap();
        let mut folder = Folder::begin(&target).unwrap().with_shards_of(100);
        for (name, floats) in [("a", 10), ("b", 15), ("c", 100), ("d", 1)] {
            folder.add(name, TensorDtype::F32, &[floats], vec![0; 4 * floats], floats as u64).unwrap();
        }
        folder.finish(&checkpoint, false).unwrap();
        let index: Value =
            serde_json::from_slice(&fs::read(target.join("model.safetensors.index.json")).unwrap()).unwrap();
        let file = |number: usize| format!("model-{number:05}-of-00003.safetensors");
        assert_eq!(
            index,
            json!({
                "metadata": {"total_size": 504, "total_parameters": 126},
                "weight_map": {"a": file(1), "b": file(1), "c": file(2), "d": file(3)},
            })
        );
        for number in 1..=3 {
            assert!(target.join(file(number)).is_file());
        }
        assert!(target.join("tokenizer.json").is_file() && !target.join("model.safetensors").exists());
        drop(Folder::begin(&place.path().join("other")).unwrap());
        let left = place.path().read_dir().unwrap().count();
        assert_eq!(left, 2, "what was begun and not finished is gone");
    }
}
