//! HTTP for clients: OpenAI's and Anthropic's dialects over a [`Front`], on a listener of its own.
//!
//! ```text
//! connection ─▶ server (limits, times) ─▶ requests (id, trace) ─▶ guard (Host, Origin) ─▶ routes ─▶ entrance (keys, limits)
//!            ─▶ one file for each endpoint ─▶ Front
//! ```
//!
//! | module | one line |
//! |---|---|
//! | `server` | accepts connections and bounds them in number, size and time |
//! | `guard` | who may ask from where: names in `Host`, origins of web pages |
//! | [`routes`] | every route as data, and the router made of it |
//! | `requests` | every request has an id and a trace |
//! | `entrance` | the gate at every route: keys, roles, limits |
//! | `caller` | for whom a request is, for handlers |
//! | `error`, `body`, `query` | how a client hears of what it got wrong |
//! | `tools` | the functions that a request offers, in OpenAI's notation |
//! | `events` | an answer in pieces (server-sent events) |
//! | `openai`, `anthropic` | the endpoints |
//! | `jobs_client` | jobs on behalf of who asks |
//! | `page` | the web page, and the endpoints under `/api/v1` that it lives on |
//! | `openapi` | the description of all of them for programs |
//!
//! What the fields mean and what is refused stands in docs/http.md. Nothing that a client sends is ignored in silence.

mod anthropic;
mod body;
mod caller;
mod entrance;
mod error;
mod events;
mod guard;
mod health;
mod jobs_client;
mod metrics;
mod openai;
mod openapi;
mod page;
mod query;
mod requests;
pub mod routes;
mod server;
mod stalled;
mod tools;

pub use crate::caller::Caller;
pub use crate::error::{ApiError, ErrorKind};
pub use error::Dialect;
pub use server::{BindError, HttpOptions, HttpServer};

use crate::cluster::ClusterService;
use crate::conversation::{self, Conversation, Model, find_model};
use crate::fields;
use crate::front::{Front, Prepared};
use crate::gate::Gate;
use crate::jobs::{JobTable, JobsService};
use crate::metrics::{Metrics, Observer};
use crate::models::ModelsService;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// What the endpoints need. Cheap to clone.
#[derive(Clone)]
pub struct HttpServices {
    front: Front,
    /// Bodies that are read and understood now, in KiB: what a body becomes in memory is several times its size.
    bodies: Arc<Semaphore>,
    /// Cancelled when the node stops: `/health` says so to whoever spreads the load.
    stopping: CancellationToken,
    gate: Gate,
    metrics: Arc<Metrics>,
    observer: Option<Arc<dyn Observer>>,
    control: Option<Control>,
    jobs: Option<Arc<dyn JobTable>>,
    jobs_service: Option<JobsService>,
    /// Files that come in now.
    uploads: Arc<Semaphore>,
    /// Unix time of the start.
    started: u64,
}

/// The cluster behind a listener: who is here, what is loaded.
#[derive(Clone)]
struct Control {
    cluster: ClusterService,
    models: ModelsService,
}

/// All bodies together; a request that finds no room is asked to come back.
const BODIES_KIB: usize = 64 << 10;

/// Uploads at once: each writes to the disk as fast as it can.
const UPLOADS: usize = 8;

impl HttpServices {
    /// Serves what `front` can reach, until `stopping`.
    pub fn new(front: Front, stopping: CancellationToken) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (gate, metrics) = (Gate::open(), Arc::new(Metrics::default()));
        let front = front.counting(metrics.clone(), Some(gate.clone()));
        let bodies = Arc::new(Semaphore::new(BODIES_KIB));
        Self {
            front,
            bodies,
            stopping,
            gate,
            metrics,
            observer: None,
            control: None,
            jobs: None,
            jobs_service: None,
            uploads: Arc::new(Semaphore::new(UPLOADS)),
            started,
        }
    }

    /// Lets in only whom the gate lets in.
    #[must_use]
    pub fn behind(self, gate: Gate) -> Self {
        let front = self.front.counting(self.metrics.clone(), Some(gate.clone()));
        Self { front, gate, ..self }
    }

    /// The model that a request means, if this caller may use it.
    async fn model(&self, caller: &Caller, model: &str) -> Result<Model, ApiError> {
        find_model(&self.front, caller, model).await
    }

    /// Everything before the first step.
    async fn prepare(
        &self,
        caller: &Caller,
        model: &Model,
        conversation: Conversation,
    ) -> Result<Prepared, ApiError> {
        conversation::prepare(&self.front, caller, model, conversation).await
    }

    /// Shows this cluster and changes what it has loaded.
    #[must_use]
    pub fn controlling(self, cluster: ClusterService, models: ModelsService) -> Self {
        Self { control: Some(Control { cluster, models }), ..self }
    }

    /// Takes jobs and their files.
    #[must_use]
    pub fn taking_jobs(self, service: JobsService) -> Self {
        Self { jobs_service: Some(service), ..self }
    }

    /// Shows these jobs.
    #[must_use]
    pub fn running_jobs(self, jobs: Arc<dyn JobTable>) -> Self {
        Self { jobs: Some(jobs), ..self }
    }

    /// Counts into `metrics`, and shows with them what the observer sees.
    #[must_use]
    pub fn showing(self, metrics: Arc<Metrics>, observer: Arc<dyn Observer>) -> Self {
        let front = self.front.counting(metrics.clone(), Some(self.gate.clone()));
        Self { front, metrics, observer: Some(observer), ..self }
    }
}

/// Now, as OpenAI's `created` wants it: seconds since 1970.
fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A name for an answer, a message or a call that nobody else has.
fn id(prefix: &str) -> String {
    let draw = || RandomState::new().hash_one(SystemTime::now());
    format!("{prefix}{:016x}{:08x}", draw(), draw() >> 32)
}
