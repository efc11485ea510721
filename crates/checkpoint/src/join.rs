//! Several safetensors files as one, tensor by tensor, so that no more than one is in memory.

use crate::checkpoint::{CheckpointError, header_bytes};
use crate::dtype::TensorDtype;
use crate::header;
use crate::writer::{WriteError, stored};
use safetensors::tensor::{Dtype, View};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Files that cannot be joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// One of them is no safetensors file.
    #[error(transparent)]
    Part(#[from] CheckpointError),
    /// One of them changed while it was read.
    #[error("{} changed while it was read", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// The whole cannot be written, or two parts have the same tensor.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Writes the tensors of all `parts`, each of which has others, as one file with these notes; None: mlx-lm's for weights. The file has the bytes that
/// [`crate::SafetensorsWriter`] writes of the same tensors.
///
/// # Errors
///
/// When a part cannot be read, has a tensor that another one has, or the whole cannot be written; then there is no such file.
pub fn join(
    parts: &[PathBuf],
    notes: Option<BTreeMap<String, String>>,
    path: &Path,
) -> Result<(), JoinError> {
    let trouble = RefCell::new(None);
    let (mut tensors, mut names) = (Vec::new(), HashSet::new());
    for part in parts {
        let (bytes, length) = header_bytes(part)?;
        let damaged = |error| CheckpointError::Header { path: part.clone(), error };
        for tensor in header::parse(&bytes, length).map_err(damaged)? {
            if !names.insert(tensor.name.clone()) {
                return Err(WriteError::Duplicate { name: tensor.name }.into());
            }
            let (dtype, shape, bytes) = (tensor.dtype, tensor.shape, tensor.bytes);
            tensors.push((tensor.name, Part { file: part, dtype, shape, bytes, trouble: &trouble }));
        }
    }
    let notes = notes.unwrap_or_else(|| BTreeMap::from([("format".to_owned(), "mlx".to_owned())]));
    let notes: HashMap<String, String> = notes.into_iter().collect();
    let written = safetensors::serialize_to_file(tensors, Some(notes), path);
    if let Some((file, source)) = trouble.into_inner() {
        let _ = std::fs::remove_file(path); // holes where the part could not be read
        return Err(JoinError::Changed { path: file, source });
    }
    Ok(written.map_err(|source| WriteError::Write { path: path.into(), source })?)
}

/// A tensor in one of the files.
struct Part<'a> {
    file: &'a Path,
    dtype: TensorDtype,
    shape: Vec<usize>,
    bytes: Range<u64>,
    /// The first file that could not be read.
    trouble: &'a RefCell<Option<(PathBuf, std::io::Error)>>,
}

impl Part<'_> {
    fn read(&self) -> std::io::Result<Vec<u8>> {
        let mut file = File::open(self.file)?;
        file.seek(SeekFrom::Start(self.bytes.start))?;
        let mut bytes = vec![0; self.data_len()];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl View for Part<'_> {
    fn dtype(&self) -> Dtype {
        stored(self.dtype)
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.read() {
            Ok(bytes) => Cow::Owned(bytes),
            Err(error) => {
                self.trouble.borrow_mut().get_or_insert_with(|| (self.file.to_owned(), error));
                Cow::Owned(vec![0; self.data_len()])
            }
        }
    }

    fn data_len(&self) -> usize {
        usize::try_from(self.bytes.end - self.bytes.start).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SafetensorsWriter;

    #[test]
    fn parts_are_the_whole_byte_by_byte_and_none_has_what_another_has() {
        let folder = std::env::temp_dir().join(format!("mlxnode-join-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let notes = BTreeMap::from([("updates".to_owned(), "3".to_owned())]);
        let tensors: [(&str, TensorDtype, Vec<u8>); 5] = [
            ("b.half", TensorDtype::BF16, vec![1, 2, 3, 4]),
            ("a.single", TensorDtype::F32, (0..16).collect()),
            ("z", TensorDtype::F32, (16..24).collect()),
            ("a.half", TensorDtype::F16, vec![9, 8]),
            ("c", TensorDtype::F32, (24..28).collect()),
        ];
        let write = |name: &str, chosen: &[usize]| {
            let mut writer = SafetensorsWriter::with_notes(notes.clone());
            for place in chosen {
                let (name, dtype, bytes) = &tensors[*place];
                writer.add(name, *dtype, &[bytes.len() / dtype.size()], bytes.clone()).unwrap();
            }
            let path = folder.join(name);
            writer.write(&path).unwrap();
            path
        };
        let whole = std::fs::read(write("whole", &[0, 1, 2, 3, 4])).unwrap();
        let joined = folder.join("joined");
        // A part may have nothing.
        let parts = [write("one", &[1, 3]), write("two", &[]), write("three", &[0, 2, 4])];
        join(&parts, Some(notes.clone()), &joined).unwrap();
        assert!(std::fs::read(&joined).unwrap() == whole);
        let twice = join(&[write("again", &[1]), write("one", &[1])], None, &joined).unwrap_err();
        assert!(twice.to_string().contains("a.single"), "{twice}");
        std::fs::write(folder.join("broken"), b"no header").unwrap();
        assert!(matches!(join(&[folder.join("broken")], None, &joined), Err(JoinError::Part(_))));
        let nowhere = join(&parts, None, &folder.join("none").join("joined")).unwrap_err();
        assert!(matches!(nowhere, JoinError::Write(WriteError::Write { .. })), "{nowhere}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
