//! The service `Cluster`: who is here and how to get in.

mod service;
mod view;
mod wire;

pub use service::ClusterService;
pub use view::{ClusterView, Household, HouseholdError, LinkView, NodeState, NodeView};
