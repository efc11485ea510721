//! From what a person calls a model to a folder with its files.

use crate::cache::{self, LocalModel, RepoCache};
use crate::demo;
use crate::download::Download;
use crate::error::HubError;
use crate::files::{Wanted, is_adapter, is_data, is_weights};
use crate::options::Options;
use crate::remote::Remote;
use crate::source::{HubId, ModelSource};
use std::path::PathBuf;

/// Gets models. All calls block; make one per process and share it.
pub struct Hub {
    options: Options,
    remote: Remote,
}

/// How far a download is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The file that comes now.
    pub file: &'a str,
    /// Bytes here, of all files that this download needs.
    pub done_bytes: u64,
    /// Bytes of all those files.
    pub total_bytes: u64,
}

impl Hub {
    /// A hub with these settings. Touches neither disk nor network.
    pub fn new(options: Options) -> Self {
        let remote = Remote::new(&options);
        Self { options, remote }
    }

    /// The settings.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The folder of a model, downloaded or written out if need be. Downloads go on where an earlier one broke off.
    ///
    /// When the hub is out of reach, a complete copy from an earlier download is used, with a warning in the log.
    pub fn resolve(
        &self,
        source: &ModelSource,
        progress: &dyn Fn(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        self.resolve_files(source, Wanted::All, progress)
    }

    /// Like [`Hub::resolve`], but without weights: config, tokenizer and templates only.
    pub fn resolve_text_files(
        &self,
        source: &ModelSource,
        progress: &dyn Fn(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        self.resolve_files(source, Wanted::Text, progress)
    }

    /// The folder of an adapter, downloaded if need be, as [`Hub::resolve`] does it for models.
    ///
    /// # Errors
    /// [`HubError`]; the demo model is no adapter.
    pub fn resolve_adapter(
        &self,
        source: &ModelSource,
        progress: &dyn Fn(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        self.resolve_files(source, Wanted::Adapter, progress)
    }

    /// The folder of a data set's rows ([`HubId::dataset`]), downloaded if need be: its JSON lines and Parquet files, and its description.
    ///
    /// # Errors
    /// [`HubError`]
    pub fn resolve_dataset(&self, id: &HubId, progress: &dyn Fn(Progress<'_>)) -> Result<PathBuf, HubError> {
        self.resolve_id(id, Wanted::Data, progress)
    }

    /// Has this machine all files of the model already, without asking the network?
    pub fn is_here(&self, source: &ModelSource) -> bool {
        match source {
            ModelSource::Demo => true,
            ModelSource::Folder(folder) => folder.is_dir(),
            ModelSource::Hub(id) => RepoCache::new(&self.options.cache, id)
                .known_snapshot()
                .is_some_and(|snapshot| cache::missing_files(&snapshot, Wanted::All).is_empty()),
        }
    }

    /// The models that the cache has all files of, by name. Whether their files are sound shows when they are opened.
    pub fn local_models(&self) -> Vec<LocalModel> {
        cache::local_models(&self.options.cache)
    }

    fn resolve_files(
        &self,
        source: &ModelSource,
        wanted: Wanted,
        progress: &dyn Fn(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        match source {
            ModelSource::Demo if wanted == Wanted::Adapter => {
                Err(HubError::NotAnAdapter { id: "demo".into() })
            }
            ModelSource::Demo => demo::resolve(&self.options.cache),
            ModelSource::Folder(folder) if folder.is_dir() => Ok(folder.clone()),
            ModelSource::Folder(folder) => Err(HubError::NoFolder(folder.clone())),
            ModelSource::Hub(id) => self.resolve_id(id, wanted, progress),
        }
    }

    fn resolve_id(
        &self,
        id: &HubId,
        wanted: Wanted,
        progress: &dyn Fn(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        let cache = RepoCache::new(&self.options.cache, id);
        let known = cache.known_snapshot();
        let missing = known.as_deref().map(|snapshot| cache::missing_files(snapshot, wanted));
        let complete = known.filter(|_| missing.as_ref().is_some_and(Vec::is_empty));
        if self.options.offline {
            return complete.ok_or_else(|| HubError::Offline {
                id: id.to_string(),
                cache: self.options.cache.clone(),
                missing: missing.unwrap_or_else(|| vec!["everything".into()]),
            });
        }
        match (self.download(id, &cache, wanted, progress), complete) {
            (Err(error), Some(snapshot)) if error.is_out_of_reach() => {
                tracing::warn!(model = %id, %error, "using the copy in the cache");
                Ok(snapshot)
            }
            (result, _) => result,
        }
    }

    fn download(
        &self,
        id: &HubId,
        cache: &RepoCache,
        wanted: Wanted,
        progress: &dyn Fn(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        let listing = self.remote.list(id)?;
        if wanted == Wanted::All && !listing.files.iter().any(|file| is_weights(file)) {
            return Err(HubError::NoWeights { id: id.repository() });
        }
        if wanted == Wanted::Data && !listing.files.iter().any(|file| is_data(file)) {
            return Err(HubError::NoData { id: id.path() });
        }
        if wanted == Wanted::Adapter && !listing.files.iter().any(|file| is_adapter(file)) {
            return Err(HubError::NotAnAdapter { id: id.repository() });
        }
        let commit = listing.commit.as_str();
        let snapshot = cache.snapshot(commit);
        let mut lacking = Vec::new();
        for file in listing.files.iter().filter(|file| wanted.takes(file)) {
            if !snapshot.join(file).is_file() {
                lacking.push((file, self.remote.describe(id, commit, file)?));
            }
        }
        cache.check_space(lacking.iter().map(|(_, facts)| facts))?;
        // Small files first: with them a wrong model shows before its weights have come.
        lacking.sort_by_key(|(_, facts)| facts.size);
        let total_bytes = lacking.iter().fold(0u64, |total, (_, facts)| total.saturating_add(facts.size));
        let mut before = 0;
        for (file, facts) in &lacking {
            let report =
                |received: u64| progress(Progress { file, done_bytes: before + received, total_bytes });
            let download = Download { remote: &self.remote, cache, id, commit, file, facts };
            download.run(&report)?;
            cache.link(commit, file, &facts.etag)?;
            before += facts.size;
        }
        cache.set_revision(commit)?;
        Ok(snapshot)
    }
}
