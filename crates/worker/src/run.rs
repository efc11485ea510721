//! The process `mlxnode worker`: says hello to its node, serves until the node lets go of it.
//!
//! It ends when the pipe on its stdin closes (the node has ended, however it ended), on SIGTERM and SIGINT, and on a fault.

use crate::compute_thread::StageFactory;
use crate::error::Fault;
use crate::hello::{self, Answer, Hello, HelloError, Ready};
use crate::server::{LocalWorker, WorkerOptions};
use mlxnode_cluster::Identity;
use mlxnode_proto::PROTOCOL_VERSION;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::time::Duration;
use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// How long the node may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the process ends with an error.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Somebody else than a node started it.
    #[error(
        "this command is for the node itself, which starts a worker for every shard it holds: try `mlxnode join`"
    )]
    NotFromNode(#[source] std::io::Error),
    /// The node's first line is not as it should be.
    #[error("the node's first line is wrong: {0}")]
    Hello(String),
    /// The system refused something.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// No key could be made.
    #[error("cannot make a key")]
    Key(#[source] mlxnode_cluster::KeyError),
    /// A fault ended it.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl RunError {
    /// The exit code of the process: which kind of error, for the node and for scripts.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFromNode(_) | Self::Hello(_) => 64,
            Self::System { .. } | Self::Key(_) => 69,
            Self::Fault(fault) => fault.exit_code(),
        }
    }
}

/// Runs the worker of this process to its end. `load` is called on the compute thread when the node asks for a shard.
///
/// The network runs on the calling thread alone: a frame's way from the socket to the compute thread then has no further thread
/// in it. When a step is stuck at the end, this returns although the compute thread still runs; leave the process then.
///
/// # Errors
/// [`RunError`], with the exit code to leave with.
pub fn run(options: WorkerOptions, load: StageFactory) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| RunError::System { what: "start the runtime", source })?;
    let outcome = runtime.block_on(serve_node(options, load));
    runtime.shutdown_background();
    outcome
}

async fn serve_node(options: WorkerOptions, load: StageFactory) -> Result<(), RunError> {
    let system = |what| move |source| RunError::System { what, source };
    let mut terminate = signal(SignalKind::terminate()).map_err(system("listen to signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("listen to signals"))?;
    let mut stdin = stdin_pipe()?;

    let hello = tokio::time::timeout(HELLO_TIMEOUT, hello::read_line::<Hello>(&mut stdin));
    let hello = hello.await.map_err(|_| RunError::Hello("it did not come".into()))?;
    let hello = match hello {
        Ok(hello) if hello.protocol == PROTOCOL_VERSION => hello,
        Ok(hello) => return refuse(&HelloError::Protocol(hello.protocol)),
        Err(error) => return refuse(&error),
    };
    let identity = Identity::generate().map_err(RunError::Key)?;
    let listener = TcpListener::bind((hello.listen, 0))
        .await
        .map_err(system("listen on the address that the node gave"))?;
    let mut worker = LocalWorker::start(options, listener, identity, hello.parent_key_pin, load)?;
    let ready = Ready {
        address: worker.address(),
        key_pin: worker.key_pin(),
        pid: std::process::id(),
        protocol: PROTOCOL_VERSION,
    };
    say(&Answer::Ready(ready))?;

    let node_gone = async {
        let mut rest = [0; 64];
        while matches!(stdin.read(&mut rest).await, Ok(count) if count > 0) {}
    };
    tokio::select! {
        ended = worker.ended() => return Ok(ended?),
        () = node_gone => {
            // Nobody reads the log any more either, and writing to a broken pipe would be an error of its own.
            discard_output();
            info!("the node has let go of this worker");
        }
        _ = terminate.recv() => info!("asked to end by SIGTERM"),
        _ = interrupt.recv() => info!("asked to end by SIGINT"),
    }
    worker.stop();
    Ok(worker.ended().await?)
}

/// Standard input, which is a pipe when a node started this process. Read without a thread, so that nothing is left at the end.
fn stdin_pipe() -> Result<BufReader<pipe::Receiver>, RunError> {
    let stdin = std::io::stdin();
    let pipe = stdin.as_fd().try_clone_to_owned().and_then(pipe::Receiver::from_owned_fd);
    Ok(BufReader::new(pipe.map_err(RunError::NotFromNode)?))
}

/// From here on stdout and stderr go nowhere.
fn discard_output() {
    if let Ok(nowhere) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        // When it cannot be done, the output stays where it was, and a write to it may end the process: it is ending anyway.
        let _ = nix::unistd::dup2_stdout(&nowhere).and_then(|()| nix::unistd::dup2_stderr(&nowhere));
    }
}

fn refuse(error: &HelloError) -> Result<(), RunError> {
    say(&Answer::Refused { error: error.to_string() })?;
    Err(RunError::Hello(error.to_string()))
}

fn say(answer: &Answer) -> Result<(), RunError> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(hello::line_of(answer).as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|source| RunError::System { what: "answer the node", source })
}
