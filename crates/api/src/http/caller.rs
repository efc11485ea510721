//! For whom a request is. Whoever checks keys puts a [`Caller`] into the request; without one it is the cluster's own people.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use std::convert::Infallible;

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// See [`mlxnode_coordinator::scheduler::RunRequest::tenant`].
    pub tenant: String,
    /// Models that the caller may use; none: all.
    pub models: Option<Vec<String>>,
}

impl Caller {
    /// May the caller use this deployment?
    pub fn may_use(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.iter().any(|name| name == model))
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_default())
    }
}
