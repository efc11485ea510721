//! `NodeControl`: carries out the coordinator's orders on this node.

use crate::observer::NodeObserver;
use crate::panorama::seen_by;
use crate::schedulers::{Schedulers, SchedulersError};
use crate::wire;
use crate::workers::{WorkerEnded, Workers, WorkersError};
use futures::stream::BoxStream;
use mlxnode_api::panorama::node_seen_to_proto;
use mlxnode_cluster::NodeId;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::deployments::AdapterWish;
use mlxnode_coordinator::scheduler::Limits;
use mlxnode_proto::internal::v1::node_control_server::NodeControl;
use mlxnode_proto::internal::v1::{
    DrainRequest, DrainResponse, LinkWorkerRequest, LinkWorkerResponse, LoadNodeAdapterRequest,
    LoadNodeAdapterResponse, ObserveRequest, PrepareModelRequest, PrepareProgress, StartProgress,
    StartSchedulerRequest, StartSchedulerResponse, StartWorkerRequest, StopWorkersRequest,
    StopWorkersResponse, UnloadNodeAdapterRequest, UnloadNodeAdapterResponse, UsageRequest, UsageResponse,
    WatchWorkersRequest, WorkerEvent,
};
use mlxnode_proto::v1::NodeFigures;
use mlxnode_worker::ProcessError;
use std::sync::Arc;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// The service on one node.
pub(crate) struct NodeControlService {
    pub(crate) workers: Workers,
    pub(crate) schedulers: Schedulers,
    pub(crate) own: NodeId,
    pub(crate) observer: Arc<NodeObserver>,
}

type Reports<T> = BoxStream<'static, Result<T, Status>>;

/// Progress reports on their way. When the coordinator does not read, older ones are worth nothing and are left out.
const REPORTS: usize = 8;

#[tonic::async_trait]
impl NodeControl for NodeControlService {
    type PrepareModelStream = Reports<PrepareProgress>;
    type StartWorkerStream = Reports<StartProgress>;
    type WatchWorkersStream = Reports<WorkerEvent>;

    async fn prepare_model(
        &self,
        request: Request<PrepareModelRequest>,
    ) -> Result<Response<Self::PrepareModelStream>, Status> {
        let workers = self.workers.clone();
        let source = request.into_inner().source;
        Ok(Response::new(reporting(move |sender| async move {
            let report = move |done: ByteCount, total: ByteCount| {
                let progress =
                    PrepareProgress { done_bytes: done.0, total_bytes: total.0, ..Default::default() };
                let _ = sender.try_send(Ok(progress)); // a report that does not fit is soon followed by a newer one
            };
            let prepared = workers.prepare(&source, report).await.map_err(status)?;
            Ok(PrepareProgress { fingerprint: prepared.to_vec().into(), ..Default::default() })
        })))
    }

    async fn start_worker(
        &self,
        request: Request<StartWorkerRequest>,
    ) -> Result<Response<Self::StartWorkerStream>, Status> {
        let request = request.into_inner();
        let attempt = wire::attempt(request.deployment, request.fence)?;
        let shard = wire::shard(request.shard)?;
        let workers = self.workers.clone();
        Ok(Response::new(reporting(move |sender| async move {
            let report = move |done: ByteCount, total: ByteCount| {
                let _ = sender.try_send(Ok(StartProgress {
                    done_bytes: done.0,
                    total_bytes: total.0,
                    started: None,
                }));
            };
            let started = workers.start(&attempt, &request.source, shard, report).await.map_err(status)?;
            let bytes = started.weights.0;
            let started = Some(wire::started_to_proto(started));
            Ok(StartProgress { done_bytes: bytes, total_bytes: bytes, started })
        })))
    }

    async fn link_worker(
        &self,
        request: Request<LinkWorkerRequest>,
    ) -> Result<Response<LinkWorkerResponse>, Status> {
        let request = request.into_inner();
        let attempt = wire::attempt(request.deployment, request.fence)?;
        self.workers.link(&attempt, request.pid, wire::links(request.links)?).await.map_err(status)?;
        Ok(Response::new(LinkWorkerResponse {}))
    }

    async fn stop_workers(
        &self,
        request: Request<StopWorkersRequest>,
    ) -> Result<Response<StopWorkersResponse>, Status> {
        let request = request.into_inner();
        let attempt = wire::attempt(request.deployment, request.fence)?;
        self.schedulers.stop(&attempt).await;
        self.workers.stop(&attempt).await.map_err(status)?;
        Ok(Response::new(StopWorkersResponse {}))
    }

