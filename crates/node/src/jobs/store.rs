//! The files of jobs on this node: by what they hold, under a quota.
//!
//! ```text
//! jobs/
//!   files/HASH          a file whose content has this hash
//!   files/HASH.part     one that is not all here yet
//!   files/upload-…      one whose content is not known yet; nothing is left of it when its upload breaks
//!   named/ID.json       a file that somebody gave a name: see `named`
//!   checks/…            what is looked through before a job is submitted
//!   ID/inputs/NAME      what a job reads, by the names it knows
//!   ID/checkpoints/…    see `bundle`
//! ```
//! What stands on the disk from before is believed once its hash was taken, once in a process.
//! Disk work is done where the caller is: call it from a thread that may wait.

use super::bundle;
use super::room::{Promise, Room};
use super::unnamed;
use mlxnode_collective::MemberId;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::jobs::{ContentHash, Wanted};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// A file that no job names stays for so long: its job may be about to be submitted.
const GRACE: Duration = Duration::from_secs(24 * 3600);
/// An upload that nobody writes to is over after so long.
const UPLOAD_GRACE: Duration = Duration::from_secs(60);
/// Folders that are no job's.
const NO_JOBS: [&str; 3] = ["files", "named", "checks"];
/// Most bytes of a node's files of jobs.
const QUOTA: ByteCount = ByteCount(256 << 30);

/// The store of one node. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    root: PathBuf,
    room: Arc<Room>,
    /// Files that are what they are called: they came in, or were read, since this process began.
    proved: Arc<Mutex<BTreeSet<ContentHash>>>,
}

/// A job that this node works at.
#[derive(Clone, Debug)]
pub(super) struct AtWork {
    pub(super) epoch: u64,
    /// Checkpoints newer than the one that the attempt goes on from; none while that is not known.
    pub(super) skipped: Option<Vec<ContentHash>>,
}

/// A file that comes in.
pub(crate) struct Incoming {
    hash: ContentHash,
    bytes: u64,
    received: u64,
    hasher: blake3::Hasher,
    promise: Promise,
    proved: Arc<Mutex<BTreeSet<ContentHash>>>,
    file: File,
    part: PathBuf,
    target: PathBuf,
}

/// Names of folders of states on their way: see [`states_name`].
const STATES: &str = "states-";
/// Names of copies of checkpoints on their way: see [`copy_name`].
const COPY: &str = "copy-";

/// Where, beside a job's checkpoints, one of an attempt's workers has states on their way.
pub(super) fn states_name(epoch: u64, member: MemberId) -> String {
    format!("{STATES}{epoch}-{member}")
}

/// What the draft of a checkpoint that comes from another node is called.
pub(super) fn copy_name(hash: ContentHash) -> String {
    format!("{COPY}{hash}")
}

