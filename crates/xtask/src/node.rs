//! A node as a process, and commands asked of it: for the demo and the benchmarks.

use crate::command::last_lines;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A healthy node starts in under a second and the second one pairs in a few; a busy laptop gets more.
const START: Duration = Duration::from_secs(40);
/// Longest any command may take; loading the small model on a busy machine is the slowest.
const COMMAND: Duration = Duration::from_secs(120);
/// Draining ends at once when nothing runs.
const STOP: Duration = Duration::from_secs(15);

/// The binary, run without whatever this terminal has set for mlxnode.
pub(crate) struct Cli {
    binary: PathBuf,
    /// A command line to put in front, such as `taskset --cpu-list 0`.
    prefix: Vec<String>,
    environment: Vec<(&'static str, OsString)>,
}

impl Cli {
    pub(crate) fn new(binary: &Path) -> Self {
        Self { binary: binary.to_owned(), prefix: Vec::new(), environment: Vec::new() }
    }

    /// The same, with a command line in front and variables set.
    pub(crate) fn prefixed(mut self, prefix: &[&str], environment: &[(&'static str, OsString)]) -> Self {
        self.prefix = prefix.iter().map(|word| (*word).to_owned()).collect();
        self.environment = environment.to_vec();
        self
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = match self.prefix.split_first() {
            Some((program, words)) => {
                let mut command = Command::new(program);
                command.args(words).arg(&self.binary);
                command
            }
            None => Command::new(&self.binary),
        };
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("MLXNODE_")) {
                command.env_remove(name);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.args(arguments).stdin(Stdio::null());
        command
    }
}

/// What `join --json` prints when the node is ready.
#[derive(Debug, Deserialize)]
struct Ready {
    node_id: String,
    name: String,
    cluster: String,
    grpc: String,
    /// URL; none without HTTP.
    http: Option<String>,
}

/// A running node; dropped without [`Node::stop`] it is killed.
pub(crate) struct Node<'a> {
    cli: &'a Cli,
    child: Child,
    ready: Ready,
    ready_after: Duration,
    data_dir: PathBuf,
    log: PathBuf,
}

impl<'a> Node<'a> {
    /// Starts `mlxnode join` and waits for its ready line.
    pub(crate) fn start(cli: &'a Cli, data_dir: &Path, name: &str, invite: Option<&str>) -> Result<Self> {
        match invite {
            Some(invite) => Self::start_with(cli, data_dir, name, &["--invite", invite]),
            None => Self::start_with(cli, data_dir, name, &[]),
        }
    }

    /// The same with any further arguments of `join`.
    pub(crate) fn start_with(cli: &'a Cli, data_dir: &Path, name: &str, arguments: &[&str]) -> Result<Self> {
        let log = data_dir.with_extension("log");
        let mut command = cli.command(&["join", "--json", "--listen", "127.0.0.1:0", "--name", name]);
        command.arg("--data-dir").arg(data_dir).args(arguments);
        command.stdout(Stdio::piped()).stderr(File::create(&log)?);
        let start = Instant::now();
        let child = command.spawn().with_context(|| format!("cannot start {}", cli.binary.display()))?;
        let mut child = Ended(Some(child));
        let ready = match child.first_line(START) {
            Ok(line) => serde_json::from_str(&line).with_context(|| format!("not a ready line: {line}"))?,
            Err(error) => {
                bail!("the {name} node did not get ready: {error:#}; its log ends with:\n{}", tail(&log))
            }
        };
        let ready_after = start.elapsed();
        let child = child.0.take().context("the child is there until taken")?;
        Ok(Self { cli, child, ready, ready_after, data_dir: data_dir.to_owned(), log })
    }

    /// From the start of the process to its ready line.
    pub(crate) fn ready_after(&self) -> Duration {
        self.ready_after
    }

    pub(crate) fn process_id(&self) -> u32 {
        self.child.id()
    }

    /// The first letters of the node's id.
    pub(crate) fn id(&self) -> &str {
        self.ready.node_id.get(..12).unwrap_or(&self.ready.node_id)
    }

    pub(crate) fn name(&self) -> &str {
        &self.ready.name
    }

    pub(crate) fn cluster(&self) -> &str {
        &self.ready.cluster
    }

    pub(crate) fn address(&self) -> &str {
        &self.ready.grpc
    }

    /// URL of its HTTP listener.
    pub(crate) fn http(&self) -> Option<&str> {
        self.ready.http.as_deref()
    }

    /// The end of its log.
    pub(crate) fn log(&self) -> String {
        tail(&self.log)
    }

    /// Runs a command with `--json` against this node and reads its answer.
    pub(crate) fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Ended(Some(command.spawn()?));
        let (stdout, stderr) =
            child.output(COMMAND).with_context(|| format!("mlxnode {}", arguments.join(" ")))?;
        serde_json::from_str(&stdout)
            .with_context(|| format!("mlxnode {} printed no JSON: {stdout}{stderr}", arguments.join(" ")))
    }

