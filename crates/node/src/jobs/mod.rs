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
//! | `runner` | drives a job's process: pieces, reports, checkpoints, yielding to requests |
//! | `stops` | orders to stop that come before what they stop (pure) |
//! | `team` | the other workers of a job that runs on several nodes: those this node leads, and those it runs for others |
//! | `line` | the stages of a model that is divided among several nodes, likewise |
//! | `meter` | what its steps come to, for reports (pure) |
//! | `pace` | how long a job stands back for requests (pure) |
//! | `client`, `service` | the coordinator's orders, given and taken |
//! | `files` | what the API asks of the store |
//! | `mirror` | the jobs as this node shows them |

mod bundle;
mod checking;
pub(crate) mod client;
pub(crate) mod files;
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
