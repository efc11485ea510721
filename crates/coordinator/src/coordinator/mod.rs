//! The coordinator: one actor for each cluster that turns wishes into running replicas and keeps them so.
//!
//! ```text
//! CoordinatorHandle ── load, unload, plan ──▶ actor ── events ──▶ Deployments (decides)
//!        ▲                                      │  ◀── effects ──────┘
//!        │ snapshots, progress                  ├── records ──▶ Journal ──▶ control log
//!        └──────────────────────────────────────└── orders ───▶ Nodes (each answer comes back as an event)
//! ```
//!
//! It makes durable, rare decisions only. Requests do not pass it: fronts look up the scheduler in its snapshot, and its loss
//! costs no token.

mod actor;
mod handle;
mod job_calls;
mod job_nodes;
mod job_orders;
mod journal;
mod nodes;
mod orders;
mod progress;

pub use handle::{Coordinator, CoordinatorHandle, LoadStream, LoadWish, PlanReport, start, start_with_jobs};
pub use job_nodes::{JobNodes, JobReports, NoJobNodes};
pub use nodes::{LinkWorker, LoadAdapter, Nodes, StartScheduler, StartWorker};
pub use progress::{LoadUpdate, Phase, Progress, ProgressSink};

use std::time::Duration;

/// How long the coordinator waits for what it asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// For a record to be durable.
    pub record: Duration,
    /// For a model's config and tensor index: a few small files, perhaps over the internet.
    pub weigh: Duration,
    /// Between two changes in the progress of a download or a load.
    pub standstill: Duration,
    /// For linking a worker and for starting a scheduler.
    pub link: Duration,
    /// For an adapter to be downloaded and read.
    pub adapter: Duration,
    /// For a scheduler to say how busy it is.
    pub usage: Duration,
    /// For the last requests of a model that goes; those that take longer end with an error.
    pub drain: Duration,
    /// For a copy of a job's checkpoint, and of what the job reads, to be on another node.
    pub copy: Duration,
    /// For workers to be gone: they have ten seconds to end by themselves.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            record: Duration::from_secs(10),
            weigh: Duration::from_secs(120),
            standstill: Duration::from_secs(120),
            link: Duration::from_secs(20),
            adapter: Duration::from_secs(600),
            usage: Duration::from_secs(5),
            drain: Duration::from_secs(300),
            copy: Duration::from_secs(3600),
            stop: Duration::from_secs(30),
        }
    }
}
