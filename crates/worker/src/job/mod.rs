//! A job in a process of its own: the node drives it piece by piece over the process's pipes.
//!
//! ```text
//! node: JobProcess ── Order (stdin) ──▶ mlxnode worker --job: run_job ──▶ dyn Job, on the process's only thread
//!            ◀───────── Answer (stdout) ──────┘
//! ```
//! Each order is answered once. The process ends when its stdin closes, that is with its node, however that ends.

mod child;
mod frames;
mod parent;
mod rehearsal;

pub use child::{JobFactory, run_job};
pub use parent::{JobCallError, JobProcess};
pub use rehearsal::Rehearsal;

use mlxnode_compute::{Advance, JobError};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What a job is made of, on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSetup {
    /// "fine-tuning", "rehearsal".
    pub kind: String,
    /// The folder of the model; none for jobs without one.
    pub model: Option<PathBuf>,
    /// How: YAML with mlx-lm's keys.
    pub configuration: String,
    /// The folder with the files that the job reads.
    pub inputs: PathBuf,
    /// The folder that [`mlxnode_compute::Job::save`] wrote, to go on from.
    pub resume: Option<PathBuf>,
}

/// From the node.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    Begin(JobSetup),
    Advance,
    Save(PathBuf),
    Publish(PathBuf),
}

/// From the process.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Advanced(Advance),
    Failed(JobError),
}
