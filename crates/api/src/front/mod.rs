//! The front of a request: the node a client is connected to owns it.
//!
//! It finds the deployment, turns text into tokens, checks every parameter, runs the sequence on the replica's scheduler
//! wherever that is, and turns tokens back into text. It keeps prompt, parameters, seed and what was emitted: when the replica is lost, it
//! goes on with the next one from there (`resume`). Dropping the answer's stream cancels the work.

mod account;
mod admission;
mod answer;
mod continuation;
mod defaults;
mod demand;
mod model_text;
mod names;
mod output;
mod patience;
mod prepared;
mod replicas;
mod resume;
mod routing;
mod spans;

pub use admission::Admission;
pub use answer::{Answer, AnswerEvent, Summary};
pub use defaults::SamplingDefaults;
pub use demand::Demand;
pub use model_text::ModelText;
pub use output::{End, Output, Piece};
pub use patience::DEFAULT_RESUME_WITHIN;
pub use prepared::Prepared;
pub use replicas::{Replicas, RunEvents};
pub use routing::{Candidate, ReplicaId, Router};

use crate::deployments::{DeploymentView, DeploymentsView, State, state_name};
use crate::gate::{Gate, retry_seconds};
use crate::metrics::{Finished, Metrics, Rejection};
use account::{Account, Submitted};
use admission::{Door, Place};
use futures::StreamExt as _;
use mlxnode_compute::{ByteCount, SpanSink, TraceContext};
use mlxnode_coordinator::requests::{Parameters, RequestError, ValidRequest};
use mlxnode_coordinator::scheduler::{RunError, RunEvent, RunRequest};
use mlxnode_text::{ChatRequest, Sandbox, TextError};
use routing::{Routing, Ticket};
use spans::RequestSpans;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

/// A figure in an answer's last message is worth less than the message itself.
const MEMORY_PATIENCE: Duration = Duration::from_millis(500);

/// What a client asks for.
#[derive(Clone, Debug)]
pub struct GenerationRequest {
    /// A deployment's name; empty for the only one.
    pub model: String,
    /// What to continue.
    pub input: Input,
    /// How.
    pub parameters: Parameters,
    /// Tokens, as text or number, that end the generation besides the model's own.
    pub extra_eos: Vec<String>,
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
    /// Who asks; see [`RunRequest::tenant`].
    pub tenant: String,
    /// Names the request on all nodes; a new name when absent.
    pub trace: Option<TraceContext>,
    /// Tell content, reasoning and tool calls apart: [`Piece::deltas`].
    pub is_read: bool,
}

/// A text whose vector is asked for.
#[derive(Clone, Debug)]
pub struct EmbeddingRequest {
    /// A deployment's name; empty for the only one.
    pub model: String,
    /// The text or its tokens.
    pub input: Input,
    /// Name of an adapter of the deployment.
    pub adapter: Option<String>,
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
    /// Who asks; see [`RunRequest::tenant`].
    pub tenant: String,
    /// Names the request on all nodes; a new name when absent.
    pub trace: Option<TraceContext>,
}

