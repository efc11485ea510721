//! The header of a safetensors file that is not a model's, such as one of caches: what it holds and the notes in it.

use crate::checkpoint::{CheckpointError, header_bytes};
use crate::dtype::TensorDtype;
use crate::header::{self, HeaderError};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// A checked header; MLX may open the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFileHeader {
    /// Type and dimensions by name.
    pub tensors: BTreeMap<String, (TensorDtype, Vec<usize>)>,
    /// The notes.
    pub metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Notes {
    /// MLX writes null when there are none.
    #[serde(rename = "__metadata__", default)]
    metadata: Option<BTreeMap<String, String>>,
}

impl TensorFileHeader {
    /// Reads and checks the header of a file.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let damaged = |error| CheckpointError::Header { path: path.into(), error };
        let (bytes, length) = header_bytes(path)?;
        let tensors = header::parse(&bytes, length).map_err(damaged)?;
        let notes: Notes = serde_json::from_slice(&bytes).map_err(|error| {
            damaged(HeaderError::Malformed { reason: error.to_string().chars().take(200).collect() })
        })?;
        let tensors = tensors.into_iter().map(|tensor| (tensor.name, (tensor.dtype, tensor.shape)));
        Ok(Self { tensors: tensors.collect(), metadata: notes.metadata.unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SafetensorsWriter;

    #[test]
    fn what_was_written_is_read() {
        let path = std::env::temp_dir().join(format!("mlxnode-notes-{}.safetensors", std::process::id()));
        let notes = BTreeMap::from([("0.model".to_owned(), "m".to_owned())]);
        let mut writer = SafetensorsWriter::with_notes(notes.clone());
        writer.add("0.2", TensorDtype::I32, &[], vec![7, 0, 0, 0]).unwrap();
        writer.write(&path).unwrap();
        let header = TensorFileHeader::read(&path);
        std::fs::remove_file(&path).unwrap();
        let header = header.unwrap();
        assert_eq!(header.metadata, notes);
        assert_eq!(header.tensors["0.2"], (TensorDtype::I32, vec![]));
        assert!(matches!(TensorFileHeader::read(&path), Err(CheckpointError::Read { .. })));
    }
}
