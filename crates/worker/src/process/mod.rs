//! The node's side of a worker process: starts it, talks to it, notices its end at once and ends it.
//!
//! One task owns the child and waits for it, so that its end is a wait status and not a timeout. The worker's stdin stays open as
//! long as this process lives: should the node die, by SIGKILL too, the system closes the pipe and the worker ends itself.

mod exit;
mod log;

pub use exit::WorkerExit;
pub(crate) use log::Log;
use log::{LOG_END, drain};

use crate::compute_thread::LoadShard;
use crate::hello::{self, Answer, Hello, Ready};
use crate::progress::ShardStats;
use crate::time_counts::TimeCounts;
use mlxnode_cluster::{ConnectError, ConnectOptions, ExpectedKey, Identity, KeyPin, connect};
use mlxnode_proto::PROTOCOL_VERSION;
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::worker_client::WorkerClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};
use tracing::{debug, info, warn};

/// From the start of the process to its first line.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// For the connection to the worker and for small calls.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// For an adapter: some hundred megabytes are read, behind the step under way and other adapters.
const ADAPTER_TIMEOUT: Duration = Duration::from_secs(120);
/// After closing its stdin and SIGTERM; then SIGKILL. The worker itself takes at most 3 s to wait for a step.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// One process is started at a time: on macOS a pipe's other end could otherwise slip into a worker that starts at the same
/// moment, and keep the first one alive after the node's death.
pub(crate) static STARTING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// How to start a worker.
#[derive(Clone, Debug)]
pub struct SpawnWorker {
    /// The executable: the node's own.
    pub command: PathBuf,
    /// Its arguments: `worker`, and what the command line adds for logging.
    pub arguments: Vec<OsString>,
    /// The address the worker listens on; it chooses the port.
    pub listen: IpAddr,
    /// For the log: which deployment and layers.
    pub name: String,
}

