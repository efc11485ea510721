//! The state of a training, which travels as the files that the trainer writes.

use bytes::Bytes;
use mlxnode_proto::internal::v1::StatePiece;
use mlxnode_proto::internal::v1::state_piece::Piece;
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};

/// Bytes of one message.
const PIECE_BYTES: usize = 1 << 20;
/// Files of one state.
const MOST_FILES: usize = 256;
/// Longest name of a file.
const LONGEST_NAME: usize = 255;

/// Makes the folder, empty.
pub(crate) fn fresh(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::create_dir_all(folder)
}

/// Is this the name of a file, and not a path?
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= LONGEST_NAME
        && !name.starts_with('.')
        && !name.contains(['/', '\\', '\0', ':'])
}

/// Reads the files of a folder, piece by piece, in the order of their names.
pub(super) struct StateReader {
    files: Vec<PathBuf>,
    open: Option<(File, blake3::Hasher)>,
}

impl StateReader {
    pub(super) fn new(folder: &Path) -> io::Result<Self> {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                files.push(entry.path());
            }
        }
        files.sort_by(|left, right| right.cmp(left)); // the first is at the end
        Ok(Self { files, open: None })
    }

    /// `None` at the end. Blocks on the disk.
    pub(super) fn next(&mut self) -> io::Result<Option<StatePiece>> {
        let piece = match &mut self.open {
            None => {
                let Some(path) = self.files.pop() else { return Ok(None) };
                let name = path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
                let name =
                    name.ok_or_else(|| io::Error::other(format!("{} has a strange name", path.display())))?;
                self.open = Some((File::open(&path)?, blake3::Hasher::new()));
                Piece::File(name)
            }
            Some((file, hasher)) => {
                let mut data = Vec::with_capacity(PIECE_BYTES);
                Read::by_ref(file).take(PIECE_BYTES as u64).read_to_end(&mut data)?;
                if data.is_empty() {
                    let hash = hasher.finalize().as_bytes().to_vec();
                    self.open = None;
                    Piece::Hash(hash.into())
                } else {
                    hasher.update(&data);
                    Piece::Data(Bytes::from(data))
                }
            }
        };
        Ok(Some(StatePiece { piece: Some(piece) }))
    }
}

/// Why a state cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub(super) enum StateError {
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{0:?} is no name of a file")]
    Name(String),
    #[error("it has more than {MOST_FILES} files")]
    TooMany,
    #[error("the file {0} comes twice")]
    Twice(String),
    #[error("a piece comes where none can be")]
    Order,
    #[error("the file {0} was damaged on its way")]
    Damaged(String),
    #[error("it ends within the file {0}")]
    CutOff(String),
    #[error("it has no file")]
    Empty,
}

/// Writes files as their pieces come.
pub(super) struct StateWriter {
    folder: PathBuf,
    files: usize,
    open: Option<(String, File, blake3::Hasher)>,
}

impl StateWriter {
    /// Into this folder, which is made anew.
    pub(super) fn new(folder: PathBuf) -> Result<Self, StateError> {
        fresh(&folder).map_err(|source| StateError::Write { path: folder.clone(), source })?;
        Ok(Self { folder, files: 0, open: None })
    }

    /// Blocks on the disk.
    pub(super) fn accept(&mut self, piece: StatePiece) -> Result<(), StateError> {
        match (piece.piece.ok_or(StateError::Order)?, &mut self.open) {
            (Piece::File(name), None) => {
                if !is_plain(&name) {
                    return Err(StateError::Name(name.chars().take(LONGEST_NAME).collect()));
                }
                if self.files >= MOST_FILES {
                    return Err(StateError::TooMany);
                }
                let path = self.folder.join(&name);
                let file = File::create_new(&path).map_err(|source| match source.kind() {
                    io::ErrorKind::AlreadyExists => StateError::Twice(name.clone()),
                    _ => StateError::Write { path, source },
                })?;
                self.files += 1;
                self.open = Some((name, file, blake3::Hasher::new()));
                Ok(())
            }
            (Piece::Data(data), Some((name, file, hasher))) => {
                hasher.update(&data);
                let path = || self.folder.join(name);
                file.write_all(&data).map_err(|source| StateError::Write { path: path(), source })
            }
            (Piece::Hash(hash), Some((name, _, hasher))) => {
                let is_whole = hasher.finalize().as_bytes()[..] == hash[..];
                let name = std::mem::take(name);
                self.open = None;
                if is_whole { Ok(()) } else { Err(StateError::Damaged(name)) }
            }
            _ => Err(StateError::Order),
        }
    }

    /// The folder, once everything is there.
    pub(super) fn finish(self) -> Result<PathBuf, StateError> {
        match self.open {
            Some((name, ..)) => Err(StateError::CutOff(name)),
            None if self.files == 0 => Err(StateError::Empty),
            None => Ok(self.folder),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces_of(folder: &Path) -> Vec<StatePiece> {
        let mut reader = StateReader::new(folder).unwrap();
        std::iter::from_fn(|| reader.next().unwrap()).collect()
    }

    fn write(folder: &Path, pieces: impl IntoIterator<Item = StatePiece>) -> Result<PathBuf, StateError> {
        let mut writer = StateWriter::new(folder.to_owned())?;
        pieces.into_iter().try_for_each(|piece| writer.accept(piece))?;
        writer.finish()
    }

    fn piece(piece: Piece) -> StatePiece {
        StatePiece { piece: Some(piece) }
    }

    #[test]
    fn files_arrive_as_they_were_or_not_at_all() {
        let scratch = std::env::temp_dir().join(format!("mlxnode-state-{}", std::process::id()));
        let (from, to) = (scratch.join("from"), scratch.join("to"));
        fresh(&from).unwrap();
        let large: Vec<u8> = (0..PIECE_BYTES + 5).map(|at| at as u8).collect();
        for (name, bytes) in [("a.safetensors", &large[..]), ("b.json", b"{}"), ("empty", b"")] {
            fs::write(from.join(name), bytes).unwrap();
        }
        let pieces = pieces_of(&from);
        write(&to, pieces.clone()).unwrap();
        for name in ["a.safetensors", "b.json", "empty"] {
            assert_eq!(fs::read(from.join(name)).unwrap(), fs::read(to.join(name)).unwrap());
        }

        let mut damaged = pieces.clone();
        damaged[1] = piece(Piece::Data(Bytes::from_static(b"other")));
        assert!(matches!(write(&to, damaged), Err(StateError::Damaged(_))));
        assert!(matches!(write(&to, pieces[..2].to_vec()), Err(StateError::CutOff(_))));
        assert!(matches!(write(&to, pieces[1..].to_vec()), Err(StateError::Order)));
        assert!(matches!(write(&to, [pieces.clone(), pieces].concat()), Err(StateError::Twice(_))));
        assert!(matches!(write(&to, []), Err(StateError::Empty)));
        assert!(matches!(write(&to, [StatePiece { piece: None }]), Err(StateError::Order)));
        for name in ["", "..", ".hidden", "a/b", "/etc/passwd", "a\\b", "a\0b", "c:d", &"x".repeat(300)] {
            let begun = write(&to, [piece(Piece::File(name.to_owned()))]);
            assert!(matches!(begun, Err(StateError::Name(_))), "{name:?}");
        }
        let many = (0..=MOST_FILES).flat_map(|number| {
            let hash = blake3::hash(b"").as_bytes().to_vec();
            [piece(Piece::File(number.to_string())), piece(Piece::Hash(hash.into()))]
        });
        assert!(matches!(write(&to, many), Err(StateError::TooMany)));
        fs::remove_dir_all(scratch).unwrap();
    }
}
