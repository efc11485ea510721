//! The hub's cache on disk, in the layout of Python's huggingface_hub, so that both use each other's downloads:
//!
//! ```text
//! models--OWNER--NAME/                       of data sets datasets--OWNER--NAME/
//! models--OWNER--NAME/refs/REVISION          the commit that a branch or tag stood for
//! models--OWNER--NAME/snapshots/COMMIT/FILE  a link to ../../blobs/ETAG
//! models--OWNER--NAME/blobs/ETAG             a file's bytes; ETAG.incomplete while they come
//! models--OWNER--NAME/trees/COMMIT.json      what a commit has (only huggingface_hub 2 writes it)
//! .locks/models--OWNER--NAME/ETAG.lock       held by who downloads a blob
//! ```

use crate::error::{HubError, disk};
use crate::files::{ADAPTER_CONFIG, Wanted, is_adapter, is_data, is_safe_part, is_safe_path, is_weights};
use crate::remote::RemoteFile;
use crate::source::{HubId, ModelSource};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How deep data sets put their files.
const DATA_DEPTH: usize = 6;

/// A model that the cache has all files of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalModel {
    /// What it is called.
    pub source: ModelSource,
    /// Its folder.
    pub folder: PathBuf,
    /// What its files occupy.
    pub bytes: u64,
}

/// One repository's part of the cache.
pub(crate) struct RepoCache {
    /// `models--OWNER--NAME`.
    folder: PathBuf,
    locks: PathBuf,
    layout: CacheRepo,
    revision: String,
}

impl RepoCache {
    pub(crate) fn new(cache: &Path, id: &HubId) -> Self {
        let kind = if id.is_dataset() { RepoType::Dataset } else { RepoType::Model };
        let repo = Repo::with_revision(id.repository(), kind, id.revision().to_owned());
        let name = repo.folder_name();
        Self {
            folder: cache.join(&name),
            locks: cache.join(".locks").join(&name),
            layout: Cache::new(cache.into()).repo(repo),
            revision: id.revision().to_owned(),
        }
    }