    /// A command against this node.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.cli.command(arguments);
        command.arg("--data-dir").arg(&self.data_dir);
        command
    }

    /// Asks the node to end, as a service manager would, and expects it to do so with status 0.
    pub(crate) fn stop(&mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGTERM)?;
        let status = wait(&mut self.child, STOP).with_context(|| {
            format!("the node did not end on SIGTERM; its log ends with:\n{}", self.log())
        })?;
        ensure!(status.success(), "the node ended with {status}; its log ends with:\n{}", self.log());
        Ok(())
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A child that is killed and awaited when it is dropped early.
struct Ended(Option<Child>);

impl Ended {
    fn child(&mut self) -> Result<&mut Child> {
        self.0.as_mut().context("the child is there until taken")
    }

    /// Its first line of stdout; later lines are read and thrown away, so that it never waits for a reader.
    fn first_line(&mut self, patience: Duration) -> Result<String> {
        let stdout = self.child()?.stdout.take().context("stdout is piped")?;
        let (sender, receiver) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines();
            if sender.send(lines.next()).is_ok() {
                lines.take_while(Result::is_ok).for_each(drop);
            }
        });
        match receiver.recv_timeout(patience) {
            Ok(Some(line)) => Ok(line?),
            Ok(None) => bail!("it ended ({})", wait(self.child()?, Duration::from_secs(1))?),
            Err(_) => bail!("nothing within {} s", patience.as_secs()),
        }
    }

    /// What it printed to stdout and stderr; fails when it fails or takes too long.
    fn output(&mut self, patience: Duration) -> Result<(String, String)> {
        let child = self.child()?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let stderr = child.stderr.take().context("stderr is piped")?;
        let stdout = std::thread::spawn(move || read_all(stdout));
        let stderr = std::thread::spawn(move || read_all(stderr));
        let status = wait(child, patience)?;
        let stdout = stdout.join().map_err(|_| anyhow!("a reader panicked"))?;
        let stderr = stderr.join().map_err(|_| anyhow!("a reader panicked"))?;
        ensure!(status.success(), "failed ({status}): {}", last_lines(&stderr, 20));
        Ok((stdout, stderr))
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

fn end(child: &mut Child) {
    if !matches!(child.try_wait(), Ok(Some(_))) {
        let _ = child.kill(); // it may just have ended by itself
        let _ = child.wait();
    }
}

fn wait(child: &mut Child, patience: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        ensure!(Instant::now() < deadline, "still running after {} s", patience.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn read_all(mut source: impl std::io::Read) -> String {
    let mut bytes = Vec::new();
    let _ = source.read_to_end(&mut bytes); // what was read before an error still helps
    String::from_utf8_lossy(&bytes).into_owned()
}

fn tail(log: &Path) -> String {
    match std::fs::read(log) {
        Ok(bytes) => last_lines(&String::from_utf8_lossy(&bytes), 30),
        Err(error) => format!("(no log: {error})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    /// A shell script in place of the binary.
    fn script(name: &str, text: &str) -> (PathBuf, Cli) {
        let folder = std::env::temp_dir().join(format!("xtask-demo-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join("mlxnode");
        std::fs::write(&file, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        (folder, Cli::new(&file))
    }

    const READY: &str =
        r#"{"node_id":"0123456789abcdef","name":"n","cluster":"desk","grpc":"127.0.0.1:1","http":null}"#;

    #[test]
    fn a_node_that_gets_ready_and_drains_is_fine() {
        let text = format!(
            "[ $1 = status ] && {{ echo '{{\"nodes\":[]}}'; exit; }}\ntrap 'exit 0' TERM\necho '{READY}'\nwhile :; do sleep 0.01; done"
        );
        let (folder, cli) = script("fine", &text);
        let mut node = Node::start(&cli, &folder.join("data"), "n", None).unwrap();
        assert_eq!((node.id(), node.cluster(), node.address()), ("0123456789ab", "desk", "127.0.0.1:1"));
        assert!(node.ask(&["status", "--json"]).unwrap()["nodes"].is_array());
        node.stop().unwrap();
        drop(node);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_node_that_fails_shows_the_end_of_its_log() {
        let (folder, cli) = script("bad", "echo 'the port is in use' >&2; exit 3");
        let error = Node::start(&cli, &folder.join("data"), "n", None).err().unwrap().to_string();
        assert!(error.contains("the port is in use") && error.contains('3'), "{error}");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_node_that_ends_badly_on_sigterm_is_a_failure() {
        let text = format!("trap 'exit 7' TERM\necho '{READY}'\nwhile :; do sleep 0.01; done");
        let (folder, cli) = script("dirty", &text);
        let mut node = Node::start(&cli, &folder.join("data"), "n", None).unwrap();
        assert!(node.stop().unwrap_err().to_string().contains('7'));
        drop(node);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
