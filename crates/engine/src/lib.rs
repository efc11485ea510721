//! Runs layers on MLX; implements Stage: decoder, architectures, KV caches, sampling, local generation.
//!
//! A [`Model`] is a layer range in the device's memory, built by the loader from a checkpoint's data ([`ModelSpec`] and
//! tensors): no architecture has code of its own here. [`EngineStage`] runs it as one stage of a pipeline, [`Generator`]
//! runs a whole model in this process. Everything lives on the thread that loaded it.
//!
//! Results equal those of mlx-lm 0.32.2 on the same libmlx: the same tokens when greedy, the same draws for a seed.
//!
//! [`ModelSpec`]: mlxnode_checkpoint::ModelSpec

mod adapters;
mod alternating_updates;
mod batch;
mod batch_generator;
mod blocks;
mod cache_pool;
mod caches;
mod constrained;
mod decoder;
mod dense_and_experts;
mod draws;
mod experts;
mod feed_forward;
mod generator;
mod linear;
mod loader;
mod mixers;
mod model;
mod ngrams;
mod norm;
mod penalties;
mod products;
mod prompt_cache;
mod residual_blocks;
mod rope;
mod router;
mod sampler;
mod scoring;
mod sequence;
mod speculation;
mod stage;
pub mod tuning;
mod turn;
mod widening;

pub use adapters::{AdapterLoadError, UnknownAdapter};
pub use batch_generator::{BatchEvent, BatchGenerator, BatchOptions, RowId};
pub use generator::{GenerateError, Generator, GeneratorOptions, Summary, TokenEvent};
pub use loader::{LoadError, WeightReader};
pub use model::Model;
pub use prompt_cache::{ForeignCache, PromptCache, PromptCacheError, PromptCacheNotes};
pub use speculation::Speculation;
pub use stage::{EngineStage, StageOptions};
