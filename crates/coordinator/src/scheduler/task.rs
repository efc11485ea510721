//! The task around the [`Scheduler`]: moves messages, keeps the channels to the fronts, reads the clock.
//!
//! States: running (driver alive) → ended, because the driver was lost ([`Ended::DriverLost`]) or because the owner stopped it or
//! all handles are gone ([`Ended::Stopped`]). The owner is who called [`start`]: dropping the [`SchedulerTask`] ends it at once.

use super::limits::Limits;
use super::machine::{Effect, RequestId, Scheduler};
use super::stream::{Cancelled, RunRequest, RunStream};
use super::{DriveCommand, DriveEvent, RunError, RunEvent, Statistics};
use mlxnode_compute::SequenceSpec;
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, info};

/// The two ends of the way to the first worker: bounded channels that the node pumps into the worker's stream and back. When
/// either is closed, the workers count as lost.
#[derive(Debug)]
pub struct Drive {
    /// To the worker.
    pub commands: mpsc::Sender<DriveCommand>,
    /// From the worker.
    pub events: mpsc::Receiver<DriveEvent>,
}

/// Why a scheduler's task ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The way to the workers is gone, or they are stuck. Whoever owns the workers should end them.
    DriverLost(String),
    /// Nobody needs it any more.
    Stopped,
}

/// Where fronts bring their requests. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SchedulerHandle {
    inbox: mpsc::Sender<Submission>,
    cancelled: Arc<Cancelled>,
    next_request: Arc<AtomicU64>,
    statistics: watch::Receiver<Statistics>,
    context_tokens: usize,
}

/// Owns the task.
#[derive(Debug)]
pub struct SchedulerTask {
    task: JoinHandle<Ended>,
    stop: watch::Sender<bool>,
}

struct Submission {
    request: RequestId,
    run: RunRequest,
    events: mpsc::Sender<Result<RunEvent, RunError>>,
}

/// Submissions on their way to the task. More than that at once means that it does not keep up, and they are refused.
const INBOX: usize = 256;

/// Starts a scheduler for a linked replica. `prompts` is the file for what is known of prompts whose blocks are on the workers' disks: it
/// is read now and written in the end and now and then. A file that cannot be read or written only means that those prompts are computed
/// anew some day.
pub fn start(limits: Limits, drive: Drive, prompts: Option<PathBuf>) -> (SchedulerHandle, SchedulerTask) {
    let (inbox, submissions) = mpsc::channel(INBOX);
    let (statistics_sender, statistics) = watch::channel(Statistics::default());
    let (stop, stopped) = watch::channel(false);
    let cancelled = Arc::new(Cancelled::default());
    let context_tokens = limits.context_tokens;
    let state = Task {
        submissions,
        cancelled: cancelled.clone(),
        stopped,
        drive,
        machine: Scheduler::new(limits, Instant::now().into_std()),
        prompts,
        stored: None,
        fronts: HashMap::new(),
        commands: VecDeque::new(),
        statistics: statistics_sender,
    };
    let task = tokio::spawn(state.run());
    let handle = SchedulerHandle {
        inbox,
        cancelled,
        next_request: Arc::new(AtomicU64::new(1)),
        statistics,
        context_tokens,
    };
    (handle, SchedulerTask { task, stop })
}

impl SchedulerHandle {
    /// Runs one sequence. Everything that can go wrong comes as the stream's last item; dropping the stream cancels.
    pub fn run(&self, run: RunRequest) -> RunStream {
        let request = RequestId(self.next_request.fetch_add(1, Ordering::Relaxed));
        // Room for every event there can be (started, the prompt's scores, the tokens, an error), so that a slow front never holds up the others.
        // Prompt and answer fit the context or are refused, so this is bounded by it: about 100 bytes for a token whose
        // keys and values take kilobytes.
        let scores = if run.spec.prompt_logprobs.is_some() { run.prompt.len() } else { 0 };
        let room = (run.spec.max_tokens + scores).min(self.context_tokens) + 3;
        let (sender, events) = mpsc::channel(room);
        match self.inbox.try_send(Submission { request, run, events: sender }) {
            Ok(()) => RunStream::new(events, request, self.cancelled.clone()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                // More came at once than the scheduler has looked at: their prompts are not counted yet.
                RunStream::refused(RunError::QueueFull { queued: INBOX, tokens: 0 })
            }
            Err(mpsc::error::TrySendError::Closed(_)) => {
                RunStream::refused(RunError::Unavailable("its scheduler ended".into()))
            }
        }
    }