pub(super) fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn locked(proved: &Mutex<BTreeSet<ContentHash>>) -> MutexGuard<'_, BTreeSet<ContentHash>> {
    proved.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// A store in this folder, which is made when it is needed.
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root, room: Arc::default(), proved: Arc::default() }
    }

    pub(super) fn files(&self) -> PathBuf {
        self.root.join("files")
    }

    pub(super) fn named(&self) -> PathBuf {
        self.root.join("named")
    }

    /// Where a job's own things are. The id was checked by the coordinator and is checked again: it is part of a path.
    pub(super) fn job(&self, id: &str) -> io::Result<PathBuf> {
        mlxnode_coordinator::jobs::check_id(id).map_err(|error| invalid(error.to_string()))?;
        if NO_JOBS.contains(&id) {
            return Err(invalid(format!("a job cannot be called {id:?}")));
        }
        Ok(self.root.join(id))
    }

    /// Where a file is, when all of it is here.
    pub(super) fn find(&self, hash: ContentHash) -> Option<PathBuf> {
        let path = self.files().join(hash.to_string());
        path.is_file().then_some(path)
    }

    /// Where a file is, when all of it is here and is what it is called. One that is not goes: it has to come again.
    pub(super) fn prove(&self, hash: ContentHash) -> io::Result<Option<PathBuf>> {
        let Some(path) = self.find(hash) else { return Ok(None) };
        if locked(&self.proved).contains(&hash) {
            return Ok(Some(path));
        }
        let (found, _) = bundle::hash_file(&path)?;
        if found != hash {
            tracing::warn!(%hash, "a file of jobs is damaged: it has to come again");
            fs::remove_file(&path)?;
            return Ok(None);
        }
        locked(&self.proved).insert(hash);
        Ok(Some(path))
    }

    /// Room for so much of a job's checkpoint that comes.
    pub(super) fn promise(&self, bytes: u64) -> io::Result<Promise> {
        bundle::make_folder(&self.root)?;
        self.room.promise(&self.root, bytes, None)
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
        bundle::make_folder(&self.files())?;
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
        // What is here already counts in the hash.
        let mut hasher = blake3::Hasher::new();
        file.set_len(offset)?;
        let promise = self.promise_file(bytes - offset.min(bytes))?;
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
        let proved = self.proved.clone();
        Ok(Incoming { hash, bytes, received: offset, hasher, promise, proved, file, part, target })
    }

    /// This file is what it is called.
    pub(super) fn is_proved(&self, hash: ContentHash) {
        locked(&self.proved).insert(hash);
    }

    pub(super) fn promise_file(&self, bytes: u64) -> io::Result<Promise> {
        let mut used = 0_u64;
        for entry in fs::read_dir(self.files())? {
            used = used.saturating_add(match entry?.metadata() {
                Ok(it) => it.len(),
                // An upload that has just broken off or got its name.
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                Err(error) => return Err(error),
            });
        }
        self.room.promise(&self.files(), bytes, Some((ByteCount(used), QUOTA)))
    }

    /// Gives a job its files under the names it knows; all have to be here.
    pub(super) fn lay_out(&self, id: &str, inputs: &[(String, ContentHash)]) -> io::Result<PathBuf> {
        let job = self.job(id)?;
        bundle::make_folder(&job)?;
        self.lay_out_in(job.join("inputs"), inputs)
    }

    /// The same to look at, until the folder is dropped.
    pub(super) fn lay_out_to_check(&self, inputs: &[(String, ContentHash)]) -> io::Result<Checked> {
        let folder = Checked(self.root.join("checks").join(format!("{:032x}", rand::random::<u128>())));
        self.lay_out_in(folder.0.clone(), inputs)?;
        Ok(folder)
    }

    fn lay_out_in(&self, folder: PathBuf, inputs: &[(String, ContentHash)]) -> io::Result<PathBuf> {
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(&folder)?;
        for (name, hash) in inputs {
            mlxnode_coordinator::jobs::check_file_name(name).map_err(|error| invalid(error.to_string()))?;
            let file = self.prove(*hash)?.ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotFound, format!("the content of {name} is not on this node"))
            })?;
            // The same bytes under another name; a copy where the file system has no links.
            fs::hard_link(&file, folder.join(name))
                .or_else(|_| fs::copy(&file, folder.join(name)).map(drop))?;
        }
        Ok(folder)
    }

    /// Removes what nobody wants any more, and says which of the wanted checkpoints are here. `at_work`: the jobs that this node works
    /// at. `copies_come`: copies of checkpoints may be on their way.
    pub(super) fn tidy(
        &self,
        wanted: &[Wanted],
        at_work: &BTreeMap<String, AtWork>,
        copies_come: bool,
    ) -> io::Result<BTreeSet<ContentHash>> {
        let mut held = BTreeSet::new();
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(held),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let Some(id) = entry.file_name().to_str().map(str::to_owned) else { continue };
            if NO_JOBS.contains(&id.as_str()) || !entry.file_type()?.is_dir() {
                continue;
            }
            let at_work = at_work.get(&id);
            match wanted.iter().find(|job| job.id == id) {
                Some(job) => {
                    remove_leftovers(&entry.path(), at_work, copies_come)?;
                    remove_checkpoints(&entry.path(), job, at_work)?;
                    let hashes = job.checkpoints.iter().map(|checkpoint| checkpoint.hash);
                    held.extend(hashes.filter(|hash| bundle::is_there(&entry.path(), *hash)));
                }
                None if at_work.is_some() => {}
                None => fs::remove_dir_all(entry.path())?,
            }
        }
        let mut named: BTreeSet<String> =
            wanted.iter().flat_map(|job| &job.inputs).map(ContentHash::to_string).collect();
        named.extend(self.kept()?.iter().map(|file| file.hash.to_string()));
        let entries = match fs::read_dir(self.files()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(held),
            Err(error) => return Err(error),
        };
        let now = SystemTime::now();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            let age = match entry.metadata().and_then(|it| it.modified()) {
                Ok(at) => now.duration_since(at).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let is_over = match name.starts_with(unnamed::BEGIN) {
                true => age > UPLOAD_GRACE && File::open(entry.path())?.try_lock().is_ok(),
                false => age > GRACE && !named.contains(name),
            };
            if is_over {
                fs::remove_file(entry.path())?;
            }
        }
        if let Ok(entries) = fs::read_dir(self.root.join("checks")) {
            for entry in entries {
                let entry = entry?;
                let made = entry.metadata()?.modified()?;
                if now.duration_since(made).is_ok_and(|age| age > GRACE) {
                    fs::remove_dir_all(entry.path())?;
                }
            }
        }
        Ok(held)
    }
}

