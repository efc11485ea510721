//! What clients speak: gRPC services, later OpenAI HTTP; limits, keys, the web page.
//!
//! | module | one line |
//! |---|---|
//! | [`front`] | owns a request: text ↔ tokens, parameters, the answer's stream |
//! | [`deployments`] | the deployments as every node sees them |
//! | [`keys`] | the API keys as every node knows them, and their service |
//! | `route` | the way to the coordinator, here or on another node |
//! | [`access`] | who may call what |
//! | `inference`, [`models`], [`cluster`], [`keys`] | the gRPC services of `mlxnode.v1` |

pub mod access;
pub mod cluster;
pub mod deployments;
pub mod front;
mod inference;
pub mod keys;
pub mod models;
mod route;
mod server;

pub use inference::InferenceService;
pub use route::{CoordinatorRoute, Route};
pub use server::{PublicServices, public_routes};
