//! The service `Inference`: text in, text out.

mod service;
mod wire;

pub use service::InferenceService;
