//! The coordinator's orders: [`service`] carries them out here, [`client`] gives them to another node.

pub(crate) mod client;
pub(crate) mod service;
