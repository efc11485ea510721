//! Models that are loaded because somebody asks for them, where the node allows it.
//!
//! The first request for a model that is on this machine and not loaded loads it; it and those that come meanwhile wait, as long as a client
//! can be expected to. So they do for one that is loading, recovering or going. The load goes on when nobody waits any more: the next one who
//! asks finds it further.

use super::{Front, FrontError};
use crate::deployments::{DeploymentView, State};
use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Loads models for those who ask. The node does it.
#[async_trait]
pub trait Demand: Send + Sync + 'static {
    /// Is this a model that is on this machine and may be loaded because somebody asks for it?
    async fn knows(&self, model: &str) -> bool;

    /// Loads it and returns when it is ready, or why it will not be. Dropping the call does not end the load.
    async fn load(&self, model: &str) -> Result<(), String>;
}

/// How long a request waits for its model.
const PATIENCE: Duration = Duration::from_secs(300);
/// Requests that wait for models; further ones are asked to come back.
pub(super) const MAX_WAITING: usize = 256;
/// When a request that does not wait shall come back.
const COME_BACK: Duration = Duration::from_secs(10);
/// From when the coordinator says that a model is ready until this node knows.
const NEWS: Duration = Duration::from_secs(5);

impl Front {
    /// Loads models that are asked for.
    #[must_use]
    pub fn demanding(self, demand: Arc<dyn Demand>) -> Self {
        Self { demand: Some(demand), ..self }
    }

    /// As [`Front::find`]; where models are loaded on demand, a model that is not ready is waited for, and one that is not loaded is
    /// loaded if `may_use` says so of its name.
    ///
    /// # Errors
    /// As [`Front::find`], and when the model cannot be loaded or too many wait.
    pub async fn summon(
        &self,
        model: &str,
        may_use: impl Fn(&str) -> bool + Send + Sync,
    ) -> Result<(DeploymentView, Option<String>), FrontError> {
        let Some(demand) = self.demand.clone() else { return self.find(model) };
        let deadline = Instant::now() + PATIENCE;
        let mut waits = None;
        loop {
            let mut news = self.deployments.clone();
            news.borrow_and_update();
            let is_loaded = match self.find(model) {
                Ok((found, adapter)) => match found.state {
                    State::Ready | State::Failed => return Ok((found, adapter)),
                    _ if !may_use(&found.name) || Instant::now() >= deadline => return Ok((found, adapter)),
                    State::Loading | State::Recovering | State::Unloading => true,
                },
                Err(error @ FrontError::UnknownModel { .. }) => {
                    if !may_use(model) || !demand.knows(model).await {
                        return Err(error);
                    }
                    false
                }
                Err(error) => return Err(error),
            };
            if waits.is_none() {
                let place = self.waiting.clone().try_acquire_owned();
                let busy = |_| FrontError::Busy { model: model.to_owned(), retry_after: COME_BACK };
                waits = Some(place.map_err(busy)?);
            }
            match is_loaded {
                true => {
                    let _ = tokio::time::timeout_at(deadline, news.changed()).await;
                }
                false => {
                    let loading = || FrontError::NotReady {
                        model: model.to_owned(),
                        state: "loading",
                        detail: String::new(),
                    };
                    let loaded = tokio::time::timeout_at(deadline, demand.load(model)).await;
                    let loaded = loaded.map_err(|_| loading())?;
                    loaded.map_err(|reason| FrontError::NotLoaded { model: model.to_owned(), reason })?;
                    let known = tokio::time::timeout(NEWS, async {
                        while self.find(model).is_err() && news.changed().await.is_ok() {}
                    });
                    if known.await.is_err() {
                        return Err(loading());
                    }
                }
            }
        }
    }
}
