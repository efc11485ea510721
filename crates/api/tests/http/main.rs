//! The HTTP listener with a model that says what it is told: every layer but the network between nodes and the arithmetic.

#[allow(dead_code, reason = "the endpoints' tests use the rest")]
mod client;
#[allow(dead_code, reason = "the endpoints' tests use the rest")]
mod desk;
mod gate;
mod shell;
