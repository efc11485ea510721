//! The front of a request: the node a client is connected to owns it.
//!
//! It finds the deployment, turns text into tokens, checks every parameter, runs the sequence on the replica's scheduler
//! wherever that is, and turns tokens back into text. It keeps prompt, parameters and seed, so that nothing has to be asked
//! again. Dropping the answer's stream cancels the work.

mod answer;
mod model_text;
mod output;
mod replicas;

pub use answer::{Answer, AnswerEvent, Summary};
pub use model_text::ModelText;
pub use output::{End, Output, Piece};
pub use replicas::{Replicas, RunEvents};

use crate::deployments::{DeploymentView, DeploymentsView, State, state_name};
use futures::StreamExt as _;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::requests::{Parameters, RequestError, ValidRequest};
use mlxnode_coordinator::scheduler::{RunError, RunEvent, RunRequest};
use mlxnode_text::{ChatRequest, Sandbox, TextError};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

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
    /// Tell content, reasoning and tool calls apart: [`Piece::deltas`]. Only for conversations.
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
}

/// By deployment, with the epoch for which they were read: a reload may bring another tokenizer.
type Texts = HashMap<String, (u64, Arc<ModelText>)>;

impl Front {
    /// A front over this view of the deployments. The sandbox carries out what the models' files bring along.
    pub fn new(
        deployments: watch::Receiver<DeploymentsView>,
        replicas: Arc<dyn Replicas>,
        sandbox: Arc<dyn Sandbox>,
    ) -> Self {
        Self { deployments, replicas, sandbox, texts: Arc::default() }
    }

    /// The deployment that a request means.
    ///
    /// # Errors
    /// When there is none of that name, or several and the request names none.
    pub fn deployment(&self, model: &str) -> Result<DeploymentView, FrontError> {
        let view = self.deployments.borrow();
        let found = match model {
            "" if view.deployments.len() > 1 => {
                return Err(FrontError::AmbiguousModel(names(&view.deployments)));
            }
            "" => view.deployments.first(),
            name => view.deployments.iter().find(|deployment| deployment.name == name),
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
        let held = self.lock_texts().get(&deployment.name).cloned();
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
        texts.retain(|name, _| loaded.deployments.iter().any(|deployment| deployment.name == *name));
        texts.insert(deployment.name.clone(), (deployment.epoch, Arc::clone(&text)));
        Ok(text)
    }

    /// Starts a generation. The answer is a stream; dropping it cancels the work within one step.
    ///
    /// # Errors
    /// Everything that can be known before the first step.
    pub async fn generate(&self, request: GenerationRequest) -> Result<Answer, FrontError> {
        let deployment = self.ready(&request.model)?;
        let text = self.model_text(&deployment).await?;
        let tools = match &request.input {
            Input::Chat(chat) if request.is_read => Some(chat.tools.clone().unwrap_or_default()),
            _ => None,
        };
        let prompt = text.clone().tokenize_blocking(request.input).await?;
        let mut parameters = request.parameters;
        for token in &request.extra_eos {
            parameters.extra_stop_tokens.push(text.tokenizer.parse_token(token)?);
        }
        let limits = text.limits(&deployment)?;
        let valid = ValidRequest::new(prompt, parameters, &limits, fresh_seed())?;
        let reader = tools.map(|tools| text.answers.parser(&tools, &valid.prompt)).transpose()?;
        let output = Output::new(&text, valid.stop.clone(), reader)?;
        let (seed, prompt_tokens) = (valid.seed(), valid.prompt.len());
        let run = RunRequest {
            prompt: valid.prompt,
            spec: valid.spec,
            deadline: request.deadline,
            tenant: request.tenant,
        };
        let stream = self.replicas.run(&deployment, run).await?;
        Ok(Answer::new(deployment, stream, output, prompt_tokens, seed))
    }

    /// The mean of the prompt's hidden vectors after the last norm, and the prompt's length in tokens.
    ///
    /// # Errors
    /// As [`Front::generate`], and when the replica is lost on the way.
    pub async fn embed(&self, request: EmbeddingRequest) -> Result<(Vec<f32>, usize), FrontError> {
        let deployment = self.ready(&request.model)?;
        let text = self.model_text(&deployment).await?;
        let prompt = text.clone().tokenize_blocking(request.input).await?;
        let valid = ValidRequest::embedding(prompt, request.adapter, &text.limits(&deployment)?)?;
        let prompt_tokens = valid.prompt.len();
        let (deadline, tenant) = (request.deadline, request.tenant);
        let run = RunRequest { prompt: valid.prompt, spec: valid.spec, deadline, tenant };
        let mut events = self.replicas.run(&deployment, run).await?;
        while let Some(event) = events.next().await {
            if let RunEvent::Embedding(values) = event? {
                return Ok((values, prompt_tokens));
            }
        }
        Err(RunError::Unavailable("the scheduler ended the sequence".into()).into())
    }

    fn ready(&self, model: &str) -> Result<DeploymentView, FrontError> {
        let deployment = self.deployment(model)?;
        if deployment.state == State::Ready {
            return Ok(deployment);
        }
        let detail = match deployment.detail.as_str() {
            "" => String::new(),
            detail => format!(": {detail}"),
        };
        Err(FrontError::NotReady { model: deployment.name, state: state_name(deployment.state), detail })
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

/// 63 random bits: a seed that survives every JSON parser's numbers would need 53, but gRPC carries all.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(Instant::now()) >> 1
}

fn names(deployments: &[DeploymentView]) -> String {
    deployments.iter().map(|deployment| deployment.name.as_str()).collect::<Vec<_>>().join(", ")
}
