//! The jobs of the cluster: which are wanted, how far each is, and what has to be done next.
//!
//! [`Jobs`] is a plain struct. It is written ahead: every decision is a [`Record`] that the coordinator makes durable first and then
//! applies, so that what is durable is always the fold of the records, and a call is answered only for what a restart would find again.
//!
//! ```text
//! submit ─▶ Queued ─▶ Preparing (a node fetches model and files) ─▶ Running ─▶ Finished        cancel ─▶ Cancelled
//!             ▲  └─ no room, no node: WaitingForNodes   │   └─ a worker or node dies: again, from the newest checkpoint
//!             └────────── resume ── Paused ◀── pause, no room on the disk ┘   └─ the job itself cannot go on: Failed
//! ```
//!
//! Rules:
//! - An epoch is one attempt to run a job. Epochs rise over all jobs and are durable before they are used; what an older attempt still
//!   reports changes nothing, so of two runners that both believe to be the one, one counts.
//! - An attempt begins from the newest checkpoint that a node has. A job with checkpoints of which no node has one now waits: it does not begin anew.
//! - A lost node or a stopped one is nobody's fault, nor is what a node cannot fetch now: that is tried again without an end, with growing
//!   pauses, and on another node where one fits. A worker process that dies is tried again, with growing pauses, and after
//!   [`MAX_FAILURES`] in a row without a new checkpoint the job has failed, until somebody resumes it. The process of a stage that is killed counts as lost
//!   with its node, as a helping worker's does where each has the whole model; one that ends by itself does not.
//! - Nodes say which checkpoints they have whenever they hear which are wanted: what is known of copies follows the disks, and a checkpoint
//!   that lost one is copied again.
//! - What a job made is named by the hash of its checkpoint, which is in the record of its end: nothing else is ever published for it.

mod content;
mod curve;
mod drive;
mod plan;
mod spec;
mod table;
mod view;

pub use content::{ContentHash, NotAHash};
pub use curve::{Curve, LossPoint, MAX_POINTS};
pub use mlxnode_checkpoint::{TrainedPart, TrainingDemand};
pub use plan::{MAX_STAGES, Need, PlannedStage};
pub use spec::{
    InputFile, JobKind, JobSpec, MAX_CONFIGURATION_BYTES, MAX_INPUT_BYTES, MAX_INPUTS, MAX_WORKERS,
    PublishWish, SavePolicy, check_file_name, check_id,
};
pub use table::{Jobs, StoredJob};
pub use view::{HeldCheckpoint, JobState, JobView, LogLine, Progress, Publication};

use crate::{Error, NodeId};
use mlxnode_compute::ByteCount;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Most jobs that are remembered. The oldest that has ended makes room for a new one.
pub const MAX_JOBS: usize = 256;
/// Lines of a job's log that are remembered.
pub const MAX_LOG_LINES: usize = 200;
/// Workers that may die in a row before a job has failed.
pub const MAX_FAILURES: u32 = 5;
/// Complete copies of a checkpoint, where there are so many nodes.
pub const COPIES: usize = 2;

/// What a job saved: enough to go on from, and what it made so far.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Checkpoint {
    /// After so many steps.
    pub step: u64,
    /// Of its manifest, which has the hashes of its files.
    pub hash: ContentHash,
    /// All files together.
    pub bytes: u64,
}

