//! The two servers: a node with the model loaded, and `mlx_lm.server`, each its own process on the same cores.

use super::client::Server;
use crate::bench::process::{cpu_of, last_lines_of, peak_memory_of, resident_memory_of};
use crate::node::{Cli, Node};
use anyhow::{Context as _, Result, bail, ensure};
use std::ffi::OsString;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Loading half a gigabyte and importing Python's packages on a busy machine.
const START: Duration = Duration::from_secs(180);
const MEBIBYTE: f64 = 1_048_576.0;

/// Our node.
pub(super) struct Ours<'a> {
    node: Node<'a>,
    worker: u32,
    pub(super) server: Server,
}

impl<'a> Ours<'a> {
    pub(super) fn start(
        cli: &'a Cli,
        folder: &Path,
        model: &Path,
        context: usize,
        sequences: usize,
    ) -> Result<Self> {
        let node = Node::start_with(
            cli,
            &folder.join("ours"),
            "ours",
            &["--no-discovery", "--http", "127.0.0.1:0"],
        )?;
        let model = model.to_str().context("the cache folder is UTF-8")?;
        let (context, sequences) = (context.to_string(), sequences.to_string());
        let loaded = node.ask(&[
            "load",
            model,
            "--name",
            "bench",
            "--context",
            &context,
            "--sequences",
            &sequences,
            "--json",
        ])?;
        let worker = loaded["stages"][0]["worker_pid"].as_u64().context("a worker has a process")?;
        let address =
            node.http().and_then(|url| url.strip_prefix("http://")).context("the node serves HTTP")?;
        let server = Server { address: address.to_owned(), model: "bench".into() };
        Ok(Self { worker: u32::try_from(worker)?, server, node })
    }

    /// The most that the node and its worker held, in MiB.
    pub(super) fn peak_memory(&self) -> Option<f64> {
        let bytes = peak_memory_of(self.node.process_id())? + peak_memory_of(self.worker)?;
        Some(bytes as f64 / MEBIBYTE)
    }

    /// What they hold now, in MiB.
    pub(super) fn memory(&self) -> Option<f64> {
        let bytes = resident_memory_of(self.node.process_id())? + resident_memory_of(self.worker)?;
        Some(bytes as f64 / MEBIBYTE)
    }

    /// CPU time that the node's process took, without its worker.
    pub(super) fn front_cpu(&self) -> Option<Duration> {
        cpu_of(self.node.process_id())
    }

    /// A command against the node.
    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        self.node.command(arguments)
    }

    pub(super) fn stop(mut self) -> Result<()> {
        self.node.stop()
    }
}

/// mlx-lm's.
pub(super) struct Theirs {
    child: Child,
    log: PathBuf,
    pub(super) server: Server,
}

impl Theirs {
    pub(super) fn start(
        python: &Path,
        folder: &Path,
        model: &Path,
        environment: &[(&'static str, OsString)],
    ) -> Result<Self> {
        // It takes a port and does not say which one it took, so one that is free now has to do.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let log = folder.join("theirs.log");
        let mut command = Command::new(python);
        command.args(["-m", "mlx_lm", "server", "--host", "127.0.0.1", "--port"]).arg(port.to_string());
        command.arg("--model").arg(model).envs(environment.iter().map(|(name, value)| (name, value)));
        command
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?);
        let child = command.spawn().context("cannot start mlx_lm.server")?;
        let server = Server { address: format!("127.0.0.1:{port}"), model: "default_model".into() };
        let mut theirs = Self { child, log, server };
        let deadline = Instant::now() + START;
        while !theirs.server.is_there() {
            if let Some(status) = theirs.child.try_wait()? {
                bail!("mlx_lm.server ended with {status}:\n{}", last_lines_of(&theirs.log));
            }
            ensure!(
                Instant::now() < deadline,
                "mlx_lm.server did not start:\n{}",
                last_lines_of(&theirs.log)
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(theirs)
    }

    /// The most that it held, in MiB.
    pub(super) fn peak_memory(&self) -> Option<f64> {
        peak_memory_of(self.child.id()).map(|bytes| bytes as f64 / MEBIBYTE)
    }

    /// The end of what it wrote.
    pub(super) fn log(&self) -> String {
        last_lines_of(&self.log)
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}
