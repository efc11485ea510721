//! Files that come in before anybody knows what they are called: their content says it at the end. Nothing is left of one that breaks.

use super::room::Promise;
use super::store::Store;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::jobs::{ContentHash, MAX_INPUT_BYTES};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::PathBuf;

/// How names of such files begin.
pub(super) const BEGIN: &str = "upload-";
/// Room is promised for so many bytes at a time: the length is not known.
const STEP: u64 = 64 << 20;

/// A file that comes in. Dropping it removes it.
pub(crate) struct Unnamed {
    store: Store,
    part: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    received: u64,
    promise: Promise,
    has_room_for: u64,
    is_done: bool,
}

impl Store {
    /// Takes in a file whose content is not known before.
    pub(super) fn take_in(&self) -> io::Result<Unnamed> {
        fs::create_dir_all(self.files())?;
        let promise = self.promise_file(STEP)?;
        let part = self.files().join(format!("{BEGIN}{:032x}", rand::random::<u128>()));
        let file = File::options().create_new(true).write(true).open(&part)?;
        file.lock()?; // who tidies up sees that it is being written
        Ok(Unnamed {
            store: self.clone(),
            part,
            file,
            hasher: blake3::Hasher::new(),
            received: 0,
            promise,
            has_room_for: STEP,
            is_done: false,
        })
    }
}

impl Unnamed {
    /// The next bytes.
    pub(super) fn write(&mut self, data: &[u8]) -> io::Result<()> {
        let received = self.received.saturating_add(data.len() as u64);
        if received > MAX_INPUT_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("a file of a job has at most {}", ByteCount(MAX_INPUT_BYTES)),
            ));
        }
        while received > self.has_room_for {
            self.promise = self.store.promise_file(STEP)?;
            self.has_room_for += STEP;
        }
        self.file.write_all(data)?;
        self.promise.came(data.len() as u64)?;
        self.hasher.update(data);
        self.received = received;
        Ok(())
    }

    /// It is whole: what it is called from now on, and its bytes.
    pub(super) fn finish(mut self) -> io::Result<(ContentHash, u64)> {
        self.file.sync_all()?;
        let hash = ContentHash::from_bytes(*self.hasher.finalize().as_bytes());
        // The same content that was here before is replaced by itself, and is as new as this.
        fs::rename(&self.part, self.store.files().join(hash.to_string()))?;
        self.is_done = true;
        self.store.is_proved(hash);
        File::open(self.store.files())?.sync_all()?;
        Ok((hash, self.received))
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if !self.is_done {
            let _ = fs::remove_file(&self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::store::tests::store;
    use std::collections::BTreeMap;
    use std::time::SystemTime;

    #[test]
    fn a_file_without_a_name_is_whole_or_nothing() {
        let (_folder, store) = store();
        let left = || fs::read_dir(store.files()).unwrap().count();
        let mut broken = store.take_in().unwrap();
        broken.write(b"half").unwrap();
        let part = broken.part.clone();
        File::options().write(true).open(&part).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        store.tidy(&[], &BTreeMap::new(), false).unwrap();
        assert!(part.exists(), "it is still coming");
        drop(broken);
        assert_eq!(left(), 0);
        for _ in 0..2 {
            let mut whole = store.take_in().unwrap();
            whole.write(b"one ").unwrap();
            whole.write(b"row").unwrap();
            assert_eq!(whole.finish().unwrap(), (ContentHash::of(b"one row"), 7));
            assert_eq!((left(), store.received(ContentHash::of(b"one row"))), (1, (7, true)));
        }
        // One whose process died.
        let abandoned = store.files().join("upload-1");
        fs::write(&abandoned, "half").unwrap();
        store.tidy(&[], &BTreeMap::new(), false).unwrap();
        assert!(abandoned.exists(), "it may have just begun");
        File::options().write(true).open(&abandoned).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        store.tidy(&[], &BTreeMap::new(), false).unwrap();
        assert!(!abandoned.exists());
    }
}
