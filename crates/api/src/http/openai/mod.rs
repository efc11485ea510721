//! OpenAI's dialect, with the fields that mlx_lm.server and vLLM add to it.

pub(super) mod adapters;
pub(super) mod chat;
pub(super) mod completions;
pub(super) mod embeddings;
pub(super) mod files;
pub(super) mod fine_tuning;
mod format;
mod logprobs;
pub(super) mod messages;
pub(super) mod models;
pub(super) mod responses;
pub(super) mod sampling;
pub(super) mod usage;