    async fn start_scheduler(
        &self,
        request: Request<StartSchedulerRequest>,
    ) -> Result<Response<StartSchedulerResponse>, Status> {
        let request = request.into_inner();
        let attempt = wire::attempt(request.deployment, request.fence)?;
        if !request.run {
            self.schedulers.stop(&attempt).await;
            return Ok(Response::new(StartSchedulerResponse {}));
        }
        let [contexts, tokens, fixed] = [request.max_sequences, request.context_tokens, request.fixed_tokens]
            .map(|number| number as usize);
        let limits = Limits::shared(contexts, tokens, fixed);
        self.schedulers.start(attempt, request.source, limits).await.map_err(|error| match error {
            SchedulersError::Workers(error) => status(error),
            SchedulersError::Text(text) => Status::failed_precondition(text),
            SchedulersError::Drive(text) => Status::unavailable(text),
        })?;
        Ok(Response::new(StartSchedulerResponse {}))
    }

    async fn load_adapter(
        &self,
        request: Request<LoadNodeAdapterRequest>,
    ) -> Result<Response<LoadNodeAdapterResponse>, Status> {
        let LoadNodeAdapterRequest { deployment, fence, name, source, load, room_bytes } =
            request.into_inner();
        let attempt = wire::attempt(deployment, fence)?;
        let adapter = AdapterWish { name, source, load };
        let memory =
            self.workers.load_adapter(&attempt, &adapter, ByteCount(room_bytes)).await.map_err(status)?;
        Ok(Response::new(LoadNodeAdapterResponse { memory_bytes: memory.0 }))
    }

    async fn unload_adapter(
        &self,
        request: Request<UnloadNodeAdapterRequest>,
    ) -> Result<Response<UnloadNodeAdapterResponse>, Status> {
        let UnloadNodeAdapterRequest { deployment, fence, key } = request.into_inner();
        let attempt = wire::attempt(deployment, fence)?;
        self.workers.unload_adapter(&attempt, &key).await.map_err(status)?;
        Ok(Response::new(UnloadNodeAdapterResponse {}))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let UsageRequest { deployment, fence } = request.into_inner();
        let usage = self.schedulers.usage(&wire::attempt(deployment, fence)?);
        let usage = usage.map_err(|error| Status::not_found(error.to_string()))?;
        Ok(Response::new(UsageResponse {
            busy: u32::try_from(usage.busy).unwrap_or(u32::MAX),
            idle_millis: u64::try_from(usage.idle.as_millis()).unwrap_or(u64::MAX),
        }))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        let DrainRequest { deployment, fence } = request.into_inner();
        let drained = self.schedulers.drain(&wire::attempt(deployment, fence)?).await;
        drained.map_err(|error| Status::not_found(error.to_string()))?;
        Ok(Response::new(DrainResponse {}))
    }

    async fn watch_workers(
        &self,
        _request: Request<WatchWorkersRequest>,
    ) -> Result<Response<Self::WatchWorkersStream>, Status> {
        let ends = self.workers.watch();
        Ok(Response::new(Box::pin(futures::stream::unfold(ends, next_end))))
    }

    async fn observe(&self, _request: Request<ObserveRequest>) -> Result<Response<NodeFigures>, Status> {
        Ok(Response::new(node_seen_to_proto(&seen_by(self.own, &self.observer).await)))
    }
}

type Ends = broadcast::Receiver<WorkerEnded>;

async fn next_end(mut ends: Ends) -> Option<(Result<WorkerEvent, Status>, Ends)> {
    let event = match ends.recv().await {
        Ok(WorkerEnded { attempt, pid, reason }) => {
            Ok(WorkerEvent { deployment: attempt.name, epoch: attempt.epoch, pid, reason })
        }
        Err(broadcast::error::RecvError::Lagged(missed)) => {
            Err(Status::data_loss(format!("{missed} ends of workers were missed")))
        }
        Err(broadcast::error::RecvError::Closed) => return None,
    };
    Some((event, ends))
}

/// Runs work that reports progress and ends with a last report; dropping the stream gives the work up.
fn reporting<T, F>(work: impl FnOnce(mpsc::Sender<Result<T, Status>>) -> F) -> Reports<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Status>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(REPORTS);
    let last = sender.clone();
    let work = work(sender);
    let task = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        let result = work.await;
        let _ = last.send(result).await; // nobody listens any more: then nobody needs the result
    }));
    let stream = ReceiverStream::new(receiver);
    Box::pin(futures::stream::unfold((stream, task), |(mut stream, task)| async move {
        let report = futures::StreamExt::next(&mut stream).await?;
        Some((report, (stream, task)))
    }))
}

fn status(error: WorkersError) -> Status {
    let text = crate::error::chain(&error);
    match error {
        WorkersError::Stale { .. } | WorkersError::Stopped { .. } | WorkersError::NoRoom { .. } => {
            Status::failed_precondition(text)
        }
        WorkersError::UnknownWorker { .. } | WorkersError::Model(_) | WorkersError::Away(_) => {
            Status::not_found(text)
        }
        WorkersError::Process(ProcessError::Refused(_)) => Status::failed_precondition(text),
        WorkersError::Process(_) => Status::aborted(text),
    }
}
