//! Runs one shard of one model in its own process and passes the result on: stage service, links, driver.
//!
//! ```text
//!            ┌────────────── mlxnode worker ───────────────┐
//! previous ═▶│ link ─▶ inbox ─▶ compute thread ─▶ outbox ─▶│═▶ next          ═▶ gRPC over mutual TLS
//!            └───────────────────(Stage)───────────────────┘
//! first stage:  scheduler ═▶ driver ─▶ inbox …              … and from the last stage round the ring: tokens ═▶ driver
//! ```
//! Child side: [`run`] is the process, [`LocalWorker`] the same within a process. Parent side: [`WorkerProcess`] starts, watches
//! and ends one. Scheduler's side: [`DriveClient`]. A training job's side: [`CollectiveEndpoint`], and [`StageEndpoint`] when its layers are divided. [`wire`] converts between the seam's types and the contract's messages.
//!
//! A job (training, quantization) runs in such a process too, with a network only for its gradients: [`run_job`] and [`JobProcess`].
//!
//! The node decides what a fault means; a worker that lost a neighbour or whose device failed just ends, with a reason.

mod blocks_wire;
mod collective;
mod compute_thread;
mod drive;
mod drive_client;
mod errand;
mod error;
mod hello;
mod job;
mod lifeline;
mod link;
mod listening;
mod message;
mod process;
mod progress;
mod queue;
mod run;
mod server;
mod service;
mod shard;
mod shard_state;
mod spans;
mod stages;
mod time_counts;
pub mod wire;

pub use collective::{
    CollectiveEndpoint, CollectiveOptions, ConductorEvent, Group, GroupClient, GroupConductor, GroupError,
    GroupPeer, GroupReports, GroupWorker,
};
pub use compute_thread::{BlockRoom, Guessing, LoadFailure, LoadShard, StageFactory};
pub use drive_client::{DriveClient, DriveError, DriveEvents};
pub use error::{Fault, Side};
pub use job::{
    GroupPlace, JobCallError, JobFactory, JobProcess, JobSetup, LinePlace, Others, Rehearsal, StagePlace,
    run_job,
};
pub use listening::CollectiveError;
pub use message::{DriveCommand, DriveEvent, SampledToken, StageTimes};
pub use process::{LoadProgress, ProcessError, ShardLoading, SpawnWorker, WorkerExit, WorkerProcess};
pub use progress::ShardStats;
pub use run::{RunError, run};
pub use server::{LocalWorker, WorkerOptions};
pub use stages::{Line, LineError, LineLink, LineWorker, StageEndpoint, StageOptions};
pub use time_counts::TimeCounts;
