//! LoRA, DoRA, full: datasets, losses, optimizers, the resumable loop; a Job.
//!
//! - [`TrainingConfig`]: what a run is asked to do; [`Schedule`]: its learning rate
//! - [`Dataset`]: rows as token ids; [`Batches`]: which of them go through the model together
//! - [`parameters`]: what of a model is trained; [`loss`]; [`optimizer`]
//! - [`trainer`]: gradients of micro-batches, and updates; [`FineTuning`]: the whole run as a job, [`StagedFineTuning`]: of a model whose
//!   layers several processes have
//! - [`Recorder`], [`Curve`]: what is left of a run's course, in figures and as a picture
//! - [`fuse`]: an adapter becomes part of its base

mod batches;
mod config;
mod data;
mod fuse;
mod job;
pub mod loss;
pub mod optimizer;
pub mod parameters;
mod records;
mod schedule;
pub mod trainer;

pub use batches::{BatchError, BatchOptions, BatchRow, Batches, Block, MicroBatch, Numpy, Sets};
pub use config::{
    AdapterConfig, ConfigError, Count, Features, FineTuneType, HubDataset, Layers, LoraParameters, Mask,
    OptimizerConfig, Preference, PreferenceLoss, Report, Settings, Split, TrainingConfig,
};
pub use data::{Cut, DataError, DataFolder, Dataset, Encoder, Row, Sequence};
pub use fuse::{FuseError, Fused, fuse};
pub use job::{ADAPTER_CONFIG, ADAPTER_FILE, CursorError, FineTuning, PrepareError, StagedFineTuning};
pub use records::{
    Averages, Cadence, ChartError, Curve, PictureError, RecordError, RecordOptions, RecordedJob, Recorder,
    Sums, Trained, Validated,
};
pub use schedule::{Schedule, Shape};
