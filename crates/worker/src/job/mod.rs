//! A job in a process of its own: the node drives it piece by piece over the process's pipes.
//!
//! ```text
//! node: JobProcess ── Order (stdin) ──▶ mlxnode worker --job: run_job ──▶ dyn Job, on the process's only thread
//!            ◀───────── Answer (stdout) ──────┘
//! ```
//! Each order is answered once. Several workers of one job exchange gradients by
//! themselves ([`crate::CollectiveEndpoint`]), and the stages of a model hidden vectors ([`crate::StageEndpoint`]). The process ends when its stdin closes, that is with its node, however that ends.

mod child;
mod frames;
mod parent;
mod rehearsal;
mod waited;

pub use child::{JobFactory, run_job};
pub use parent::{JobCallError, JobProcess};
pub use rehearsal::Rehearsal;
pub(crate) use waited::Waited;

use crate::collective::CollectiveEndpoint;
use mlxnode_cluster::KeyPin;
use mlxnode_collective::MemberId;
use mlxnode_compute::{Advance, JobError, LayerRange, StageLink};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

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
    /// Which part of the model this process has; none: all of it.
    pub stage: Option<StagePlace>,
}

/// A process's part of a model whose layers are divided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagePlace {
    /// Which stage, from 0.
    pub stage: usize,
    /// Of how many.
    pub stages: usize,
    /// Of which line of stages, from 0.
    pub replica: usize,
    /// Its layers.
    pub layers: LayerRange,
    /// A folder of this stage alone, for its part of the state.
    pub folder: PathBuf,
}

/// A stage's place in its line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinePlace {
    /// Which stage, from 0.
    pub stage: usize,
    /// Of how many.
    pub stages: usize,
    /// The key of the node that says who the others are.
    pub conductor: KeyPin,
    /// The address to listen on.
    pub listen: IpAddr,
    /// A folder of this stage alone, for files on their way.
    pub folder: PathBuf,
}

/// The other processes of a job, as far as there are others.
#[derive(Default)]
pub struct Others<'a> {
    /// Those that have the same model, or the same layers of it, and other rows.
    pub group: Option<&'a CollectiveEndpoint>,
    /// Those that have the model's other layers.
    pub line: Option<Box<dyn StageLink>>,
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
    JoinLine(LinePlace),
    Begin(JobSetup),
    Advance,
    Save(PathBuf),
    Publish(PathBuf),
}

/// From the process.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Joined {
        address: SocketAddr,
        key_pin: KeyPin,
    },
    /// A piece, and how long of it the other processes were waited for.
    Advanced {
        advance: Advance,
        waited: Duration,
    },
    Failed(JobError),
}
