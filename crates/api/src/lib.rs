//! What clients speak: gRPC services and HTTP in OpenAI's and Anthropic's dialects; limits, keys, the web page.
//!
//! | module | one line |
//! |---|---|
//! | [`front`] | owns a request: text ↔ tokens, parameters, the answer's stream |
//! | [`deployments`] | the deployments as every node sees them |
//! | [`gate`] | who is let in over HTTP, and how much each may ask |
//! | [`keys`] | the API keys as every node knows them, and their service |
//! | [`metrics`] | figures for monitoring |
//! | [`panorama`] | what all nodes do now, asked once for everybody who watches |
//! | [`picture`] | the cluster as the web page and `mlxnode top` show it |
//! | [`jobs`] | the jobs of the cluster: their service, and how they are shown |
//! | `conversation` | a request for an answer and the answer's parts, for every dialect |
//! | `error`, `fields` | what a client can get wrong, and JSON taken apart field by field |
//! | `caller` | for whom a request is |
//! | `route` | the way to the coordinator, here or on another node |
//! | [`rpc`] | every rpc, and the gate at it |
//! | [`access`] | who may call what |
//! | `inference`, [`models`], [`cluster`], [`keys`], [`jobs`] | the gRPC services of `mlxnode.v1` |
//! | [`http`] | the HTTP listener and its endpoints |

pub mod access;
mod caller;
pub mod cluster;
mod conversation;
pub mod deployments;
mod error;
mod fields;
pub mod front;
pub mod gate;
pub mod http;
mod inference;
pub mod jobs;
pub mod keys;
pub mod metrics;
pub mod models;
pub mod panorama;
pub mod picture;
mod route;
pub mod rpc;
mod server;

pub use inference::InferenceService;
pub use route::{CoordinatorRoute, Route};
pub use server::{PublicServices, public_routes};
