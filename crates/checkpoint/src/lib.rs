//! A model on disk: config, tensor index, slices of a layer range, writer, GGUF; validates before MLX sees a byte.
//!
//! [`Checkpoint::open`] reads a folder's config.json into a [`ModelSpec`] (by way of [`architectures`]) and the header of every
//! weight file into tensors with our names ([`Weights`]: what files hold, and what has to be made from it); [`Checkpoint::shard_tensors`] picks those of a layer range and checks them
//! against the spec; [`ModelProfile`] says what they weigh. A plain synchronous library: no MLX, no threads, no open files.

mod adapter;
pub mod architectures;
mod checkpoint;
mod config;
mod dtype;
mod expression;
mod header;
mod index;
mod join;
mod latent;
pub mod layout;
mod methods;
pub mod names;
mod notes;
mod profile;
mod quantization;
mod ranges;
mod shard;
mod spec;
mod template;
mod tensor;
mod tensor_file;
mod training;
mod weights;
mod writer;

pub use adapter::{Adapter, AdapterError, Change, StoredMatrix};
pub use checkpoint::{Checkpoint, CheckpointError, TensorEntry};
pub use config::{Config, ConfigError};
pub use dtype::TensorDtype;
pub use expression::{Expression, Function, NibbleOrder, QuantizedPart};
pub use header::HeaderError;
pub use join::{JoinError, join};
pub use latent::LatentHeads;
pub use methods::PackedBy;
pub use notes::Note;
pub use profile::ModelProfile;
pub use quantization::{PerPath, QuantMode, QuantSetting, Quantization};
pub use ranges::FileRange;
pub use shard::{ShardModule, ShardTensors, TensorsError, WrongTensor};
pub use spec::{
    Activation, AlternatingUpdates, AttentionGate, AttentionNames, AttentionSpec, BlockIndexerSpec,
    ConvolvedKeysSpec, Correction, DeltaForm, DenseAndExpertsSpec, ExpertForm, ExpertNetworks, ExpertsSpec,
    FeedForward, Flow, GAINS, GateFunction, GatedDeltaSpec, GatedNames, GatedRecurrenceSpec, GroupScore,
    Groups, INDEXER_NORM_EPS, IndexerSpec, LatentForm, LatentSpec, LayerInputs, LayerNorms, LayerSpec,
    LightningSpec, Logits, Mamba2Spec, MambaGate, MambaNorms, MambaSpec, Mixer, ModelSpec, NgramsSpec,
    NormKind, Normalization, Outside, ParallelSum, PlamoMambaSpec, QkNorm, QkNormKind, QueryFactor,
    QueryGrowth, Residual, RopeScaling, RopeSpec, RouterSpec, Routing, Rwkv7Ranks, Rwkv7Spec, Scores,
    SharedExpertSpec, ShortConvolutionSpec, ShortcutSpec, SinglePrecision, Temperature, Values,
    WeightPrecision, Widening, XIELU,
};
pub use tensor::{Tensor, UnfitTensor};
pub use tensor_file::TensorFileHeader;
pub use training::{LayerTraining, StageMemory, TrainedPart, TrainingCost, TrainingDemand};
pub use weights::{Weights, WeightsError};
pub use writer::{SafetensorsWriter, WriteError};
