//! What a node needs to know before it starts. The command line fills it; nothing here reads the environment.

use crate::jobs::JobReader;
use mlxnode_api::http::HttpOptions;
use mlxnode_compute::ByteCount;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Settings of one node.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Everything the node keeps: key, roster, control log, downloaded state. One node at a time owns it.
    pub data_dir: PathBuf,
    /// Where the gRPC listener binds. Port 0 lets the system choose.
    pub listen: SocketAddr,
    /// The HTTP listener; none when absent.
    pub http: Option<HttpOptions>,
    /// Name shown to people; the host's name when absent.
    pub name: Option<String>,
    /// Name of the cluster, when this node makes one.
    pub cluster_name: Option<String>,
    /// Short code or long token of an invite, when this node joins a cluster.
    pub invite: Option<String>,
    /// Addresses (HOST:PORT) to try besides those that mDNS finds.
    pub peers: Vec<String>,
    /// Look for other nodes by mDNS and announce this one.
    pub discovery: bool,
    /// How much memory models may use here; [`NodeOptions::DEFAULT_BUDGET_SHARE`] of the machine's when absent.
    pub memory_budget: Option<ByteCount>,
    /// How much of the budget each model may use here to remember prompts, of what its weights and caches leave free;
    /// [`NodeOptions::DEFAULT_PROMPT_CACHE_SHARE`] of the budget when absent, 0 for nothing.
    pub prompt_cache_memory: Option<ByteCount>,
    /// How much disk all models together may use here to remember prompts, over restarts as well; 0 for none.
    pub prompt_cache_disk: ByteCount,
    /// The executable that is started as `<command> worker` for each shard, and as `<command> sandbox` for what models' files make
    /// us run.
    pub worker_command: PathBuf,
    /// Where models come from.
    pub hub: mlxnode_hub::Options,
    /// Load models of this machine's cache when somebody asks for them, and unload them when nobody did for so long.
    pub load_on_demand: Option<Duration>,
    /// `http://HOST:PORT` of an OpenTelemetry collector that takes spans of requests; nothing is sent when absent.
    pub otlp_endpoint: Option<String>,
    /// Looks through what fine-tunings would read before they are submitted; none: what is wrong shows when they start.
    pub job_reader: Option<Arc<dyn JobReader>>,
    /// How long a stopping node waits for running requests.
    pub drain: Duration,
    /// How long an answer that lost its replica waits while nobody forms another one, see `mlxnode_api::front::Front::resuming_within`.
    pub resume_within: Duration,
}

impl NodeOptions {
    /// The defaults, with this data directory and listening address. The worker's command is this very executable.
    pub fn new(
        data_dir: impl Into<PathBuf>,
        listen: SocketAddr,
        worker_command: PathBuf,
        hub: mlxnode_hub::Options,
    ) -> Self {
        Self {
            data_dir: data_dir.into(),
            listen,
            http: Some(HttpOptions::local()),
            name: None,
            cluster_name: None,
            invite: None,
            peers: Vec::new(),
            discovery: true,
            memory_budget: None,
            prompt_cache_memory: None,
            prompt_cache_disk: ByteCount(0),
            worker_command,
            hub,
            load_on_demand: None,
            otlp_endpoint: None,
            job_reader: None,
            drain: Self::DEFAULT_DRAIN,
            resume_within: Self::DEFAULT_RESUME_WITHIN,
        }
    }

    /// Three quarters: what macOS lets the GPU wire by default on most machines, with room left for the system.
    pub const DEFAULT_BUDGET_SHARE: f64 = 0.75;
    /// A tenth: on a Mac with 64 GB the beginnings of prompts with some thirty thousand tokens of an 8B model.
    pub const DEFAULT_PROMPT_CACHE_SHARE: f64 = 0.1;
    /// Long enough for a short answer to finish, short enough for a person who waits at a terminal.
    pub const DEFAULT_DRAIN: Duration = Duration::from_secs(5);
    /// A node that crashed and is started again is back by then.
    pub const DEFAULT_RESUME_WITHIN: Duration = mlxnode_api::front::DEFAULT_RESUME_WITHIN;
}
