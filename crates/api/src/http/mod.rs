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
//! | `caller` | for whom a request is |
//! | `error` | what a client hears when something is wrong |
//! | `openai` | `/v1/chat/completions` and its relatives |
//!
//! What the fields mean and what is refused stands in docs/http.md. Nothing that a client sends is ignored in silence.

mod caller;
mod entrance;
mod error;
mod guard;
mod health;
mod metrics;
mod openai;
mod requests;
pub mod routes;
mod server;
mod stalled;

pub use caller::Caller;
pub use error::{ApiError, Dialect, ErrorKind};
pub use server::{BindError, HttpOptions, HttpServer};

use crate::front::Front;
use crate::gate::Gate;
use crate::metrics::{Metrics, Observer};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio_util::sync::CancellationToken;

/// What the endpoints need. Cheap to clone.
#[derive(Clone)]
pub struct HttpServices {
    front: Front,
    /// Cancelled when the node stops: `/health` says so to whoever spreads the load.
    stopping: CancellationToken,
    gate: Gate,
    metrics: Arc<Metrics>,
    observer: Option<Arc<dyn Observer>>,
    /// Unix time of the start.
    started: u64,
}

impl HttpServices {
    /// Serves what `front` can reach, until `stopping`.
    pub fn new(front: Front, stopping: CancellationToken) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (gate, metrics) = (Gate::open(), Arc::new(Metrics::default()));
        let front = front.counting(metrics.clone(), Some(gate.clone()));
        Self { front, stopping, gate, metrics, observer: None, started }
    }

    /// Lets in only whom the gate lets in.
    #[must_use]
    pub fn behind(self, gate: Gate) -> Self {
        let front = self.front.counting(self.metrics.clone(), Some(gate.clone()));
        Self { front, gate, ..self }
    }

    /// Counts into `metrics`, and shows with them what the observer sees.
    #[must_use]
    pub fn showing(self, metrics: Arc<Metrics>, observer: Arc<dyn Observer>) -> Self {
        let front = self.front.counting(metrics.clone(), Some(self.gate.clone()));
        Self { front, metrics, observer: Some(observer), ..self }
    }
}
