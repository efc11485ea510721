//! One node: started from its options, asked where it listens, taken down in order.
//!
//! ```text
//! data directory ─▶ identity, roster ─▶ (join by invite | found a cluster) ─▶ mesh ─▶ workers, schedulers
//!        ─▶ coordinator, where the roster says so ─▶ view of the deployments ─▶ front ─▶ gRPC listener
//! ```
//! Taking down goes the other way: first nobody new is let in, then requests get a moment to finish, then workers end, then links.

use crate::addresses;
use crate::coordination::{self, RosterRoute};
use crate::data_dir::{DataDir, DataDirError, DataDirLock, RunningNode};
use crate::demand::NodeDemand;
use crate::facts::MachineFacts;
use crate::household::{LEAVE_TIME, Members, NodeHousehold};
use crate::jobs;
use crate::joining::become_member;
use crate::key_ring;
use crate::key_ring::service::KeyRingService;
use crate::lookout::Lookout;
use crate::node_control::client::ClusterNodes;
use crate::node_control::service::NodeControlService;
use crate::observer::NodeObserver;
use crate::options::NodeOptions;
use crate::panorama::ClusterSight;
use crate::registrar::{Registrar, keep_addresses};
use crate::replica::client::ClusterReplicas;
use crate::replica::service::ReplicaService;
use crate::schedulers::Schedulers;
use crate::workers::{Workers, WorkersError, WorkersOptions};
use mlxnode_api::access::{NODES, only};
use mlxnode_api::cluster::{ClusterService, Household, HouseholdError};
use mlxnode_api::deployments::DeploymentsView;
use mlxnode_api::front::Front;
use mlxnode_api::gate::{Gate, GateOptions};
use mlxnode_api::http::{BindError, HttpServer, HttpServices};
use mlxnode_api::jobs::{JobsService, JobsView};
use mlxnode_api::keys::{KeysService, KeysView};
use mlxnode_api::metrics::Metrics;
use mlxnode_api::models::{Busy, ModelsService};
use mlxnode_api::panorama::Panorama;
use mlxnode_api::{InferenceService, PublicServices, public_routes};
use mlxnode_cluster::{
    AccessList, ClusterAdmission, ClusterKey, Discovery, Identity, InviteError, Inviter, JoinError, KeyError,
    MeshHandle, MeshOptions, NodeFacts, NodeId, Role, RosterError, RosterStore, RosterStoreError, ServeError,
    ServeOptions, SignedRoster, SqliteControlLog, Timing, announce_invites, peer_service, serve,
};
use mlxnode_coordinator::coordinator::{self, Coordinator, CoordinatorHandle};
use mlxnode_coordinator::scheduler::Statistics;
use mlxnode_hub::Hub;
use mlxnode_proto::internal::v1::job_runner_server::JobRunnerServer;
use mlxnode_proto::internal::v1::key_ring_server::KeyRingServer;
use mlxnode_proto::internal::v1::node_control_server::NodeControlServer;
use mlxnode_proto::internal::v1::replica_server::ReplicaServer;
use mlxnode_sandbox::{SandboxOptions, SandboxProcess};
use mlxnode_traces::{Collector, Exporter, ExporterError};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::interceptor::InterceptedService;
use tracing::info;

/// Why a node does not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// A key file.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The roster file.
    #[error(transparent)]
    Roster(#[from] RosterStoreError),
    /// The cluster could not be founded.
    #[error("cannot make a cluster")]
    Found(#[source] RosterError),
    /// Nothing can be bound there.
    #[error("cannot listen on {address}{}", listen_hint(source))]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Nothing can be bound there for HTTP.
    #[error("{bind}{}", http_hint(&bind.source))]
    Http {
        /// Where, and the system's reason.
        #[source]
        bind: BindError,
    },
    /// HTTP for other machines, and nobody could be told from anybody else.
    #[error(
        "--http {0} is for other machines too, but the cluster has no API key to tell who may use the models: start with \
         `mlxnode join`, make one by `mlxnode keys create NAME`, then start with --http again"
    )]
    OpenHttp(SocketAddr),
    /// The text after `--invite` is none.
    #[error(transparent)]
    Invite(#[from] InviteError),
    /// The invite did not work.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// This node was taken out of its cluster.
    #[error("this node was removed from the cluster {0}; join again with `mlxnode join --invite CODE`")]
    Removed(String),
    /// Traces cannot be sent.
    #[error(transparent)]
    Traces(#[from] ExporterError),
    /// An invite, but a member already.
    #[error(
        "this node belongs to the cluster {0} already; run `mlxnode leave` first, or join without --invite"
    )]
    Member(String),
    /// The coordinator's node lost the key that signs the roster.
    #[error(
        "{0} is missing, without which this coordinator can change nothing: restore it from a backup, or delete the data \
         directory, make a new cluster, and invite the others again"
    )]
    NoClusterKey(PathBuf),
    /// The control log or the coordinator.
    #[error("cannot start the coordinator: {0}")]
    Coordinator(String),
    /// The listener ended.
    #[error("the node stopped listening")]
    Serve(#[source] ServeError),
    /// Part of the API could not be built.
    #[error("cannot set up the API: {0}")]
    Api(String),
}

