//! The coordinator's decisions in the control log, as JSON: rare, small, and readable when something went wrong.

use crate::Error;
use crate::deployments::Record;
use mlxnode_cluster::{ControlEpoch, ControlLog, ControlLogError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Entries after which the log is folded into a snapshot. Each attempt writes one of some 300 bytes.
const ENTRIES_BEFORE_SNAPSHOT: u64 = 1000;

/// One entry. Other kinds of decisions will stand beside it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    Deployment(Record),
}

/// What a snapshot holds.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Snapshot {
    deployments: Vec<Record>,
}

/// The way to the control log.
pub(super) struct Journal {
    log: Arc<dyn ControlLog>,
    epoch: ControlEpoch,
    folded: u64,
    is_superseded: bool,
}

impl Journal {
    /// Opens the journal and reads all records, in order.
    pub(super) async fn open(log: Arc<dyn ControlLog>) -> Result<(Self, Vec<Record>), Error> {
        let snapshot = log.snapshot().await.map_err(unusable)?;
        let mut records = Vec::new();
        let mut folded = 0;
        if let Some(snapshot) = snapshot {
            folded = snapshot.index;
            let state: Snapshot = serde_json::from_slice(&snapshot.state)
                .map_err(|error| unreadable(&format!("snapshot {folded}"), &error))?;
            records = state.deployments;
        }
        for entry in log.entries_after(folded).await.map_err(unusable)? {
            let Entry::Deployment(record) = serde_json::from_slice(&entry.record)
                .map_err(|error| unreadable(&format!("record {}", entry.index), &error))?;
            records.push(record);
        }
        let mut epoch = log.epoch().await.map_err(unusable)?;
        if epoch == ControlEpoch::default() {
            epoch = ControlEpoch { generation: 1, term: 1 }; // the first coordinator of this cluster
        }
        Ok((Self { log, epoch, folded, is_superseded: false }, records))
    }

    /// Makes a record durable. Answers whether it is time for [`Journal::fold`], with the index to fold up to.
    pub(super) async fn append(&mut self, record: &Record) -> Result<Option<u64>, Error> {
        let bytes = serde_json::to_vec(&Entry::Deployment(record.clone()))
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

    /// Replaces the records up to `index` by those that say the same.
    pub(super) async fn fold(&mut self, index: u64, deployments: Vec<Record>) -> Result<(), Error> {
        let state = serde_json::to_vec(&Snapshot { deployments })
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
