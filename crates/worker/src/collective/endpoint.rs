//! The network side of a training job's worker: a listener on a thread of its own.

use super::group::Group;
use super::service::CollectiveService;
use super::shared::Shared;
use mlxnode_cluster::{Identity, KeyPin, ServeOptions};
use mlxnode_collective::MemberId;
use mlxnode_proto::internal::v1::collective_server::CollectiveServer;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tracing::debug;

/// A piece of a gradient or of a state is 1 MiB.
const LARGEST_MESSAGE: usize = 2 << 20;
/// How long streams may go on when the worker ends.
const CONNECTION_GRACE: Duration = Duration::from_millis(200);

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

/// The network side cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// The system refused something.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// No key could be made.
    #[error("cannot make a key")]
    Key(#[source] mlxnode_cluster::KeyError),
}

/// A worker's listener. Dropping it ends all streams and the thread.
pub struct CollectiveEndpoint {
    shared: Arc<Shared>,
    address: SocketAddr,
    key_pin: KeyPin,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for CollectiveEndpoint {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("CollectiveEndpoint").field("address", &self.address).finish_non_exhaustive()
    }
}

impl CollectiveEndpoint {
    /// Listens as worker `me`, with a key of its own; only `parent` may say who the others are.
    ///
    /// # Errors
    /// When the address cannot be listened on, or the thread cannot be started.
    pub fn start(options: CollectiveOptions, me: MemberId, parent: KeyPin) -> Result<Self, CollectiveError> {
        let system = |what| move |source| CollectiveError::System { what, source };
        let identity = Arc::new(Identity::generate().map_err(CollectiveError::Key)?);
        let key_pin = identity.key_pin();
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(system("start the runtime of the gradients' exchange"))?;
        let listening = system("listen for the other workers of the job");
        let listener = std::net::TcpListener::bind((options.listen, 0))
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(listening)?;
        let listener = {
            let _within = runtime.enter();
            TcpListener::from_std(listener).map_err(system("listen for the other workers of the job"))?
        };
        let address = listener.local_addr().map_err(system("learn the listener's address"))?;
        let shared = Shared::new(me, parent, options, identity.clone(), runtime.handle().clone());
        let shared = Arc::new(shared);
        let serving = serve(shared.clone(), listener, identity);
        let thread = std::thread::Builder::new()
            .name("collective".to_owned())
            .spawn(move || runtime.block_on(serving))
            .map_err(system("start the thread of the gradients' exchange"))?;
        Ok(Self { shared, address, key_pin, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its key.
    pub fn key_pin(&self) -> KeyPin {
        self.key_pin
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
        if let Some(thread) = self.thread.take() {
            // It ends within the grace; a panic in it has been told already.
            let _ = thread.join();
        }
    }
}

async fn serve(shared: Arc<Shared>, listener: TcpListener, identity: Arc<Identity>) {
    let service = CollectiveService { shared: shared.clone(), controlled: Arc::default() };
    let service = CollectiveServer::new(service).max_decoding_message_size(LARGEST_MESSAGE);
    let shutdown = CancellationToken::new();
    let options = ServeOptions { grace: CONNECTION_GRACE, ..ServeOptions::default() };
    let access = shared.access.clone();
    let server =
        mlxnode_cluster::serve(listener, identity, access, Routes::new(service), options, shutdown.clone());
    let ending = async {
        shared.end.cancelled().await;
        shutdown.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = server => {
            debug!(?ended, "the listener of the gradients' exchange has ended");
            shared.leave("the worker's listener has ended");
        }
        () = ending => {}
    }
    shared.tasks.close();
    // Streams out: they are cancelled with `end`.
    let _ = tokio::time::timeout(CONNECTION_GRACE, shared.tasks.wait()).await;
}
