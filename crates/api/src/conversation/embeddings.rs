//! The vectors of several texts.

use super::Model;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::front::{EmbeddingRequest, Front, Input};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use std::time::Instant;

/// Texts of one request that run at the same time; the scheduler would queue more of them anyway.
const AT_ONCE: usize = 8;

/// The vector of each input and its length in tokens, in the inputs' order.
///
/// # Errors
/// The first thing that is wrong with any of them.
pub(crate) async fn embed(
    front: &Front,
    caller: &Caller,
    model: &Model,
    inputs: Vec<Input>,
    adapter: Option<String>,
    deadline: Option<Instant>,
) -> Result<Vec<(Vec<f32>, usize)>, ApiError> {
    let adapter = adapter.or_else(|| model.adapter.clone());
    let embed = |input| {
        front.embed(EmbeddingRequest {
            model: model.deployment.name.clone(),
            input,
            adapter: adapter.clone(),
            deadline,
            tenant: caller.tenant.clone(),
            trace: caller.trace,
        })
    };
    stream::iter(inputs).map(embed).buffered(AT_ONCE).map_err(ApiError::from).try_collect().await
}