/// A durable decision. Replayed in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// Wanted.
    Submitted {
        /// What.
        spec: Box<JobSpec>,
        /// When, in seconds since 1970; here and below.
        at: u64,
    },
    /// An attempt begins.
    Started {
        /// Which job; here and below.
        id: String,
        /// Of the attempt.
        epoch: u64,
        /// Where; of several nodes the one that leads.
        node: NodeId,
        /// What each node computes of it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        stages: Vec<PlannedStage>,
        /// When.
        at: u64,
    },
    /// A node has a checkpoint.
    Checkpointed {
        /// Which job.
        id: String,
        /// Of the attempt that saved it.
        epoch: u64,
        /// What.
        checkpoint: Checkpoint,
        /// Who has it.
        node: NodeId,
        /// The curve since the last one.
        points: Vec<LossPoint>,
        /// When.
        at: u64,
    },
    /// Another node has a copy of a checkpoint.
    Copied {
        /// Which job.
        id: String,
        /// Which checkpoint.
        hash: ContentHash,
        /// Who has it.
        node: NodeId,
    },
    /// A node does not have a checkpoint any more: its disk was emptied, or it has left the cluster.
    Lost {
        /// Which job.
        id: String,
        /// Which checkpoint.
        hash: ContentHash,
        /// Who had it.
        node: NodeId,
    },
    /// An attempt's worker died.
    Stumbled {
        /// Which job.
        id: String,
        /// Of the attempt.
        epoch: u64,
        /// Why.
        reason: String,
        /// When.
        at: u64,
    },
    /// Not to run until somebody says so.
    Paused {
        /// Which job.
        id: String,
        /// Who.
        by: String,
        /// When.
        at: u64,
    },
    /// To run again.
    Resumed {
        /// Which job.
        id: String,
        /// When.
        at: u64,
    },
    /// Done.
    Finished {
        /// Which job.
        id: String,
        /// Of the attempt that did it.
        epoch: u64,
        /// What it made.
        checkpoint: Checkpoint,
        /// Who has it.
        node: NodeId,
        /// The curve since the last checkpoint.
        points: Vec<LossPoint>,
        /// When.
        at: u64,
    },
    /// It cannot be done.
    Failed {
        /// Which job.
        id: String,
        /// Why.
        reason: String,
        /// When.
        at: u64,
    },
    /// Not wanted any more.
    Cancelled {
        /// Which job.
        id: String,
        /// When.
        at: u64,
    },
    /// What it made (so far) is served, or cannot be.
    Published {
        /// Which job.
        id: String,
        /// Which checkpoint, as what, and why not.
        publication: Publication,
        /// When.
        at: u64,
    },
    /// Forgotten, to make room.
    Removed {
        /// Which job.
        id: String,
    },
    /// All that is durable about a job, in snapshots.
    Kept {
        /// It.
        job: Box<StoredJob>,
    },
    /// Epochs up to this one are used up. In snapshots.
    Epochs {
        /// The highest.
        used: u64,
    },
}

/// What has to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Make a decision durable and apply it.
    Record(Record),
    /// Estimate what a job needs. Answered by [`Event::Weighed`].
    Weigh {
        /// Which job.
        id: String,
        /// What.
        spec: Box<JobSpec>,
    },
    /// Run an attempt on a node. Reports come as [`Event::Reported`], the end as one [`Event::RunEnded`].
    Run {
        /// Where.
        node: NodeId,
        /// What.
        order: Box<RunJob>,
    },
    /// Have an attempt end: it saves a checkpoint first or it does not. Its [`Event::RunEnded`] follows. Not answered.
    Stop {
        /// Which job.
        id: String,
        /// Of the attempt.
        epoch: u64,
        /// Where.
        node: NodeId,
        /// Save before.
        saves: bool,
    },
    /// The node of an attempt is lost: wait for its end no longer. Not answered.
    Abandon {
        /// Which job.
        id: String,
        /// Of the attempt.
        epoch: u64,
    },
    /// Get a copy of a checkpoint, and of what the job reads, onto a node. Answered by [`Event::Copied`].
    Copy {
        /// Which job.
        spec: Box<JobSpec>,
        /// What.
        checkpoint: Checkpoint,
        /// Whereto.
        node: NodeId,
    },
    /// Tell the nodes what of jobs is still wanted: the rest goes. One at a time. Answered by [`Event::Tidied`].
    Tidy,
    /// Serve what a job made. Answered by [`Event::Published`].
    Publish {
        /// Which job.
        id: String,
        /// Which checkpoint.
        hash: ContentHash,
        /// Where it is found, for the nodes of the deployment: see [`artifact_source`].
        source: String,
        /// As what.
        wish: PublishWish,
    },
}

/// An order to run a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunJob {
    /// What.
    pub spec: JobSpec,
    /// Of the attempt.
    pub epoch: u64,
    /// What it may go on from, the newest first. Empty: from the beginning.
    pub checkpoints: Vec<Checkpoint>,
    /// Which nodes have which layers, when they are divided, line by line; the first one leads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<PlannedStage>,
    /// What it takes of each node that works at it, or of the first stage's; 0 when that is not known.
    #[serde(default)]
    pub memory: ByteCount,
}

impl RunJob {
    /// How many lines of stages share the work; 1 where the layers are not divided.
    pub fn replicas(&self) -> usize {
        self.stages.iter().map(|stage| stage.replica as usize + 1).max().unwrap_or(1)
    }

    /// How many stages a line has; none where the layers are not divided.
    pub fn line_length(&self) -> usize {
        self.stages.len() / self.replicas()
    }

