//! What clients speak: gRPC services, later OpenAI HTTP; limits, keys, the web page.
//!
//! | module | one line |
//! |---|---|
//! | [`front`] | owns a request: text ↔ tokens, parameters, the answer's stream |
//! | [`deployments`] | the deployments as every node sees them |
//! | [`access`] | who may call what |
//! | `inference` | the gRPC service `mlxnode.v1.Inference` |

pub mod access;
pub mod deployments;
pub mod front;
mod inference;

pub use inference::InferenceService;
