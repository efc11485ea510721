//! Models that are loaded because somebody asks for them: those that this machine's cache has all files of.
//!
//! Folders are no such models, whatever a client writes: what may be loaded by its path is for the people at the terminal.

use crate::coordination::RosterRoute;
use async_trait::async_trait;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use mlxnode_api::front::Demand;
use mlxnode_api::{CoordinatorRoute as _, Route};
use mlxnode_coordinator::coordinator::LoadWish;
use mlxnode_hub::{Hub, ModelSource};
use mlxnode_proto::v1::models_client::ModelsClient;
use mlxnode_proto::v1::{LoadRequest, PlanRequest};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

/// A load that several may wait for. It goes on when none does, and ends with the node.
type Loading = Shared<BoxFuture<'static, Result<(), String>>>;

/// Loads models on demand, on one node.
pub(crate) struct NodeDemand {
    pub(crate) route: Arc<RosterRoute>,
    pub(crate) hub: Arc<Hub>,
    /// How long they stay when nobody asks any more.
    pub(crate) ttl: Duration,
    pub(crate) under_way: Mutex<HashMap<String, Loading>>,
}

impl NodeDemand {
    fn under_way(&self) -> MutexGuard<'_, HashMap<String, Loading>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The load of this model: the one that is under way, or a new one.
    fn loading(&self, model: &str) -> Loading {
        let mut under_way = self.under_way();
        under_way.retain(|_, loading| loading.peek().is_none());
        if let Some(loading) = under_way.get(model) {
            return loading.clone();
        }
        let (route, name, ttl) = (self.route.clone(), model.to_owned(), self.ttl);
        let task = AbortOnDropHandle::new(tokio::spawn(async move { load(&route, name, ttl).await }));
        let loading = async move { task.await.unwrap_or_else(|error| Err(error.to_string())) };
        let loading = loading.boxed().shared();
        under_way.insert(model.to_owned(), loading.clone());
        loading
    }
}

#[async_trait]
impl Demand for NodeDemand {
    async fn knows(&self, model: &str) -> bool {
        let source = match ModelSource::parse(model) {
            Ok(source @ (ModelSource::Hub(_) | ModelSource::Demo)) => source,
            Ok(ModelSource::Folder(_)) | Err(_) => return false,
        };
        let hub = self.hub.clone();
        tokio::task::spawn_blocking(move || hub.is_here(&source)).await.unwrap_or(false)
    }

    async fn load(&self, model: &str) -> Result<(), String> {
        self.loading(model).await
    }
}

/// Loads it wherever the coordinator is.
async fn load(route: &RosterRoute, model: String, ttl: Duration) -> Result<(), String> {
    info!(model, "loading what somebody asks for");
    let told = |status: tonic::Status| status.message().to_owned();
    match route.route().map_err(told)? {
        Route::Here(coordinator) => {
            let wish = LoadWish { source: model, ttl: Some(ttl), makes_room: true, ..LoadWish::default() };
            coordinator.load(wish).ready().await.map(drop).map_err(|error| error.to_string())
        }
        Route::There(channel) => {
            let request = LoadRequest {
                plan: Some(PlanRequest { model, ..PlanRequest::default() }),
                ttl_seconds: ttl.as_secs().max(1),
                make_room: true,
                ..LoadRequest::default()
            };
            let mut progress = ModelsClient::new(channel).load(request).await.map_err(told)?.into_inner();
            let mut is_ready = false;
            while let Some(message) = progress.message().await.map_err(told)? {
                is_ready |= message.deployment.is_some();
            }
            if is_ready {
                Ok(())
            } else {
                Err("the coordinator ended the load without saying how it went".into())
            }
        }
    }
}
