//! Files that somebody gave a name: their content stays until the name is forgotten. A name is a small file of its own, so that two
//! names of one content do not know of each other.

use super::store::{Store, invalid};
use mlxnode_api::jobs::{NamedFile, check_file_id};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::PathBuf;

/// Most names on a node.
const MAX_NAMES: usize = 2000;
const ENDING: &str = "json";

impl Store {
    fn name(&self, id: &str) -> io::Result<PathBuf> {
        check_file_id(id).map_err(|error| invalid(error.to_string()))?;
        Ok(self.named().join(id).with_extension(ENDING))
    }

    /// Keeps the content of this file, which has to be here.
    pub(super) fn keep(&self, file: &NamedFile) -> io::Result<()> {
        let path = self.name(&file.id)?;
        if self.find(file.hash).is_none() {
            return Err(invalid("a file that is not here cannot be kept".to_owned()));
        }
        fs::create_dir_all(self.named())?;
        if fs::read_dir(self.named())?.count() >= MAX_NAMES {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("this node keeps {MAX_NAMES} files, which is the most; delete some"),
            ));
        }
        let new = path.with_extension("new");
        let mut out = File::create(&new)?;
        out.write_all(&serde_json::to_vec(file)?)?;
        out.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(self.named())?.sync_all()
    }

    /// All that are kept.
    pub(super) fn kept(&self) -> io::Result<Vec<NamedFile>> {
        let entries = match fs::read_dir(self.named()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut kept = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|ending| ending == ENDING) {
                match fs::read(&path) {
                    Ok(bytes) => kept.extend(serde_json::from_slice::<NamedFile>(&bytes).ok()),
                    // Forgotten at this moment.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        kept.retain(|file| self.find(file.hash).is_some());
        Ok(kept)
    }

    /// The content need not be kept for this name; jobs that read it keep it still.
    pub(super) fn forget(&self, id: &str) -> io::Result<()> {
        match fs::remove_file(self.name(id)?) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_api::jobs::ContentHash;
    use std::collections::BTreeMap;
    use std::time::SystemTime;

    #[test]
    fn a_content_stays_as_long_as_it_has_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("jobs"));
        let mut content = store.take_in().unwrap();
        content.write(b"rows").unwrap();
        let (hash, bytes) = content.finish().unwrap();
        let named = |letter: char| NamedFile {
            id: format!("file-{}", letter.to_string().repeat(24)),
            hash,
            bytes,
            name: "rows.jsonl".into(),
            owner: String::new(),
            created_unix: 7,
        };
        store.keep(&named('a')).unwrap();
        store.keep(&named('b')).unwrap();
        for wrong in ["../../x", "file-", "file-../aaaaaaaaaaaaaaaaaaaaaa"] {
            assert!(store.keep(&NamedFile { id: wrong.into(), ..named('a') }).is_err(), "{wrong}");
            assert!(store.forget(wrong).is_err(), "{wrong}");
        }
        assert!(store.keep(&NamedFile { hash: ContentHash::of(b"absent"), ..named('c') }).is_err());
        let path = store.find(hash).unwrap();
        let age = || {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        };
        age();
        store.forget(&named('a').id).unwrap();
        store.tidy(&[], &BTreeMap::new(), false).unwrap();
        assert_eq!(store.kept().unwrap(), [named('b')]);
        store.forget(&named('b').id).unwrap();
        store.forget(&named('b').id).unwrap();
        store.tidy(&[], &BTreeMap::new(), false).unwrap();
        assert_eq!((store.kept().unwrap(), store.find(hash)), (vec![], None));
    }
}
