//! What only the first stage does: it takes sequences from the scheduler, feeds their prompts and tokens into the pipeline, and
//! hears on the ring what the last stage made of them.
//!
//! [`driver`] decides with what [`pace`] knows, and shares [`prompt_room`]; all are pure; [`session`] moves the messages.

pub(crate) mod driver;
mod pace;
mod prompt_room;
pub(crate) mod session;
