//! For whom a request is. Whoever checks keys puts a [`Caller`] into the request; without one it is the cluster's own people.

use crate::keys::KeyEntry;
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
    /// May the caller use this deployment?
    pub fn may_use(&self, model: &str) -> bool {
        self.key.as_ref().is_none_or(|key| key.may_ask(model))
    }
}
