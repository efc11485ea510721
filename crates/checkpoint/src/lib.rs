//! A model on disk: config, tensor index, slices of a layer range, writer, GGUF; validates before MLX sees a byte.

pub mod architectures;
mod config;
mod dtype;
pub mod names;
mod quantization;
mod spec;

pub use config::{Config, ConfigError};
pub use dtype::TensorDtype;
pub use quantization::{PerPath, QuantMode, QuantSetting, Quantization};
pub use spec::{
    Activation, AttentionSpec, FeedForward, LayerSpec, Mixer, ModelSpec, NormPlacement, QkNorm, RopeScaling,
    RopeSpec,
};
