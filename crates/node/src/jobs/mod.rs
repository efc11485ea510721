//! The jobs on this node: their files, their processes, and what nodes ask of each other for them.
//!
//! ```text
//! coordinator ── ClusterJobs ──▶ Runners (own node) | JobRunner (other nodes) ──▶ Runners ──▶ JobProcess: mlxnode worker --job
//!                                                                    └── Store: files by content, checkpoints ◀── Peers: other nodes' stores
//! ```
//!
//! | module | one line |
//! |---|---|
//! | `store` | files by their content, under a quota, and what of them is still wanted |
//! | `named` | files that somebody gave a name, and that stay until they are forgotten |
//! | `checking` | configuration and rows, looked through before a job is submitted |
//! | `unnamed` | files that come in before anybody knows what they are called |
//! | `room` | what is announced counts as taken |
//! | `bundle` | a checkpoint on the disk: written whole or not at all, checked by hashes |
//! | `peer_client` | fetches both from other nodes |
//! | `runner` | the jobs that run on this node: the newest attempt of each, and the node's own end |
//! | `attempt` | one attempt: gets what it needs, starts its process, yields to requests |
//! | `driving` | the leading process piece by piece: reports, checkpoints, its end |
//! | `stops` | orders to stop that come before what they stop (pure) |
//! | `help_client`, `helpers` | workers on nodes that do not lead their job: asked for by the one, run by the other |
//! | `team` | the workers of a job that runs on several nodes, seen from the one that leads |
//! | `line` | the stages of a model that is divided among several nodes, likewise |
//! | `meter` | what its steps come to, for reports (pure) |
//! | `pace` | how long a job stands back for requests (pure) |
//! | `client`, `service` | the coordinator's orders, given and taken |
//! | `files` | what the API asks of the store |
//! | `mirror` | the jobs as this node shows them |

mod attempt;
mod bundle;
mod checking;
pub(crate) mod client;
mod driving;
pub(crate) mod files;
mod help_client;
mod helpers;
mod line;
mod meter;
pub(crate) mod mirror;
mod named;
mod pace;
mod peer_client;
mod room;
mod runner;
pub(crate) mod service;
mod stops;
mod store;
mod team;
#[cfg(test)]
mod tests;
mod unnamed;

pub(crate) use checking::Checker;
pub use checking::JobReader;
pub(crate) use peer_client::Peers;
pub(crate) use runner::{Runners, RunnersOptions};
pub(crate) use store::Store;
