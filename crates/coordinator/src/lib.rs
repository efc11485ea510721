//! Turns wishes into plans and requests into steps: valid requests, scheduler, prompt-cache index, placement, deployments, keys, job table.
//!
//! | module | one line |
//! |---|---|
//! | [`placement`] | which node runs which layers, or why it does not fit (pure) |
//! | [`requests`] | loose generation parameters into a request that cannot be wrong (pure) |
//! | [`scheduler`] | one per replica: queue, admission, tokens in order; a pure machine and its task |
//! | [`prompt_index`] | which beginnings of prompts the stages remember (pure) |
//! | [`deployments`] | which models are wanted and what has to be done next (pure) |
//! | [`jobs`] | which jobs are wanted, how far each is, and what has to be done next (pure) |
//! | [`keys`] | who may use the cluster over HTTP (pure) |
//! | [`coordinator`] | the actor that does it: owns the deployments, the keys and the control log, gives the nodes their orders |

pub mod coordinator;
pub mod deployments;
mod error;
pub mod jobs;
pub mod keys;
pub mod placement;
pub mod prompt_index;
pub mod requests;
pub mod scheduler;
pub use error::Error;
pub use mlxnode_cluster::NodeId;