    /// How busy the scheduler is now.
    pub fn statistics(&self) -> Statistics {
        *self.statistics.borrow()
    }

    /// Follows [`SchedulerHandle::statistics`]; closed when the scheduler has ended.
    pub fn watch_statistics(&self) -> watch::Receiver<Statistics> {
        self.statistics.clone()
    }
}

impl SchedulerTask {
    /// Waits until the task ends by itself: the driver was lost, or all handles are gone. May be called again.
    pub async fn ended(&mut self) -> Ended {
        match (&mut self.task).await {
            Ok(ended) => ended,
            Err(error) => Ended::DriverLost(format!("its scheduler failed: {error}")),
        }
    }

    /// Ends all requests with [`RunError::Unavailable`] and the task with them.
    pub async fn stop(mut self) -> Ended {
        // The task may have ended by itself.
        let _ = self.stop.send(true);
        self.ended().await
    }
}

impl Drop for SchedulerTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Task {
    submissions: mpsc::Receiver<Submission>,
    cancelled: Arc<Cancelled>,
    stopped: watch::Receiver<bool>,
    drive: Drive,
    machine: Scheduler,
    fronts: HashMap<RequestId, mpsc::Sender<Result<RunEvent, RunError>>>,
    /// Not yet taken by the driver: at most an open and a cancel for each sequence, and what becomes of each block.
    commands: VecDeque<DriveCommand>,
    statistics: watch::Sender<Statistics>,
    /// The file of prompts.
    prompts: Option<PathBuf>,
    /// What it was last written with: blocks on the disk, and when.
    stored: Option<(usize, Instant)>,
}

/// How often the file of prompts is written at most. What a crash loses of it is computed anew.
const STORE_EVERY: Duration = Duration::from_secs(30);

/// What happened next.
#[expect(clippy::large_enum_variant, reason = "one exists at a time, on the stack")]
enum Input {
    Drive(Option<DriveEvent>),
    /// A command was handed over, or cannot be.
    Command(Result<(), DriverGone>),
    Submission(Option<Submission>),
    Cancelled,
    Woke,
    Stop,
}

struct DriverGone;

impl Task {
    async fn run(mut self) -> Ended {
        self.machine = self.machine.with_stored_prompts(read(self.prompts.as_deref()).await);
        let ended = self.serve().await;
        self.store().await;
        ended
    }

    async fn serve(&mut self) -> Ended {
        const DRIVER_GONE: &str = "the connection to its workers ended";
        let mut inbox_is_open = true;
        loop {
            let effects = match self.next_input(inbox_is_open).await {
                Input::Drive(Some(event)) => self.machine.on_drive(event, now()),
                Input::Drive(None) | Input::Command(Err(DriverGone)) => {
                    self.machine.on_driver_lost(DRIVER_GONE)
                }
                Input::Command(Ok(())) => continue,
                // Dropped before it got here: its cancellation may have come first, so nobody else would end it.
                Input::Submission(Some(submission)) if submission.events.is_closed() => continue,
                Input::Submission(Some(Submission { request, run, events })) => {
                    self.fronts.insert(request, events);
                    // From here on the log calls it by this number; the trace is what other nodes know it by.
                    debug!(
                        trace = named(&run.spec),
                        request = request.0,
                        tokens = run.prompt.len(),
                        "request queued"
                    );
                    self.machine.submit(request, &run.tenant, run.prompt, run.spec, run.deadline, now())
                }
                Input::Submission(None) => {
                    inbox_is_open = false;
                    Vec::new()
                }
                Input::Cancelled => self.cancel_dropped(),
                Input::Woke => self.machine.tick(now()),
                Input::Stop => {
                    let effects = self.machine.on_driver_lost("the model is being unloaded");
                    self.apply(effects);
                    return Ended::Stopped;
                }
            };
            self.apply(effects);
            if let Some(reason) = self.machine.lost() {
                info!(reason, "scheduler lost its workers");
                return Ended::DriverLost(reason.to_owned());
            }
            if !inbox_is_open && self.fronts.is_empty() {
                return Ended::Stopped;
            }
            self.store_now_and_then().await;
        }
    }

