//! Writes safetensors files that MLX and mlx-lm read.

use crate::dtype::TensorDtype;
use safetensors::tensor::{Dtype, View};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Collects tensors and writes them as one file.
#[derive(Debug, Default)]
pub struct SafetensorsWriter {
    tensors: BTreeMap<String, Tensor>,
    /// None: mlx-lm's note for weights.
    notes: Option<BTreeMap<String, String>>,
}

#[derive(Debug)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A file that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A tensor's bytes are not those of its shape.
    #[error("tensor \"{name}\" of shape {shape:?} and type {dtype} cannot have {actual} bytes")]
    Tensor {
        /// Its name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type.
        dtype: TensorDtype,
        /// The bytes that were given.
        actual: usize,
    },
    /// Two tensors of the same name.
    #[error("tensor \"{name}\" was given twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The file cannot be written.
    #[error("{} cannot be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: safetensors::SafeTensorError,
    },
}

impl SafetensorsWriter {
    /// No tensors yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// No tensors yet, and these notes instead of the one that weights have.
    pub fn with_notes(notes: BTreeMap<String, String>) -> Self {
        Self { tensors: BTreeMap::new(), notes: Some(notes) }
    }

    /// Adds a tensor: `bytes` are its elements, row-major and little-endian.
    pub fn add(
        &mut self,
        name: &str,
        dtype: TensorDtype,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Result<(), WriteError> {
        let expected = shape.iter().try_fold(dtype.size(), |bytes, dimension| bytes.checked_mul(*dimension));
        if expected != Some(bytes.len()) {
            let (name, shape, actual) = (name.to_owned(), shape.to_vec(), bytes.len());
            return Err(WriteError::Tensor { name, shape, dtype, actual });
        }
        let tensor = Tensor { dtype: stored(dtype), shape: shape.to_vec(), bytes };
        match self.tensors.insert(name.to_owned(), tensor) {
            Some(_) => Err(WriteError::Duplicate { name: name.to_owned() }),
            None => Ok(()),
        }
    }

    /// Writes the file, beside its place first, so that a file of that name is replaced as a whole or not at all.
    pub fn write(self, path: &Path) -> Result<(), WriteError> {
        // mlx-lm writes this note and some tools look for it.
        let weights = || BTreeMap::from([("format".to_owned(), "mlx".to_owned())]);
        let notes: HashMap<String, String> = self.notes.clone().unwrap_or_else(weights).into_iter().collect();
        safetensors::serialize_to_file(&self.tensors, Some(notes), path)
            .map_err(|source| WriteError::Write { path: path.into(), source })
    }
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

pub(crate) fn stored(dtype: TensorDtype) -> Dtype {
    match dtype {
        TensorDtype::Bool => Dtype::BOOL,
        TensorDtype::U8 => Dtype::U8,
        TensorDtype::I8 => Dtype::I8,
        TensorDtype::U16 => Dtype::U16,
        TensorDtype::I16 => Dtype::I16,
        TensorDtype::U32 => Dtype::U32,
        TensorDtype::I32 => Dtype::I32,
        TensorDtype::U64 => Dtype::U64,
        TensorDtype::I64 => Dtype::I64,
        TensorDtype::F16 => Dtype::F16,
        TensorDtype::BF16 => Dtype::BF16,
        TensorDtype::F32 => Dtype::F32,
        TensorDtype::F64 => Dtype::F64,
        TensorDtype::F8E4M3 => Dtype::F8_E4M3,
        TensorDtype::F8E8M0 => Dtype::F8_E8M0,
        TensorDtype::C64 => Dtype::C64,
    }
}