    /// The folder of a commit's files.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    /// The bytes of the file with this etag.
    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.layout.blob_path(etag)
    }

    /// Where they are while they come.
    pub(crate) fn incomplete_blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The folder that the revision stood for when it was last downloaded.
    pub(crate) fn known_snapshot(&self) -> Option<PathBuf> {
        let commit = match fs::read_to_string(self.folder.join("refs").join(&self.revision)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => self.revision.clone(), // a commit has no ref of its own
        };
        if !is_safe_part(&commit) {
            return None;
        }
        Some(self.snapshot(&commit)).filter(|snapshot| snapshot.is_dir())
    }

    /// Notes what the revision stands for now. Last of all steps, so that it never points to an incomplete snapshot
    /// while there is a complete one.
    pub(crate) fn set_revision(&self, commit: &str) -> Result<(), HubError> {
        if commit == self.revision {
            return Ok(());
        }
        let path = self.folder.join("refs").join(&self.revision);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(disk(folder))?;
        // Renamed into place, so that no other process reads half of it.
        let temporary = tempfile::TempDir::new_in(&self.folder).map_err(disk(&self.folder))?;
        let fresh = temporary.path().join("ref");
        fs::write(&fresh, commit).map_err(disk(&fresh))?;
        fs::rename(&fresh, &path).map_err(disk(&path))
    }

    /// Makes `file` of the snapshot point to the blob. On a disk without links the blob becomes the file.
    pub(crate) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(file);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(disk(folder))?;
        let up = "../".repeat(2 + file.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{etag}"));
        // A link beside its place, then renamed, replaces one that leads nowhere and races with nobody.
        let temporary = tempfile::TempDir::new_in(folder).map_err(disk(folder))?;
        let link = temporary.path().join("link");
        match std::os::unix::fs::symlink(&target, &link) {
            Ok(()) => fs::rename(&link, &path).map_err(disk(&path)),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) =>
            {
                fs::rename(self.blob(etag), &path).map_err(disk(&path))
            }
            Err(error) => Err(disk(&path)(error)),
        }
    }

    /// Refuses a download of `bytes` for which the disk has no room, before it begins. Bytes of broken-off downloads count as here.
    pub(crate) fn check_space<'a>(
        &self,
        files: impl Iterator<Item = &'a RemoteFile>,
    ) -> Result<(), HubError> {
        let needed = files.fold(0u64, |needed, facts| {
            let present = self.incomplete_blob(&facts.etag).metadata().map_or(0, |metadata| metadata.len());
            let present = if self.blob(&facts.etag).is_file() { facts.size } else { present };
            needed.saturating_add(facts.size.saturating_sub(present))
        });
        // The first folder upwards that is there already says which disk it will be.
        let Some(there) = self.folder.ancestors().find(|folder| folder.is_dir()) else { return Ok(()) };
        let Ok(disk) = nix::sys::statvfs::statvfs(there) else { return Ok(()) };
        // The types of these differ between systems.
        #[allow(clippy::useless_conversion)]
        let free = u64::from(disk.blocks_available()).saturating_mul(u64::from(disk.fragment_size()));
        if needed <= free {
            return Ok(());
        }
        Err(HubError::NoSpace { folder: there.into(), needed, free })
    }

    /// Waits until no other process downloads this blob, then keeps others waiting until the file is dropped. A process that
    /// dies lets go. `waiting` is called now and then.
    pub(crate) fn lock(&self, etag: &str, mut waiting: impl FnMut()) -> Result<File, HubError> {
        const PAUSE: Duration = Duration::from_millis(200);
        fs::create_dir_all(&self.locks).map_err(disk(&self.locks))?;
        let path = self.locks.join(format!("{etag}.lock"));
        let file =
            File::options().write(true).create(true).truncate(false).open(&path).map_err(disk(&path))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => waiting(),
                Err(TryLockError::Error(error)) => return Err(disk(&path)(error)),
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// The files that a snapshot lacks, judged without the hub: by the list of the commit's files when huggingface_hub left one,
/// else config, tokenizer, and the weights that the index lists.
pub(crate) fn missing_files(snapshot: &Path, wanted: Wanted) -> Vec<String> {
    let has = |file: &str| snapshot.join(file).is_file();
    let mut missing = BTreeSet::new();
    let mut expect = |file: &str, present: bool| {
        if !present {
            missing.insert(file.to_owned());
        }
    };
    for file in files_of_commit(snapshot).unwrap_or_default() {
        if wanted.takes(&file) {
            expect(&file, has(&file));
        }
    }
    if wanted == Wanted::Adapter {
        expect(ADAPTER_CONFIG, has(ADAPTER_CONFIG));
        let is_there = files_of(snapshot).iter().any(|(name, _)| is_adapter(name));
        expect("adapters.safetensors", is_there);
        return missing.into_iter().collect();
    }
    if wanted == Wanted::Data {
        // Which files a data set has, only the hub knows; our own downloads note the revision when all have come.
        expect("data", has_data(snapshot, DATA_DEPTH));
        return missing.into_iter().collect();
    }
    expect("config.json", has("config.json"));
    let tokenizers =
        ["tokenizer.json", "tekken.json", "tokenizer.model", "vocab.json", "tiktoken.model", "qwen.tiktoken"];
    expect("tokenizer.json", tokenizers.iter().any(|file| has(file)));
    if wanted == Wanted::All {
        match fs::read(snapshot.join("model.safetensors.index.json")).ok().and_then(|text| shards(&text)) {
            Some(shards) => shards.iter().for_each(|shard| expect(shard, has(shard))),
            None => {
                expect("model.safetensors", files_of(snapshot).iter().any(|(name, _)| is_weights(name)));
            }
        }
    }
    missing.into_iter().collect()
}

/// Does the folder hold a file of data, at most so many folders down?
fn has_data(folder: &Path, depth: usize) -> bool {
    let Ok(entries) = fs::read_dir(folder) else { return false };
    entries.flatten().any(|entry| {
        let path = entry.path();
        match path.is_dir() {
            true => depth > 0 && has_data(&path, depth - 1),
            false => path.is_file() && entry.file_name().to_str().is_some_and(is_data),
        }
    })
}

/// All files of the commit that this is the snapshot of, if huggingface_hub noted them.
fn files_of_commit(snapshot: &Path) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Tree {
        files: BTreeMap<String, serde::de::IgnoredAny>,
    }
    let commit = snapshot.file_name()?.to_str()?;
    let trees = snapshot.parent()?.parent()?.join("trees");
    let text = fs::read(trees.join(format!("{commit}.json"))).ok()?;
    let tree: Tree = serde_json::from_slice(&text).ok()?;
    Some(tree.files.into_keys().filter(|file| is_safe_path(file)).collect())
}

