//! What a worker answers: its own node (`Worker`), the stage before it and its scheduler (`Stage`).
//!
//! TLS lets in only the parent's, the neighbour's and the drivers' keys; here each is held to what it may ask.

use crate::compute_thread::{BlockRoom, Guessing, LoadShard};
use crate::drive::session::{SESSION_EVENTS, Session};
use crate::errand::Order;
use crate::error::Fault;
use crate::shard_state::{LinkEnd, LoadedShard, ShardState};
use mlxnode_cluster::PeerKey;
use mlxnode_compute::{Activation, ByteCount, LayerRange, StageInfo};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::stage_server::Stage;
use mlxnode_proto::internal::v1::worker_server::Worker;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Between two reports of how far loading is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Most sequences that a shard may be asked to hold.
const MOST_SEQUENCES: usize = 1024;
/// Longest name of an adapter and longest path of its folder, in bytes.
const LONGEST_NAME: usize = 256;
const LONGEST_PATH: usize = 4096;
/// Longest chunk that a shard may be asked to work on at once.
const LONGEST_CHUNK: usize = 8192;

/// The services of one worker.
#[derive(Clone)]
pub(crate) struct Services {
    pub(crate) shard_state: Arc<ShardState>,
}

fn caller<T>(request: &Request<T>) -> Result<PeerKey, Status> {
    let peer = request.extensions().get::<PeerKey>().copied();
    peer.ok_or_else(|| Status::unauthenticated("the connection has no key"))
}

impl Services {
    fn require_parent<T>(&self, request: &Request<T>) -> Result<(), Status> {
        if caller(request)?.pin == self.shard_state.parent {
            Ok(())
        } else {
            Err(Status::permission_denied("only the node that started this worker may ask this"))
        }
    }
}

#[tonic::async_trait]
impl Worker for Services {
    type LoadStream = ReceiverStream<Result<proto::LoadShardProgress, Status>>;

