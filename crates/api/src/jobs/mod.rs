//! The jobs of the cluster: the service that takes them, and how they are shown.
//!
//! | module | one line |
//! |---|---|
//! | `service` | `mlxnode.v1.Jobs`: wishes go to the coordinator, files stay on the node that is called |
//! | `files` | what a node does with the files of jobs; the node crate implements it |
//! | `view` | a job as the web page, `top` and `/api/v1/jobs` show it |
//! | `wire` | messages to the coordinator's types and back |

mod files;
mod service;
mod view;
mod wire;

pub use files::{FilePiece, JobFiles, NoJobFiles, Received, Receiving};
pub use mlxnode_coordinator::jobs::ContentHash;
pub use service::JobsService;
pub use view::{JobTable, JobView, JobsView, LossPoint};
pub use wire::{demand_to_proto, job_to_wire, shown};
