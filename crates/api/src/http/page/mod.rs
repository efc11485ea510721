//! The web page of a node, and the endpoints under `/api/v1` that it lives on: the cluster as it is now, loading and unloading, jobs.
//!
//! | module | one line |
//! |---|---|
//! | [`files`] | the page itself: a few files that are part of the program |
//! | [`cluster`] | who asks, and the cluster as one picture, once or again and again |
//! | [`models`] | plan, load, unload |
//! | [`jobs`] | what the cluster works on |
//! | `client`, `wire` | wishes as the gRPC services take them, and what they answer |

mod client;
pub(super) mod cluster;
pub(super) mod files;
pub(super) mod jobs;
pub(super) mod models;
mod wire;

pub(super) use wire::refusal;

use crate::http::{ApiError, Control, ErrorKind, HttpServices};

/// The cluster behind this listener.
fn control(services: &HttpServices) -> Result<&Control, ApiError> {
    let missing = || ApiError::new(ErrorKind::Unavailable, "this listener shows no cluster");
    services.control.as_ref().ok_or_else(missing)
}
