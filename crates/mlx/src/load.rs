//! Tensors from safetensors files, read when they are first needed.

use crate::error::through;
use crate::{Array, Device, Error, Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// An open safetensors file. Only tensors that are evaluated are read, straight into the arrays' memory.
///
/// MLX checks little of a header: validate the file before (`mlxnode-checkpoint` does).
pub struct TensorFile {
    path: PathBuf,
    /// Those that were not taken yet. A file that kept them all would keep every tensor in memory that was read from it.
    tensors: HashMap<String, Array>,
}

impl TensorFile {
    /// Opens `path`, which must end in `.safetensors`, and reads its header. The tensors belong to the thread of the device.
    pub fn open(_device: &Device, path: &Path) -> Result<Self> {
        // Reading needs a stream of the CPU: mlx-rs takes the thread's default one there.
        let tensors = through(|| mlx_rs::Array::load_safetensors(path))
            .map_err(|source| Error::Open { file: path.display().to_string(), source: Box::new(source) })?;
        let tensors = tensors.into_iter().map(|(name, array)| (name, Array::wrap(array))).collect();
        Ok(Self { path: path.to_owned(), tensors })
    }

    /// The names of the tensors that were not taken yet.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Takes the tensor of this name out; it is read when it is evaluated.
    pub fn take(&mut self, name: &str) -> Result<Array> {
        self.tensors
            .remove(name)
            .ok_or_else(|| Error::NoTensor { file: self.path.display().to_string(), name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn a_file_that_is_not_there_or_not_one_of_tensors_is_named() {
        let device = Device::open().unwrap();
        let folder = std::env::temp_dir().join(format!("mlxnode-mlx-load-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let broken = folder.join("broken.safetensors");
        std::fs::write(&broken, b"no header").unwrap();
        let missing = TensorFile::open(&device, &folder.join("missing.safetensors")).err().unwrap();
        let broken = TensorFile::open(&device, &broken).err().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(missing.to_string().ends_with("missing.safetensors"), "{missing}");
        assert!(broken.source().unwrap().to_string().starts_with("mlx: "), "{broken:?}");
    }
}
