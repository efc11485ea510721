//! A listener over scripted replicas. The model says what stands behind the last `SAY ` of its prompt (up to the end of that message),
//! and otherwise `Hello there.`; a few other words make it wait or fail. Everything else is the real thing.

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream;
use mlxnode_api::deployments::{AdapterView, DeploymentView, DeploymentsView, State};
use mlxnode_api::front::{Front, Replicas, RunEvents};
use mlxnode_api::gate::Gate;
use mlxnode_api::http::{HttpOptions, HttpServer, HttpServices};
use mlxnode_api::jobs::{JobTable, JobsService};
use mlxnode_compute::{ByteCount, Candidate, Output, Sampled, SequenceEnd};
use mlxnode_coordinator::scheduler::{RunError, RunEvent, RunRequest};
use mlxnode_text::{InProcess, TextFiles, Tokenizer};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A running listener.
pub(crate) struct Desk {
    pub(crate) address: SocketAddr,
    pub(crate) replicas: Arc<Scripted>,
    pub(crate) front: Front,
    stop: CancellationToken,
    server: JoinHandle<()>,
    pub(crate) deployments: watch::Sender<DeploymentsView>,
}

/// The demo model's files with another template, which writes down everything that a conversation holds.
const TEMPLATE: &str = "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }} <tool_call>{% if false %}{{ tool_call.name }}{% endif %}\
    <|end|>{% endif %}{% for message in messages %}<|{{ message.role if message.role != 'tool' else 'user' }}|>{{ message.content or '' }}\
    {% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>{% endif %}";

impl Desk {
    pub(crate) async fn start() -> Result<Self> {
        Self::with(HttpOptions { any_port_will_do: false, ..HttpOptions::local() }).await
    }

    pub(crate) async fn with(options: HttpOptions) -> Result<Self> {
        Self::behind(options, Gate::open()).await
    }

    /// With a gate.
    pub(crate) async fn behind(options: HttpOptions, gate: Gate) -> Result<Self> {
        Self::made(options, Duration::ZERO, |services| services.behind(gate)).await
    }

    /// Answers that lose their replica wait for another one.
    pub(crate) async fn patient(resume_within: Duration) -> Result<Self> {
        let options = HttpOptions { any_port_will_do: false, ..HttpOptions::local() };
        Self::made(options, resume_within, |services| services).await
    }

    /// With jobs.
    pub(crate) async fn with_jobs(jobs: Arc<dyn JobTable>) -> Result<Self> {
        Self::made(HttpOptions::local(), Duration::ZERO, |services| services.running_jobs(jobs)).await
    }

    /// With jobs, and a gate.
    pub(crate) async fn with_jobs_behind(jobs: Arc<dyn JobTable>, gate: Gate) -> Result<Self> {
        Self::made(HttpOptions::local(), Duration::ZERO, |services| services.behind(gate).running_jobs(jobs))
            .await
    }

    /// That takes jobs and their files.
    pub(crate) async fn with_service(options: HttpOptions, service: JobsService) -> Result<Self> {
        Self::made(options, Duration::ZERO, |services| services.taking_jobs(service)).await
    }

    async fn made(
        options: HttpOptions,
        resume_within: Duration,
        with: impl FnOnce(HttpServices) -> HttpServices,
    ) -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hub/demo-model/model");
        let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for name in TextFiles::names() {
            if let Ok(bytes) = std::fs::read(folder.join(name)) {
                files.insert(name.to_owned(), bytes);
            }
        }
        files.insert("chat_template.jinja".to_owned(), TEMPLATE.as_bytes().to_vec());
        files.remove("generation_config.json");
        add_thinking(&mut files)?;
        let files = TextFiles::from_map(files)?;
        let tokenizer = Tokenizer::from_files(&files)?;
        let replicas = Arc::new(Scripted {
            files,
            tokenizer,
            running: AtomicUsize::new(0).into(),
            seen: Mutex::default(),
            tokens_per_replica: AtomicUsize::new(usize::MAX),
        });
        let deployment = |name: &str, source: &str, state| DeploymentView {
            name: name.into(),
            replica: 1,
            replicas: 1,
            is_pinned: false,
            ttl: None,
            guessing: None,
            source: source.into(),
            epoch: 1,
            state,
            detail: String::new(),
            stages: Vec::new(),
            scheduler: None,
            architecture: "llama".into(),
            context_tokens: 512,
            max_sequences: 4,
            adapters: Vec::new(),
        };
        let style = AdapterView {
            name: "style".into(),
            source: "/adapters/style".into(),
            key: "style#3".into(),
            problem: None,
        };
        let deployments = vec![
            DeploymentView { adapters: vec![style], ..deployment("demo", "hub/demo", State::Ready) },
            deployment("later", "hub/later", State::Loading),
        ];
        let (sender, view) = watch::channel(DeploymentsView { deployments, is_current: true });
        let stop = CancellationToken::new();
        let options = HttpOptions { listen: SocketAddr::new(options.listen.ip(), 0), ..options };
        let server = HttpServer::bind(options).await?;
        let address = server.address();
        let front =
            Front::new(view, replicas.clone(), Arc::new(InProcess::default())).resuming_within(resume_within);
        let services = with(HttpServices::new(front.clone(), stop.clone()));
        let router = server.router(services, &["studio".to_owned()]);
        let server = tokio::spawn(server.serve(router, stop.clone()));
        Ok(Self { address, replicas, front, stop, server, deployments: sender })
    }

    /// What the demo model is doing now.
    pub(crate) fn set_state(&self, state: State, epoch: u64) {
        self.deployments.send_modify(|view| {
            if let Some(demo) = view.deployments.first_mut() {
                (demo.state, demo.epoch) = (state, epoch);
            }
        });
    }

    /// Stops the listener and waits until it has.
    pub(crate) async fn stop(self) -> Result<()> {
        self.stop.cancel();
        self.server.await.context("the server ended badly")
    }
}