fn listen_hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::AddrInUse => {
            "; another program, perhaps another node, uses this port: take another one with --listen"
        }
        std::io::ErrorKind::AddrNotAvailable => "; this machine has no such address",
        std::io::ErrorKind::PermissionDenied => "; ports below 1024 are for the administrator",
        _ => "",
    }
}

fn http_hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::AddrInUse => "; another program uses this port: take another one with --http",
        std::io::ErrorKind::AddrNotAvailable => "; this machine has no such address",
        std::io::ErrorKind::PermissionDenied => "; ports below 1024 are for the administrator",
        _ => "",
    }
}

/// A running node.
pub struct Node {
    id: NodeId,
    name: String,
    cluster_name: String,
    bound: SocketAddr,
    reachable: Vec<String>,
    http: Option<HttpListener>,
    drain: Duration,
    front: Front,
    data_dir: DataDir,
    founded: bool,
    household: Arc<NodeHousehold>,
    has_left: watch::Receiver<bool>,
    roster: Arc<RosterStore>,
    server: AbortOnDropHandle<Result<(), ServeError>>,
    stop_serving: CancellationToken,
    coordinator: Option<Coordinator>,
    schedulers: Schedulers,
    workers: Workers,
    job_runners: jobs::Runners,
    mesh: MeshHandle,
    lookout: Arc<Lookout>,
    traces: Option<Exporter>,
    _tasks: Vec<AbortOnDropHandle<()>>,
    _lock: DataDirLock,
}

/// The HTTP listener of a running node.
struct HttpListener {
    address: SocketAddr,
    moved: bool,
    server: AbortOnDropHandle<()>,
}

/// How often the memory that models take here is told to the other nodes.
const FACTS_PERIOD: Duration = Duration::from_secs(2);
/// How long a start waits to hear of the API keys.
const KEYS_TIME: Duration = Duration::from_secs(5);
/// For the last words of HTTP answers.
const HTTP_FAREWELL: Duration = Duration::from_secs(2);
/// A worker's frames are at most 1 MiB; nodes send each other prompts and tokenizer files.
const LARGEST_MESSAGE: usize = 64 << 20;

