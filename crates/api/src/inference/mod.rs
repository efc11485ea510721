//! The service `Inference`: text in, text out.
//!
//! | module | one line |
//! |---|---|
//! | `service` | the rpcs |
//! | `wire` | messages to our types and back |
//! | `run` | one request on its way |
//! | `status` | errors with their details |

mod run;
mod service;
mod status;
mod wire;

pub use service::InferenceService;
pub(crate) use status::status;
