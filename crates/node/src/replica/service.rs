//! `Replica`: the schedulers of this node, for fronts on other nodes.

use crate::schedulers::Schedulers;
use crate::wire;
use crate::workers::Workers;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use mlxnode_coordinator::scheduler::RunError;
use mlxnode_proto::internal::v1::replica_server::Replica;
use mlxnode_proto::internal::v1::{
    MemoryRequest, MemoryResponse, RunEvent, RunRequest, TextFilesRequest, TextFilesResponse,
};
use tonic::{Request, Response, Status};

/// The service on one node.
pub(crate) struct ReplicaService {
    pub(crate) schedulers: Schedulers,
    pub(crate) workers: Workers,
}

#[tonic::async_trait]
impl Replica for ReplicaService {
    type RunStream = BoxStream<'static, Result<RunEvent, Status>>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        // The front enforces the client's deadline by dropping the call.
        let request = request.into_inner();
        let deployment = request.deployment.clone();
        let run = wire::run(request, None)?;
        let events = match self.schedulers.run(&deployment, run) {
            Ok(events) => events.boxed(),
            Err(error) => futures::stream::once(async { Err(error) }).boxed(),
        };
        Ok(Response::new(events.map(wire::run_event_to_proto).boxed()))
    }

    async fn text_files(
        &self,
        request: Request<TextFilesRequest>,
    ) -> Result<Response<TextFilesResponse>, Status> {
        let files =
            self.schedulers.text_files(&request.into_inner().deployment).await.map_err(
                |error| match error {
                    RunError::Unavailable(text) => Status::unavailable(text),
                    error => Status::internal(error.to_string()),
                },
            )?;
        let files = files.iter().map(|(name, bytes)| (name.to_owned(), bytes.to_vec().into())).collect();
        Ok(Response::new(TextFilesResponse { files }))
    }

    async fn memory(&self, request: Request<MemoryRequest>) -> Result<Response<MemoryResponse>, Status> {
        let memory = self.workers.memory_of(&request.into_inner().deployment).await;
        Ok(Response::new(MemoryResponse { active_bytes: memory.active.0, peak_bytes: memory.peak.0 }))
    }
}
