//! A checkpoint on the disk: a folder of files with a manifest of their hashes, named by the manifest's own hash.
//!
//! ```text
//! jobs/ID/checkpoints/HASH/
//!   manifest.json       {"job", "step", "files": [{"name", "bytes", "hash"}]}, written last
//!   state/…             all that the job goes on from
//!   result/…            what it made so far
//! ```
//! It is written into a folder of another name ([`Draft`]), made durable file by file, and then renamed: under its own name it is whole.

use mlxnode_coordinator::jobs::{Checkpoint, ContentHash};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// The part of a checkpoint that the job goes on from.
pub(super) const STATE: &str = "state";
/// What the job made.
pub(super) const RESULT: &str = "result";
const MANIFEST: &str = "manifest.json";
/// Longest manifest.
pub(super) const MAX_MANIFEST: usize = 1 << 20;
/// Most files of a checkpoint.
const MAX_FILES: usize = 4096;

/// What a checkpoint holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) job: String,
    pub(super) step: u64,
    /// By name.
    pub(super) files: Vec<BundleFile>,
}

/// One file of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BundleFile {
    /// "state/…" or "result/…", one folder deep.
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) hash: ContentHash,
}

impl Manifest {
    /// Reads a manifest that may come from anywhere.
    pub(super) fn parse(bytes: &[u8]) -> io::Result<Self> {
        let wrong = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        if manifest.files.len() > MAX_FILES {
            return Err(wrong(format!("a checkpoint of {} files", manifest.files.len())));
        }
        for file in &manifest.files {
            let is_valid = file.name.split_once('/').is_some_and(|(folder, name)| {
                [STATE, RESULT].contains(&folder)
                    && !name.is_empty()
                    && name.len() <= 255
                    && !name.starts_with('.')
                    && !name.contains(['/', '\\', '\0'])
            });
            if !is_valid {
                return Err(wrong(format!("a checkpoint with a file named {:?}", file.name)));
            }
        }
        Ok(manifest)
    }

    /// Its bytes: the same manifest has the same ones.
    fn bytes(&self) -> io::Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(io::Error::other)
    }

    pub(super) fn total(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }
}

/// Where a job's checkpoints are.
pub(super) fn checkpoints_of(job: &Path) -> PathBuf {
    job.join("checkpoints")
}

/// Where a checkpoint is, or would be.
pub(super) fn folder_of(job: &Path, hash: ContentHash) -> PathBuf {
    checkpoints_of(job).join(hash.to_string())
}

/// Beginning of the names of what is being removed.
pub(super) const GONE: &str = "gone-";

/// Removes a checkpoint. It loses its name first: whoever dies on the way leaves nothing half under it.
pub(super) fn remove(job: &Path, hash: ContentHash) -> io::Result<()> {
    let gone = job.join(format!("{GONE}{hash}"));
    match fs::remove_dir_all(&gone) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::rename(folder_of(job, hash), &gone)?;
    fs::remove_dir_all(gone)
}

/// A folder that somebody works in for a while. It goes when this is dropped, whatever became of the work.
#[derive(Debug)]
pub(super) struct Draft(PathBuf);

impl Draft {
    /// A folder that somebody makes, or has made.
    pub(super) fn of(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// Where it is.
    pub(super) fn folder(&self) -> &Path {
        &self.0
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.0) {
            // It has its name now, or was never made.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(folder = %self.0.display(), %error, "what was begun stays for now"),
            Ok(()) => {}
        }
    }
}

/// What a draft is called: see [`begin`].
pub(super) fn draft_name(name: &str) -> String {
    format!("new-{name}")
}

/// An empty folder to write a checkpoint into; what a broken attempt left there goes.
pub(super) fn begin(job: &Path, name: &str) -> io::Result<Draft> {
    let folder = job.join(draft_name(name));
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    make_folder(job)?;
    let draft = Draft(folder);
    fs::create_dir(draft.folder())?;
    fs::create_dir(draft.folder().join(STATE))?;
    fs::create_dir(draft.folder().join(RESULT))?;
    Ok(draft)
}