/// Why a worker process cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The executable could not be started.
    #[error("cannot start {}", command.display())]
    Start {
        /// The executable.
        command: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// It does not speak as a worker does.
    #[error("the worker process did not start up: {0}")]
    Hello(String),
    /// It listens, but cannot be reached.
    #[error("cannot reach the worker process")]
    Connect(#[source] ConnectError),
    /// It has ended.
    #[error("the worker process {0}")]
    Ended(WorkerExit),
    /// It refused a call, for example because the model cannot be loaded.
    #[error("{0}")]
    Refused(String),
    /// It did not answer in time.
    #[error("the worker process did not answer within {} s", _0.as_secs())]
    Timeout(Duration),
}

/// A worker process. Dropping it kills the process; [`Self::stop`] ends it in good order.
#[derive(Debug)]
pub struct WorkerProcess {
    ready: Ready,
    client: WorkerClient<Channel>,
    exit: watch::Receiver<Option<WorkerExit>>,
    stop: CancellationToken,
    _owner: AbortOnDropHandle<()>,
}

impl WorkerProcess {
    /// Starts a worker whose parent is `identity`, and waits until it can be called.
    ///
    /// # Errors
    /// [`ProcessError`]; then no process is left behind.
    pub async fn spawn(options: SpawnWorker, identity: &Identity) -> Result<Self, ProcessError> {
        let mut command = Command::new(&options.command);
        command.args(&options.arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Its own process group: Ctrl-C in a terminal is for the node, which ends its workers itself.
        command.process_group(0).kill_on_drop(true);
        let mut child = {
            let _starting = STARTING.lock().await;
            let spawned = command.spawn();
            spawned.map_err(|source| ProcessError::Start { command: options.command.clone(), source })?
        };
        let missing = |what| ProcessError::Hello(format!("it has no {what}"));
        let pid = child.id().ok_or_else(|| missing("process id"))?;
        let mut stdin = child.stdin.take().ok_or_else(|| missing("stdin"))?;
        let mut stdout = BufReader::new(child.stdout.take().ok_or_else(|| missing("stdout"))?);
        let log = Log::follow(pid, options.name, child.stderr.take().ok_or_else(|| missing("stderr"))?);

        let hello = hello::line_of(&Hello::new(identity.key_pin(), options.listen));
        let greeting = async {
            let written = stdin.write_all(hello.as_bytes()).await;
            let answer = hello::read_line::<Answer>(&mut stdout).await;
            // Its answer says more than a pipe that it closed meanwhile.
            answer.map_err(|error| written.err().map_or_else(|| error.to_string(), |error| error.to_string()))
        };
        let answer = tokio::time::timeout(HELLO_TIMEOUT, greeting).await;
        let ready = match answer.unwrap_or_else(|_| Err("it did not answer in time".into())) {
            Ok(Answer::Ready(ready)) if ready.protocol == PROTOCOL_VERSION => ready,
            Ok(Answer::Ready(ready)) => {
                let protocol = ready.protocol;
                return Err(ProcessError::Hello(format!(
                    "it speaks protocol {protocol}, not {PROTOCOL_VERSION}"
                )));
            }
            Ok(Answer::Refused { error }) => return Err(ProcessError::Hello(error)),
            Err(error) => {
                // It may have ended with a message of its own, which says most.
                let ended = tokio::time::timeout(LOG_END, child.wait()).await;
                let Ok(status) = ended else { return Err(ProcessError::Hello(error)) };
                return Err(ProcessError::Ended(WorkerExit::new(pid, status, log.end().await)));
            }
        };

        let (exit_sender, exit) = watch::channel(None);
        let stop = CancellationToken::new();
        let drain = AbortOnDropHandle::new(tokio::spawn(drain(stdout)));
        let owner = own(child, pid, stdin, log, drain, stop.clone(), exit_sender);
        let owner = AbortOnDropHandle::new(tokio::spawn(owner));
        let connecting = ConnectOptions { timeout: CALL_TIMEOUT, ..ConnectOptions::default() };
        let expected = ExpectedKey::Pin(ready.key_pin);
        let target = reachable(ready.address).to_string();
        let channel = connect(&target, identity, expected, connecting).await;
        let channel = channel.map_err(|error| {
            let ended = exit.borrow().clone();
            ended.map_or(ProcessError::Connect(error), ProcessError::Ended)
        })?;
        debug!(pid, address = %ready.address, "worker started");
        Ok(Self { ready, client: WorkerClient::new(channel), exit, stop, _owner: owner })
    }

    /// Where the worker listens.
    pub fn address(&self) -> SocketAddr {
        self.ready.address
    }

    /// The address under which this process reaches the worker: loopback when it listens on all addresses.
    pub fn local_address(&self) -> SocketAddr {
        reachable(self.ready.address)
    }

    /// The worker's key: what its neighbours and its scheduler expect.
    pub fn key_pin(&self) -> KeyPin {
        self.ready.key_pin
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.ready.pid
    }

    /// Loads the shard. Read the returned progress to its end; the shard is loaded when it says so.
    ///
    /// # Errors
    /// [`ProcessError`] when the worker refused at once or is gone.
    pub async fn load(&self, shard: &LoadShard, epoch: u64) -> Result<ShardLoading, ProcessError> {
        let too_large = |what: &str| ProcessError::Refused(format!("{what} does not fit 32 bits"));
        let number = |what, value: usize| u32::try_from(value).map_err(|_| too_large(what));
        let text = |path: &std::path::Path| {
            let text = path.to_str().map(str::to_owned);
            text.ok_or_else(|| {
                ProcessError::Refused(format!("the path {} is not valid UTF-8", path.display()))
            })
        };
        let guessing = match &shard.guessing {
            Some(guessing) => Some(proto::Guessing {
                draft: guessing.draft.as_deref().map(text).transpose()?.unwrap_or_default(),
                ngram: number("ngram", guessing.ngram)?,
                tokens: number("tokens", guessing.tokens)?,
            }),
            None => None,
        };
        let spec = proto::ShardSpec {
            layer_start: number("layer_start", shard.layers.start)?,
            layer_end: number("layer_end", shard.layers.end)?,
            layer_count: number("layer_count", shard.layer_count)?,
            context_tokens: number("context_tokens", shard.context_tokens)?,
            max_sequences: number("max_sequences", shard.max_sequences)?,
            prefill_chunk: number("prefill_chunk", shard.prefill_chunk)?,
            prompt_bytes: shard.blocks.as_ref().map_or(0, |room| room.memory.0),
            guessing,
        };
        let blocks = match &shard.blocks {
            Some(room) => Some(proto::BlockRoom { disk_bytes: room.disk.0, folder: text(&room.folder)? }),
            None => None,
        };
        let request =
            proto::LoadShardRequest { folder: text(&shard.folder)?, shard: Some(spec), epoch, blocks };
        let mut client = self.client.clone();
        let reports = self.answer(client.load(request)).await?.into_inner();
        Ok(ShardLoading { reports, exit: self.exit.clone() })
    }

    /// Tells the worker its neighbours and drivers. Returns before the links are made; when they cannot be, the worker ends.
    ///
    /// # Errors
    /// [`ProcessError`] when the worker refused or is gone.
    pub async fn set_links(&self, links: proto::WorkerLinks) -> Result<(), ProcessError> {
        let mut client = self.client.clone();
        self.answer(client.set_links(links)).await.map(|_| ())
    }

    /// Reads what the adapter in `folder` changes in the shard's layers; then sequences may ask for it by `name`.
    ///
    /// # Errors
    /// [`ProcessError::Refused`] when it is none or does not fit the model, others when the worker is gone.
    pub async fn load_adapter(&self, name: &str, folder: &Path) -> Result<(), ProcessError> {
        let folder = folder.to_str().map(str::to_owned).ok_or_else(|| {
            ProcessError::Refused(format!("the path {} is not valid UTF-8", folder.display()))
        })?;
        let mut client = self.client.clone();
        let request = proto::LoadShardAdapterRequest { name: name.to_owned(), folder };
        self.answer_within(ADAPTER_TIMEOUT, client.load_adapter(request)).await.map(|_| ())
    }

    /// No further sequence gets the adapter. One that is not there is fine.
    ///
    /// # Errors
    /// [`ProcessError`] when the worker is gone or does not answer.
    pub async fn unload_adapter(&self, name: &str) -> Result<(), ProcessError> {
        let mut client = self.client.clone();
        let request = proto::UnloadShardAdapterRequest { name: name.to_owned() };
        self.answer_within(ADAPTER_TIMEOUT, client.unload_adapter(request)).await.map(|_| ())
    }

    /// What the worker has done and holds.
    ///
    /// # Errors
    /// [`ProcessError`] when it is gone or does not answer.
    pub async fn stats(&self) -> Result<ShardStats, ProcessError> {
        let mut client = self.client.clone();
        let stats = self.answer(client.stats(Request::new(proto::StatsRequest {}))).await?.into_inner();
        let duration = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        Ok(ShardStats {
            active_bytes: stats.active_bytes,
            peak_bytes: stats.peak_bytes,
            steps: stats.steps,
            open_sequences: stats.open_sequences,
            compute_time: duration(stats.compute_seconds),
            step_time: duration(stats.step_seconds),
            wait_time: duration(stats.wait_seconds),
            send_time: duration(stats.send_seconds),
            prompt_tokens: stats.prompt_tokens,
            decode_tokens: stats.decode_tokens,
            sent_bytes: stats.sent_bytes,
            guessed_tokens: stats.guessed_tokens,
            accepted_tokens: stats.accepted_tokens,
            computes: TimeCounts::of(&stats.compute_counts),
            waits: TimeCounts::of(&stats.wait_counts),
            sends: TimeCounts::of(&stats.send_counts),
        })
    }

    /// Waits for the end of the process, however it comes. May be called by several tasks and again.
    pub async fn wait(&self) -> WorkerExit {
        wait_for(self.exit.clone(), self.pid()).await
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<WorkerExit> {
        self.exit.borrow().clone()
    }

    /// Ends the process and waits until it is gone: closes its stdin, sends SIGTERM, and SIGKILL after 5 s.
    pub async fn stop(&self) -> WorkerExit {
        self.stop.cancel();
        self.wait().await
    }

    async fn answer<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, ProcessError> {
        self.answer_within(CALL_TIMEOUT, call).await
    }

    async fn answer_within<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, ProcessError> {
        tokio::select! {
            biased;
            answer = tokio::time::timeout(limit, call) => match answer {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(status)) => Err(after(&status, &self.exit, self.pid()).await),
                Err(_) => Err(ProcessError::Timeout(limit)),
            },
            exit = self.wait() => Err(ProcessError::Ended(exit)),
        }
    }
}

/// How far loading is, in bytes of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Read so far.
    pub done_bytes: u64,
    /// All that this shard needs.
    pub total_bytes: u64,
    /// The shard is loaded; the last report.
    pub loaded: bool,
}

/// A load under way.
#[derive(Debug)]
pub struct ShardLoading {
    reports: Streaming<proto::LoadShardProgress>,
    exit: watch::Receiver<Option<WorkerExit>>,
}

impl ShardLoading {
    /// The next report. The last one says `loaded`.
    ///
    /// # Errors
    /// [`ProcessError`] when the shard cannot be loaded or the worker has ended.
    pub async fn next(&mut self) -> Result<LoadProgress, ProcessError> {
        let status = match self.reports.message().await {
            Ok(Some(report)) => {
                let proto::LoadShardProgress { done_bytes, total_bytes, loaded } = report;
                return Ok(LoadProgress { done_bytes, total_bytes, loaded });
            }
            Ok(None) => Status::unavailable("the worker stopped loading"),
            Err(status) => status,
        };
        Err(after(&status, &self.exit, 0).await)
    }
}

/// What a failed call means. When the connection broke, the process is ending: its wait status, within moments, says more.
async fn after(status: &Status, exit: &watch::Receiver<Option<WorkerExit>>, pid: u32) -> ProcessError {
    let broke =
        matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled);
    if broke && let Ok(exit) = tokio::time::timeout(CALL_TIMEOUT, wait_for(exit.clone(), pid)).await {
        return ProcessError::Ended(exit);
    }
    ProcessError::Refused(status.message().to_owned())
}

