//! The coordinator's decisions in the control log, as JSON: rare, small, and readable when something went wrong.

use crate::{Error, deployments, jobs, keys};
use mlxnode_cluster::{ControlEpoch, ControlLog, ControlLogError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Entries after which the log is folded into a snapshot. Each attempt writes one of some 300 bytes.
const ENTRIES_BEFORE_SNAPSHOT: u64 = 1000;

/// One entry.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Entry {
    /// About a model that is wanted.
    Deployment(deployments::Record),
    /// About an API key.
    Key(keys::Record),
    /// About a job.
    Job(jobs::Record),
}

/// All decisions that still count, in order: what a snapshot holds, and what opening the journal yields.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Decisions {
    /// About models.
    pub(super) deployments: Vec<deployments::Record>,
    /// About API keys.
    #[serde(default)] // snapshots of before there were keys
    pub(super) keys: Vec<keys::Record>,
    /// About jobs.
    #[serde(default)] // snapshots of before there were jobs
    pub(super) jobs: Vec<jobs::Record>,
}

/// The way to the control log.
pub(super) struct Journal {
    log: Arc<dyn ControlLog>,
    epoch: ControlEpoch,
    folded: u64,
    is_superseded: bool,
}

impl Journal {
    /// Opens the journal and reads all decisions.
    pub(super) async fn open(log: Arc<dyn ControlLog>) -> Result<(Self, Decisions), Error> {
        let snapshot = log.snapshot().await.map_err(unusable)?;
        let mut decisions = Decisions::default();
        let mut folded = 0;
        if let Some(snapshot) = snapshot {
            folded = snapshot.index;
            decisions = serde_json::from_slice(&snapshot.state)
                .map_err(|error| unreadable(&format!("snapshot {folded}"), &error))?;
        }
        for entry in log.entries_after(folded).await.map_err(unusable)? {
            let read = serde_json::from_slice(&entry.record)
                .map_err(|error| unreadable(&format!("record {}", entry.index), &error))?;
            match read {
                Entry::Deployment(record) => decisions.deployments.push(record),
                Entry::Key(record) => decisions.keys.push(record),
                Entry::Job(record) => decisions.jobs.push(record),
            }
        }
        let mut epoch = log.epoch().await.map_err(unusable)?;
        if epoch == ControlEpoch::default() {
            epoch = ControlEpoch { generation: 1, term: 1 }; // the first coordinator of this cluster
        }
        Ok((Self { log, epoch, folded, is_superseded: false }, decisions))
    }

    /// Makes a decision durable. Answers whether it is time for [`Journal::fold`], with the index to fold up to.
    pub(super) async fn append(&mut self, entry: &Entry) -> Result<Option<u64>, Error> {
        let bytes = serde_json::to_vec(entry)
            .map_err(|error| Error::Failed(format!("the decision cannot be written: {error}")))?;
        let appended = self.log.append(self.epoch, bytes).await;
        self.is_superseded |= matches!(appended, Err(ControlLogError::StaleEpoch { .. }));
        let index = appended.map_err(unusable)?;
        Ok((index.saturating_sub(self.folded) >= ENTRIES_BEFORE_SNAPSHOT).then_some(index))
    }

    /// Does the log belong to a later coordinator now? Then this one has nothing more to say.
    pub(super) fn is_superseded(&self) -> bool {
        self.is_superseded
    }

    /// Replaces the records up to `index` by decisions that say the same.
    pub(super) async fn fold(&mut self, index: u64, decisions: &Decisions) -> Result<(), Error> {
        let state = serde_json::to_vec(decisions)
            .map_err(|error| Error::Failed(format!("the state cannot be written: {error}")))?;
        self.log.compact(index, state).await.map_err(unusable)?;
        self.folded = index;
        Ok(())
    }
}

fn unusable(error: ControlLogError) -> Error {
    let mut text = error.to_string();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    Error::Failed(text)
}

fn unreadable(what: &str, error: &serde_json::Error) -> Error {
    Error::Failed(format!(
        "{what} of the control log cannot be read, it may be of another version of mlxnode: {error}"
    ))
}
