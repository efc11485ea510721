//! The coordinator's orders: [`service`] carries them out here, [`client`] gives them to another node.

pub(crate) mod client;
pub(crate) mod service;

use crate::workers::WorkersError;
use mlxnode_coordinator::Error;

/// A model that this node does not have: for good, or for now.
fn not_here(error: &WorkersError) -> Error {
    let text = crate::error::chain(error);
    match error {
        WorkersError::Away(_) => Error::Unavailable(text),
        _ => Error::NotFound(text),
    }
}