async fn wait_for(mut exit: watch::Receiver<Option<WorkerExit>>, pid: u32) -> WorkerExit {
    match exit.wait_for(Option::is_some).await.map(|exit| exit.clone()) {
        Ok(Some(exit)) => exit,
        _ => WorkerExit { pid, code: None, signal: None, reason: "was dropped".into(), last_line: None },
    }
}

/// Owns the child until it has ended.
async fn own(
    mut child: Child,
    pid: u32,
    stdin: ChildStdin,
    log: Log,
    _drain: AbortOnDropHandle<()>,
    stop: CancellationToken,
    exit: watch::Sender<Option<WorkerExit>>,
) {
    let status = tokio::select! {
        status = child.wait() => status,
        () = stop.cancelled() => {
            drop(stdin);
            if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                // An error means that it has ended already.
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
            match tokio::time::timeout(STOP_TIMEOUT, child.wait()).await {
                Ok(status) => status,
                Err(_) => {
                    warn!(pid, "the worker does not end: killing it");
                    let _ = child.start_kill();
                    child.wait().await
                }
            }
        }
    };
    let ended = WorkerExit::new(pid, status, log.end().await);
    info!(pid, reason = %ended.reason, "worker ended");
    exit.send_replace(Some(ended));
}

/// A worker that listens on all addresses is reached by this process over loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
