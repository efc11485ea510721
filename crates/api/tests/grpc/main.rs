//! The public gRPC services with a model that says what it is told: everything but TLS, which `mlxnode_cluster` proves, and the arithmetic.

mod descriptors;
// The same scripted model as behind HTTP; the HTTP tests use all of it.
#[allow(dead_code)]
#[path = "../http/desk.rs"]
mod desk;
mod generate;
mod keys;
mod malformed;
mod raw;
