//! `Models`: wishes go to the coordinator, wherever it is; what is loaded is known on every node.

use super::wire;
use crate::caller::Caller;
use crate::deployments::DeploymentsView;
use crate::route::{CoordinatorRoute, Route, forwarded, not_answered};
use crate::rpc::caller;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use mlxnode_coordinator::coordinator::{LoadUpdate, LoadWish};
use mlxnode_coordinator::scheduler::Statistics;
use mlxnode_proto::v1::models_client::ModelsClient;
use mlxnode_proto::v1::models_server::Models;
use mlxnode_proto::v1::{
    ListModelsRequest, ListModelsResponse, LoadAdapterRequest, LoadAdapterResponse, LoadProgress,
    LoadRequest, PlanRequest, PlanResponse, UnloadAdapterRequest, UnloadAdapterResponse, UnloadRequest,
    UnloadResponse, WatchModelsRequest,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// How busy the schedulers that run on this node are, by deployment.
pub trait Busy: Send + Sync + 'static {
    /// Now.
    fn statistics(&self) -> BTreeMap<String, Statistics>;
}

/// The service on one node. Cheap to clone.
#[derive(Clone)]
pub struct ModelsService {
    route: Arc<dyn CoordinatorRoute>,
    deployments: watch::Receiver<DeploymentsView>,
    busy: Arc<dyn Busy>,
}

impl ModelsService {
    /// Serves what this node knows and hands wishes to the coordinator.
    pub fn new(
        route: Arc<dyn CoordinatorRoute>,
        deployments: watch::Receiver<DeploymentsView>,
        busy: Arc<dyn Busy>,
    ) -> Self {
        Self { route, deployments, busy }
    }
}

/// What the caller may ask.
fn listing(
    view: &DeploymentsView,
    busy: &BTreeMap<String, Statistics>,
    caller: &Caller,
) -> ListModelsResponse {
    let mine = view.deployments.iter().filter(|view| caller.may_use(&view.name));
    let all = mine.map(|view| wire::deployment_to_proto(view, busy.get(&view.instance())));
    ListModelsResponse { deployments: all.collect() }
}

#[tonic::async_trait]
impl Models for ModelsService {
    type LoadStream = BoxStream<'static, Result<LoadProgress, Status>>;
    type WatchStream = BoxStream<'static, Result<ListModelsResponse, Status>>;

    async fn list(
        &self,
        request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(listing(&self.deployments.borrow(), &self.busy.statistics(), &caller(&request))))
    }

    async fn plan(&self, request: Request<PlanRequest>) -> Result<Response<PlanResponse>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                ModelsClient::new(channel).plan(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let request = request.into_inner();
                let wish = wire::wish(&request)?;
                let report = coordinator.plan(request.model, wish).await.map_err(wire::status)?;
                Ok(Response::new(wire::plan_to_proto(report)))
            }
        }
    }

    async fn load(&self, request: Request<LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                let progress = ModelsClient::new(channel).load(forwarded(request)?).await;
                let progress = progress.map_err(not_answered)?.into_inner();
                Ok(Response::new(progress.map(|message| message.map_err(not_answered)).boxed()))
            }
            Route::Here(coordinator) => {
                let request = request.into_inner();
                let plan = request.plan.ok_or_else(|| Status::invalid_argument("plan is missing"))?;
                let name = Some(request.name).filter(|name| !name.is_empty());
                let updates = coordinator.load(LoadWish {
                    wish: wire::wish(&plan)?,
                    source: plan.model,
                    name,
                    replicas: request.replicas as usize,
                    is_pinned: request.pin,
                    ttl: Some(request.ttl_seconds).filter(|ttl| *ttl > 0).map(Duration::from_secs),
                    makes_room: request.make_room,
                });
                let updates = updates.map(|update| match update {
                    Ok(LoadUpdate::Progress(progress)) => Ok(wire::progress_to_proto(progress)),
                    Ok(LoadUpdate::Ready(view)) => Ok(LoadProgress {
                        phase: "ready".to_owned(),
                        deployment: Some(wire::deployment_to_proto(&view, None)),
                        ..LoadProgress::default()
                    }),
                    Err(error) => Err(wire::status(error)),
                });
                Ok(Response::new(updates.boxed()))
            }
        }
    }

    async fn unload(&self, request: Request<UnloadRequest>) -> Result<Response<UnloadResponse>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                ModelsClient::new(channel).unload(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                coordinator.unload(request.into_inner().name).await.map_err(wire::status)?;
                Ok(Response::new(UnloadResponse {}))
            }
        }
    }

    async fn load_adapter(
        &self,
        request: Request<LoadAdapterRequest>,
    ) -> Result<Response<LoadAdapterResponse>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                ModelsClient::new(channel).load_adapter(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let LoadAdapterRequest { model, source, name } = request.into_inner();
                let (view, name) =
                    coordinator.load_adapter(model, source, Some(name)).await.map_err(wire::status)?;
                let deployment = Some(wire::deployment_to_proto(&view, None));
                Ok(Response::new(LoadAdapterResponse { deployment, name }))
            }
        }
    }

    async fn unload_adapter(
        &self,
        request: Request<UnloadAdapterRequest>,
    ) -> Result<Response<UnloadAdapterResponse>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                ModelsClient::new(channel).unload_adapter(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let UnloadAdapterRequest { model, name } = request.into_inner();
                coordinator.unload_adapter(model, name).await.map_err(wire::status)?;
                Ok(Response::new(UnloadAdapterResponse {}))
            }
        }
    }

    async fn watch(
        &self,
        request: Request<WatchModelsRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut deployments = self.deployments.clone();
        deployments.mark_changed(); // the first message comes at once
        let state = (deployments, self.busy.clone(), caller(&request));
        let stream = futures::stream::unfold(state, |(mut deployments, busy, caller)| async move {
            deployments.changed().await.ok()?;
            let listing = listing(&deployments.borrow_and_update(), &busy.statistics(), &caller);
            Some((Ok(listing), (deployments, busy, caller)))
        });
        Ok(Response::new(stream.boxed()))
    }
}
