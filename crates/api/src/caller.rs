//! For whom a request is. Whoever checks keys puts a [`Caller`] into the request; without one it is the cluster's own people.

use crate::keys::{KeyEntry, KeyRole};
use mlxnode_compute::TraceContext;
use std::sync::Arc;

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// See [`mlxnode_coordinator::scheduler::RunRequest::tenant`].
    pub tenant: String,
    /// The key that was presented; none where none is asked for.
    pub key: Option<Arc<KeyEntry>>,
    /// Names the request on all nodes.
    pub trace: Option<TraceContext>,
}

impl Caller {
    /// Does the caller administer the cluster?
    pub fn administers(&self) -> bool {
        self.key.as_ref().is_none_or(|key| key.role == KeyRole::Admin)
    }

    /// May the caller look at what the key of this name made, and change it? Everybody may with their own; those who administer the
    /// cluster with all. What was made without a key (`owner` is empty) is theirs.
    pub fn may_see(&self, owner: &str) -> bool {
        self.administers() || self.key.as_ref().is_some_and(|key| key.name == owner)
    }

    /// Name of the key; empty without one.
    pub fn name(&self) -> String {
        self.key.as_ref().map(|key| key.name.clone()).unwrap_or_default()
    }

    /// May the caller use this deployment?
    pub fn may_use(&self, model: &str) -> bool {
        self.key.as_ref().is_none_or(|key| key.may_ask(model))
    }
}