/// Makes a folder and those above it that are missing, each so that it is there after a crash too.
pub(super) fn make_folder(folder: &Path) -> io::Result<()> {
    let above = folder.parent().filter(|above| !above.as_os_str().is_empty());
    match (fs::create_dir(folder), above) {
        (Err(error), _) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        (Err(error), Some(above)) if error.kind() == io::ErrorKind::NotFound => {
            make_folder(above)?;
            match fs::create_dir(folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                _ => File::open(above)?.sync_all(), // or somebody else was faster
            }
        }
        (Err(error), _) => Err(error),
        (Ok(()), above) => above.map_or(Ok(()), |above| File::open(above)?.sync_all()),
    }
}

/// Makes the folder that was written a checkpoint: hashes, syncs, names it.
pub(super) fn seal(job_folder: &Path, written: &Path, job: &str, step: u64) -> io::Result<Checkpoint> {
    let mut files = Vec::new();
    for part in [STATE, RESULT] {
        let folder = written.join(part);
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str().ok_or_else(|| io::Error::other("a file with a name that is no text"))?;
            if !entry.file_type()?.is_file() {
                return Err(io::Error::other(format!("{part}/{name} is no file")));
            }
            let (hash, bytes) = hash_file(&entry.path())?;
            File::open(entry.path())?.sync_all()?;
            files.push(BundleFile { name: format!("{part}/{name}"), bytes, hash });
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let manifest = Manifest { job: job.to_owned(), step, files };
    let bytes = manifest.bytes()?;
    Manifest::parse(&bytes)?;
    name(job_folder, written, &bytes)?;
    Ok(Checkpoint { step, hash: ContentHash::of(&bytes), bytes: manifest.total() })
}

/// The last steps, once the files are durable: their folders, manifest, sync, rename, sync.
pub(super) fn name(job_folder: &Path, written: &Path, manifest: &[u8]) -> io::Result<PathBuf> {
    for part in [STATE, RESULT] {
        File::open(written.join(part))?.sync_all()?;
    }
    let mut file = File::create(written.join(MANIFEST))?;
    file.write_all(manifest)?;
    file.sync_all()?;
    File::open(written)?.sync_all()?;
    let all = checkpoints_of(job_folder);
    make_folder(&all)?;
    let target = folder_of(job_folder, ContentHash::of(manifest));
    if target.exists() {
        let named = Manifest::parse(manifest)?;
        if verify(&target, &named.job, ContentHash::of(manifest)).is_ok() {
            // The same content, which somebody may be reading.
            fs::remove_dir_all(written)?;
            return Ok(target);
        }
        fs::remove_dir_all(&target)?;
    }
    fs::rename(written, &target)?;
    File::open(&all)?.sync_all()?;
    Ok(target)
}

/// The manifest of a checkpoint that is here, if its name is true.
pub(super) fn manifest(folder: &Path, hash: ContentHash) -> io::Result<(Manifest, Vec<u8>)> {
    let mut bytes = Vec::new();
    File::open(folder.join(MANIFEST))?.take(MAX_MANIFEST as u64 + 1).read_to_end(&mut bytes)?;
    if ContentHash::of(&bytes) != hash {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its manifest is damaged"));
    }
    Ok((Manifest::parse(&bytes)?, bytes))
}

/// Is a checkpoint here, as far as names and lengths tell? What cannot be read now may be.
pub(super) fn is_there(job: &Path, hash: ContentHash) -> bool {
    let is_passing =
        |error: io::Error| !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData);
    let folder = folder_of(job, hash);
    let has = |file: &BundleFile| {
        fs::metadata(folder.join(&file.name)).map_or_else(is_passing, |it| it.len() == file.bytes)
    };
    manifest(&folder, hash).map_or_else(is_passing, |(manifest, _)| manifest.files.iter().all(has))
}

/// Is all of a checkpoint as it was written?
pub(super) fn verify(folder: &Path, job: &str, hash: ContentHash) -> io::Result<Manifest> {
    let (manifest, _) = manifest(folder, hash)?;
    let wrong = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    if manifest.job != job {
        return Err(wrong(format!("it is of the job {}", manifest.job)));
    }
    for file in &manifest.files {
        let (hash, bytes) = hash_file(&folder.join(&file.name))?;
        if hash != file.hash || bytes != file.bytes {
            return Err(wrong(format!("{} is damaged", file.name)));
        }
    }
    Ok(manifest)
}