/// `<think>` and `</think>` become tokens, as models that reason have them.
fn add_thinking(files: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    let json = files.get_mut("tokenizer.json").context("tokenizer.json")?;
    let mut tokenizer: serde_json::Value = serde_json::from_slice(json)?;
    let added = tokenizer["added_tokens"].as_array_mut().context("added_tokens")?;
    for (id, content) in [(512, "<think>"), (513, "</think>")] {
        added.push(serde_json::json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": false
        }));
    }
    *json = serde_json::to_vec(&tokenizer)?;
    let config = files.get_mut("config.json").context("config.json")?;
    *config =
        String::from_utf8(config.clone())?.replace("\"vocab_size\": 512", "\"vocab_size\": 514").into_bytes();
    Ok(())
}

/// Plays every replica.
pub(crate) struct Scripted {
    files: TextFiles,
    pub(crate) tokenizer: Tokenizer,
    /// Sequences whose streams are held by somebody.
    running: Arc<AtomicUsize>,
    /// Every request so far.
    pub(crate) seen: Mutex<Vec<RunRequest>>,
    /// A replica is lost after so many tokens of each sequence.
    pub(crate) tokens_per_replica: AtomicUsize,
}

impl Scripted {
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    /// How many requests came so far.
    pub(crate) fn requests(&self) -> usize {
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).len()
    }

    /// The last request.
    pub(crate) fn last(&self) -> RunRequest {
        self.seen
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .last()
            .cloned()
            .expect("a request came")
    }

    fn say(&self, prompt: &[u32]) -> String {
        let text = self.tokenizer.decode(prompt, false).unwrap_or_default();
        let Some(at) = text.rfind("SAY ") else { return "Hello there.".to_owned() };
        let words = &text[at + 4..];
        words.split("<|end|>").next().unwrap_or_default().to_owned()
    }
}

/// Counts down when a stream is dropped.
struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Replicas for Scripted {
    async fn run(&self, _deployment: &DeploymentView, request: RunRequest) -> Result<RunEvents, RunError> {
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(request.clone());
        let generated = request.generated();
        let text = self.say(&request.prompt[..request.spec.prompt_tokens]);
        let spec = &request.spec;
        let mut events = vec![Ok(RunEvent::Started { cached_tokens: 3.min(request.prompt.len() - 1) })];
        if text == "QUEUE FULL" {
            return Ok(stream::iter([Err(RunError::QueueFull { queued: 64, tokens: 64_000 })]).boxed());
        }
        let sampled = |token: u32, wish: Option<mlxnode_compute::LogprobRequest>| Sampled {
            token,
            logprob: wish.map(|_| -0.5),
            top: (0..wish.map_or(0, |wish| wish.top))
                .map(|rank| Candidate {
                    token: if rank == 0 { token } else { 30 + rank as u32 },
                    logprob: -0.5 - rank as f32,
                })
                .collect(),
        };
        if spec.prompt_logprobs.is_some() {
            let scores =
                request.prompt[1..].iter().map(|token| sampled(*token, spec.prompt_logprobs)).collect();
            events.push(Ok(RunEvent::Scores { position: 1, scores }));
        }
        if spec.output == Output::Embedding {
            let length = request.prompt.len() as f32;
            events.push(Ok(RunEvent::Embedding(vec![length, 0.5, -1.25, 3.0e-3])));
            return Ok(stream::iter(events).boxed());
        }
        let breaks = text.contains("BREAK");
        let waits = text.contains("WAIT");
        let mut tokens =
            self.tokenizer.encode(&text, false).map_err(|error| RunError::Failed(error.to_string()))?;
        tokens.push(2);
        let told = &request.prompt[request.spec.prompt_tokens..];
        if tokens.get(..generated) != Some(told) {
            return Err(RunError::Failed(format!("{told:?} was never said")));
        }
        let until = self.tokens_per_replica.load(Ordering::SeqCst).saturating_add(generated);
        for (index, token) in tokens.iter().enumerate().skip(generated) {
            if index == until {
                events.push(Err(RunError::Unavailable("a worker ended with signal 9".into())));
                break;
            }
            let is_stop = spec.stop_tokens.contains(token);
            let is_last = index + 1 == spec.max_tokens;
            let end = if is_stop { Some(SequenceEnd::Stop) } else { is_last.then_some(SequenceEnd::Length) };
            if breaks && index + 1 == tokens.len() {
                events.push(Err(RunError::Unavailable("worker 7 ended".into())));
                break;
            }
            let position = request.spec.prompt_tokens + index;
            events.push(Ok(RunEvent::Token {
                position,
                sampled: sampled(*token, spec.sampling.logprobs),
                end,
            }));
            if end.is_some() {
                break;
            }
        }
        if waits {
            events.pop();
        }
        self.running.fetch_add(1, Ordering::SeqCst);
        let held = Held(self.running.clone());
        let rest = if waits { stream::pending().boxed() } else { stream::empty().boxed() };
        let whole = stream::iter(events).chain(rest);
        Ok(whole
            .map(move |event| {
                let _held = &held;
                event
            })
            .boxed())
    }

    async fn text_files(&self, _deployment: &DeploymentView) -> Result<TextFiles, RunError> {
        Ok(self.files.clone())
    }

    async fn peak_memory(&self, _deployment: &DeploymentView) -> ByteCount {
        ByteCount(0)
    }
}
