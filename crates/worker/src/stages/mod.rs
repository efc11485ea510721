//! A training whose layers are divided among processes: hidden vectors and gradients go from stage to stage, over mutual TLS, without
//! passing a node.
//!
//! ```text
//!              ┌───────────── process of stage s ─────────────┐
//!  node ═════▶ │ Control: where the stages are                │
//!  stage 0 ◀═══│═▶ lane: orders, numbers, files ─┐            │
//!  stage s-1 ◀═│═▶ lane: hidden vectors ─────────┼▶ LineLink ─│─▶ trainer, on the compute thread
//!  stage s+1 ◀═│═▶ lane: hidden vectors ─────────┘            │
//!              └──────────────────────────────────────────────┘
//! ```
//! [`StageEndpoint`] is the network side, on a thread of its own; [`LineLink`] is what the trainer calls and blocks on. [`Line`] is the
//! node's side: it tells all stages where the others are, and hears when one of them is lost.
//!
//! A lane is one stream in both directions on a connection of its own. What is sent waits in a queue of a few items, and what came in
//! one of at most a window of micro-batches; beyond that HTTP/2's flow control stops the sender, whose trainer then waits. Whatever
//! ends a lane, or the node's stream, ends the line for this stage, and with it its other lanes: within moments it is over for all.

mod conductor;
mod dialling;
mod endpoint;
mod files;
mod lanes;
mod link;
mod service;
mod shared;
mod wire;

pub use conductor::{Line, LineError, LineWorker};
pub use endpoint::{StageEndpoint, StageOptions};
pub use link::LineLink;

/// Most stages of a line.
pub(crate) const MOST_STAGES: usize = 8;
