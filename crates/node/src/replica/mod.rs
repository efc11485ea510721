//! Sequences between a front and a scheduler on another node: [`service`] on the scheduler's node, [`client`] on the front's.

pub(crate) mod client;
pub(crate) mod service;