/// All checkpoints of a job that are here by their manifests, unverified.
pub(super) fn list(job: &Path) -> Vec<(Manifest, ContentHash)> {
    let Ok(entries) = fs::read_dir(checkpoints_of(job)) else { return Vec::new() };
    let found = entries.flatten().filter_map(|entry| {
        let hash: ContentHash = entry.file_name().to_str()?.parse().ok()?;
        Some((manifest(&entry.path(), hash).ok()?.0, hash))
    });
    found.collect()
}

/// BLAKE3 and length of a file.
pub(super) fn hash_file(path: &Path) -> io::Result<(ContentHash, u64)> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    let mut length = 0;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok((ContentHash::from_bytes(*hasher.finalize().as_bytes()), length));
        }
        length += count as u64;
        hasher.update(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(job: &Path) -> Draft {
        let draft = begin(job, "1").unwrap();
        fs::write(draft.folder().join(STATE).join("moments"), "many numbers").unwrap();
        fs::write(draft.folder().join(RESULT).join("adapter"), "few numbers").unwrap();
        draft
    }

    #[test]
    fn a_checkpoint_is_whole_under_its_name_and_damage_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let job = folder.path();
        let new = written(job);
        let checkpoint = seal(job, new.folder(), "job-1", 7).unwrap();
        assert!(!new.folder().exists());
        let place = folder_of(job, checkpoint.hash);
        let manifest = verify(&place, "job-1", checkpoint.hash).unwrap();
        assert_eq!((manifest.step, manifest.total()), (7, checkpoint.bytes));
        assert_eq!(list(job).len(), 1);
        assert!(verify(&place, "job-2", checkpoint.hash).is_err());
        // The same again is the same, also after it was removed.
        assert_eq!(seal(job, written(job).folder(), "job-1", 7).unwrap(), checkpoint);
        remove(job, checkpoint.hash).unwrap();
        assert!(!place.exists() && list(job).is_empty() && fs::read_dir(job).unwrap().count() == 1);
        assert_eq!(seal(job, written(job).folder(), "job-1", 7).unwrap(), checkpoint);
        let path = place.join(STATE).join("moments");
        fs::write(&path, "many numberz").unwrap();
        let error = verify(&place, "job-1", checkpoint.hash).unwrap_err();
        assert!(error.to_string().contains("state/moments"), "{error}");
        fs::write(&path, "many").unwrap();
        assert!(verify(&place, "job-1", checkpoint.hash).is_err());
        fs::remove_file(&path).unwrap();
        assert!(verify(&place, "job-1", checkpoint.hash).is_err());
        fs::write(place.join(MANIFEST), "{}").unwrap();
        assert!(verify(&place, "job-1", checkpoint.hash).is_err());
        assert!(list(job).is_empty());
        // The same again takes the place of what is damaged.
        assert_eq!(seal(job, written(job).folder(), "job-1", 7).unwrap(), checkpoint);
        assert!(verify(&place, "job-1", checkpoint.hash).is_ok());
    }

    #[test]
    fn a_manifest_names_no_file_elsewhere() {
        for name in ["/etc/passwd", "state/../../x", "state/", "other/x", "state/.x", "x", "state/a/b"] {
            let text = format!(
                r#"{{"job": "a", "step": 1, "files": [{{"name": "{name}", "bytes": 1, "hash": "{}"}}]}}"#,
                ContentHash::of(b"")
            );
            assert!(Manifest::parse(text.as_bytes()).is_err(), "{name}");
        }
    }

    #[test]
    fn what_a_broken_attempt_left_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        std::mem::forget(written(folder.path())); // as a process that dies
        let again = begin(folder.path(), "1").unwrap();
        assert_eq!(fs::read_dir(again.folder().join(STATE)).unwrap().count(), 0);
        assert!(list(folder.path()).is_empty());
        drop(again);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "what was not finished goes");
    }

    #[test]
    fn folders_are_made_with_those_above_them() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("jobs").join("a").join("checkpoints");
        make_folder(&deep).unwrap();
        make_folder(&deep).unwrap();
        assert!(deep.is_dir());
        fs::write(folder.path().join("file"), "").unwrap();
        assert!(make_folder(&folder.path().join("file")).is_err());
        assert!(make_folder(&folder.path().join("file").join("below")).is_err());
    }
}
