//! Puts one node together and takes it down: configuration, actors and their restart policy, listeners, telemetry, worker processes.
//!
//! | module | one line |
//! |---|---|
//! | `node` | the order in which everything starts and stops |
//! | `options`, `data_dir`, `facts`, `addresses` | what a node knows before it starts |
//! | `joining`, `registrar`, `household`, `lookout` | membership: becoming a member, who signs it, who sees it, where to look for others |
//! | `coordination` | the coordinator's role here or on another node |
//! | `key_ring` | the API keys, from the coordinator's node to all others |
//! | `workers`, `schedulers`, `adapter_room` | the worker processes and the schedulers of this node; what their adapters may take of its memory |
//! | `jobs` | the jobs on this node: their files, their processes |
//! | `observer` | what the figures for monitoring say about this node |
//! | `node_control`, `replica` | what nodes ask of each other: service and client of each, converted in `wire` |
//! | `client` | how local programs reach the node |

mod adapter_room;
mod addresses;
mod client;
mod coordination;
mod data_dir;
mod demand;
mod error;
mod facts;
mod household;
mod jobs;
mod joining;
mod key_ring;
mod lookout;
mod node;
mod node_control;
mod observer;
mod options;
mod panorama;
mod registrar;
mod replica;
mod schedulers;
mod wire;
mod workers;

pub use client::{ClientError, connect_to_local_node};
pub use data_dir::{DataDir, DataDirError, RunningNode};
pub use jobs::JobReader;
pub use mlxnode_api::http::HttpOptions;
pub use node::{Node, NodeError};
pub use options::NodeOptions;
