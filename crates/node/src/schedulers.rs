//! The schedulers of this node: one for each replica whose first stage runs here.

use crate::workers::{Workers, WorkersError};
use mlxnode_api::front::ModelText;
use mlxnode_cluster::Identity;
use mlxnode_coordinator::deployments::{Attempt, Usage};
use mlxnode_coordinator::scheduler::{
    self, Drive, DriveCommand, DriveEvent, Ended, Limits, RunError, RunRequest, RunStream, SchedulerHandle,
    Statistics,
};
use mlxnode_text::{Sandbox, TextFiles};
use mlxnode_worker::{DriveClient, DriveError, DriveEvents};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

/// Why a scheduler could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SchedulersError {
    /// The first stage is not here.
    #[error(transparent)]
    Workers(#[from] WorkersError),
    /// The model's tokenizer or chat template cannot be used.
    #[error("{0}")]
    Text(String),
    /// The first worker does not let itself be driven.
    #[error("{0}")]
    Drive(String),
}

/// All schedulers of this node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Schedulers {
    shared: Arc<Shared>,
}

struct Shared {
    identity: Arc<Identity>,
    workers: Workers,
    sandbox: Arc<dyn Sandbox>,
    /// Where it is written which prompts are on the disk; None when none are.
    prompts: Option<PathBuf>,
    running: Mutex<BTreeMap<String, Running>>,
}

struct Running {
    attempt: Attempt,
    source: String,
    handle: SchedulerHandle,
    /// Ends the scheduler in good order.
    stop: CancellationToken,
    owner: AbortOnDropHandle<()>,
    /// When a request last came or ended.
    last_used: Arc<Mutex<Instant>>,
    /// Takes no further requests.
    is_draining: Arc<AtomicBool>,
    _ways: [AbortOnDropHandle<()>; 3],
}

/// Passing a last word on to everybody who waits takes no time; a stuck scheduler must not hold up an unload.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl Running {
    /// Tells its requests that the model is being unloaded, and ends it.
    async fn end(mut self) {
        self.stop.cancel();
        let _ = tokio::time::timeout(LAST_WORDS, &mut self.owner).await;
    }
}

/// Commands and events on their way between the scheduler and the first worker.
const IN_FLIGHT: usize = 64;

impl Schedulers {
    /// None yet.
    pub(crate) fn new(
        identity: Arc<Identity>,
        workers: Workers,
        sandbox: Arc<dyn Sandbox>,
        prompts: Option<PathBuf>,
    ) -> Self {
        let running = Mutex::default();
        Self { shared: Arc::new(Shared { identity, workers, sandbox, prompts, running }) }
    }

    /// Starts the scheduler of a replica, in place of an older one.
    ///
    /// # Errors
    /// [`SchedulersError`].
    pub(crate) async fn start(
        &self,
        attempt: Attempt,
        source: String,
        limits: Limits,
    ) -> Result<(), SchedulersError> {
        self.check_text(&source).await?;
        let worker = self.shared.workers.first_stage(&attempt)?;
        let address = worker.local_address().to_string();
        let (client, events) = DriveClient::connect(&address, worker.key_pin(), &self.shared.identity)
            .await
            .map_err(|error| SchedulersError::Drive(crate::error::chain(&error)))?;
        let (commands, commands_out) = mpsc::channel(IN_FLIGHT);
        let (events_in, events_out) = mpsc::channel(IN_FLIGHT);
        let sending = AbortOnDropHandle::new(tokio::spawn(send_commands(commands_out, client)));
        let receiving = AbortOnDropHandle::new(tokio::spawn(receive_events(events, events_in)));
        let drive = Drive { commands, events: events_out };
        let prompts = self.shared.prompts.as_ref().map(|folder| folder.join(index_file(&attempt.name)));
        let (handle, mut task) = scheduler::start(limits, drive, prompts);
        let name = attempt.name.clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let owner = AbortOnDropHandle::new(tokio::spawn(async move {
            let ended = tokio::select! {
                ended = task.ended() => ended,
                () = stopped.cancelled() => task.stop().await,
            };
            if let Ended::DriverLost(reason) = ended {
                warn!(model = name, reason, "the replica is lost");
                // A worker that cannot be driven is of no use; its end tells the coordinator.
                worker.stop().await;
            }
        }));
        info!(model = attempt.name, epoch = attempt.epoch, "scheduler started");
        let last_used = Arc::new(Mutex::new(Instant::now()));
        let noting = note_use(handle.watch_statistics(), last_used.clone());
        let noting = AbortOnDropHandle::new(tokio::spawn(noting));
        let running = Running {
            source,
            handle,
            stop,
            owner,
            last_used,
            is_draining: Arc::default(),
            _ways: [sending, receiving, noting],
            attempt: attempt.clone(),
        };
        self.running().insert(attempt.name, running);
        Ok(())
    }

