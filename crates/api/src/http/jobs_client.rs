//! Calls of `Jobs` on behalf of somebody who came over HTTP: the way is the same as for gRPC, wherever the coordinator is.

use crate::http::page::refusal;
use crate::http::{ApiError, Caller, ErrorKind};
use crate::jobs::JobsService;
use futures::StreamExt as _;
use mlxnode_proto::v1::jobs_server::Jobs as _;
use mlxnode_proto::v1::{
    GetJobRequest, Job, JobLogLine, JobLogsRequest, ListJobsRequest, PublishJobRequest, SubmitJobRequest,
};
use tonic::{Code, Request, Status};

/// What can be done to a job.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    Cancel,
    Pause,
    Resume,
}

fn asked<T>(caller: &Caller, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(caller.clone());
    request
}

fn told(status: Status) -> ApiError {
    match status.code() {
        Code::NotFound => ApiError {
            param: Some("fine_tuning_job_id".to_owned()),
            ..ApiError::new(ErrorKind::NotFound, status.message())
        },
        _ => refusal(&status),
    }
}

pub(super) async fn submit(
    service: &JobsService,
    caller: &Caller,
    wish: SubmitJobRequest,
) -> Result<Job, ApiError> {
    Ok(service.submit(asked(caller, wish)).await.map_err(told)?.into_inner())
}

/// All that the caller may see, the newest first; without curves, configurations and labels.
pub(super) async fn list(service: &JobsService, caller: &Caller) -> Result<Vec<Job>, ApiError> {
    let listed = service.list(asked(caller, ListJobsRequest {})).await.map_err(told)?;
    let mut jobs = listed.into_inner().jobs;
    jobs.retain(|job| caller.may_see(&job.owner));
    Ok(jobs)
}

/// One that the caller may see: others do not exist for them.
pub(super) async fn get(service: &JobsService, caller: &Caller, id: &str) -> Result<Job, ApiError> {
    let job = service.get(asked(caller, GetJobRequest { id: id.to_owned() })).await.map_err(told)?;
    let job = job.into_inner();
    if caller.may_see(&job.owner) {
        return Ok(job);
    }
    let shown: String = id.chars().take(64).collect();
    Err(told(Status::not_found(format!("there is no job {shown:?}; `mlxnode jobs list` shows all"))))
}

pub(super) async fn change(
    service: &JobsService,
    caller: &Caller,
    id: &str,
    change: Change,
) -> Result<Job, ApiError> {
    get(service, caller, id).await?;
    let request = asked(caller, GetJobRequest { id: id.to_owned() });
    let changed = match change {
        Change::Cancel => service.cancel(request).await,
        Change::Pause => service.pause(request).await,
        Change::Resume => service.resume(request).await,
    };
    Ok(changed.map_err(told)?.into_inner())
}

/// What requests write into `model` for it from now on.
pub(super) async fn publish(
    service: &JobsService,
    caller: &Caller,
    request: PublishJobRequest,
) -> Result<String, ApiError> {
    get(service, caller, &request.id).await?;
    let published = service.publish(asked(caller, request)).await;
    Ok(published.map_err(|status| refusal(&status))?.into_inner().id)
}

/// The oldest first.
pub(super) async fn log(
    service: &JobsService,
    caller: &Caller,
    id: &str,
) -> Result<Vec<JobLogLine>, ApiError> {
    let request = JobLogsRequest { id: id.to_owned(), follow: false };
    let lines: Vec<_> =
        service.logs(asked(caller, request)).await.map_err(told)?.into_inner().collect().await;
    lines.into_iter().collect::<Result<_, Status>>().map_err(told)
}
