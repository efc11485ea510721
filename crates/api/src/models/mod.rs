//! The service `Models`: which models the cluster runs and where their layers are.

pub(crate) mod client;
mod service;
pub(crate) mod wire;

pub use service::{Busy, ModelsService};
pub use wire::deployment as deployment_from_wire;
