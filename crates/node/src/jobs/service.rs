//! `JobRunner`: what other nodes ask of this one for jobs.

use super::bundle;
use super::client::{json, parsed};
use super::helpers::{Helped, Joined};
use super::peer_client::on_disk;
use super::runner::Runners;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use mlxnode_cluster::{KeyPin, PeerKey};
use mlxnode_collective::MemberId;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Checkpoint, ContentHash};
use mlxnode_proto::internal::v1::job_runner_server::JobRunner;
use mlxnode_proto::internal::v1::{
    ContentPiece, CopyCheckpointRequest, CopyCheckpointResponse, ForgetFileRequest, ForgetFileResponse,
    HelpJobReport, HelpJobRequest, KeptFilesRequest, KeptFilesResponse, ReadCheckpointRequest,
    ReadContentRequest, RunJobReport, RunJobRequest, StopJobRequest, StopJobResponse, TidyJobsRequest,
    TidyJobsResponse,
};
use std::collections::VecDeque;
use std::io::SeekFrom;
use std::path::PathBuf;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tonic::{Request, Response, Status};

/// Largest piece of a file.
const PIECE: usize = 1 << 20;

/// The service on one node.
pub(crate) struct JobRunnerService {
    pub(crate) runners: Runners,
}

fn status(error: Error) -> Status {
    let text = error.to_string();
    match error {
        Error::Invalid(_) => Status::invalid_argument(text),
        Error::TooMany(_) => Status::resource_exhausted(text),
        Error::Failed(_) => Status::internal(text),
        _ => Status::failed_precondition(text),
    }
}

