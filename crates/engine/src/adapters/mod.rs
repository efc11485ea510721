//! Low-rank changes of the weights, chosen for each sequence (LoRA, Hu et al. 2021; DoRA, Liu et al. 2024).
//!
//! The weights stay as they are and are shared by all; a map adds what its adapters make of the rows that asked for them, so that
//! one batch holds rows of several adapters and rows of none. Each linear map, embedding and stack of experts has a [`Slot`] with
//! the changes it takes part in; [`Active`] says which tokens of the running batch go with which adapter. Without adapters in the
//! batch a map does one comparison more.

mod active;
mod experts;
mod low_rank;
mod registry;

pub(crate) use active::{Active, Segment};
pub(crate) use experts::{ExpertSlot, Trained};
pub(crate) use low_rank::{Change, Dropout, EmbeddingChange, EmbeddingSlot, Slot};
pub use registry::{AdapterLoadError, UnknownAdapter};
pub(crate) use registry::{Matrices, Part, Registry, Target};

/// Names a loaded adapter within its model. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct AdapterId(pub(crate) u32);
