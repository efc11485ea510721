//! A trainer's state in a file, and back.

use super::Trainer;
use mlxnode_checkpoint::{SafetensorsWriter, TensorDtype, WriteError};
use mlxnode_mlx::{Array, Device, Dtype, TensorFile};
use std::collections::BTreeMap;
use std::path::Path;

/// State that cannot be written or taken over.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The file is not one of this training.
    #[error("{file} is no state of this training: {problem}")]
    Foreign {
        /// The file.
        file: String,
        /// What does not fit.
        problem: String,
    },
    /// MLX refused.
    #[error(transparent)]
    Device(#[from] mlxnode_mlx::Error),
}

/// What the number of updates is called in a file's notes.
const UPDATES: &str = "updates";
/// Before the names of parameters.
const PARAMETERS: &str = "parameters.";
/// Before those of what the optimizer remembers.
const OPTIMIZER: &str = "optimizer.";

impl Trainer {
    /// Writes what is trained, by mlx-lm's names: an adapter's file.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write_parameters(&self, file: &Path) -> Result<(), StateError> {
        let mut writer = SafetensorsWriter::new();
        for (trained, array) in self.tuner.trained().iter().zip(&self.parameters) {
            add(self.device(), &mut writer, &trained.stored, array)?;
        }
        Ok(writer.write(file)?)
    }

    /// BLAKE3 of what is trained, bit by bit, in the tuner's order.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn hash_parameters(&self) -> Result<[u8; 32], mlxnode_mlx::Error> {
        let mut hasher = blake3::Hasher::new();
        for parameter in &self.parameters {
            hasher.update(&self.device().contiguous(parameter)?.to_bytes()?);
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Writes all that is needed to go on, bit by bit the same.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write_state(&self, file: &Path) -> Result<(), StateError> {
        let mut writer = SafetensorsWriter::with_notes(self.notes());
        for (name, array) in self.named() {
            add(self.device(), &mut writer, &name, array)?;
        }
        Ok(writer.write(file)?)
    }

    /// Takes over what [`Self::write_state`] wrote, after so many updates.
    ///
    /// # Errors
    ///
    /// When it is not the state of a training of the same parameters with the same optimizer.
    pub fn read_state(&mut self, file: &Path, updates: u64) -> Result<(), StateError> {
        self.read_own_state(file, updates, |_| false)
    }

    /// The same, of a file that also has what others train, by these names.
    pub(super) fn read_own_state(
        &mut self,
        file: &Path,
        updates: u64,
        is_of_others: impl Fn(&str) -> bool,
    ) -> Result<(), StateError> {
        let foreign = |problem: String| StateError::Foreign { file: file.display().to_string(), problem };
        let mut tensors = TensorFile::open(self.device(), file)?;
        let mut arrays = Vec::new();
        for (name, known) in self.named() {
            let array = tensors.take(&name).map_err(|error| foreign(error.to_string()))?;
            if array.shape() != known.shape() || array.dtype() != known.dtype() {
                let (found, needed) = (array.shape(), known.shape());
                return Err(foreign(format!("{name} has shape {found:?}, but {needed:?} is needed")));
            }
            arrays.push(array);
        }
        let rest = |name: &&str| {
            let name = name.strip_prefix(PARAMETERS).or_else(|| name.strip_prefix(OPTIMIZER));
            !name.is_some_and(&is_of_others)
        };
        if let Some(name) = tensors.names().find(rest) {
            return Err(foreign(format!("{name} is not part of it")));
        }
        self.device().eval(&arrays)?;
        self.memories = arrays.split_off(self.parameters.len());
        self.parameters = arrays;
        self.updates = updates;
        Ok(())
    }

    /// The notes of a file with the state.
    pub(super) fn notes(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(UPDATES.to_owned(), self.updates.to_string())])
    }

    /// Parameters, then what the optimizer remembers.
    fn named(&self) -> impl Iterator<Item = (String, &Array)> {
        let trained = || self.tuner.trained().iter();
        let parameters = trained().map(|trained| format!("{PARAMETERS}{}", trained.name));
        let memories = trained().zip(&self.parameters).flat_map(|(trained, parameter)| {
            let memories = self.update.optimizer().memories(parameter.shape()).into_iter();
            memories.map(|memory| format!("{OPTIMIZER}{}.{}", trained.name, memory.name))
        });
        let arrays = self.parameters.iter().chain(&self.memories);
        parameters.chain(memories).zip(arrays)
    }
}

fn add(device: &Device, writer: &mut SafetensorsWriter, name: &str, array: &Array) -> Result<(), StateError> {
    let dtype = match array.dtype() {
        Dtype::F16 => TensorDtype::F16,
        Dtype::BF16 => TensorDtype::BF16,
        _ => TensorDtype::F32,
    };
    let shape: Vec<usize> = array.shape().iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect();
    let bytes = device.contiguous(array)?.to_bytes()?;
    Ok(writer.add(name, dtype, &shape, bytes)?)
}
