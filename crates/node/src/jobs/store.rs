//! The files of jobs on this node: by what they hold, under a quota.
//!
//! ```text
//! jobs/
//!   files/HASH          a file whose content has this hash
//!   files/HASH.part     one that is not all here yet
//!   ID/inputs/NAME      what a job reads, by the names it knows
//!   ID/checkpoints/…    see `bundle`
//! ```
//! Disk work is done where the caller is: call it from a thread that may wait.

use super::bundle;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::jobs::{ContentHash, Wanted};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A file that no job names stays for so long: its job may be about to be submitted.
const GRACE: Duration = Duration::from_secs(24 * 3600);
/// Room on the disk that files of jobs leave free.
const RESERVE: ByteCount = ByteCount(1 << 30);
/// Most bytes of a node's files of jobs.
const QUOTA: ByteCount = ByteCount(256 << 30);

/// The store of one node. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    root: PathBuf,
}

/// A file that comes in.
pub(crate) struct Incoming {
    hash: ContentHash,
    bytes: u64,
    received: u64,
    hasher: blake3::Hasher,
    file: File,
    part: PathBuf,
    target: PathBuf,
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl Store {
    /// A store in this folder, which is made when it is needed.
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    fn files(&self) -> PathBuf {
        self.root.join("files")
    }

    /// Where a job's own things are. The id was checked by the coordinator and is checked again: it is part of a path.
    pub(super) fn job(&self, id: &str) -> io::Result<PathBuf> {
        mlxnode_coordinator::jobs::check_id(id).map_err(|error| invalid(error.to_string()))?;
        if id == "files" {
            return Err(invalid("a job cannot be called \"files\"".to_owned()));
        }
        Ok(self.root.join(id))
    }

    /// Where a file is, when all of it is here.
    pub(super) fn find(&self, hash: ContentHash) -> Option<PathBuf> {
        let path = self.files().join(hash.to_string());
        path.is_file().then_some(path)
    }

    /// Bytes of a file that are here, and whether that is all.
    pub(super) fn received(&self, hash: ContentHash) -> (u64, bool) {
        let length = |path: &Path| fs::metadata(path).map(|it| it.len()).ok();
        match self.find(hash).as_deref().and_then(length) {
            Some(bytes) => (bytes, true),
            None => (length(&self.part(hash)).unwrap_or(0), false),
        }
    }

    fn part(&self, hash: ContentHash) -> PathBuf {
        self.files().join(format!("{hash}.part"))
    }

    /// Takes a file of `bytes` bytes in, from `offset` on.
    pub(super) fn receive(&self, hash: ContentHash, bytes: u64, offset: u64) -> io::Result<Incoming> {
        if bytes > mlxnode_coordinator::jobs::MAX_INPUT_BYTES {
            let most = ByteCount(mlxnode_coordinator::jobs::MAX_INPUT_BYTES);
            return Err(invalid(format!("a file of a job has at most {most}")));
        }
        fs::create_dir_all(self.files())?;
        let part = self.part(hash);
        let mut file = File::options().create(true).truncate(false).read(true).write(true).open(&part)?;
        if file.try_lock().is_err() {
            return Err(invalid(
                "this file is being uploaded by somebody else now; wait for that".to_owned(),
            ));
        }
        let here = file.metadata()?.len();
        if offset > here {
            return Err(invalid(format!(
                "{here} bytes of the file are here: go on from there, not from {offset}"
            )));
        }
        self.check_room(bytes - offset.min(bytes))?;
        // What is here already counts in the hash.
        let mut hasher = blake3::Hasher::new();
        file.set_len(offset)?;
        file.seek(SeekFrom::Start(0))?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
        }
        let target = self.files().join(hash.to_string());
        Ok(Incoming { hash, bytes, received: offset, hasher, file, part, target })
    }

