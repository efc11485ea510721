//! A training job's worker among the others: gradients go from worker to worker, over mutual TLS, without passing a node.
//!
//! ```text
//!                       ┌───────────── worker of a job ─────────────┐
//!  node ══ Control ════▶│ service ─▶ Member (plain) ◀─ Group (Reduce) ◀─ trainer, on the compute thread
//!                       │                │  ▲                         │
//!  other workers ◀══════│◀═ outboxes ◀═══╛  ╘═ Exchange ◀════════════│◀══ other workers
//!                       └────────────────────────────────────────────┘
//! ```
//! [`CollectiveEndpoint`] is the network side, on a thread of its own; [`Group`] is what the trainer calls and blocks on. Between them
//! is one [`mlxnode_collective::Member`] behind a lock, whose effects are carried out in order. [`GroupConductor`] is the node's side:
//! it drives the rounds over one [`GroupClient`] per worker.
//!
//! Nothing queues without a bound: what waits to be sent are slices of the gradients that were given for one step, and what is
//! received is taken only when the protocol expects just that piece; everything else is HTTP/2's flow control.

mod client;
mod conductor;
mod endpoint;
mod group;
mod outbox;
mod peers;
mod service;
mod shared;
pub(crate) mod state_files;
mod wire;

pub use client::{GroupClient, GroupError, GroupPeer, GroupReports};
pub use conductor::{ConductorEvent, GroupConductor, GroupWorker};
pub use endpoint::{CollectiveEndpoint, CollectiveOptions};
pub use group::Group;
