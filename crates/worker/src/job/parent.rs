//! The node's side of a job's process.

use super::{Answer, GroupPlace, JobSetup, LinePlace, Order, frames};
use crate::process::{Log, ProcessError, STARTING, WorkerExit};
use mlxnode_cluster::KeyPin;
use mlxnode_compute::{Advance, JobError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// A piece is a few seconds; reading a model or writing a checkpoint may take minutes on a slow disk. Longer than this it is stuck.
const ORDER_LIMIT: Duration = Duration::from_secs(1800);
/// From closing its stdin to SIGKILL: it ends after the piece under way.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum JobCallError {
    /// The job says so.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The process has ended or does not answer.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl JobCallError {
    /// The process was killed from outside: see [`WorkerExit::was_killed`].
    pub fn is_kill(&self) -> bool {
        matches!(self, Self::Process(ProcessError::Ended(exit)) if exit.was_killed())
    }
}

/// A job in a process. Dropping it kills the process.
#[derive(Debug)]
pub struct JobProcess {
    pid: u32,
    child: Child,
    orders: Option<ChildStdin>,
    answers: ChildStdout,
    log: Option<Log>,
    waited: Duration,
}

impl JobProcess {
    /// Starts `command` with `arguments` (`worker --job`). `name` is for the log.
    ///
    /// # Errors
    /// [`ProcessError::Start`]
    pub async fn spawn(command: &Path, arguments: &[OsString], name: String) -> Result<Self, ProcessError> {
        let mut starting = Command::new(command);
        starting.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Its own process group: Ctrl-C in a terminal is for the node, which ends its workers itself.
        starting.process_group(0).kill_on_drop(true);
        let mut child = {
            let _starting = STARTING.lock().await;
            let spawned = starting.spawn();
            spawned.map_err(|source| ProcessError::Start { command: PathBuf::from(command), source })?
        };
        let missing = |what| ProcessError::Hello(format!("it has no {what}"));
        let pid = child.id().ok_or_else(|| missing("process id"))?;
        let orders = child.stdin.take().ok_or_else(|| missing("stdin"))?;
        let answers = child.stdout.take().ok_or_else(|| missing("stdout"))?;
        let log = Log::follow(pid, name, child.stderr.take().ok_or_else(|| missing("stderr"))?);
        Ok(Self { pid, child, orders: Some(orders), answers, log: Some(log), waited: Duration::ZERO })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Makes it one worker of several, before the job is made: where it listens for them, and its key.
    ///
    /// # Errors
    /// [`JobCallError`]
    pub async fn join(&mut self, place: GroupPlace) -> Result<(SocketAddr, KeyPin), JobCallError> {
        match self.ask(Order::Join(place)).await? {
            Answer::Joined { address, key_pin } => Ok((address, key_pin)),
            Answer::Failed(error) => Err(error.into()),
            Answer::Done | Answer::Advanced { .. } => Err(confused().into()),
        }
    }

    /// Makes it one stage of several, before the job is made: where it listens for them, and its key.
    ///
    /// # Errors
    /// [`JobCallError`]
    pub async fn join_line(&mut self, place: LinePlace) -> Result<(SocketAddr, KeyPin), JobCallError> {
        match self.ask(Order::JoinLine(place)).await? {
            Answer::Joined { address, key_pin } => Ok((address, key_pin)),
            Answer::Failed(error) => Err(error.into()),
            Answer::Done | Answer::Advanced { .. } => Err(confused().into()),
        }
    }

    /// Makes the job.
    ///
    /// # Errors
    /// [`JobCallError`]; here and below.
    pub async fn begin(&mut self, setup: JobSetup) -> Result<(), JobCallError> {
        self.done(Order::Begin(setup), ORDER_LIMIT).await
    }

    /// Makes the job of a stage, which waits until all others are there, however long that takes.
    pub async fn begin_in_line(&mut self, setup: JobSetup) -> Result<(), JobCallError> {
        self.done(Order::Begin(setup), Duration::MAX).await
    }

    /// The next piece. Giving the call up leaves the process in the middle of it: stop it then.
    pub async fn advance(&mut self) -> Result<Advance, JobCallError> {
        self.piece(ORDER_LIMIT).await
    }

    /// The next piece of a stage that follows another one, however long that one takes to say what it is.
    pub async fn follow(&mut self) -> Result<Advance, JobCallError> {
        self.piece(Duration::MAX).await
    }

    /// How long of the last piece it waited for the job's other processes.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    async fn piece(&mut self, limit: Duration) -> Result<Advance, JobCallError> {
        match self.ask_for(Order::Advance, limit).await? {
            Answer::Advanced { advance, waited } => {
                self.waited = waited;
                Ok(advance)
            }
            Answer::Failed(error) => Err(error.into()),
            Answer::Done | Answer::Joined { .. } => Err(confused().into()),
        }
    }

    /// Writes its state into an empty folder.
    pub async fn save(&mut self, folder: PathBuf) -> Result<(), JobCallError> {
        self.done(Order::Save(folder), ORDER_LIMIT).await
    }

    /// Writes what it makes into an empty folder.
    pub async fn publish(&mut self, folder: PathBuf) -> Result<(), JobCallError> {
        self.done(Order::Publish(folder), ORDER_LIMIT).await
    }

    /// Ends the process and waits until it is gone: closes its stdin, then SIGKILL after 5 s.
    pub async fn stop(mut self) {
        self.orders = None;
        if tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            if let Ok(pid) = i32::try_from(self.pid) {
                // An error means that it has ended already.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = self.child.wait().await;
        }
    }

    async fn done(&mut self, order: Order, limit: Duration) -> Result<(), JobCallError> {
        match self.ask_for(order, limit).await? {
            Answer::Done => Ok(()),
            Answer::Failed(error) => Err(error.into()),
            Answer::Advanced { .. } | Answer::Joined { .. } => Err(confused().into()),
        }
    }

    async fn ask(&mut self, order: Order) -> Result<Answer, JobCallError> {
        self.ask_for(order, ORDER_LIMIT).await
    }

    async fn ask_for(&mut self, order: Order, limit: Duration) -> Result<Answer, JobCallError> {
        let Some(orders) = &mut self.orders else { return Err(confused().into()) };
        let answers = &mut self.answers;
        let call = async {
            frames::send(orders, &order).await?;
            frames::receive(answers).await
        };
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.ended(&error).await.into()),
            Err(_) => Err(ProcessError::Timeout(limit).into()),
        }
    }

    /// The pipe broke: its wait status says more.
    async fn ended(&mut self, error: &std::io::Error) -> ProcessError {
        match tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await {
            Ok(status) => {
                let last_line = match self.log.take() {
                    Some(log) => log.end().await,
                    None => None,
                };
                ProcessError::Ended(WorkerExit::new(self.pid, status, last_line))
            }
            Err(_) => ProcessError::Hello(format!("it answers what is not understood: {error}")),
        }
    }
}

fn confused() -> ProcessError {
    ProcessError::Hello("it answers something else than was asked".to_owned())
}
