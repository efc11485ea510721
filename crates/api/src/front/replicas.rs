//! Where a front sends its sequences, and where it gets a model's tokenizer from. The node decides how: in this process or over the
//! network.

use crate::deployments::DeploymentView;
use async_trait::async_trait;
use futures::stream::BoxStream;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::scheduler::{RunError, RunEvent, RunRequest};
use mlxnode_text::TextFiles;

/// The events of one sequence, in order; ends after the token that has an end, or with an error.
pub type RunEvents = BoxStream<'static, Result<RunEvent, RunError>>;

/// The schedulers of all deployments, wherever they run.
#[async_trait]
pub trait Replicas: Send + Sync + 'static {
    /// Runs one sequence. Dropping the stream cancels it within one step.
    async fn run(&self, deployment: &DeploymentView, request: RunRequest) -> Result<RunEvents, RunError>;

    /// The small files of the model that turn text into tokens.
    async fn text_files(&self, deployment: &DeploymentView) -> Result<TextFiles, RunError>;

    /// The largest memory that any stage's MLX held since it was loaded.
    async fn peak_memory(&self, deployment: &DeploymentView) -> ByteCount;
}