/// What a generation continues.
#[derive(Clone, Debug)]
pub enum Input {
    /// Text as it is.
    Prompt(String),
    /// A conversation for the model's chat template.
    Chat(ChatRequest),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

/// Why a request is refused or ends early.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// Nobody loaded it.
    #[error("no model named {model:?} is loaded; {loaded}")]
    UnknownModel {
        /// What was asked for.
        model: String,
        /// A sentence on what there is.
        loaded: String,
    },
    /// It is there, but not with this adapter.
    #[error("the model {model:?} has no adapter named {adapter:?}; {loaded}")]
    UnknownAdapter {
        /// Deployment.
        model: String,
        /// What was asked for.
        adapter: String,
        /// A sentence on what there is.
        loaded: String,
    },
    /// The adapter is wanted, but could not be read.
    #[error("the adapter {adapter:?} of {model:?} cannot be used: {problem}")]
    BrokenAdapter {
        /// Deployment.
        model: String,
        /// Its name.
        adapter: String,
        /// Why not.
        problem: String,
    },
    /// Another draft model is to guess than the one that it was loaded with.
    #[error(
        "the model {model:?} was loaded with {has} as its draft model, not with {draft:?}; leave draft_model out, or load the model with it: \
         `mlxnode load MODEL --draft-model DRAFT`"
    )]
    OtherDraft {
        /// Deployment.
        model: String,
        /// What was asked for.
        draft: String,
        /// "another one" or "none".
        has: &'static str,
    },
    /// It was asked for, and cannot be loaded.
    #[error("{model:?} is not loaded, and cannot be: {reason}")]
    NotLoaded {
        /// What was asked for.
        model: String,
        /// Why not.
        reason: String,
    },
    /// Several are loaded and the request names none.
    #[error("several models are loaded ({0}); name one of them")]
    AmbiguousModel(String),
    /// It is there but cannot answer now.
    #[error("the model {model:?} is {state}{detail}")]
    NotReady {
        /// Deployment.
        model: String,
        /// What it is doing.
        state: &'static str,
        /// Why, when that is known; begins with ": ".
        detail: String,
    },
    /// Too much waits already.
    #[error("too many requests wait for {model:?}; try again in {} s", retry_seconds(*retry_after))]
    Busy {
        /// Deployment.
        model: String,
        /// When it is worth trying again.
        retry_after: Duration,
    },
    /// A parameter is out of its range.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The replica refused or lost the sequence.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Everything that a node needs to be a front. Cheap to clone.
#[derive(Clone)]
pub struct Front {
    deployments: watch::Receiver<DeploymentsView>,
    replicas: Arc<dyn Replicas>,
    sandbox: Arc<dyn Sandbox>,
    texts: Arc<Mutex<Texts>>,
    door: Door,
    metrics: Arc<Metrics>,
    gate: Option<Gate>,
    /// How long a sequence that lost its replica waits while nobody forms another one.
    resume_within: Duration,
    /// The node ends: nobody waits for replicas any more.
    ending: CancellationToken,
    spans: Option<Arc<dyn SpanSink>>,
    routing: Routing,
    demand: Option<Arc<dyn Demand>>,
    /// Requests that wait for their model.
    waiting: Arc<Semaphore>,
}

/// By replica, with the epoch for which they were read: a reload may bring another tokenizer.
type Texts = HashMap<String, (u64, Arc<ModelText>)>;

impl Front {
    /// A front over this view of the deployments. The sandbox carries out what the models' files bring along.
    pub fn new(
        deployments: watch::Receiver<DeploymentsView>,
        replicas: Arc<dyn Replicas>,
        sandbox: Arc<dyn Sandbox>,
    ) -> Self {
        let (texts, door, metrics) = (Arc::default(), Door::default(), Arc::default());
        Self {
            deployments,
            replicas,
            sandbox,
            texts,
            door,
            metrics,
            gate: None,
            resume_within: DEFAULT_RESUME_WITHIN,
            ending: CancellationToken::new(),
            spans: None,
            routing: Routing::default(),
            demand: None,
            waiting: Arc::new(Semaphore::new(demand::MAX_WAITING)),
        }
    }

    /// Waits so long for a node to come back when a sequence lost its replica and nobody forms another one; not at all for zero, and then
    /// every loss ends its sequences. While a replica is being formed, sequences wait longer.
    #[must_use]
    pub fn resuming_within(self, resume_within: Duration) -> Self {
        Self { resume_within, ..self }
    }

    /// The node ends: sequences that wait for a replica end now.
    pub fn end(&self) {
        self.ending.cancel();
    }

    /// With figures that are read elsewhere too, and a gate at which tokens are counted against the keys that asked for them.
    #[must_use]
    pub fn counting(self, metrics: Arc<Metrics>, gate: Option<Gate>) -> Self {
        Self { metrics, gate, ..self }
    }

    /// With a place for spans of requests.
    #[must_use]
    pub fn telling(self, spans: Option<Arc<dyn SpanSink>>) -> Self {
        Self { spans, ..self }
    }

    /// Where spans of requests go, when somebody collects them.
    pub(crate) fn spans(&self) -> Option<Arc<dyn SpanSink>> {
        self.spans.clone()
    }

    /// All deployments, by name.
    pub fn deployments(&self) -> Vec<DeploymentView> {
        self.deployments.borrow().deployments.clone()
    }

