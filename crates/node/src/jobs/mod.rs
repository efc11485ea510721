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
//! | `room` | what is announced counts as taken |
//! | `bundle` | a checkpoint on the disk: written whole or not at all, checked by hashes |
//! | `peer_client` | fetches both from other nodes |
//! | `runner` | drives a job's process: pieces, reports, checkpoints, yielding to requests |
//! | `stops` | orders to stop that come before what they stop (pure) |
//! | `team` | the other workers of a job that runs on several nodes: those this node leads, and those it runs for others |
//! | `pace` | how long a job stands back for requests (pure) |
//! | `client`, `service` | the coordinator's orders, given and taken |
//! | `files` | what the API asks of the store |
//! | `mirror` | the jobs as this node shows them |

mod bundle;
pub(crate) mod client;
pub(crate) mod files;
pub(crate) mod mirror;
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

pub(crate) use peer_client::Peers;
pub(crate) use runner::{Runners, RunnersOptions};
pub(crate) use store::Store;
