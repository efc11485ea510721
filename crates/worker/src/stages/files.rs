//! A file of the state on its way along a lane.

use super::wire::{Item, PIECE_BYTES};
use bytes::Bytes;
use mlxnode_compute::LinkError;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

fn failed(path: &Path, error: &std::io::Error) -> LinkError {
    LinkError::File(format!("{}: {error}", path.display()))
}

/// A file as the items of a lane, in order.
pub(super) struct FileReader {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    left: u64,
    stage: Part,
}

enum Part {
    Head,
    Pieces,
    Over,
}

impl FileReader {
    pub(super) fn open(path: &Path) -> Result<Self, LinkError> {
        let file = File::open(path).map_err(|error| failed(path, &error))?;
        let left = file.metadata().map_err(|error| failed(path, &error))?.len();
        Ok(Self { path: path.to_owned(), file, hasher: blake3::Hasher::new(), left, stage: Part::Head })
    }

    /// `None` at the end. Blocks on the disk.
    pub(super) fn next(&mut self) -> Result<Option<Item>, LinkError> {
        match self.stage {
            Part::Head => {
                self.stage = Part::Pieces;
                let name = self.path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
                let name = name.ok_or_else(|| {
                    LinkError::File(format!("{} has a name that cannot travel", self.path.display()))
                })?;
                Ok(Some(Item::File { bytes: self.left, name }))
            }
            Part::Pieces if self.left > 0 => {
                let mut data = vec![0; PIECE_BYTES.min(usize::try_from(self.left).unwrap_or(PIECE_BYTES))];
                self.file.read_exact(&mut data).map_err(|error| failed(&self.path, &error))?;
                self.hasher.update(&data);
                self.left -= data.len() as u64;
                Ok(Some(Item::Piece(Bytes::from(data))))
            }
            Part::Pieces => {
                self.stage = Part::Over;
                Ok(Some(Item::Hash(*self.hasher.finalize().as_bytes())))
            }
            Part::Over => Ok(None),
        }
    }
}

/// Writes a file as its pieces come.
pub(super) struct FileWriter {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
}

impl FileWriter {
    /// `name` has been checked: it is no path.
    pub(super) fn create(folder: &Path, name: &str) -> Result<Self, LinkError> {
        crate::collective::state_files::fresh(folder).map_err(|error| failed(folder, &error))?;
        let path = folder.join(name);
        let file = File::create_new(&path).map_err(|error| failed(&path, &error))?;
        Ok(Self { path, file, hasher: blake3::Hasher::new() })
    }

    /// Blocks on the disk.
    pub(super) fn write(&mut self, piece: &[u8]) -> Result<(), LinkError> {
        self.hasher.update(piece);
        self.file.write_all(piece).map_err(|error| failed(&self.path, &error))
    }

    /// The file, if it is what was sent.
    pub(super) fn finish(self, hash: [u8; 32]) -> Result<PathBuf, LinkError> {
        match *self.hasher.finalize().as_bytes() == hash {
            true => Ok(self.path),
            false => Err(LinkError::File(format!("{} was damaged on its way", self.path.display()))),
        }
    }
}
