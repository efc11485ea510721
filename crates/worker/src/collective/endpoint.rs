//! The network side of a training job's worker: a listener on a thread of its own.

use super::group::Group;
use super::service::CollectiveService;
use super::shared::Shared;
use crate::listening::{CollectiveError, Listening, Serving};
use mlxnode_cluster::KeyPin;
use mlxnode_collective::MemberId;
use mlxnode_proto::internal::v1::collective_server::CollectiveServer;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tonic::service::Routes;

/// A piece of a gradient or of a state is 1 MiB.
const LARGEST_MESSAGE: usize = 2 << 20;

/// How a worker of a group behaves.
#[derive(Clone, Debug)]
pub struct CollectiveOptions {
    /// The address to listen on.
    pub listen: IpAddr,
    /// A folder of this worker alone, for states on their way.
    pub folder: PathBuf,
    /// How long another member may take to come to the same formation.
    pub form_within: Duration,
    /// How long another member may take to write its state, and to send the next piece of it.
    pub state_within: Duration,
    /// How long the trainer waits for an answer. The last resort: the rounds know better, and earlier, who is missing.
    pub patience: Duration,
}

impl CollectiveOptions {
    /// With `folder` for states on their way.
    pub fn new(listen: IpAddr, folder: PathBuf) -> Self {
        Self {
            listen,
            folder,
            form_within: Duration::from_secs(10),
            state_within: Duration::from_secs(300),
            patience: Duration::from_secs(3600),
        }
    }
}

/// A worker's listener. Dropping it ends all streams and the thread.
pub struct CollectiveEndpoint {
    shared: Arc<Shared>,
    serving: Serving,
}

impl std::fmt::Debug for CollectiveEndpoint {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("CollectiveEndpoint").field("address", &self.serving.address).finish_non_exhaustive()
    }
}

impl CollectiveEndpoint {
    /// Listens as worker `me`, with a key of its own; only `parent` may say who the others are.
    ///
    /// # Errors
    /// When the address cannot be listened on, or the thread cannot be started.
    pub fn start(options: CollectiveOptions, me: MemberId, parent: KeyPin) -> Result<Self, CollectiveError> {
        let listening = Listening::bind(options.listen)?;
        let shared = Shared::new(me, parent, options, listening.identity.clone(), listening.runtime());
        let shared = Arc::new(shared);
        let service = CollectiveService { shared: shared.clone(), controlled: Arc::default() };
        let service = CollectiveServer::new(service).max_decoding_message_size(LARGEST_MESSAGE);
        let ended = {
            let shared = shared.clone();
            move || shared.leave("the worker's listener has ended")
        };
        let (access, end, tasks) = (shared.access.clone(), shared.end.clone(), shared.tasks.clone());
        let serving = listening.serve(access, Routes::new(service), end, tasks, ended)?;
        Ok(Self { shared, serving })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.serving.address
    }

    /// How long the trainer has waited for the others so far.
    pub fn waited(&self) -> Duration {
        self.shared.waited.total()
    }

    /// Its key.
    pub fn key_pin(&self) -> KeyPin {
        self.serving.key_pin
    }

    /// The trainer is there: its gradient has `values` numbers, in steps of `micro_batches`. Once.
    pub fn join(&self, values: usize, micro_batches: u32) -> Group {
        Group::new(self.shared.clone(), values, micro_batches)
    }
}

impl Drop for CollectiveEndpoint {
    fn drop(&mut self) {
        self.shared.leave("the worker ends");
        self.shared.end.cancel();
        self.serving.join();
    }
}