    /// The deployment that a request means.
    ///
    /// # Errors
    /// When there is none of that name, or several and the request names none.
    pub fn deployment(&self, model: &str) -> Result<DeploymentView, FrontError> {
        let view = self.deployments.borrow();
        let found = match model {
            "" if view.deployments.iter().any(|deployment| deployment.name != view.deployments[0].name) => {
                return Err(FrontError::AmbiguousModel(names(&view.deployments)));
            }
            "" => best(&view.deployments, |_| true),
            name => best(&view.deployments, |deployment| deployment.name == name),
        };
        let loaded = match view.deployments.is_empty() {
            true => "nothing is; load a model with `mlxnode load MODEL`".to_owned(),
            false => format!("loaded: {}", names(&view.deployments)),
        };
        found.cloned().ok_or_else(|| FrontError::UnknownModel { model: model.to_owned(), loaded })
    }

    /// Tokenizer and template of a deployment, read once for each epoch.
    ///
    /// # Errors
    /// When the node of the first stage cannot be reached, or its files are no tokenizer.
    pub async fn model_text(&self, deployment: &DeploymentView) -> Result<Arc<ModelText>, FrontError> {
        let instance = deployment.instance();
        let held = self.lock_texts().get(&instance).cloned();
        if let Some((epoch, text)) = held
            && epoch == deployment.epoch
        {
            return Ok(text);
        }
        let files = self.replicas.text_files(deployment).await?;
        // Building a tokenizer of a hundred thousand merges takes long enough to keep other requests waiting.
        let sandbox = Arc::clone(&self.sandbox);
        let text = tokio::task::spawn_blocking(move || ModelText::new(&files, sandbox))
            .await
            .map_err(|error| RunError::Failed(format!("reading the tokenizer failed: {error}")))??;
        let text = Arc::new(text);
        let mut texts = self.lock_texts();
        let loaded = self.deployments.borrow();
        let is_loaded = |name: &str| loaded.deployments.iter().any(|deployment| deployment.name == name);
        let is_there = |instance: &str| loaded.deployments.iter().any(|it| it.instance() == instance);
        texts.retain(|instance, _| is_there(instance));
        self.door.with(|admission| admission.retain(is_loaded));
        self.routing.with(|router| router.retain(is_there));
        texts.insert(instance, (deployment.epoch, Arc::clone(&text)));
        Ok(text)
    }

    /// [`Front::model_text`] of a deployment that can answer now.
    ///
    /// # Errors
    /// [`FrontError::NotReady`] for one that cannot, and as `model_text`.
    pub async fn text_of(&self, deployment: &DeploymentView) -> Result<Arc<ModelText>, FrontError> {
        check_ready(deployment)?;
        self.model_text(deployment).await
    }

    /// The mean of the prompt's hidden vectors after the last norm, and the prompt's length in tokens.
    ///
    /// # Errors
    /// As [`Front::generate`], and when the replica is lost on the way.
    pub async fn embed(&self, request: EmbeddingRequest) -> Result<(Vec<f32>, usize), FrontError> {
        let arrived = Instant::now();
        let (deployment, named_adapter) = self.summon(&request.model, |_| true).await?;
        check_ready(&deployment)?;
        let adapter = names::adapter_key(&deployment, request.adapter.or(named_adapter).as_deref())?;
        let _place = self.enter(&deployment.name, arrived)?;
        let text = self.model_text(&deployment).await?;
        let prompt = text.clone().tokenize_blocking(request.input).await?;
        let mut valid = ValidRequest::embedding(prompt, adapter, &text.limits(&deployment)?)?;
        valid.spec.trace = Some(named(request.trace));
        let parent = request.trace.map(|trace| trace.span_id());
        let prompt_tokens = valid.prompt.len();
        let (deadline, tenant) = (request.deadline, request.tenant);
        let run = RunRequest { prompt: valid.prompt, spec: valid.spec, deadline, tenant };
        let mut account = self.account(&deployment, &run, Origin { arrived, parent });
        let mut events = self.run(&deployment, run).await.map_err(|error| account.failed(error))?;
        while let Some(event) = events.next().await {
            match event {
                Ok(RunEvent::Started { cached_tokens }) => account.started(cached_tokens),
                Ok(RunEvent::Embedding(values)) => {
                    account.ended(Finished::Stop);
                    return Ok((values, prompt_tokens));
                }
                Ok(_) => {}
                Err(error) => return Err(account.failed(error)),
            }
        }
        Err(account.failed(RunError::Unavailable("the scheduler ended the sequence".into())))
    }