    fn check_room(&self, bytes: u64) -> io::Result<()> {
        let full = |text: String| io::Error::new(io::ErrorKind::StorageFull, text);
        let free = nix::sys::statvfs::statvfs(&self.files()).map_err(io::Error::from)?;
        let free = ByteCount((free.blocks_available() as u64).saturating_mul(free.fragment_size() as u64));
        if free < ByteCount(bytes) + RESERVE {
            return Err(full(format!(
                "the disk has {free} free, of which {RESERVE} stay free: {} more do not fit",
                ByteCount(bytes)
            )));
        }
        let mut used = 0_u64;
        for entry in fs::read_dir(self.files())? {
            used = used.saturating_add(entry?.metadata()?.len());
        }
        if ByteCount(used.saturating_add(bytes)) > QUOTA {
            return Err(full(format!("the files of jobs take {} of {QUOTA} on this node", ByteCount(used))));
        }
        Ok(())
    }

    /// Gives a job its files under the names it knows; all have to be here.
    pub(super) fn lay_out(&self, id: &str, inputs: &[(String, ContentHash)]) -> io::Result<PathBuf> {
        let folder = self.job(id)?.join("inputs");
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(&folder)?;
        for (name, hash) in inputs {
            mlxnode_coordinator::jobs::check_file_name(name).map_err(|error| invalid(error.to_string()))?;
            let file = self.find(*hash).ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotFound, format!("the content of {name} is not on this node"))
            })?;
            // The same bytes under another name; a copy where the file system has no links.
            fs::hard_link(&file, folder.join(name))
                .or_else(|_| fs::copy(&file, folder.join(name)).map(drop))?;
        }
        Ok(folder)
    }

    /// Removes what nobody wants any more. `running`: jobs that run here now, of which everything stays.
    pub(super) fn tidy(&self, wanted: &[Wanted], running: &BTreeSet<String>) -> io::Result<()> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let Some(id) = entry.file_name().to_str().map(str::to_owned) else { continue };
            if id == "files" || !entry.file_type()?.is_dir() {
                continue;
            }
            match wanted.iter().find(|job| job.id == id) {
                _ if running.contains(&id) => {}
                Some(job) => tidy_job(&entry.path(), job)?,
                None => fs::remove_dir_all(entry.path())?,
            }
        }
        let named: BTreeSet<String> =
            wanted.iter().flat_map(|job| &job.inputs).map(ContentHash::to_string).collect();
        let entries = match fs::read_dir(self.files()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let now = SystemTime::now();
        for entry in entries {
            let entry = entry?;
            let is_named = entry.file_name().to_str().is_some_and(|name| named.contains(name));
            let age = entry.metadata()?.modified().ok().and_then(|at| now.duration_since(at).ok());
            if !is_named && age.is_some_and(|age| age > GRACE) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// The checkpoints that are wanted stay, and those after them: they may have just been made.
fn tidy_job(folder: &Path, job: &Wanted) -> io::Result<()> {
    let newest = job.checkpoints.iter().map(|checkpoint| checkpoint.step).max().unwrap_or(0);
    // What broken attempts left; a copy may be on its way.
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        if (name.starts_with("new-") && !name.starts_with("new-copy-")) || name.starts_with(bundle::GONE) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    for (manifest, hash) in bundle::list(folder) {
        let is_wanted = job.checkpoints.iter().any(|checkpoint| checkpoint.hash == hash);
        if !is_wanted && manifest.step <= newest {
            bundle::remove(folder, hash)?;
        }
    }
    Ok(())
}

impl Incoming {
    /// The next bytes.
    pub(super) fn write(&mut self, data: &[u8]) -> io::Result<()> {
        if self.received.saturating_add(data.len() as u64) > self.bytes {
            return Err(invalid(format!("more bytes come than the {} that were announced", self.bytes)));
        }
        self.file.write_all(data)?;
        self.hasher.update(data);
        self.received += data.len() as u64;
        Ok(())
    }

    /// No more come for now: (bytes here, is that all).
    pub(super) fn finish(self) -> io::Result<(u64, bool)> {
        self.file.sync_all()?;
        if self.received < self.bytes {
            return Ok((self.received, false));
        }
        let hash = ContentHash::from_bytes(*self.hasher.finalize().as_bytes());
        if hash != self.hash {
            fs::remove_file(&self.part)?;
            return Err(invalid(format!(
                "the content has the hash {hash}, not {}; upload it again",
                self.hash
            )));
        }
        fs::rename(&self.part, &self.target)?;
        if let Some(folder) = self.target.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok((self.received, true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_coordinator::jobs::Checkpoint;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("jobs"));
        (folder, store)
    }

    #[test]
    fn a_file_comes_in_pieces_and_goes_on_where_it_broke() {
        let (_folder, store) = store();
        let content = b"row one\nrow two\n";
        let hash = ContentHash::of(content);
        let bytes = content.len() as u64;
        let mut incoming = store.receive(hash, bytes, 0).unwrap();
        incoming.write(&content[..5]).unwrap();
        assert!(store.receive(hash, bytes, 0).is_err(), "one at a time");
        drop(incoming); // the connection broke
        assert_eq!(store.received(hash), (5, false));
        assert!(store.receive(hash, bytes, 6).is_err(), "a gap");
        let mut incoming = store.receive(hash, bytes, 5).unwrap();
        incoming.write(&content[5..]).unwrap();
        assert!(incoming.write(b"x").is_err());
        assert_eq!(incoming.finish().unwrap(), (bytes, true));
        assert_eq!(store.received(hash), (bytes, true));
        assert_eq!(fs::read(store.find(hash).unwrap()).unwrap(), content);
    }

    #[test]
    fn content_that_is_not_what_it_was_called_is_refused_and_not_kept() {
        let (_folder, store) = store();
        let hash = ContentHash::of(b"promised");
        let mut incoming = store.receive(hash, 5, 0).unwrap();
        incoming.write(b"other").unwrap();
        assert!(incoming.finish().unwrap_err().to_string().contains("hash"));
        assert_eq!(store.received(hash), (0, false));
        assert!(store.receive(hash, u64::MAX, 0).is_err());
    }

    #[test]
    fn a_job_finds_its_files_by_name_and_only_what_is_wanted_stays() {
        let (_folder, store) = store();
        let hash = ContentHash::of(b"rows");
        let mut incoming = store.receive(hash, 4, 0).unwrap();
        incoming.write(b"rows").unwrap();
        incoming.finish().unwrap();
        let folder = store.lay_out("a", &[("train.jsonl".into(), hash)]).unwrap();
        assert_eq!(fs::read(folder.join("train.jsonl")).unwrap(), b"rows");
        assert!(store.lay_out("a", &[("../x".into(), hash)]).is_err());
        assert!(store.lay_out("../a", &[]).is_err() && store.lay_out("files", &[]).is_err());
        assert!(store.lay_out("a", &[("x".into(), ContentHash::of(b"absent"))]).is_err());

        let job = store.job("a").unwrap();
        let checkpoints: Vec<Checkpoint> = (1..=3)
            .map(|step| {
                let new = bundle::begin(&job, "1").unwrap();
                fs::write(new.join(bundle::STATE).join("s"), step.to_string()).unwrap();
                bundle::seal(&job, &new, "a", step).unwrap()
            })
            .collect();
        let wanted = Wanted { id: "a".into(), checkpoints: vec![checkpoints[1].clone()], inputs: vec![hash] };
        store.tidy(&[wanted], &BTreeSet::new()).unwrap();
        let mut left: Vec<u64> = bundle::list(&job).into_iter().map(|(manifest, _)| manifest.step).collect();
        left.sort_unstable();
        assert_eq!(left, [2, 3], "the one before is gone, the one after may have just been made");
        store.tidy(&[], &BTreeSet::from(["a".to_owned()])).unwrap();
        assert!(job.exists(), "it runs");
        store.tidy(&[], &BTreeSet::new()).unwrap();
        assert!(!job.exists());
        assert!(store.find(hash).is_some(), "a file stays for a day");
    }
}
