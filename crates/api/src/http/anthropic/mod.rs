//! Anthropic's dialect: messages of blocks, reasoning as thinking blocks.

pub(super) mod messages;
mod request;
mod stream;