    /// Are the stages there line by line, all lines with the same layers? Whoever takes an order looks.
    pub fn is_well_divided(&self) -> bool {
        let length = self.line_length();
        let first = self.stages.get(..length).unwrap_or_default();
        self.stages.len() == length * self.replicas()
            && length != 1
            && self.stages.iter().enumerate().all(|(place, stage)| {
                stage.replica as usize == place / length
                    && first.get(place % length).is_some_and(|same| same.layers == stage.layers)
            })
    }
}

/// What was done, or happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Answers [`Effect::Weigh`].
    Weighed {
        /// Which job.
        id: String,
        /// What it takes of nodes' memory.
        result: Result<Need, Error>,
    },
    /// An attempt reports.
    Reported {
        /// Which job.
        id: String,
        /// Of the attempt.
        epoch: u64,
        /// What.
        report: Report,
    },
    /// An attempt is over.
    RunEnded {
        /// Which job.
        id: String,
        /// Of the attempt.
        epoch: u64,
        /// How. An error: the worker died or the node is gone, and the job can go on.
        result: Result<RunEnd, Error>,
    },
    /// Answers [`Effect::Copy`].
    Copied {
        /// Which job.
        id: String,
        /// Which checkpoint.
        hash: ContentHash,
        /// Whereto.
        node: NodeId,
        /// Done, or why not.
        result: Result<(), Error>,
    },
    /// Answers [`Effect::Publish`].
    Published {
        /// Which job.
        id: String,
        /// Which checkpoint.
        hash: ContentHash,
        /// As what.
        wish: PublishWish,
        /// Done, or why not.
        result: Result<(), Error>,
    },
    /// Answers [`Effect::Tidy`].
    Tidied {
        /// [`Jobs::holders`] when that was asked.
        asked: BTreeMap<ContentHash, BTreeSet<NodeId>>,
        /// What the nodes say.
        tidied: Tidied,
    },
    /// A node is dead.
    NodeLost {
        /// Which.
        node: NodeId,
    },
    /// A node is there (again).
    NodeJoined {
        /// Which.
        node: NodeId,
    },
}

/// What an attempt says on its way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// It fetches and reads things: "fetching train.jsonl".
    Preparing(String),
    /// It computes from here, after so many steps.
    Running {
        /// Steps that were done before.
        step: u64,
    },
    /// How far it is.
    Advanced {
        /// The steps since the last report.
        points: Vec<LossPoint>,
        /// The last step.
        progress: Option<Progress>,
    },
    /// It has saved.
    Checkpointed(Checkpoint),
    /// It stands still, and goes on by itself when it can: "no room on the disk".
    Held(String),
    /// It goes on.
    Going,
    /// For the log.
    Said(String),
    /// These other nodes run workers of it now, or are asked to.
    Helped(Vec<NodeId>),
}

/// How an attempt ended in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunEnd {
    /// All is done, and this is what it made.
    Finished(Checkpoint),
    /// It was asked to end, or its node stops.
    Yielded,
    /// The job itself cannot go on.
    Failed(String),
}

/// What of a job is still wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Which job.
    pub id: String,
    /// These checkpoints, and all with more steps than any of them: they may have just been made.
    pub checkpoints: Vec<Checkpoint>,
    /// These files.
    pub inputs: Vec<ContentHash>,
}

/// What nodes say that were told what is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tidied {
    /// Which of the wanted checkpoints are on which node: those nodes that answered.
    pub held: BTreeMap<NodeId, BTreeSet<ContentHash>>,
    /// The nodes of the cluster, whether they are there or not. Empty: not known.
    pub members: BTreeSet<NodeId>,
}

/// What a node offers for jobs now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobOffer {
    /// Which.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Memory that nobody has reserved.
    pub free: ByteCount,
}

/// How adapters of jobs are named where sources of adapters are: `job:ID/HASH`.
pub fn artifact_source(id: &str, hash: ContentHash) -> String {
    format!("{ARTIFACT_PREFIX}{id}/{hash}")
}

const ARTIFACT_PREFIX: &str = "job:";

/// What [`artifact_source`] names; none when the source is something else.
pub fn parse_artifact_source(source: &str) -> Option<(&str, ContentHash)> {
    let (id, hash) = source.strip_prefix(ARTIFACT_PREFIX)?.split_once('/')?;
    check_id(id).ok()?;
    Some((id, hash.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jobs_result_is_a_source_that_cannot_be_mistaken() {
        let hash = ContentHash::of(b"manifest");
        let source = artifact_source("job-1", hash);
        assert_eq!(parse_artifact_source(&source), Some(("job-1", hash)));
        for other in ["job:../x/00", "job:a", "demo", "job:a/b", "/job:a/00"] {
            assert_eq!(parse_artifact_source(other), None, "{other}");
        }
    }
}
