//! The network side of a stage: a listener on a thread of its own.

use super::link::LineLink;
use super::service::LineService;
use super::shared::Shared;
use crate::listening::{CollectiveError, Listening, Serving};
use mlxnode_cluster::KeyPin;
use mlxnode_proto::internal::v1::stage_line_server::StageLineServer;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tonic::service::Routes;

/// A piece of hidden vectors or of a file is 1 MiB.
pub(super) const LARGEST_MESSAGE: usize = 2 << 20;

/// How a stage behaves.
#[derive(Clone, Debug)]
pub struct StageOptions {
    /// The address to listen on.
    pub listen: IpAddr,
    /// A folder of this stage alone, for files on their way.
    pub folder: PathBuf,
    /// How long another stage may take to be there once the node has said where.
    pub form_within: Duration,
    /// How long the trainer waits for a stage that is there but says nothing. The last resort: one that is lost is noticed at once.
    pub patience: Duration,
}

impl StageOptions {
    /// With `folder` for files on their way.
    pub fn new(listen: IpAddr, folder: PathBuf) -> Self {
        Self { listen, folder, form_within: Duration::from_secs(20), patience: Duration::from_secs(1800) }
    }
}

/// A stage's listener. Dropping it ends all lanes and the thread.
pub struct StageEndpoint {
    shared: Arc<Shared>,
    serving: Serving,
}

impl std::fmt::Debug for StageEndpoint {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("StageEndpoint").field("address", &self.serving.address).finish_non_exhaustive()
    }
}

impl StageEndpoint {
    /// Listens as stage `stage` of `stages`, with a key of its own; only `parent` may say who the others are.
    ///
    /// # Errors
    /// When there is no such stage, the address cannot be listened on, or the thread cannot be started.
    pub fn start(
        options: StageOptions,
        stage: usize,
        stages: usize,
        parent: KeyPin,
    ) -> Result<Self, CollectiveError> {
        if !(2..=super::MOST_STAGES).contains(&stages) || stage >= stages {
            return Err(CollectiveError::NoStage { stage, stages });
        }
        let listening = Listening::bind(options.listen)?;
        let (identity, runtime) = (listening.identity.clone(), listening.runtime());
        let shared = Arc::new(Shared::new((stage, stages), parent, options, identity, runtime));
        let service = LineService { shared: shared.clone(), controlled: Arc::default() };
        let service = StageLineServer::new(service).max_decoding_message_size(LARGEST_MESSAGE);
        let ended = {
            let shared = shared.clone();
            move || shared.over.now("the stage's listener has ended")
        };
        let end = shared.over.token().clone();
        let (access, tasks) = (shared.access.clone(), shared.tasks.clone());
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

    /// The trainer's side. Of several only the first one has anything to say.
    pub fn link(&self) -> LineLink {
        LineLink::new(self.shared.clone())
    }
}

impl Drop for StageEndpoint {
    fn drop(&mut self) {
        self.shared.over.now("the process ends");
        self.serving.join();
    }
}
