//! OpenAI's dialect, with the fields that mlx_lm.server and vLLM add to it.

pub(super) mod models;
