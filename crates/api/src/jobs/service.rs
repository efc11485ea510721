//! `Jobs`: wishes go to the coordinator, wherever it is; files are taken in, checked and handed out by the node that is called.

use super::files::{DownloadPart, Examined, FilePiece, JobFiles, Unfit};
use super::onward_client::{is_handed_on, jobs_client, onward, whose};
use super::watch_service::{follow_log, watch};
use super::wire;
use crate::models::wire::status;
use crate::route::{CoordinatorRoute, Route, not_answered};
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use mlxnode_coordinator::coordinator::CoordinatorHandle;
use mlxnode_coordinator::jobs::{Checkpoint, JobKind, JobView, PublishWish};
use mlxnode_proto::v1::jobs_server::Jobs;
use mlxnode_proto::v1::{
    DownloadJobRequest, GetJobRequest, Job, JobFilePiece, JobLogLine, JobLogsRequest, ListJobsRequest,
    ListJobsResponse, PublishJobRequest, PublishJobResponse, SubmitJobRequest, UploadRequest, UploadResponse,
    UploadedRequest, WatchJobsRequest,
};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status, Streaming};

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

    /// The files of jobs.
    pub(crate) fn files(&self) -> &Arc<dyn JobFiles> {
        &self.files
    }

    pub(super) fn job(&self, view: &JobView) -> Job {
        wire::job_to_wire(view, &|node| self.files.node_name(node))
    }

    pub(super) fn find(&self, coordinator: &CoordinatorHandle, id: &str) -> Result<Arc<JobView>, Status> {
        let jobs = coordinator.jobs();
        let found = jobs.borrow().iter().find(|view| view.spec.id == id).cloned();
        found.ok_or_else(|| {
            let shown: String = id.chars().take(64).collect();
            Status::not_found(format!("there is no job {shown:?}; `mlxnode jobs list` shows all"))
        })
    }
}

impl JobsService {
    /// Looks through a fine-tuning's configuration and rows, as far as this node can get them: what is wrong with them is told to who
    /// submits them, with file and line, and not by a job that fails. None: there is nothing to look through, or it is elsewhere.
    async fn check(&self, request: &SubmitJobRequest) -> Result<Option<Examined>, Status> {
        let spec = wire::spec(request.clone(), String::new())?;
        spec.check().map_err(status)?;
        if spec.kind != JobKind::FineTuning {
            return Ok(None);
        }
        match self.files.check(spec.configuration, spec.model, spec.inputs).await {
            Ok(examined) => Ok(Some(examined)),
            Err(Unfit::Configuration(text) | Unfit::Rows { text, .. }) => Err(Status::invalid_argument(text)),
            // Whether any node has the files, the coordinator finds out.
            Err(Unfit::NotHere(_)) => Ok(None),
            Err(Unfit::Failed(error)) => Err(status(error)),
        }
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

    async fn submit(&self, mut request: Request<SubmitJobRequest>) -> Result<Response<Job>, Status> {
        if !is_handed_on(&request) {
            let examined = self.check(request.get_ref()).await?;
            let wish = request.get_mut();
            // Who does not say what it takes gets what its configuration says.
            wish.demand = wish.demand.take().or_else(|| examined.map(|it| wire::demand_to_proto(&it.demand)));
        }
        match self.route.route()? {
            Route::There(channel) => {
                jobs_client(channel).submit(onward(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let owner = whose(&request);
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
            Route::There(channel) => jobs_client(channel).list(onward(request)?).await.map_err(not_answered),
            Route::Here(coordinator) => {
                let views = coordinator.jobs().borrow().clone();
                let jobs = views
                    .iter()
                    .map(|view| Job { losses: Vec::new(), ..wire::in_brief(self.job(view)) })
                    .collect();
                Ok(Response::new(ListJobsResponse { jobs, ..Default::default() }))
            }
        }
    }

    async fn get(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        match self.route.route()? {
            Route::There(channel) => jobs_client(channel).get(onward(request)?).await.map_err(not_answered),
            Route::Here(coordinator) => {
                Ok(Response::new(self.job(&*self.find(&coordinator, &request.into_inner().id)?)))
            }
        }
    }

    async fn watch(&self, request: Request<WatchJobsRequest>) -> Result<Response<Self::WatchStream>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                let watched = jobs_client(channel).watch(onward(request)?).await;
                let watched = watched.map_err(not_answered)?.into_inner();
                Ok(Response::new(watched.map_err(not_answered).boxed()))
            }
            Route::Here(coordinator) => {
                let id = request.into_inner().id;
                if !id.is_empty() {
                    self.find(&coordinator, &id)?;
                }
                Ok(Response::new(watch(self.clone(), &coordinator, id).boxed()))
            }
        }
    }

    async fn logs(&self, request: Request<JobLogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                let lines = jobs_client(channel).logs(onward(request)?).await;
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
                jobs_client(channel).cancel(onward(request)?).await.map_err(not_answered)
            }
            Route::Here(coordinator) => {
                let view = coordinator.cancel_job(request.into_inner().id).await.map_err(status)?;
                Ok(Response::new(self.job(&view)))
            }
        }
    }

    async fn pause(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        match self.route.route()? {
            Route::There(channel) => jobs_client(channel).pause(onward(request)?).await.map_err(not_answered),
            Route::Here(coordinator) => {
                let by = match whose(&request).as_str() {
                    "" => "a person".to_owned(),
                    key => format!("the key {key}"),
                };
                let view = coordinator.pause_job(request.into_inner().id, by).await.map_err(status)?;
                Ok(Response::new(self.job(&view)))
            }
        }
    }

    async fn resume(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        match self.route.route()? {
            Route::There(channel) => {
                jobs_client(channel).resume(onward(request)?).await.map_err(not_answered)
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
                jobs_client(channel).publish(onward(request)?).await.map_err(not_answered)
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
        let part = if state { DownloadPart::All } else { DownloadPart::Result };
        let pieces = self.files.download(id, checkpoint, part);
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
