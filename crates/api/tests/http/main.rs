//! The HTTP listener with a model that says what it is told: every layer but the network between nodes and the arithmetic.

mod anthropic;
mod chat;
mod client;
mod clients;
mod completions;
mod constraints;
mod demand;
mod desk;
mod fine_tuning;
mod gate;
mod malformed;
mod page;
mod responses;
mod resume;
mod shell;