    /// A place among the requests that are being prepared for this deployment.
    fn enter(&self, model: &str, now: Instant) -> Result<Place, FrontError> {
        self.door.enter(model, now).map_err(|retry_after| {
            self.metrics.rejected(Rejection::Overloaded);
            FrontError::Busy { model: model.to_owned(), retry_after }
        })
    }

    /// The account of a sequence that is about to be submitted.
    fn account(&self, deployment: &DeploymentView, run: &RunRequest, origin: Origin) -> Account {
        let arrived = origin.arrived;
        let place = self.door.join(&deployment.name, run.prompt.len());
        let record = self.metrics.request(&deployment.name, run.prompt.len(), arrived);
        let gate = self.gate.clone().map(|gate| (gate, run.tenant.clone()));
        let spans = self.spans.clone().zip(run.spec.trace);
        let spans = spans.map(|(sink, trace)| {
            RequestSpans::new(sink, trace, origin.parent, &deployment.name, run.prompt.len(), arrived)
        });
        Account::new(place, record, self.metrics.clone(), gate, spans, Submitted::new(run, arrived))
    }

    /// The replica of this deployment that shall have the sequence.
    fn route(&self, deployment: DeploymentView, run: &RunRequest) -> (DeploymentView, Option<Ticket>) {
        let replicas: Vec<DeploymentView> = {
            let view = self.deployments.borrow();
            let ready =
                view.deployments.iter().filter(|it| it.name == deployment.name && it.state == State::Ready);
            ready.cloned().collect()
        };
        if deployment.replicas <= 1 || replicas.is_empty() {
            return (deployment, None);
        }
        let candidate = |replica: &DeploymentView| Candidate {
            instance: replica.instance(),
            epoch: replica.epoch,
            places: replica.max_sequences,
        };
        let candidates: Vec<Candidate> = replicas.iter().map(candidate).collect();
        let kind = (deployment.name.as_str(), run.spec.adapter.as_deref(), run.tenant.as_str());
        let (place, ticket) = self.routing.choose(&candidates, &kind, &run.prompt);
        let chosen = replicas.into_iter().nth(place);
        (chosen.unwrap_or(deployment), Some(ticket))
    }

    /// The largest memory that any stage's MLX held since it was loaded; 0 when no stage says so in time.
    pub async fn peak_memory(&self, deployment: &DeploymentView) -> ByteCount {
        let asked = self.replicas.peak_memory(deployment);
        tokio::time::timeout(MEMORY_PATIENCE, asked).await.unwrap_or_default()
    }

    fn lock_texts(&self) -> std::sync::MutexGuard<'_, Texts> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_ready(deployment: &DeploymentView) -> Result<(), FrontError> {
    if deployment.state == State::Ready {
        return Ok(());
    }
    let detail = match deployment.detail.as_str() {
        "" => String::new(),
        detail => format!(": {detail}"),
    };
    let (model, state) = (deployment.name.clone(), state_name(deployment.state));
    Err(FrontError::NotReady { model, state, detail })
}

/// When a request came, and the span that it is part of.
#[derive(Clone, Copy)]
struct Origin {
    arrived: Instant,
    parent: Option<[u8; 8]>,
}

/// The request's trace, or a new one, with a span of its own.
fn named(trace: Option<TraceContext>) -> TraceContext {
    match trace {
        Some(trace) => trace.with_span(rand::random()),
        None => TraceContext::new(rand::random()),
    }
}

/// 63 random bits: a seed that survives every JSON parser's numbers would need 53, but gRPC carries all.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(Instant::now()) >> 1
}

fn names(deployments: &[DeploymentView]) -> String {
    let mut names: Vec<&str> = deployments.iter().map(|deployment| deployment.name.as_str()).collect();
    names.dedup(); // replicas stand beside each other
    names.join(", ")
}

/// Of those that are meant a replica that is ready, if there is one.
fn best(
    deployments: &[DeploymentView],
    is_meant: impl Fn(&DeploymentView) -> bool,
) -> Option<&DeploymentView> {
    deployments.iter().filter(|it| is_meant(it)).min_by_key(|it| it.state != State::Ready)
}
