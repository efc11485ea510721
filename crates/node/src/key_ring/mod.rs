//! The API keys from the coordinator's node to all others: [`service`] there, [`client`] elsewhere. The hashes travel, never the text.

pub(crate) mod client;
pub(crate) mod service;
mod wire;
