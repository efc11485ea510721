//! The demo model: its files are part of this program and are written out when they are first needed.

use crate::error::{HubError, disk};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Name and content of each file, from demo-model/model (see build.rs).
static FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/demo_files.rs"));

/// The folder of the demo model below `cache`, written or repaired if need be.
pub(crate) fn resolve(cache: &Path) -> Result<PathBuf, HubError> {
    write_files(cache, FILES, hash())
}

/// A hash of all names and contents.
fn hash() -> &'static str {
    static HASH: OnceLock<String> = OnceLock::new();
    HASH.get_or_init(|| hash_of(FILES))
}

fn hash_of(files: &[(&str, &[u8])]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, content) in files {
        for part in [name.as_bytes(), content] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

fn write_files(cache: &Path, files: &[(&str, &[u8])], hash: &str) -> Result<PathBuf, HubError> {
    if files.is_empty() {
        return Err(HubError::NoDemo);
    }
    let parent = cache.join("mlxnode");
    let folder = parent.join(format!("demo-{hash}"));
    if is_intact(&folder, files) {
        return Ok(folder);
    }
    fs::create_dir_all(&parent).map_err(disk(&parent))?;
    // Written beside its place and renamed, so that nobody ever sees a part of it.
    let fresh = tempfile::TempDir::with_prefix_in(".demo-", &parent).map_err(disk(&parent))?;
    let whole = fresh.path().join("whole");
    fs::create_dir(&whole).map_err(disk(&whole))?;
    for (name, content) in files {
        let path = whole.join(name);
        let written = fs::File::create(&path).and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()
        });
        written.map_err(disk(&path))?;
    }
    // A damaged copy goes away with the temporary folder.
    let _ = fs::rename(&folder, fresh.path().join("damaged"));
    match fs::rename(&whole, &folder) {
        Ok(()) => Ok(folder),
        // Another process was faster.
        Err(_) if is_intact(&folder, files) => Ok(folder),
        Err(error) => Err(disk(&folder)(error)),
    }
}

/// Does the folder hold exactly these contents? Compares all bytes, which for a few MB takes about a millisecond.
fn is_intact(folder: &Path, files: &[(&str, &[u8])]) -> bool {
    files.iter().all(|(name, content)| {
        let path = folder.join(name);
        let same_size = path.metadata().is_ok_and(|metadata| metadata.len() == content.len() as u64);
        same_size && fs::read(path).is_ok_and(|bytes| bytes == *content)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: &[(&str, &[u8])] = &[("config.json", b"{}"), ("model.safetensors", b"12345678")];

    #[test]
    fn writes_repairs_and_keeps() {
        let cache = tempfile::tempdir().unwrap();
        let hash = hash_of(SOME);
        let folder = write_files(cache.path(), SOME, &hash).unwrap();
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), b"12345678");
        let written = folder.metadata().unwrap().modified().unwrap();
        assert_eq!(write_files(cache.path(), SOME, &hash).unwrap(), folder);
        assert_eq!(folder.metadata().unwrap().modified().unwrap(), written); // left alone
        fs::write(folder.join("model.safetensors"), b"1234567x").unwrap();
        fs::remove_file(folder.join("config.json")).unwrap();
        assert_eq!(write_files(cache.path(), SOME, &hash).unwrap(), folder);
        assert!(is_intact(&folder, SOME));
        // Nothing is left lying about.
        assert_eq!(fs::read_dir(cache.path().join("mlxnode")).unwrap().count(), 1);
    }

    #[test]
    fn other_files_have_another_folder() {
        assert_ne!(hash_of(SOME), hash_of(&SOME[..1]));
        assert_ne!(hash_of(&[("ab", b"c")]), hash_of(&[("a", b"bc")]));
    }

    #[test]
    fn says_when_there_is_no_demo_or_no_place_for_it() {
        let cache = tempfile::tempdir().unwrap();
        assert!(matches!(write_files(cache.path(), &[], "x"), Err(HubError::NoDemo)));
        let file = cache.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(write_files(&file, SOME, "x"), Err(HubError::Disk { .. })));
    }
}