/// Files by the names that a job would know them by, for as long as this lives.
pub(super) struct Checked(pub(super) PathBuf);

impl Drop for Checked {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What attempts that were killed left: checkpoints and states that were being written.
fn remove_leftovers(folder: &Path, at_work: Option<&AtWork>, copies_come: bool) -> io::Result<()> {
    let own = at_work.map(|work| bundle::draft_name(&work.epoch.to_string()));
    let states = at_work.map(|work| format!("{STATES}{}-", work.epoch));
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let is_left = match name {
            _ if name.starts_with(&bundle::draft_name(COPY)) => !copies_come,
            _ if name.starts_with(&bundle::draft_name("")) => own.as_deref() != Some(name),
            _ if name.starts_with(STATES) => !states.as_ref().is_some_and(|own| name.starts_with(own)),
            _ => name.starts_with(bundle::GONE),
        };
        if is_left {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// The checkpoints that are wanted stay, and those after them: they may have just been made.
fn remove_checkpoints(folder: &Path, job: &Wanted, at_work: Option<&AtWork>) -> io::Result<()> {
    let Some(newest) = job.checkpoints.iter().max_by_key(|checkpoint| checkpoint.step) else { return Ok(()) };
    if let Some(work) = at_work {
        // While the attempt goes on from an older checkpoint than the newest that whoever asks knows, what it makes has fewer steps than
        // that one, and nobody has heard of it.
        let skipped = work.skipped.as_ref();
        if skipped.is_none_or(|skipped| skipped.contains(&newest.hash)) {
            return Ok(());
        }
    }
    let newest = newest.step;
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
        self.promise.came(data.len() as u64)
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
        locked(&self.proved).insert(hash);
        if let Some(folder) = self.target.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok((self.received, true))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use mlxnode_coordinator::jobs::Checkpoint;

    /// An empty one.
    pub(in crate::jobs) fn store() -> (tempfile::TempDir, Store) {
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
                fs::write(new.folder().join(bundle::STATE).join("s"), step.to_string()).unwrap();
                bundle::seal(&job, new.folder(), "a", step).unwrap()
            })
            .collect();
        let nobody = BTreeMap::new();
        let absent = Checkpoint { step: 1, hash: ContentHash::of(b"absent"), bytes: 1 };
        let wanted =
            Wanted { id: "a".into(), checkpoints: vec![absent, checkpoints[1].clone()], inputs: vec![hash] };
        let held = store.tidy(&[wanted], &nobody, false).unwrap();
        assert_eq!(held, BTreeSet::from([checkpoints[1].hash]), "what is wanted and here");
        let mut left: Vec<u64> = bundle::list(&job).into_iter().map(|(manifest, _)| manifest.step).collect();
        left.sort_unstable();
        assert_eq!(left, [2, 3], "the one before is gone, the one after may have just been made");
        let at_work = BTreeMap::from([("a".to_owned(), AtWork { epoch: 1, skipped: None })]);
        store.tidy(&[], &at_work, false).unwrap();
        assert!(job.exists(), "it runs");
        store.tidy(&[], &nobody, false).unwrap();
        assert!(!job.exists());
        assert!(store.find(hash).is_some(), "a file stays for a day");
    }

    fn saved(job: &Path, step: u64, content: &str) -> Checkpoint {
        let new = bundle::begin(job, "1").unwrap();
        fs::write(new.folder().join(bundle::STATE).join("s"), content).unwrap();
        bundle::seal(job, new.folder(), "a", step).unwrap()
    }

    fn steps(job: &Path) -> Vec<u64> {
        let mut steps: Vec<u64> = bundle::list(job).into_iter().map(|(manifest, _)| manifest.step).collect();
        steps.sort_unstable();
        steps
    }

    #[test]
    fn a_job_that_runs_keeps_no_more_checkpoints_than_are_wanted() {
        let (_folder, store) = store();
        let job = store.job("a").unwrap();
        let made: Vec<Checkpoint> = (1..=6).map(|step| saved(&job, step, &step.to_string())).collect();
        let wanted = |checkpoints: &[&Checkpoint]| {
            let checkpoints = checkpoints.iter().map(|it| (*it).clone()).collect();
            [Wanted { id: "a".into(), checkpoints, inputs: vec![] }]
        };
        let at_work = |skipped| BTreeMap::from([("a".to_owned(), AtWork { epoch: 1, skipped })]);
        // What it goes on from is not known yet.
        store.tidy(&wanted(&[&made[3]]), &at_work(None), false).unwrap();
        assert_eq!(steps(&job), [1, 2, 3, 4, 5, 6]);
        store.tidy(&wanted(&[&made[2], &made[3]]), &at_work(Some(vec![])), false).unwrap();
        assert_eq!(steps(&job), [3, 4, 5, 6], "those after may have just been made");
        // It goes on from 3 because nobody has `lost`; 4, 5 and 6 are its own, and nobody has heard of them.
        let lost = Checkpoint { step: 9, hash: ContentHash::of(b"lost"), bytes: 1 };
        let at_work = at_work(Some(vec![lost.hash]));
        store.tidy(&wanted(&[&made[2], &lost]), &at_work, false).unwrap();
        assert_eq!(steps(&job), [3, 4, 5, 6]);
        store.tidy(&wanted(&[&made[2], &made[4]]), &at_work, false).unwrap();
        assert_eq!(steps(&job), [3, 5, 6], "now they have");
    }

    #[test]
    fn what_broken_attempts_and_copies_left_goes() {
        let (_folder, store) = store();
        let job = store.job("a").unwrap();
        let checkpoint = saved(&job, 1, "1");
        let wanted = [Wanted { id: "a".into(), checkpoints: vec![checkpoint.clone()], inputs: vec![] }];
        let copy = bundle::draft_name(&copy_name(checkpoint.hash));
        let make = || {
            for name in ["new-3", "new-4", &copy, &states_name(3, MemberId(1)), &states_name(4, MemberId(2))]
            {
                fs::create_dir_all(job.join(name).join("state")).unwrap();
            }
        };
        let left = || {
            let entries = fs::read_dir(&job).unwrap();
            let names: BTreeSet<String> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names
        };
        make();
        let at_work = BTreeMap::from([("a".to_owned(), AtWork { epoch: 4, skipped: None })]);
        store.tidy(&wanted, &at_work, true).unwrap();
        let own = ["checkpoints".to_owned(), "new-4".to_owned(), copy.clone(), states_name(4, MemberId(2))];
        assert_eq!(left(), BTreeSet::from(own), "of the attempt, and of a copy on its way");
        make();
        store.tidy(&wanted, &BTreeMap::new(), false).unwrap();
        assert_eq!(left(), BTreeSet::from(["checkpoints".to_owned()]));
    }

    #[test]
    fn a_file_that_is_not_what_it_is_called_is_found_before_it_is_used() {
        let (_folder, store) = store();
        let hash = ContentHash::of(b"rows");
        let mut incoming = store.receive(hash, 4, 0).unwrap();
        incoming.write(b"rows").unwrap();
        incoming.finish().unwrap();
        assert!(store.prove(hash).unwrap().is_some());
        // The disk has it wrong after the next start.
        fs::write(store.find(hash).unwrap(), b"rowz").unwrap();
        let again = Store::new(store.root.clone());
        let error = again.lay_out("a", &[("train.jsonl".into(), hash)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(again.received(hash), (0, false), "it has to come again");
    }

    #[test]
    fn files_that_come_at_once_have_room_for_all_of_them_or_are_refused() {
        let (_folder, store) = store();
        bundle::make_folder(&store.files()).unwrap();
        let free = nix::sys::statvfs::statvfs(&store.files()).unwrap();
        let free = free.blocks_available() as u64 * free.fragment_size() as u64;
        // One fits and two do not. Others write on this disk at the same time.
        let part = (free.saturating_sub(2 << 30) / 8 * 5).min(mlxnode_coordinator::jobs::MAX_INPUT_BYTES);
        let fits = store.receive(ContentHash::of(b"0"), part, 0);
        let mut open = vec![fits.unwrap()];
        let refused = (1..64).find_map(|number: u32| {
            match store.receive(ContentHash::of(&number.to_le_bytes()), part, 0) {
                Ok(incoming) => {
                    open.push(incoming);
                    None
                }
                Err(error) => Some(error),
            }
        });
        assert_eq!(refused.unwrap().kind(), io::ErrorKind::StorageFull);
        open.clear();
        assert!(store.receive(ContentHash::of(b"1"), part, 0).is_ok(), "what broke off promises nothing");
    }
}
