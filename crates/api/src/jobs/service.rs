//! `Jobs`: wishes go to the coordinator, wherever it is; files are taken in and handed out by the node that is called.

use super::files::{FilePiece, JobFiles};
use super::wire;
use crate::models::wire::status;
use crate::route::{CoordinatorRoute, Route, forwarded, not_answered};
use crate::rpc::caller;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use mlxnode_coordinator::coordinator::CoordinatorHandle;
use mlxnode_coordinator::jobs::{Checkpoint, JobView, PublishWish};
use mlxnode_proto::v1::jobs_client::JobsClient;
use mlxnode_proto::v1::jobs_server::Jobs;
use mlxnode_proto::v1::{
    DownloadJobRequest, GetJobRequest, Job, JobFilePiece, JobLogLine, JobLogsRequest, ListJobsRequest,
    ListJobsResponse, PublishJobRequest, PublishJobResponse, SubmitJobRequest, UploadRequest, UploadResponse,
    UploadedRequest, WatchJobsRequest,
};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status, Streaming};

/// Between two messages of a watch.
const WATCH_PERIOD: Duration = Duration::from_millis(250);
/// Between two looks at a log that is followed.
const LOG_PERIOD: Duration = Duration::from_millis(500);
/// Nothing comes of an upload for so long: it broke.
const UPLOAD_STANDSTILL: Duration = Duration::from_secs(60);
/// Largest piece of a file.
const MAX_PIECE: usize = 1 << 20;

/// The service on one node. Cheap to clone.
#[derive(Clone)]
pub struct JobsService {
    route: Arc<dyn CoordinatorRoute>,
    files: Arc<dyn JobFiles>,
}

impl JobsService {
    /// Keeps files in `files` and hands wishes to the coordinator.
    pub fn new(route: Arc<dyn CoordinatorRoute>, files: Arc<dyn JobFiles>) -> Self {
        Self { route, files }
    }

    fn job(&self, view: &JobView) -> Job {
        wire::job_to_wire(view, &|node| self.files.node_name(node))
    }

    fn without_curve(&self, view: &JobView) -> Job {
        Job { losses: Vec::new(), ..self.job(view) }
    }

    fn find(&self, coordinator: &CoordinatorHandle, id: &str) -> Result<Arc<JobView>, Status> {
        let jobs = coordinator.jobs();
        let found = jobs.borrow().iter().find(|view| view.spec.id == id).cloned();
        found.ok_or_else(|| {
            let shown: String = id.chars().take(64).collect();
            Status::not_found(format!("there is no job {shown:?}; `mlxnode jobs list` shows all"))
        })
    }
}

#[tonic::async_trait]
impl Jobs for JobsService {
    type WatchStream = BoxStream<'static, Result<ListJobsResponse, Status>>;
    type LogsStream = BoxStream<'static, Result<JobLogLine, Status>>;
    type DownloadStream = BoxStream<'static, Result<JobFilePiece, Status>>;

