//! The jobs of the cluster: the service that takes them, and how they are shown.
//!
//! | module | one line |
//! |---|---|
//! | `service` | `mlxnode.v1.Jobs`: wishes go to the coordinator, files stay on the node that is called |
//! | `watch_service`, `watch_client` | what has changed about jobs, told and collected |
//! | `onward_client` | calls that another node's coordinator answers, and for whom they are |
//! | `files` | what a node does with the files of jobs; the node crate implements it |
//! | `view` | a job as the web page, `top` and `/api/v1/jobs` show it |
//! | `wire` | messages to the coordinator's types and back |

mod files;
mod onward_client;
mod service;
mod view;
mod watch_client;
mod watch_service;
mod wire;

pub use files::{
    DownloadPart, Examined, FilePiece, JobFiles, NamedFile, NoJobFiles, Received, Receiving, TakingIn, Unfit,
    check_file_id,
};
pub use mlxnode_coordinator::jobs::{ContentHash, InputFile};
pub use onward_client::jobs_client;
pub use service::JobsService;
pub use view::{CheckpointView, JobTable, JobView, JobsView, LossPoint};
pub use watch_client::WatchedJobs;
pub use wire::{demand_to_proto, job_to_wire, shown};