impl Node {
    /// Starts a node and returns when it can be reached.
    ///
    /// # Errors
    /// [`NodeError`]; then nothing is left running.
    pub async fn start(options: NodeOptions) -> Result<Self, NodeError> {
        let data_dir = DataDir::new(&options.data_dir);
        let lock = data_dir.lock()?;
        let identity = Arc::new(Identity::load_or_create(data_dir.root())?);
        let roster = Arc::new(RosterStore::open(data_dir.root())?);
        let listener = TcpListener::bind(options.listen)
            .await
            .map_err(|source| NodeError::Listen { address: options.listen, source })?;
        let bound =
            listener.local_addr().map_err(|source| NodeError::Listen { address: options.listen, source })?;
        let http = match &options.http {
            Some(http) => {
                Some(HttpServer::bind(http.clone()).await.map_err(|bind| NodeError::Http { bind })?)
            }
            None => None,
        };
        let machine = MachineFacts::read(&options);
        let reachable = addresses::reachable(bound);
        let facts = NodeFacts {
            name: machine.name.clone(),
            addresses: reachable.clone(),
            memory_total_bytes: machine.memory_total.0,
            memory_budget_bytes: machine.memory_budget.0,
            memory_used_bytes: 0,
            prompt_cache_bytes: machine.prompt_cache.0,
            chip: machine.chip.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let lookout = Arc::new(Lookout::start(bound, options.discovery, &options.peers));
        let founded = become_member(&options, &data_dir, &identity, &roster, &lookout, &facts).await?;

        let signed = roster.current().ok_or_else(|| NodeError::Removed(String::new()))?;
        let own = identity.id();
        let entry = signed.roster().get(&own);
        let entry = entry.ok_or_else(|| NodeError::Removed(signed.roster().cluster_name().to_owned()))?;
        let name = entry.name.clone();
        let cluster = (signed.roster().cluster(), signed.roster().cluster_name().to_owned());
        let coordinates = signed.roster().coordinator() == own;
        let facts = NodeFacts { name: name.clone(), ..facts };

        let mesh = MeshHandle::start(MeshOptions {
            identity: identity.clone(),
            roster: roster.clone(),
            discovery: lookout.clone(),
            facts: facts.clone(),
            timing: Timing::WIRED,
        });
        let key = if coordinates { ClusterKey::load(data_dir.root())? } else { None };
        if coordinates && key.is_none() {
            return Err(NodeError::NoClusterKey(data_dir.root().join("cluster.key")));
        }
        let registrar = Arc::new(Registrar::new(roster.clone(), key));
        let inviter = Arc::new(Inviter::new(identity.clone(), registrar.clone()));
        let collector = options.otlp_endpoint.clone().map(|endpoint| Collector {
            endpoint,
            node: name.clone(),
            part: "node".to_owned(),
        });
        let traces = collector.clone().map(Exporter::start).transpose()?;
        let advertised = addresses::host(reachable.first().map_or("127.0.0.1", String::as_str)).to_owned();
        let workers_options = WorkersOptions {
            command: options.worker_command.clone(),
            listen: bound.ip(),
            advertised,
            blocks: data_dir.blocks(),
            block_disk: options.prompt_cache_disk,
            collector: collector.clone(),
        };
        let hub = Arc::new(Hub::new(options.hub.clone()));
        let workers = Workers::new(workers_options, identity.clone(), hub.clone());
        let sandbox = Arc::new(SandboxProcess::new(SandboxOptions::new(options.worker_command.clone())));
        let schedulers = Schedulers::new(
            identity.clone(),
            workers.clone(),
            sandbox.clone(),
            (options.prompt_cache_disk.0 > 0).then(|| data_dir.blocks()),
        );

        let job_peers = jobs::Peers {
            store: jobs::Store::new(data_dir.jobs()),
            mesh: mesh.clone(),
            roster: roster.clone(),
            fetching: Arc::default(),
        };
        workers.take_adapters_of_jobs_from(job_peers.clone());
        let place = (
            identity.clone(),
            bound.ip(),
            addresses::host(reachable.first().map_or("127.0.0.1", String::as_str)),
        );
        let job_runners = job_runners(&options, place, &workers, &schedulers, job_peers.clone());
        let nodes = ClusterNodes {
            own,
            mesh: mesh.clone(),
            roster: roster.clone(),
            workers: workers.clone(),
            schedulers: schedulers.clone(),
            listens_everywhere: bound.ip().is_unspecified(),
        };
        let (handle, coordinator) = match coordinates {
            true => start_coordinator(&data_dir, &nodes, &job_runners)
                .await
                .map(|(handle, owner)| (Some(handle), Some(owner)))?,
            false => (None, None),
        };
        let route =
            Arc::new(RosterRoute { own, roster: roster.clone(), mesh: mesh.clone(), here: handle.clone() });
        let (view_sender, view) = watch::channel(DeploymentsView::default());
        let (keys_sender, keys) = watch::channel(KeysView::default());
        let key_ring = KeyRingService { coordinator: handle.clone() };
        let (jobs_sender, jobs_view) = watch::channel(Vec::new());
        let mut tasks = Vec::new();
        let mut own_task = |task: tokio::task::JoinHandle<()>| tasks.push(AbortOnDropHandle::new(task));
        match handle {
            Some(handle) => {
                own_task(tokio::spawn(coordination::mirror(handle.clone(), view_sender)));
                own_task(tokio::spawn(key_ring::client::mirror(handle.clone(), keys_sender)));
                let mirror = jobs::mirror::mirror(handle.clone(), job_peers.clone(), jobs_sender);
                own_task(tokio::spawn(mirror));
                own_task(tokio::spawn(coordination::bring_news(handle, nodes, workers.clone())));
                own_task(tokio::spawn(keep_addresses(registrar.clone(), mesh.clone(), own)));
            }
            None => {
                own_task(tokio::spawn(coordination::follow(route.clone(), view_sender)));
                own_task(tokio::spawn(key_ring::client::follow(route.clone(), keys_sender)));
                own_task(tokio::spawn(jobs::mirror::follow(route.clone(), jobs_sender)));
            }
        }
        let stop_serving = CancellationToken::new();
        own_task(tokio::spawn(announce_invites(inviter.clone(), lookout.clone(), stop_serving.clone())));
        own_task(tokio::spawn(tell_memory(mesh.clone(), workers.clone())));

        let household = Arc::new(NodeHousehold::new(Members {
            own,
            cluster: cluster.clone(),
            data_dir: data_dir.clone(),
            roster: roster.clone(),
            mesh: mesh.clone(),
            registrar: registrar.clone(),
            inviter: inviter.clone(),
        }));
        let replicas = Arc::new(ClusterReplicas {
            own,
            mesh: mesh.clone(),
            schedulers: schedulers.clone(),
            workers: workers.clone(),
        });
        let busy = Arc::new(schedulers.clone());
        let metrics = Arc::new(Metrics::default());
        // One gate for HTTP and for the keys that gRPC calls carry: what one key asks is counted in one place.
        let gate = Gate::new(
            keys.clone(),
            GateOptions {
                is_public: http.as_ref().is_some_and(|http| !http.address().ip().is_loopback()),
                requires_key: options.http.as_ref().is_some_and(|http| http.requires_key),
            },
        );
        let front = Front::new(view.clone(), replicas, sandbox)
            .counting(metrics.clone(), Some(gate.clone()))
            .telling(traces.as_ref().map(Exporter::sink))
            .resuming_within(options.resume_within);
        let front = match options.load_on_demand {
            None => front,
            Some(ttl) => {
                let (route, under_way) = (route.clone(), Default::default());
                front.demanding(Arc::new(NodeDemand { route, hub, ttl, under_way }))
            }
        };
        let own_front = front.clone();
        let observer = Arc::new(NodeObserver {
            deployments: view.clone(),
            schedulers: schedulers.clone(),
            workers: workers.clone(),
            household: household.clone(),
        });
        let sight = ClusterSight { own, mesh: mesh.clone(), observer: observer.clone() };
        let panorama = Panorama::new(Arc::new(sight));
        let models = ModelsService::new(route.clone(), view.clone(), busy.clone());
        let members = ClusterService::new(household.clone(), route.clone(), view, busy, panorama);
        let job_files = Arc::new(jobs::files::NodeJobFiles { peers: job_peers });
        let jobs_service = JobsService::new(route.clone(), job_files);
        let public = PublicServices {
            inference: InferenceService::new(front.clone()),
            models: models.clone(),
            cluster: members.clone(),
            keys: KeysService::new(route, keys.clone()),
            jobs: jobs_service.clone(),
        };
        let public = public_routes(public, gate.clone(), metrics.clone())
            .await
            .map_err(|error| NodeError::Api(error.to_string()))?;
        let control = NodeControlServer::new(NodeControlService {
            workers: workers.clone(),
            schedulers: schedulers.clone(),
            own,
            observer: observer.clone(),
        });
        let replica =
            ReplicaServer::new(ReplicaService { schedulers: schedulers.clone(), workers: workers.clone() })
                .max_decoding_message_size(LARGEST_MESSAGE);
        let routes = public
            .add_service(InterceptedService::new(control, only(NODES)))
            .add_service(InterceptedService::new(replica, only(NODES)))
            .add_service(InterceptedService::new(KeyRingServer::new(key_ring), only(NODES)))
            .add_service(InterceptedService::new(
                JobRunnerServer::new(jobs::service::JobRunnerService { runners: job_runners.clone() }),
                only(NODES),
            ))
            .add_service(peer_service(&mesh, registrar));

        let access = Arc::new(AccessList::default());
        let client = Identity::load_or_create(&data_dir.client())?;
        access.allow(client.key_pin(), Role::Client);
        data_dir.write_node_certificate(&identity.certificate_pem())?;
        let admission = Arc::new(ClusterAdmission::new(identity.key_pin(), roster.clone(), access));
        let serve_options = ServeOptions { pairing: Some(inviter), ..ServeOptions::default() };
        let server =
            tokio::spawn(serve(listener, identity, admission, routes, serve_options, stop_serving.clone()));
        let server = AbortOnDropHandle::new(server);
        if let Some(http) = &http
            && !http.address().ip().is_loopback()
        {
            refuse_without_keys(http.address(), keys).await?;
        }
        let http = http.map(|http| {
            let services = HttpServices::new(front, stop_serving.clone())
                .behind(gate)
                .showing(metrics, observer)
                .controlling(members, models)
                .running_jobs(Arc::new(JobsView(jobs_view)));
            let names = addresses::http_names(&name, http.address(), &reachable);
            let router = http.router(services, &names);
            let (address, moved) = (http.address(), http.moved());
            let server = tokio::spawn(http.serve(router, stop_serving.clone()));
            HttpListener { address, moved, server: AbortOnDropHandle::new(server) }
        });
        data_dir.write_running(&RunningNode {
            grpc: addresses::local(bound).to_string(),
            http: http.as_ref().map(HttpListener::url),
            node_id: own.to_string(),
            pid: std::process::id(),
        })?;
        info!(node = %own.short(), name, cluster = cluster.1, address = %bound, coordinates, "node started");
        Ok(Self {
            id: own,
            name,
            cluster_name: cluster.1,
            bound,
            reachable,
            http,
            drain: options.drain,
            front: own_front,
            data_dir,
            founded,
            has_left: household.left(),
            roster,
            household,
            server,
            stop_serving,
            coordinator,
            schedulers,
            workers,
            job_runners,
            mesh,
            lookout,
            traces,
            _tasks: tasks,
            _lock: lock,
        })
    }

    /// Its id.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Its name in the roster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cluster's name.
    pub fn cluster_name(&self) -> &str {
        &self.cluster_name
    }

    /// Did this start make the cluster?
    pub fn founded(&self) -> bool {
        self.founded
    }

    /// Opens an invite and returns its short code.
    ///
    /// # Errors
    /// On nodes that do not coordinate.
    pub async fn invite(&self, lifetime: Duration) -> Result<String, HouseholdError> {
        Ok(self.household.invite(lifetime).await?.code.reveal())
    }

    /// HOST:PORT under which other machines can reach it, best first.
    pub fn addresses(&self) -> &[String] {
        &self.reachable
    }

    /// URL of the HTTP listener for clients on this machine, such as `http://127.0.0.1:8080`; none without one.
    pub fn http(&self) -> Option<String> {
        self.http.as_ref().map(HttpListener::url)
    }

    /// Is the HTTP listener at another port than the usual one, because that was taken?
    pub fn http_moved(&self) -> bool {
        self.http.as_ref().is_some_and(|http| http.moved)
    }

    /// HOST:PORT where clients on this machine reach it.
    pub fn grpc_address(&self) -> String {
        match self.bound.ip().is_unspecified() {
            true => addresses::local(self.bound).to_string(),
            false => self.bound.to_string(),
        }
    }

    /// Waits until the node should stop by itself: it left its cluster (no error), or it cannot go on.
    ///
    /// # Errors
    /// Why it cannot go on.
    pub async fn ended(&mut self) -> Result<(), NodeError> {
        let mut has_left = self.has_left.clone();
        let (id, mut roster) = (self.id, self.roster.watch());
        let removed = async {
            let is_member = |roster: &Option<Arc<SignedRoster>>| {
                roster.as_ref().is_none_or(|signed| signed.roster().get(&id).is_some())
            };
            if roster.wait_for(|roster| !is_member(roster)).await.is_err() {
                std::future::pending::<()>().await;
            }
            // Who leaves is taken out of the roster first, and ends by having left.
            tokio::time::sleep(LEAVE_TIME).await;
        };
        let coordinator = async {
            match &mut self.coordinator {
                Some(coordinator) => coordinator.ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = has_left.wait_for(|left| *left) => Ok(()),
            () = removed => Err(NodeError::Removed(self.cluster_name.clone())),
            server = &mut self.server => match server {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(NodeError::Serve(error)),
                Err(error) => Err(NodeError::Api(error.to_string())),
            },
            () = coordinator => Err(NodeError::Coordinator("it ended unexpectedly; see the log".to_owned())),
        }
    }

    /// Takes the node down: running requests get [`NodeOptions::drain`] to finish, then workers and links end.
    pub async fn shutdown(mut self) {
        info!("node stops");
        let drained = async {
            while self.schedulers.busy() > 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let _ = tokio::time::timeout(self.drain, drained).await;
        self.front.end();
        // Orders to workers must not come back to life while they are ended.
        if let Some(coordinator) = self.coordinator.take() {
            coordinator.stop().await;
        }
        // What jobs have done so far is saved.
        self.job_runners.stop_all().await;
        self.schedulers.stop_all().await;
        self.workers.stop_all().await;
        self.lookout.shutdown().await;
        self.mesh.shutdown().await;
        self.stop_serving.cancel();
        if !self.server.is_finished() {
            let _ = (&mut self.server).await;
        }
        if let Some(http) = self.http.take() {
            // What still runs has lost its workers and ends; a client that takes nothing is not waited for.
            let _ = tokio::time::timeout(HTTP_FAREWELL, http.server).await;
        }
        if let Some(traces) = self.traces.take() {
            // Waits a moment for what is left.
            let _ = tokio::task::spawn_blocking(move || drop(traces)).await;
        }
        if *self.has_left.borrow() {
            // SQLite may have written its files again on the way out.
            let _ = self.data_dir.forget_cluster();
        }
    }
}

impl HttpListener {
    fn url(&self) -> String {
        format!("http://{}", addresses::local(self.address))
    }
}

/// A listener for other machines without any key is a mistake. While the coordinator cannot be reached nobody knows: then the node starts,
/// and its gate lets nobody in until the keys are known.
async fn refuse_without_keys(
    address: SocketAddr,
    mut keys: watch::Receiver<KeysView>,
) -> Result<(), NodeError> {
    match tokio::time::timeout(KEYS_TIME, keys.wait_for(|keys| keys.is_known)).await {
        Ok(Ok(known)) if known.keys.is_empty() => Err(NodeError::OpenHttp(address)),
        _ => Ok(()),
    }
}

async fn start_coordinator(
    data_dir: &DataDir,
    nodes: &ClusterNodes,
    job_runners: &jobs::Runners,
) -> Result<(CoordinatorHandle, Coordinator), NodeError> {
    let path = data_dir.control_log();
    let opened = tokio::task::spawn_blocking(move || SqliteControlLog::open(&path)).await;
    let log = match opened {
        Ok(Ok(log)) => log,
        Ok(Err(error)) => return Err(NodeError::Coordinator(crate::error::chain(&error))),
        Err(error) => return Err(NodeError::Coordinator(error.to_string())),
    };
    let job_nodes = jobs::client::ClusterJobs { own: nodes.own, runners: job_runners.clone() };
    let limits = coordinator::Limits::default();
    coordinator::start_with_jobs(limits, Arc::new(log), Arc::new(nodes.clone()), Arc::new(job_nodes))
        .await
        .map_err(|error| NodeError::Coordinator(error.to_string()))
}

fn job_runners(
    options: &NodeOptions,
    (identity, listen, advertised): (Arc<Identity>, IpAddr, &str),
    workers: &Workers,
    schedulers: &Schedulers,
    peers: jobs::Peers,
) -> jobs::Runners {
    let (mesh, models) = (peers.mesh.clone(), workers.clone());
    let (busy_workers, busy_schedulers, hub_workers) = (workers.clone(), schedulers.clone(), workers.clone());
    let options = jobs::RunnersOptions {
        command: options.worker_command.clone(),
        identity,
        listen,
        advertised: advertised.to_owned(),
        free: Arc::new(move || {
            mlxnode_compute::ByteCount(mesh.facts().memory_budget_bytes).saturating_sub(models.memory_used())
        }),
        is_busy: Arc::new(move || busy_schedulers.busy() > 0 || busy_workers.open_sequences() > 0),
        fetch_model: Arc::new(move |source| {
            let workers = hub_workers.clone();
            Box::pin(async move {
                let folder = workers.resolve(&source).await;
                folder.map_err(|error| match error {
                    WorkersError::Away(text) => mlxnode_coordinator::Error::Unavailable(text),
                    // Another node may have it: it is tried a few times, and not where it just failed.
                    error => mlxnode_coordinator::Error::Failed(crate::error::chain(&error)),
                })
            })
        }),
    };
    jobs::Runners::new(options, peers)
}

/// Keeps what this node says about its memory current.
async fn tell_memory(mesh: MeshHandle, workers: Workers) {
    let mut period = tokio::time::interval(FACTS_PERIOD);
    loop {
        period.tick().await;
        let used = workers.memory_used().0;
        let facts = mesh.facts();
        if facts.memory_used_bytes != used {
            mesh.set_facts(NodeFacts { memory_used_bytes: used, ..facts });
        }
    }
}

impl Busy for Schedulers {
    fn statistics(&self) -> BTreeMap<String, Statistics> {
        Schedulers::statistics(self)
    }
}
