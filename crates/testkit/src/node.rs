//! One node as a process: started by `mlxnode join --json`, asked through the command line, ended by SIGTERM.

use crate::binary;
use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What `mlxnode join --json` prints when it is ready.
#[derive(Clone, Debug, Deserialize)]
pub struct Ready {
    /// Hex id.
    pub node_id: String,
    /// Name in the roster.
    pub name: String,
    /// Cluster's name.
    pub cluster: String,
    /// HOST:PORT of the gRPC listener.
    pub grpc: String,
    /// URL of the HTTP listener.
    pub http: Option<String>,
}

/// How to start a node.
#[derive(Clone, Debug, Default)]
pub struct NodeSetup {
    /// Argument of `--name`.
    pub name: String,
    /// Argument of `--listen`; the loopback with a free port when empty.
    pub listen: String,
    /// Argument of `--http`; the loopback with a free port when empty.
    pub http: String,
    /// Argument of `--invite`.
    pub invite: Option<String>,
    /// Arguments of `--peer`.
    pub peers: Vec<String>,
    /// Further arguments of `join`.
    pub arguments: Vec<String>,
    /// A command line to put in front, such as `ip netns exec host1`.
    pub prefix: Vec<String>,
}

/// A running node. Dropping it kills the process.
pub struct NodeProcess {
    child: Child,
    /// What it printed when it was ready.
    pub ready: Ready,
    data_dir: PathBuf,
    log: PathBuf,
    prefix: Vec<String>,
}

/// Long enough for a loaded two-core machine; a healthy node needs well under a second.
const START: Duration = Duration::from_secs(30);

impl NodeProcess {
    /// Starts a node and waits until it is ready.
    pub fn start(data_dir: &Path, setup: &NodeSetup) -> Result<Self> {
        std::fs::create_dir_all(data_dir)?;
        let log = data_dir.with_extension("log");
        let listen = if setup.listen.is_empty() { "127.0.0.1:0" } else { &setup.listen };
        let mut command = prefixed(&setup.prefix)?;
        command.args(["join", "--json", "--listen", listen, "--data-dir"]).arg(data_dir);
        // Two tests on one machine must not fight for the usual port.
        if !setup.arguments.iter().any(|argument| argument == "--no-http") {
            command.args(["--http", if setup.http.is_empty() { "127.0.0.1:0" } else { &setup.http }]);
        }
        if !setup.name.is_empty() {
            command.args(["--name", &setup.name]);
        }
        if let Some(invite) = &setup.invite {
            command.args(["--invite", invite]);
        }
        for peer in &setup.peers {
            command.args(["--peer", peer]);
        }
        command.args(&setup.arguments);
        let file = File::options().create(true).append(true).open(&log)?;
        let mut child =
            command.stdout(Stdio::piped()).stderr(file).spawn().context("cannot start mlxnode")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let (line_sender, line_receiver) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines();
            let _ = line_sender.send(lines.next());
            for _ in lines {} // keep the pipe open and empty until the node ends
        });
        let line = line_receiver.recv_timeout(START);
        let Ok(Some(Ok(line))) = line else {
            let _ = child.kill();
            let _ = child.wait();
            bail!("the node did not get ready; its log:\n{}", tail(&log));
        };
        let ready = serde_json::from_str(&line).with_context(|| format!("not the ready line: {line}"))?;
        Ok(Self { child, ready, data_dir: data_dir.to_owned(), log, prefix: setup.prefix.clone() })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The node's data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// The end of its log, for messages of failed tests.
    pub fn log(&self) -> String {
        tail(&self.log)
    }

    /// A command line against this node: `mlxnode <arguments> --data-dir <its>`.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = prefixed(&self.prefix)?;
        command.args(arguments).arg("--data-dir").arg(&self.data_dir);
        Ok(command)
    }

    /// Runs it, whatever comes of it.
    pub fn output(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments)?.output()?)
    }

    /// Runs it with `--json` and reads what it printed; fails with its stderr when it failed.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = arguments.to_vec();
        all.push("--json");
        let output = self.output(&all)?;
        ensure!(
            output.status.success(),
            "mlxnode {arguments:?} failed ({}): {}\nlog of the node:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("not JSON: {}", String::from_utf8_lossy(&output.stdout)))
    }

    /// Sends a signal to the node.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }

    /// Ends the node politely and checks that it says goodbye with status 0 within `bound`.
    pub fn stop(mut self, bound: Duration) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let end = Instant::now() + bound;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the node ended with {status}; its log:\n{}", self.log());
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("the node did not stop within {bound:?}; its log:\n{}", self.log())
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn prefixed(prefix: &[String]) -> Result<Command> {
    let Some((program, arguments)) = prefix.split_first() else { return binary::command() };
    let mut command = Command::new(program);
    command.args(arguments).arg(binary::path()?).stdin(Stdio::null());
    Ok(command)
}

/// The last 60 lines of a log.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_else(|error| format!("(no log: {error})"));
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}
