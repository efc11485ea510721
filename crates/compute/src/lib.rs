//! The seam between the network and the arithmetic: plain data and the traits [`Stage`], [`Job`], [`Reduce`] and [`StageLink`].
//!
//! The network side (worker) moves [`Activation`]s and token ids; the compute side (engine) turns one into the other.
//! Neither knows the other: both know this crate. No IO, no async, no MLX here, so that the pipeline can be tested
//! with the [`simulated`] stage and the engine without a network.

mod activation;
mod blocks;
mod cache_options;
mod grammar;
mod job;
mod link;
mod quantity;
mod reduce;
mod sampling;
pub mod simulated;
mod span;
mod stage;
mod trace;

pub use activation::{Activation, ActivationError, Dtype};
pub use blocks::{
    BLOCK_TOKENS, BlockCapacity, BlockHash, BlockId, BlockOrder, BlockPlan, BlockStore, BlockUsage, Keep,
};
pub use cache_options::{CacheOptions, CacheOptionsError};
pub use grammar::{Grammar, GrammarError, Grammars, TokenConstraint};
pub use job::{Advance, Job, JobError, StepReport};
pub use link::{LinkError, StageLink, StageOrder, Way};
pub use quantity::{ByteCount, LayerRange};
pub use reduce::{
    Alone, Deal, MOST_MICRO_BATCHES, MicroBatches, Partial, Reduce, ReduceError, Reduced, StepError, Sum,
    Tally, TreeNode, TreeSum, Turn, nodes_of, sum_step, tells_parameters_after,
};
pub use sampling::{Candidate, LogprobRequest, Penalty, Sampled, Sampling, SamplingError, Xtc};
pub use span::{Span, SpanSink, SpanValue};
pub use stage::{
    BatchOutput, MicroBatch, Output, Row, RowOutput, SequenceEnd, SequenceId, SequenceSpec, Stage,
    StageError, StageInfo, StageMemory, Step, StepInput, StepOutput,
};
pub use trace::TraceContext;
