//! A job in a process of its own: the node drives it piece by piece over the process's pipes.
//!
//! ```text
//! node: JobProcess ── Order (stdin) ──▶ mlxnode worker --job: run_job ──▶ dyn Job, on the process's only thread
//!            ◀───────── Answer (stdout) ──────┘
//! ```
//! Each order is answered once. Several workers of one job exchange gradients by themselves ([`crate::CollectiveEndpoint`]). The process ends when its stdin closes, that is with its node, however that ends.

mod child;
mod frames;
mod parent;
mod rehearsal;

pub use child::{JobFactory, run_job};
pub use parent::{JobCallError, JobProcess};
pub use rehearsal::Rehearsal;

use mlxnode_cluster::KeyPin;
use mlxnode_collective::MemberId;
use mlxnode_compute::{Advance, JobError};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// What a job is made of, on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSetup {
    /// "fine-tuning", "rehearsal".
    pub kind: String,
    /// The folder of the model; none for jobs without one.
    pub model: Option<PathBuf>,
    /// What the job calls its model: the folder is one of this machine.
    pub model_name: String,
    /// How: YAML with mlx-lm's keys.
    pub configuration: String,
    /// The folder with the files that the job reads.
    pub inputs: PathBuf,
    /// The folder that [`mlxnode_compute::Job::save`] wrote, to go on from.
    pub resume: Option<PathBuf>,
}

/// A worker's place among several of one job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPlace {
    /// Never used before in this job.
    pub member: MemberId,
    /// The key of the node that says who the others are.
    pub conductor: KeyPin,
    /// The address to listen on.
    pub listen: IpAddr,
    /// A folder of this worker alone, for states on their way.
    pub folder: PathBuf,
}

/// From the node.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    Join(GroupPlace),
    Begin(JobSetup),
    Advance,
    Save(PathBuf),
    Publish(PathBuf),
}

/// From the process.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Joined { address: SocketAddr, key_pin: KeyPin },
    Advanced(Advance),
    Failed(JobError),
}
