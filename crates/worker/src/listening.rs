//! A listener of a job's worker, on a thread of its own beside the one that computes.

use mlxnode_cluster::{AccessList, Identity, KeyError, KeyPin, PeerKey, ServeOptions};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic::{Request, Status};
use tracing::debug;

/// How long streams may go on when the worker ends.
const CONNECTION_GRACE: Duration = Duration::from_millis(200);

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
    Key(#[source] KeyError),
    /// A place that no line has.
    #[error("there is no stage {stage} of {stages}: a line has 2 to 8, counted from 0")]
    NoStage {
        /// The place.
        stage: usize,
        /// The length of the line.
        stages: usize,
    },
}

/// A bound listener with a key of its own, which does not serve yet.
pub(crate) struct Listening {
    runtime: Runtime,
    listener: TcpListener,
    pub(crate) address: SocketAddr,
    pub(crate) identity: Arc<Identity>,
}

impl Listening {
    /// Binds a free port of `listen`.
    pub(crate) fn bind(listen: IpAddr) -> Result<Self, CollectiveError> {
        let system = |what| move |source| CollectiveError::System { what, source };
        let identity = Arc::new(Identity::generate().map_err(CollectiveError::Key)?);
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(system("start the runtime of the job's network"))?;
        let listener = std::net::TcpListener::bind((listen, 0))
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(system("listen for the other workers of the job"))?;
        let listener = {
            let _within = runtime.enter();
            TcpListener::from_std(listener).map_err(system("listen for the other workers of the job"))?
        };
        let address = listener.local_addr().map_err(system("learn the listener's address"))?;
        Ok(Self { runtime, listener, address, identity })
    }

    pub(crate) fn runtime(&self) -> Handle {
        self.runtime.handle().clone()
    }

    /// Serves until `end`, and then gives `tasks` a moment. `ended` runs when nothing is served any more, whatever the reason.
    pub(crate) fn serve(
        self,
        access: Arc<AccessList>,
        routes: Routes,
        end: CancellationToken,
        tasks: TaskTracker,
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<Serving, CollectiveError> {
        let Self { runtime, listener, address, identity } = self;
        let key_pin = identity.key_pin();
        let serving = async move {
            let _ended = OnDrop(Some(ended));
            let shutdown = CancellationToken::new();
            let options = ServeOptions { grace: CONNECTION_GRACE, ..ServeOptions::default() };
            let server =
                mlxnode_cluster::serve(listener, identity, access, routes, options, shutdown.clone());
            tokio::pin!(server);
            tokio::select! {
                ended = &mut server => {
                    debug!(?ended, "a listener of the job has ended");
                    return;
                }
                () = end.cancelled() => {}
            }
            shutdown.cancel();
            // Streams out are cancelled with `end`.
            tasks.close();
            let tasks = tokio::time::timeout(CONNECTION_GRACE, tasks.wait());
            let _ = tokio::join!(server, tasks);
        };
        let thread = std::thread::Builder::new()
            .name("job network".to_owned())
            .spawn(move || runtime.block_on(serving))
            .map_err(|source| CollectiveError::System {
                what: "start the thread of the job's network",
                source,
            })?;
        Ok(Serving { address, key_pin, thread: Some(thread) })
    }
}

/// A listener that serves, on its thread.
pub(crate) struct Serving {
    pub(crate) address: SocketAddr,
    pub(crate) key_pin: KeyPin,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    /// Waits for the thread, which ends within the grace once it was told to.
    pub(crate) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic in it has been told already.
            let _ = thread.join();
        }
    }
}

/// The key of whoever calls. TLS lets in only those that are known; what each may ask is the service's to say.
pub(crate) fn caller<T>(request: &Request<T>) -> Result<KeyPin, Status> {
    let peer = request.extensions().get::<PeerKey>().copied();
    peer.map(|peer| peer.pin).ok_or_else(|| Status::unauthenticated("the connection has no key"))
}

struct OnDrop<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(run) = self.0.take() {
            run();
        }
    }
}