/// The files that an index lists.
fn shards(index: &[u8]) -> Option<BTreeSet<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).ok()?;
    Some(index.weight_map.into_values().filter(|file| is_weights(file)).collect())
}

/// The files at the top of a folder that lead somewhere, with their sizes.
fn files_of(folder: &Path) -> Vec<(String, u64)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let metadata = entry.path().metadata().ok().filter(|metadata| metadata.is_file())?;
            Some((entry.file_name().into_string().ok()?, metadata.len()))
        })
        .collect()
}

/// All complete models of a cache, by name. What cannot be read is left out.
pub(crate) fn local_models(cache: &Path) -> Vec<LocalModel> {
    let Ok(entries) = fs::read_dir(cache) else { return Vec::new() };
    let mut models: Vec<LocalModel> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let (owner, name) = name.strip_prefix("models--")?.split_once("--")?;
            Some(models_of(&entry.path(), owner, name))
        })
        .flatten()
        .collect();
    models.sort_by(|left, right| left.source.cmp(&right.source));
    models
}

/// The complete snapshots of one repository: by branch or tag, else by commit.
fn models_of(folder: &Path, owner: &str, name: &str) -> Vec<LocalModel> {
    let refs = refs_of(&folder.join("refs"), "");
    let Ok(snapshots) = fs::read_dir(folder.join("snapshots")) else { return Vec::new() };
    let mut models = Vec::new();
    for snapshot in snapshots.flatten() {
        let Ok(commit) = snapshot.file_name().into_string() else { continue };
        let folder = snapshot.path();
        if !missing_files(&folder, Wanted::All).is_empty() {
            continue;
        }
        let bytes = files_of(&folder).iter().map(|(_, bytes)| bytes).sum();
        let revisions: Vec<_> =
            refs.iter().filter(|(_, to)| *to == commit).map(|(from, _)| from.as_str()).collect();
        let revisions = if revisions.is_empty() { vec![commit.as_str()] } else { revisions };
        for revision in revisions {
            let Some(id) = HubId::new(owner, name, Some(revision)) else { continue };
            models.push(LocalModel { source: ModelSource::Hub(id), folder: folder.clone(), bytes });
        }
    }
    models
}

/// Branches and tags with their commits; names may have slashes, hence folders.
fn refs_of(folder: &Path, prefix: &str) -> Vec<(String, String)> {
    const MAX_SLASHES: usize = 4;
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut refs = Vec::new();
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let name = format!("{prefix}{name}");
        if entry.path().is_dir() {
            if name.matches('/').count() < MAX_SLASHES {
                refs.extend(refs_of(&entry.path(), &format!("{name}/")));
            }
        } else if let Ok(commit) = fs::read_to_string(entry.path()) {
            refs.push((name, commit.trim().to_owned()));
        }
    }
    refs
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a failing test is supposed to stop
mod tests {
    use super::*;

    #[test]
    fn any_vocabulary_is_a_tokenizer() {
        for name in [
            "tokenizer.json",
            "tekken.json",
            "tokenizer.model",
            "vocab.json",
            "tiktoken.model",
            "qwen.tiktoken",
        ] {
            let folder = tempfile::tempdir().unwrap();
            for file in ["config.json", "model.safetensors", name] {
                fs::write(folder.path().join(file), "x").unwrap();
            }
            assert!(missing_files(folder.path(), Wanted::All).is_empty(), "{name}");
            fs::remove_file(folder.path().join(name)).unwrap();
            assert_eq!(missing_files(folder.path(), Wanted::All), ["tokenizer.json"], "{name}");
        }
    }
}