    async fn load(
        &self,
        request: Request<proto::LoadShardRequest>,
    ) -> Result<Response<Self::LoadStream>, Status> {
        self.require_parent(&request)?;
        let request = request.into_inner();
        let shard = shard_from_proto(&request)?;
        let mut loading = self.shard_state.begin_load(shard.clone())?;
        let (reports, stream) = mpsc::channel(4);
        let shard_state = self.shard_state.clone();
        self.shard_state.spawn_to_the_end(async move {
            let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
            let outcome = loop {
                tokio::select! {
                    biased; // a failure to load ends the worker, but is to be reported first
                    outcome = &mut loading.loaded => break outcome,
                    () = shard_state.ending() => break Ok(Err(Fault::Load(shard_state.last_words()))),
                    _ = ticks.tick() => {
                        let (done_bytes, total_bytes) = *loading.progress.borrow();
                        if total_bytes > 0 {
                            // A slow reader misses reports, not the outcome.
                            let report = proto::LoadShardProgress { done_bytes, total_bytes, loaded: false };
                            let _ = reports.try_send(Ok(report));
                        }
                    }
                }
            };
            let outcome = outcome.unwrap_or_else(|_| Err(Fault::Device("the compute thread ended".into())));
            let checked = outcome.map_err(|fault| match fault {
                Fault::Load(reason) => Status::failed_precondition(reason),
                fault => Status::internal(fault.to_string()),
            });
            let checked = checked.and_then(|info| {
                check_info(&info, &shard)?;
                let weights = info.weights.0;
                shard_state.loaded(LoadedShard { info, shard, epoch: request.epoch });
                Ok(proto::LoadShardProgress { done_bytes: weights, total_bytes: weights, loaded: true })
            });
            let _ = reports.send(checked).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn set_links(
        &self,
        request: Request<proto::WorkerLinks>,
    ) -> Result<Response<proto::SetLinksResponse>, Status> {
        self.require_parent(&request)?;
        self.shard_state.set_links(request.into_inner())?;
        Ok(Response::new(proto::SetLinksResponse {}))
    }

    async fn load_adapter(
        &self,
        request: Request<proto::LoadShardAdapterRequest>,
    ) -> Result<Response<proto::LoadShardAdapterResponse>, Status> {
        self.require_parent(&request)?;
        let proto::LoadShardAdapterRequest { name, folder } = request.into_inner();
        bounded("name", &name, LONGEST_NAME)?;
        bounded("folder", &folder, LONGEST_PATH)?;
        self.shard_state.errand(Order::LoadAdapter { name, folder: folder.into() }).await?;
        Ok(Response::new(proto::LoadShardAdapterResponse {}))
    }

    async fn unload_adapter(
        &self,
        request: Request<proto::UnloadShardAdapterRequest>,
    ) -> Result<Response<proto::UnloadShardAdapterResponse>, Status> {
        self.require_parent(&request)?;
        let name = request.into_inner().name;
        bounded("name", &name, LONGEST_NAME)?;
        self.shard_state.errand(Order::UnloadAdapter { name }).await?;
        Ok(Response::new(proto::UnloadShardAdapterResponse {}))
    }

    async fn stats(
        &self,
        request: Request<proto::StatsRequest>,
    ) -> Result<Response<proto::WorkerStats>, Status> {
        self.require_parent(&request)?;
        let stats = self.shard_state.progress.stats();
        Ok(Response::new(proto::WorkerStats {
            active_bytes: stats.active_bytes,
            peak_bytes: stats.peak_bytes,
            steps: stats.steps,
            open_sequences: stats.open_sequences,
            compute_seconds: stats.compute_time.as_secs_f64(),
            step_seconds: stats.step_time.as_secs_f64(),
            wait_seconds: stats.wait_time.as_secs_f64(),
            send_seconds: stats.send_time.as_secs_f64(),
            prompt_tokens: stats.prompt_tokens,
            decode_tokens: stats.decode_tokens,
            sent_bytes: stats.sent_bytes,
            guessed_tokens: stats.guessed_tokens,
            accepted_tokens: stats.accepted_tokens,
            compute_counts: stats.computes.0.to_vec(),
            wait_counts: stats.waits.0.to_vec(),
            send_counts: stats.sends.0.to_vec(),
        }))
    }
}

#[tonic::async_trait]
impl Stage for Services {
    type LinkStream = ReceiverStream<Result<proto::Credit, Status>>;
    type DriveStream = ReceiverStream<Result<proto::DriveEvent, Status>>;

    async fn link(
        &self,
        request: Request<Streaming<proto::Frame>>,
    ) -> Result<Response<Self::LinkStream>, Status> {
        let pin = caller(&request)?.pin;
        let LinkEnd { plan, inbox } = self.shard_state.take_link(pin)?;
        let credits = self.shard_state.receive_link(request.into_inner(), plan, inbox);
        Ok(Response::new(ReceiverStream::new(credits)))
    }

    async fn drive(
        &self,
        request: Request<Streaming<proto::DriveCommand>>,
    ) -> Result<Response<Self::DriveStream>, Status> {
        let pin = caller(&request)?.pin;
        let sessions = self.shard_state.sessions_for(pin)?;
        let (events, stream) = mpsc::channel(SESSION_EVENTS);
        let session = Session { commands: request.into_inner(), events };
        if sessions.send(session).await.is_err() {
            return Err(Status::unavailable("the worker is ending"));
        }
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

fn bounded(field: &str, text: &str, most: usize) -> Result<(), Status> {
    if (1..=most).contains(&text.len()) {
        return Ok(());
    }
    Err(Status::invalid_argument(format!("{field} has {} bytes, but must have 1 to {most}", text.len())))
}

fn shard_from_proto(request: &proto::LoadShardRequest) -> Result<LoadShard, Status> {
    let spec = request.shard.as_ref().ok_or_else(|| Status::invalid_argument("the request has no shard"))?;
    let shard = LoadShard {
        folder: request.folder.clone().into(),
        layers: LayerRange::new(spec.layer_start as usize, spec.layer_end as usize),
        layer_count: spec.layer_count as usize,
        context_tokens: spec.context_tokens as usize,
        max_sequences: spec.max_sequences as usize,
        prefill_chunk: spec.prefill_chunk as usize,
        blocks: request.blocks.as_ref().map(|room| BlockRoom {
            memory: ByteCount(spec.prompt_bytes),
            disk: ByteCount(room.disk_bytes),
            folder: room.folder.clone().into(),
        }),
        guessing: spec.guessing.as_ref().map(|guessing| Guessing {
            draft: Some(guessing.draft.clone()).filter(|draft| !draft.is_empty()).map(Into::into),
            ngram: guessing.ngram as usize,
            tokens: guessing.tokens as usize,
        }),
    };
    if shard.layers.is_empty() || shard.layers.end > shard.layer_count {
        let text = format!("layers {} of a model of {} layers", shard.layers, shard.layer_count);
        return Err(Status::invalid_argument(text));
    }
    let bounded = [
        ("context_tokens", shard.context_tokens, 1 << 24),
        ("max_sequences", shard.max_sequences, MOST_SEQUENCES),
        ("prefill_chunk", shard.prefill_chunk, LONGEST_CHUNK),
    ];
    for (name, value, most) in bounded {
        if value == 0 || value > most {
            return Err(Status::invalid_argument(format!("{name} is {value}, but must be 1 to {most}")));
        }
    }
    Ok(shard)
}

/// Did the engine load what was asked, and do its activations fit a link?
fn check_info(info: &StageInfo, shard: &LoadShard) -> Result<(), Status> {
    if info.layers != shard.layers || info.layer_count != shard.layer_count {
        return Err(Status::failed_precondition(format!(
            "layers {} of {} were asked for, but the model has {} of {}",
            shard.layers, shard.layer_count, info.layers, info.layer_count
        )));
    }
    let chunk = shard.most_tokens();
    let bytes = chunk.saturating_mul(info.hidden).saturating_mul(info.dtype.size());
    if bytes > Activation::MAX_BYTES {
        return Err(Status::invalid_argument(format!(
            "a step of {chunk} tokens of width {} is larger than {} MiB: choose a smaller prefill_chunk",
            info.hidden,
            Activation::MAX_BYTES >> 20
        )));
    }
    Ok(())
}