    async fn store_now_and_then(&mut self) {
        if self.prompts.is_none() {
            return;
        }
        let blocks = self.machine.statistics().prompts.blocks_on_disk;
        let is_due = match self.stored {
            Some((stored, at)) => stored != blocks && at.elapsed() >= STORE_EVERY,
            None => blocks > 0,
        };
        if is_due {
            self.store().await;
        }
    }

    /// Writes the file of prompts beside its place first, so that it is there as a whole or not at all.
    async fn store(&mut self) {
        let Some(path) = &self.prompts else { return };
        let Some(bytes) = self.machine.stored_prompts() else { return };
        self.stored = Some((self.machine.statistics().prompts.blocks_on_disk, Instant::now()));
        let unfinished = path.with_extension("unfinished");
        let written = async {
            if let Some(folder) = path.parent() {
                tokio::fs::create_dir_all(folder).await?;
            }
            tokio::fs::write(&unfinished, bytes).await?;
            tokio::fs::rename(&unfinished, path).await
        };
        if let Err(error) = written.await {
            debug!(%error, "the index of prompts is not written");
        }
    }

    async fn next_input(&mut self, inbox_is_open: bool) -> Input {
        let wake = self.machine.next_wake();
        tokio::select! {
            event = self.drive.events.recv() => Input::Drive(event),
            place = self.drive.commands.reserve(), if !self.commands.is_empty() => {
                let Ok(place) = place else { return Input::Command(Err(DriverGone)) };
                if let Some(command) = self.commands.pop_front() {
                    place.send(command);
                }
                Input::Command(Ok(()))
            }
            submission = self.submissions.recv(), if inbox_is_open => Input::Submission(submission),
            () = self.cancelled.changed() => Input::Cancelled,
            () = sleep_until(wake) => Input::Woke,
            // An error means that the owner is gone, and then the task is being aborted.
            _ = self.stopped.wait_for(|stopped| *stopped) => Input::Stop,
        }
    }

    fn cancel_dropped(&mut self) -> Vec<Effect> {
        let dropped = self.cancelled.take();
        dropped.into_iter().flat_map(|request| self.machine.cancel(request, now())).collect()
    }

    fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Open { sequence, prompt, spec, blocks } => {
                    debug!(trace = named(&spec), sequence = sequence.0, "sequence opened");
                    self.commands.push_back(DriveCommand::Open { sequence, prompt, spec, blocks });
                }
                Effect::Keep { sequence, keep } => {
                    self.commands.push_back(DriveCommand::Keep { sequence, keep });
                }
                Effect::Blocks(order) => self.commands.push_back(DriveCommand::Blocks(order)),
                Effect::Cancel { sequence } => self.commands.push_back(DriveCommand::Cancel { sequence }),
                Effect::Emit { request, event } => {
                    if let Some(front) = self.fronts.get(&request) {
                        // Full it cannot be; closed it is when the front is gone, and then the cancellation is on its way.
                        let _ = front.try_send(Ok(event));
                    }
                }
                Effect::End { request, result } => {
                    let Some(front) = self.fronts.remove(&request) else { continue };
                    if let Err(error) = result {
                        debug!(request = request.0, %error, "request ended");
                        let _ = front.try_send(Err(error));
                    }
                }
            }
        }
        let statistics = self.machine.statistics();
        self.statistics.send_if_modified(|old| std::mem::replace(old, statistics) != statistics);
    }
}

/// The trace that a sequence belongs to, for the log.
fn named(spec: &SequenceSpec) -> Option<String> {
    spec.trace.map(|trace| trace.id())
}

/// The file of prompts, if there is one of a size that makes sense.
async fn read(path: Option<&Path>) -> Option<Vec<u8>> {
    let path = path?;
    let size = tokio::fs::metadata(path).await.ok()?.len();
    if size > LARGEST_STORE { None } else { tokio::fs::read(path).await.ok() }
}

/// 64 MiB are sixty thousand blocks, which is fifteen million tokens.
const LARGEST_STORE: u64 = 64 << 20;

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

async fn sleep_until(wake: Option<std::time::Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(Instant::from_std(wake)).await,
        None => std::future::pending().await,
    }
}
