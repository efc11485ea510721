//! A whole worker within a process: listener, services and the shard behind them.

use crate::compute_thread::StageFactory;
use crate::error::Fault;
use crate::lifeline::Lifeline;
use crate::service::Services;
use crate::shard_state::ShardState;
use mlxnode_cluster::{Identity, KeyPin, ServeOptions};
use mlxnode_compute::SpanSink;
use mlxnode_proto::internal::v1::stage_server::StageServer;
use mlxnode_proto::internal::v1::worker_server::WorkerServer;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;
use tracing::debug;

/// How a worker treats its neighbours and its end.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// How long the links to both neighbours may take to be made after `SetLinks`.
    pub link_deadline: Duration,
    /// How long the step under way may take to finish when the worker ends.
    pub end_within: Duration,
    /// Where spans of requests go, when somebody collects them.
    pub spans: Option<Arc<dyn SpanSink>>,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self { link_deadline: Duration::from_secs(10), end_within: Duration::from_secs(3), spans: None }
    }
}

/// A prompt of a million tokens takes about 4 MB; larger messages are refused.
const LARGEST_MESSAGE: usize = 8 << 20;
/// How long connections may go on when the worker ends: enough for the last status to reach the other side.
const CONNECTION_GRACE: Duration = Duration::from_millis(200);

/// A running worker. The process `mlxnode worker` is one of these and its parent's pipe; tests run several in one process.
/// Dropping it ends it at once.
#[derive(Debug)]
pub struct LocalWorker {
    address: SocketAddr,
    key_pin: KeyPin,
    lifeline: Lifeline,
    task: AbortOnDropHandle<Result<(), Fault>>,
}

impl LocalWorker {
    /// Serves on `listener` under `identity`; only `parent` may load and link the shard.
    ///
    /// # Errors
    /// When the listener has no address.
    pub fn start(
        options: WorkerOptions,
        listener: TcpListener,
        identity: Identity,
        parent: KeyPin,
        load: StageFactory,
    ) -> Result<Self, Fault> {
        let address = listener.local_addr().map_err(|error| Fault::Listener(error.to_string()))?;
        let key_pin = identity.key_pin();
        let lifeline = Lifeline::default();
        let life = live(options, listener, Arc::new(identity), parent, load, lifeline.clone());
        Ok(Self { address, key_pin, task: AbortOnDropHandle::new(tokio::spawn(life)), lifeline })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its key.
    pub fn key_pin(&self) -> KeyPin {
        self.key_pin
    }

    /// Cancelled when the worker begins to end.
    pub fn ending(&self) -> CancellationToken {
        self.lifeline.token().clone()
    }

    /// Waits until it has ended, by a fault or by [`Self::stop`].
    ///
    /// # Errors
    /// The fault that ended it.
    pub async fn ended(&mut self) -> Result<(), Fault> {
        (&mut self.task).await.unwrap_or_else(|error| Err(Fault::Device(error.to_string())))
    }

    /// Asks it to end; [`Self::ended`] tells when it has.
    pub fn stop(&self) {
        self.lifeline.finish();
    }
}

impl Drop for LocalWorker {
    fn drop(&mut self) {
        self.lifeline.finish(); // ends the tasks that its own task would have waited for
    }
}

async fn live(
    options: WorkerOptions,
    listener: TcpListener,
    identity: Arc<Identity>,
    parent: KeyPin,
    load: StageFactory,
    lifeline: Lifeline,
) -> Result<(), Fault> {
    let shard_state =
        ShardState::new(parent, identity.clone(), load, options.link_deadline, lifeline.clone());
    let shard_state = Arc::new(shard_state.telling(options.spans));
    let services = Services { shard_state: shard_state.clone() };
    let routes = Routes::new(WorkerServer::new(services.clone()))
        .add_service(StageServer::new(services).max_decoding_message_size(LARGEST_MESSAGE));
    let shutdown = CancellationToken::new();
    let serve_options = ServeOptions { grace: CONNECTION_GRACE, ..ServeOptions::default() };
    let access = shard_state.access.clone();
    let server = mlxnode_cluster::serve(listener, identity, access, routes, serve_options, shutdown.clone());
    let mut server = AbortOnDropHandle::new(tokio::spawn(server));

    tokio::select! {
        () = lifeline.token().cancelled() => {}
        ended = &mut server => {
            let reason = match ended {
                Ok(Ok(())) => "it ended by itself".to_owned(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            lifeline.fail(Fault::Listener(reason));
        }
    }
    // First the neighbours learn of it (their streams end), then the stage is dropped, which may wait for a step.
    debug!(fault = ?lifeline.fault(), "the worker ends");
    let shard_ends = shard_state.end(options.end_within);
    let listener_ends = async {
        shutdown.cancel();
        if !server.is_finished() {
            let _ = (&mut server).await; // bounded by the grace; the fault, if any, is known already
        }
    };
    tokio::join!(shard_ends, listener_ends);
    lifeline.fault().map_or(Ok(()), Err)
}