    async fn upload(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<UploadResponse>, Status> {
        let mut pieces = request.into_inner();
        let late =
            |_| Status::deadline_exceeded("nothing came of the upload for a minute; go on where it broke");
        let first = tokio::time::timeout(UPLOAD_STANDSTILL, pieces.message()).await.map_err(late)??;
        let first = first.ok_or_else(|| Status::invalid_argument("the upload has no message"))?;
        let file = first.file.ok_or_else(|| Status::invalid_argument("the first message has no file"))?;
        let hash = wire::hash(&file.hash, "file.hash")?;
        let receiving = self.files.receive(hash, file.bytes, first.offset).await;
        let mut receiving = receiving.map_err(status)?;
        let mut data = first.data;
        loop {
            if data.len() > MAX_PIECE {
                return Err(Status::invalid_argument(format!(
                    "data has {} bytes, more than {MAX_PIECE}",
                    data.len()
                )));
            }
            if !data.is_empty() {
                receiving.write(data).await.map_err(status)?;
            }
            match tokio::time::timeout(UPLOAD_STANDSTILL, pieces.message()).await.map_err(late)?? {
                Some(next) => data = next.data,
                None => break,
            }
        }
        let received = receiving.finish().await.map_err(status)?;
        Ok(Response::new(UploadResponse { received: received.bytes, complete: received.is_complete }))
    }

    async fn uploaded(&self, request: Request<UploadedRequest>) -> Result<Response<UploadResponse>, Status> {
        let hash = wire::hash(&request.into_inner().hash, "hash")?;
        let received = self.files.received(hash).await.map_err(status)?;
        Ok(Response::new(UploadResponse { received: received.bytes, complete: received.is_complete }))
    }

    async fn submit(&self, request: Request<SubmitJobRequest>) -> Result<Response<Job>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                JobsClient::new(channel).submit(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let owner = caller(&request).key.map(|key| key.name.clone()).unwrap_or_default();
                let spec = wire::spec(request.into_inner(), owner)?;
                spec.check().map_err(status)?;
                let missing = self.files.missing(spec.inputs.iter().map(|input| input.hash).collect()).await;
                if let Some(input) = spec.inputs.iter().find(|input| missing.contains(&input.hash)) {
                    return Err(Status::failed_precondition(format!(
                        "no node has the file {}: upload it first",
                        input.name
                    )));
                }
                for input in &spec.inputs {
                    // It would never be all there, or never fit.
                    if self.files.has_length(input.hash, input.bytes).await == Some(false) {
                        return Err(Status::invalid_argument(format!(
                            "inputs: the file {} has another length than {} bytes",
                            input.name, input.bytes
                        )));
                    }
                }
                let view = coordinator.submit_job(spec).await.map_err(status)?;
                Ok(Response::new(self.job(&view)))
            }
        }
    }

    async fn list(&self, request: Request<ListJobsRequest>) -> Result<Response<ListJobsResponse>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                JobsClient::new(channel).list(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let views = coordinator.jobs().borrow().clone();
                let jobs = views.iter().map(|view| self.without_curve(view)).collect();
                Ok(Response::new(ListJobsResponse { jobs }))
            }
        }
    }

    async fn get(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                JobsClient::new(channel).get(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                Ok(Response::new(self.job(&*self.find(&coordinator, &request.into_inner().id)?)))
            }
        }
    }

    async fn watch(&self, request: Request<WatchJobsRequest>) -> Result<Response<Self::WatchStream>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                let watched = JobsClient::new(channel).watch(forwarded(request)?).await;
                let watched = watched.map_err(not_answered)?.into_inner();
                Ok(Response::new(watched.map_err(not_answered).boxed()))
            }
            Route::Here(coordinator) => {
                let id = request.into_inner().id;
                if !id.is_empty() {
                    self.find(&coordinator, &id)?;
                }
                let mut jobs = coordinator.jobs();
                jobs.mark_changed(); // the first message comes at once
                let state = (jobs, self.clone(), id, None::<Vec<Job>>, false);
                let messages =
                    futures::stream::unfold(state, |(mut jobs, service, id, mut last, is_last)| async move {
                        if is_last {
                            return None;
                        }
                        loop {
                            if last.is_some() {
                                tokio::time::sleep(WATCH_PERIOD).await;
                            }
                            jobs.changed().await.ok()?;
                            let views = jobs.borrow_and_update().clone();
                            let meant = views.iter().filter(|view| id.is_empty() || view.spec.id == id);
                            let now: Vec<Job> = meant.map(|view| service.job(view)).collect();
                            if last.as_ref() == Some(&now) {
                                continue;
                            }
                            let is_last = !id.is_empty() && now.iter().all(|job| wire::is_over(job.state));
                            let message = ListJobsResponse { jobs: now.clone() };
                            last = Some(now);
                            return Some((Ok(message), (jobs, service, id, last, is_last)));
                        }
                    });
                Ok(Response::new(messages.boxed()))
            }
        }
    }

    async fn logs(&self, request: Request<JobLogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                let lines = JobsClient::new(channel).logs(forwarded(request)?).await;
                let lines = lines.map_err(not_answered)?.into_inner();
                Ok(Response::new(lines.map_err(not_answered).boxed()))
            }
            Route::Here(coordinator) => {
                let JobLogsRequest { id, follow } = request.into_inner();
                let lines = coordinator.job_log(id.clone()).await.map_err(status)?;
                if !follow {
                    let lines = lines.into_iter().map(|line| Ok(wire::line_to_proto(line)));
                    return Ok(Response::new(futures::stream::iter(lines).boxed()));
                }
                Ok(Response::new(follow_log(self.clone(), coordinator, id).boxed()))
            }
        }
    }

    async fn cancel(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                JobsClient::new(channel).cancel(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let view = coordinator.cancel_job(request.into_inner().id).await.map_err(status)?;
                Ok(Response::new(self.job(&view)))
            }
        }
    }

    async fn pause(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                JobsClient::new(channel).pause(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let by = caller(&request).key.map(|key| format!("the key {}", key.name));
                let by = by.unwrap_or_else(|| "a person".to_owned());
                let view = coordinator.pause_job(request.into_inner().id, by).await.map_err(status)?;
                Ok(Response::new(self.job(&view)))
            }
        }
    }

    async fn resume(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                JobsClient::new(channel).resume(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let view = coordinator.resume_job(request.into_inner().id).await.map_err(status)?;
                Ok(Response::new(self.job(&view)))
            }
        }
    }

    async fn publish(
        &self,
        request: Request<PublishJobRequest>,
    ) -> Result<Response<PublishJobResponse>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                JobsClient::new(channel).publish(forwarded(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let PublishJobRequest { id, step, model, adapter } = request.into_inner();
                let adapter = if adapter.is_empty() { id.clone() } else { adapter };
                let wish = PublishWish { deployment: model, adapter };
                let step = Some(step).filter(|step| *step > 0);
                let id = coordinator.publish_job(id, step, wish).await.map_err(status)?;
                Ok(Response::new(PublishJobResponse { id }))
            }
        }
    }

    async fn download(
        &self,
        request: Request<DownloadJobRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let DownloadJobRequest { id, step, state } = request.get_ref().clone();
        let asked = Request::from_parts(
            request.metadata().clone(),
            request.extensions().clone(),
            GetJobRequest { id: id.clone() },
        );
        let job = self.get(asked).await?.into_inner();
        let newest_first = job.checkpoints.iter().rev();
        let mut meant = newest_first.filter(|checkpoint| step == 0 || checkpoint.step == step);
        let found = meant.next().ok_or_else(|| match job.checkpoints.is_empty() {
            true => Status::failed_precondition(format!("the job {id} has saved nothing yet")),
            false => Status::not_found(format!("the job {id} has no checkpoint after step {step}")),
        })?;
        let hash = wire::hash(&found.hash, "hash")?;
        let checkpoint = Checkpoint { step: found.step, hash, bytes: found.bytes };
        let pieces = self.files.download(id, checkpoint, state);
        let pieces = pieces.map(|piece| match piece {
            Ok(FilePiece::File { name, bytes, hash }) => {
                let hash = hash.as_bytes().to_vec().into();
                Ok(JobFilePiece { name, bytes, hash, ..Default::default() })
            }
            Ok(FilePiece::Data(data)) => Ok(JobFilePiece { data, ..Default::default() }),
            Err(error) => Err(status(error)),
        });
        Ok(Response::new(pieces.boxed()))
    }
}

/// The lines of a job until it is over. A log keeps its last lines: what went by between two looks is missing then.
fn follow_log(
    service: JobsService,
    coordinator: CoordinatorHandle,
    id: String,
) -> impl futures::Stream<Item = Result<JobLogLine, Status>> {
    let state = (service, coordinator, id, Vec::new(), std::collections::VecDeque::new());
    futures::stream::unfold(state, |(service, coordinator, id, mut told, mut waiting)| async move {
        loop {
            if let Some(line) = waiting.pop_front() {
                return Some((Ok(wire::line_to_proto(line)), (service, coordinator, id, told, waiting)));
            }
            let is_over = service.find(&coordinator, &id).ok()?.state.is_over();
            let lines = coordinator.job_log(id.clone()).await.ok()?;
            // Where what was told ends in what there is now.
            let known = (0..=told.len())
                .map(|cut| &told[cut..])
                .find(|rest| lines.starts_with(rest))
                .map_or(0, <[_]>::len);
            waiting.extend(lines[known..].iter().cloned());
            told = lines;
            if waiting.is_empty() {
                if is_over {
                    return None;
                }
                tokio::time::sleep(LOG_PERIOD).await;
            }
        }
    })
}
