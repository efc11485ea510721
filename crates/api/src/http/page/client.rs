//! What the endpoints ask of the gRPC services in this process, which know the way to the coordinator.

use super::models::Progress;
use super::wire::refusal;
use crate::http::ApiError;
use crate::models::ModelsService;
use crate::picture::{Plan, deployment};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use mlxnode_proto::v1::models_server::Models as _;
use mlxnode_proto::v1::{LoadProgress, LoadRequest, PlanRequest, UnloadRequest};
use tonic::{Request, Status};

pub(super) async fn plan(models: &ModelsService, wish: PlanRequest) -> Result<Plan, ApiError> {
    let plan = models.plan(Request::new(wish)).await.map_err(|status| refusal(&status))?;
    Ok(Plan::from(plan.into_inner()))
}

pub(super) async fn load(
    models: &ModelsService,
    wish: LoadRequest,
) -> Result<BoxStream<'static, Result<Progress, ApiError>>, ApiError> {
    let reports = models.load(Request::new(wish)).await.map_err(|status| refusal(&status))?;
    Ok(reports.into_inner().map(progress).boxed())
}

pub(super) async fn unload(models: &ModelsService, wish: UnloadRequest) -> Result<(), ApiError> {
    models.unload(Request::new(wish)).await.map_err(|status| refusal(&status))?;
    Ok(())
}

fn progress(report: Result<LoadProgress, Status>) -> Result<Progress, ApiError> {
    let report = report.map_err(|status| refusal(&status))?;
    Ok(Progress {
        phase: report.phase,
        node: report.node_name,
        done_bytes: report.done_bytes,
        total_bytes: report.total_bytes,
        detail: report.detail,
        deployment: report.deployment.map(deployment),
    })
}