fn hash(bytes: &[u8]) -> Result<ContentHash, Status> {
    ContentHash::try_from(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

/// The bytes of files, one after the other, from `offset` of the first.
pub(super) fn pieces(
    files: impl IntoIterator<Item = PathBuf>,
    offset: u64,
) -> BoxStream<'static, std::io::Result<(usize, bytes::Bytes)>> {
    let files: VecDeque<PathBuf> = files.into_iter().collect();
    let state = (files, None::<tokio::fs::File>, offset, 0_usize);
    let stream = futures::stream::try_unfold(state, |(mut files, mut open, offset, mut number)| async move {
        loop {
            let file = match &mut open {
                Some(file) => file,
                None => {
                    let Some(path) = files.pop_front() else { return Ok(None) };
                    let mut file = tokio::fs::File::open(path).await?;
                    if number == 0 {
                        file.seek(SeekFrom::Start(offset)).await?;
                    }
                    number += 1;
                    open.insert(file)
                }
            };
            let mut data = Vec::with_capacity(PIECE);
            if (&mut *file).take(PIECE as u64).read_to_end(&mut data).await? == 0 {
                open = None;
                continue;
            }
            return Ok(Some(((number - 1, bytes::Bytes::from(data)), (files, open, offset, number))));
        }
    });
    stream.boxed()
}

fn told(piece: std::io::Result<(usize, bytes::Bytes)>) -> Result<ContentPiece, Status> {
    match piece {
        Ok((_, data)) => Ok(ContentPiece { data }),
        Err(error) => Err(Status::data_loss(error.to_string())),
    }
}

#[tonic::async_trait]
impl JobRunner for JobRunnerService {
    type RunStream = BoxStream<'static, Result<RunJobReport, Status>>;
    type HelpStream = BoxStream<'static, Result<HelpJobReport, Status>>;
    type ReadContentStream = BoxStream<'static, Result<ContentPiece, Status>>;
    type ReadCheckpointStream = BoxStream<'static, Result<ContentPiece, Status>>;

    async fn run(&self, request: Request<RunJobRequest>) -> Result<Response<Self::RunStream>, Status> {
        let order = parsed(&request.into_inner().order, "the order of a job").map_err(status)?;
        let running = self.runners.run(order).await.map_err(status)?;
        let messages = futures::stream::unfold(Some(running), |running| async move {
            let mut running = running?;
            if let Some(report) = running.reports.recv().await {
                let message = json(&report).map(|report| RunJobReport { report, ..Default::default() });
                return Some((message.map_err(status), Some(running)));
            }
            let end = match (&mut running.end).await {
                Ok(Ok(end)) => json(&end).map(|end| RunJobReport { end, ..Default::default() }),
                Ok(Err(error)) => Err(error),
                Err(_) => Err(Error::Failed("the job's runner ended without a word".into())),
            };
            Some((end.map_err(status), None))
        });
        Ok(Response::new(messages.boxed()))
    }

    async fn help(&self, request: Request<HelpJobRequest>) -> Result<Response<Self::HelpStream>, Status> {
        let leader = request.extensions().get::<PeerKey>().map(|peer| peer.pin);
        let leader = leader.ok_or_else(|| Status::unauthenticated("the connection has no key"))?;
        let HelpJobRequest { order, member } = request.into_inner();
        let order = parsed(&order, "the order of a job").map_err(status)?;
        let helper = self.runners.help(order, MemberId(member), leader).map_err(status)?;
        let messages = futures::stream::unfold(Some(helper), |helper| async move {
            let mut helper = helper?;
            match helper.next().await {
                Ok(Some(Helped::Joined(Joined { at, exchange }))) => {
                    let pin = |key_pin: KeyPin| bytes::Bytes::from(key_pin.as_bytes().to_vec());
                    let report = HelpJobReport {
                        address: at.0.to_string(),
                        key_pin: pin(at.1),
                        exchange_address: exchange
                            .map(|(address, _)| address.to_string())
                            .unwrap_or_default(),
                        exchange_key_pin: exchange.map(|(_, key_pin)| pin(key_pin)).unwrap_or_default(),
                        ..HelpJobReport::default()
                    };
                    Some((Ok(report), Some(helper)))
                }
                Ok(Some(Helped::Leaves)) => {
                    Some((Ok(HelpJobReport { leaves: true, ..HelpJobReport::default() }), Some(helper)))
                }
                Ok(None) => None,
                Err(error) => Some((Err(status(error)), None)),
            }
        });
        Ok(Response::new(messages.boxed()))
    }

    async fn stop(&self, request: Request<StopJobRequest>) -> Result<Response<StopJobResponse>, Status> {
        let StopJobRequest { id, epoch, saves } = request.into_inner();
        self.runners.stop(&id, epoch, saves);
        Ok(Response::new(StopJobResponse {}))
    }

    async fn copy(
        &self,
        request: Request<CopyCheckpointRequest>,
    ) -> Result<Response<CopyCheckpointResponse>, Status> {
        let CopyCheckpointRequest { spec, step, hash: name, bytes } = request.into_inner();
        let spec = parsed(&spec, "a job").map_err(status)?;
        let checkpoint = Checkpoint { step, hash: hash(&name)?, bytes };
        self.runners.copy(&spec, &checkpoint).await.map_err(status)?;
        Ok(Response::new(CopyCheckpointResponse {}))
    }

    async fn tidy(&self, request: Request<TidyJobsRequest>) -> Result<Response<TidyJobsResponse>, Status> {
        let wanted = parsed(&request.into_inner().wanted, "what of jobs is wanted").map_err(status)?;
        let held = self.runners.tidy(wanted).await.map_err(status)?;
        let held = held.iter().map(|hash| hash.as_bytes().to_vec().into()).collect();
        Ok(Response::new(TidyJobsResponse { held }))
    }

    async fn kept_files(
        &self,
        _request: Request<KeptFilesRequest>,
    ) -> Result<Response<KeptFilesResponse>, Status> {
        let store = self.runners.peers().store.clone();
        let kept = on_disk("looking for files", move || store.kept()).await.map_err(status)?;
        Ok(Response::new(KeptFilesResponse { files: json(&kept).map_err(status)? }))
    }

    async fn forget_file(
        &self,
        request: Request<ForgetFileRequest>,
    ) -> Result<Response<ForgetFileResponse>, Status> {
        let (store, id) = (self.runners.peers().store.clone(), request.into_inner().id);
        on_disk("forgetting a file", move || store.forget(&id)).await.map_err(status)?;
        Ok(Response::new(ForgetFileResponse {}))
    }

    async fn read_content(
        &self,
        request: Request<ReadContentRequest>,
    ) -> Result<Response<Self::ReadContentStream>, Status> {
        let ReadContentRequest { hash: name, offset } = request.into_inner();
        let file = self.runners.peers().store.find(hash(&name)?);
        let file = file.ok_or_else(|| Status::not_found("this node does not have the file"))?;
        Ok(Response::new(pieces([file], offset).map(told).boxed()))
    }

    async fn read_checkpoint(
        &self,
        request: Request<ReadCheckpointRequest>,
    ) -> Result<Response<Self::ReadCheckpointStream>, Status> {
        let ReadCheckpointRequest { id, hash: name } = request.into_inner();
        let hash = hash(&name)?;
        let job = self.runners.peers().store.job(&id);
        let job = job.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let folder = bundle::folder_of(&job, hash);
        // Whoever asks checks every hash: here only the manifest is looked at.
        let (manifest, bytes) = bundle::manifest(&folder, hash)
            .map_err(|_| Status::not_found("this node does not have the checkpoint"))?;
        let files: Vec<PathBuf> = manifest.files.iter().map(|file| folder.join(&file.name)).collect();
        let first = futures::stream::once(async move { Ok(ContentPiece { data: bytes.into() }) });
        Ok(Response::new(first.chain(pieces(files, 0).map(told)).boxed()))
    }
}
