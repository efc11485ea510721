//! Gets a model (or data to train on) onto this Mac: Hugging Face, peers, local store; only the byte ranges a shard needs.
//!
//! [`ModelSource`] is what people call a model; [`Hub::resolve`] makes a folder of it: the demo inside this program is written
//! out, a folder is taken as it is, and a repository of the hub is downloaded into the cache that Python's huggingface_hub
//! uses, too. What a server says is checked before it becomes a path, and what it sends before it becomes a model.

mod cache;
mod demo;
mod download;
mod error;
mod files;
mod hub;
mod options;
mod remote;
mod source;

pub use cache::LocalModel;
pub use error::HubError;
pub use hub::{Hub, Progress};
pub use options::{Options, Secret};
pub use source::{HubId, ModelSource, SourceError};