    /// Ends the scheduler of a deployment up to this epoch; its requests end with an error that says so.
    pub(crate) async fn stop(&self, attempt: &Attempt) {
        let ending = {
            let mut running = self.running();
            let is_meant =
                running.get(&attempt.name).is_some_and(|running| running.attempt.epoch <= attempt.epoch);
            if is_meant { running.remove(&attempt.name) } else { None }
        };
        if let Some(running) = ending {
            running.end().await;
        }
    }

    /// Ends all.
    pub(crate) async fn stop_all(&self) {
        let ending = std::mem::take(&mut *self.running());
        futures::future::join_all(ending.into_values().map(Running::end)).await;
    }

    /// A damaged tokenizer or chat template is found when the model is loaded, not when somebody asks it something. Without a
    /// tokenizer at all a model still takes token ids.
    async fn check_text(&self, source: &str) -> Result<(), SchedulersError> {
        let refuse = |error: &dyn std::error::Error| SchedulersError::Text(crate::error::chain(error));
        let folder = self.shared.workers.resolve(source).await?;
        let sandbox = Arc::clone(&self.shared.sandbox);
        let check = move || {
            let files = TextFiles::read(&folder)?;
            files.has_tokenizer().then(|| ModelText::new(&files, sandbox)).transpose().map(|_| ())
        };
        match tokio::task::spawn_blocking(check).await {
            Ok(checked) => checked.map_err(|error| refuse(&error)),
            Err(error) => Err(refuse(&error)),
        }
    }

    /// Runs one sequence. Dropping the stream cancels it.
    ///
    /// # Errors
    /// When no scheduler of this deployment runs here.
    pub(crate) fn run(&self, deployment: &str, request: RunRequest) -> Result<RunStream, RunError> {
        let running = self.running();
        let found = running.get(deployment).ok_or_else(|| not_here(deployment))?;
        if found.is_draining.load(Ordering::SeqCst) {
            return Err(RunError::Unavailable(format!("{deployment} is being unloaded")));
        }
        *found.last_used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Ok(found.handle.run(request))
    }

    /// The model's small files.
    ///
    /// # Errors
    /// When no scheduler of this deployment runs here, or the files cannot be read.
    pub(crate) async fn text_files(&self, deployment: &str) -> Result<TextFiles, RunError> {
        let source = self.running().get(deployment).map(|running| running.source.clone());
        let source = source.ok_or_else(|| not_here(deployment))?;
        let folder = self
            .shared
            .workers
            .resolve(&source)
            .await
            .map_err(|error| RunError::Failed(error.to_string()))?;
        let read = tokio::task::spawn_blocking(move || TextFiles::read(&folder)).await;
        match read {
            Ok(files) => files.map_err(|error| RunError::Failed(crate::error::chain(&error))),
            Err(error) => Err(RunError::Failed(format!("reading the tokenizer failed: {error}"))),
        }
    }

    /// How busy the scheduler of an attempt is.
    ///
    /// # Errors
    /// When it does not run here.
    pub(crate) fn usage(&self, attempt: &Attempt) -> Result<Usage, RunError> {
        let running = self.running();
        let found = running.get(&attempt.name).filter(|running| running.attempt == *attempt);
        let found = found.ok_or_else(|| not_here(&attempt.name))?;
        let statistics = found.handle.statistics();
        let idle = found.last_used.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        Ok(Usage { busy: statistics.active + statistics.queued, idle })
    }

    /// Takes no further requests for an attempt and waits until those that it has have ended.
    ///
    /// # Errors
    /// When its scheduler does not run here.
    pub(crate) async fn drain(&self, attempt: &Attempt) -> Result<(), RunError> {
        let mut statistics = {
            let running = self.running();
            let found = running.get(&attempt.name).filter(|running| running.attempt == *attempt);
            let found = found.ok_or_else(|| not_here(&attempt.name))?;
            found.is_draining.store(true, Ordering::SeqCst);
            found.handle.watch_statistics()
        };
        // A request that was taken a moment ago may not be counted yet; one that is lost by this was never begun.
        tokio::time::sleep(TAKEN_LATE).await;
        // An error means that the scheduler has ended, and its requests with it.
        let _ = statistics.wait_for(|now| now.active + now.queued == 0).await;
        Ok(())
    }

