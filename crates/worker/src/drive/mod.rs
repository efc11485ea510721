//! What only the first stage does: it takes sequences from the scheduler, feeds their prompts and tokens into the pipeline, and
//! hears on the ring what the last stage made of them.
//!
//! [`driver`] decides and is pure; [`session`] moves the messages.

pub(crate) mod driver;
pub(crate) mod session;
