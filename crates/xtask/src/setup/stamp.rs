//! What a finished set-up leaves behind to be known by, and the lock that keeps two of them apart.

use super::wheel::{for_this_machine, hex};
use super::{committed_bindings, mlxc, pins, smoke};
use crate::places::Places;
use anyhow::{Context as _, Result};
use ring::digest::{Context as Hash, SHA256};
use serde::{Deserialize, Serialize};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// Counted up when the way mlx-c is compiled changes and nothing else in the fingerprint does.
const RECIPE: &str = "1";

/// How MLX is linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// libmlx from the wheel.
    Wheel,
    /// mlx-sys builds MLX itself, because the wheel failed its smoke test on this Mac.
    OwnBuild,
}

/// Written when everything is in place, removed before anything is changed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// Of the recipe it was made by.
    pub(crate) fingerprint: String,
    pub(crate) outcome: Outcome,
}

impl Stamp {
    /// The stamp, unless set-up never ended or the file is damaged.
    pub(crate) fn read(places: &Places) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path(places)).ok()?).ok()
    }

    pub(crate) fn write(&self, places: &Places) -> Result<()> {
        Ok(std::fs::write(path(places), serde_json::to_vec(self)?)?)
    }

    pub(crate) fn remove(places: &Places) -> Result<()> {
        if path(places).exists() {
            std::fs::remove_file(path(places))?;
        }
        Ok(())
    }
}

fn path(places: &Places) -> PathBuf {
    places.mlx().join("stamp.json")
}

/// Changes with everything that decides what set-up makes: the wheel, mlx-sys, our own recipe, the bindings.
pub(crate) fn fingerprint(places: &Places) -> Result<String> {
    let mut hash = Hash::new(&SHA256);
    let parts =
        [for_this_machine()?.sha256, pins::MLX_SYS_VERSION, RECIPE, mlxc::SHIM, mlxc::CLOCK, smoke::PROGRAM];
    for part in parts {
        hash.update(part.as_bytes());
        hash.update(&[0]);
    }
    let bindings = committed_bindings(places);
    hash.update(&std::fs::read(&bindings).with_context(|| format!("cannot read {}", bindings.display()))?);
    Ok(hex(hash.finish().as_ref()))
}

/// Takes the lock file for as long as the result lives; waits when another process has it, and says so.
pub(crate) fn lock(file: &Path, what: &str) -> Result<File> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let lock = File::options().create(true).write(true).truncate(false).open(file)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("waiting for another {what} on this machine");
            lock.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_written_or_missing_stamps_count_as_none() {
        let cache = std::env::temp_dir().join(format!("xtask-stamp-{}", std::process::id()));
        let places = Places { repository: "/nowhere".into(), cache: cache.clone() };
        assert!(Stamp::read(&places).is_none());
        std::fs::create_dir_all(places.mlx()).unwrap();
        Stamp { fingerprint: "abc".into(), outcome: Outcome::Wheel }.write(&places).unwrap();
        assert_eq!(Stamp::read(&places).unwrap().fingerprint, "abc");
        std::fs::write(path(&places), "{\"fingerprint\":\"ab").unwrap();
        assert!(Stamp::read(&places).is_none());
        Stamp::remove(&places).unwrap();
        std::fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn a_second_holder_waits_for_the_first() {
        let file = std::env::temp_dir().join(format!("xtask-lock-{}", std::process::id()));
        let first = lock(&file, "test").unwrap();
        let second = File::options().write(true).open(&file).unwrap();
        assert!(matches!(second.try_lock(), Err(TryLockError::WouldBlock)));
        drop(first);
        second.try_lock().unwrap();
        std::fs::remove_file(file).unwrap();
    }
}