    /// How busy each deployment's scheduler on this node is.
    pub(crate) fn statistics(&self) -> BTreeMap<String, Statistics> {
        self.running().iter().map(|(name, running)| (name.clone(), running.handle.statistics())).collect()
    }

    /// Requests that run or wait on this node, over all deployments.
    pub(crate) fn busy(&self) -> usize {
        self.statistics().values().map(|statistics| statistics.active + statistics.queued).sum()
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.shared.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From when a request is taken until its scheduler counts it.
const TAKEN_LATE: Duration = Duration::from_millis(50);

/// Notes when requests come and end, until the scheduler ends.
async fn note_use(mut statistics: watch::Receiver<Statistics>, last_used: Arc<Mutex<Instant>>) {
    let mut before = 0;
    while statistics.changed().await.is_ok() {
        let busy = {
            let now = statistics.borrow_and_update();
            now.active + now.queued
        };
        if busy == std::mem::replace(&mut before, busy) {
            continue; // something else changed, such as what is on the disk
        }
        *last_used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// Names of deployments may hold what names of files may not.
fn index_file(deployment: &str) -> String {
    let mut name = String::with_capacity(deployment.len() + 8);
    for byte in deployment.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(byte)),
            other => name.push_str(&format!("%{other:02x}")),
        }
    }
    name + ".prompts"
}

fn not_here(deployment: &str) -> RunError {
    RunError::Unavailable(format!("the scheduler of {deployment} is not running"))
}

/// Ends when the scheduler does, or when the worker takes no more: then the channel closes, which the scheduler notices.
async fn send_commands(mut commands: mpsc::Receiver<DriveCommand>, client: DriveClient) {
    while let Some(command) = commands.recv().await {
        let command = match command {
            DriveCommand::Open { sequence, prompt, spec, blocks } => {
                mlxnode_worker::DriveCommand::Open { sequence, prompt, spec, blocks }
            }
            DriveCommand::Keep { sequence, keep } => mlxnode_worker::DriveCommand::Keep { sequence, keep },
            DriveCommand::Blocks(order) => mlxnode_worker::DriveCommand::Blocks(order),
            DriveCommand::Cancel { sequence } => mlxnode_worker::DriveCommand::Cancel { sequence },
        };
        if let Err(error) = client.send(command).await {
            warn!(%error, "cannot drive the replica");
            return;
        }
    }
}

/// Ends when the worker's stream does; then the channel closes, which the scheduler notices.
async fn receive_events(mut events: DriveEvents, sender: mpsc::Sender<DriveEvent>) {
    loop {
        let event = match events.next().await {
            Ok(mlxnode_worker::DriveEvent::Capacity { stages }) => DriveEvent::Capacity { stages },
            // The scheduler knows itself how many tokens it needed no work for.
            Ok(mlxnode_worker::DriveEvent::Started { sequence, .. }) => DriveEvent::Started { sequence },
            Ok(mlxnode_worker::DriveEvent::Progress { sequence, tokens }) => {
                DriveEvent::Progress { sequence, tokens }
            }
            Ok(mlxnode_worker::DriveEvent::Missing { sequence }) => DriveEvent::Missing { sequence },
            Ok(mlxnode_worker::DriveEvent::Scores { sequence, position, scores }) => {
                DriveEvent::Scores { sequence, position, scores }
            }
            Ok(mlxnode_worker::DriveEvent::Embedding { sequence, values }) => {
                DriveEvent::Embedding { sequence, values }
            }
            Ok(mlxnode_worker::DriveEvent::Token(token)) => DriveEvent::Token {
                sequence: token.sequence,
                position: token.position,
                sampled: token.sampled,
                end: token.end,
            },
            Ok(mlxnode_worker::DriveEvent::Closed { sequence }) => DriveEvent::Closed { sequence },
            Ok(mlxnode_worker::DriveEvent::Failed { sequence, reason }) => {
                DriveEvent::Failed { sequence, reason }
            }
            Err(error) => {
                // The scheduler passes the cause on to everybody who waits.
                let reason = match error {
                    DriveError::Lost(reason) => reason,
                    error => crate::error::chain(&error),
                };
                let _ = sender.send(DriveEvent::Lost { reason }).await;
                return;
            }
        };
        if sender.send(event).await.is_err() {
            return;
        }
    }
}
