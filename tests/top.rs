//! `mlxnode top` in a pseudo terminal: it shows the cluster, obeys keys, and gives the terminal back however it ends.

use anyhow::{Context as _, Result, bail, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::NodeProcess;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::Child;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A program in a terminal of its own.
struct Terminal {
    child: Child,
    keyboard: File,
    /// Kept open, so that the terminal lives on when the program ends.
    slave: File,
    pieces: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

const BOUND: Duration = Duration::from_secs(30);
const TAKEN: &str = "\u{1b}[?1049h";
const GIVEN_BACK: &str = "\u{1b}[?1049l";

impl Terminal {
    fn start(node: &NodeProcess, arguments: &[&str]) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?.into_string()?;
        let slave = File::options().read(true).write(true).open(name)?;
        tcsetwinsize(&slave, Winsize { ws_row: 30, ws_col: 110, ws_xpixel: 0, ws_ypixel: 0 })?;
        let mut command = node.command(arguments)?;
        let child = command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).spawn()?;
        let keyboard = File::from(master);
        let mut screen = keyboard.try_clone()?;
        let (sender, pieces) = mpsc::sync_channel(1024);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, keyboard, slave, pieces, seen: String::new() })
    }

    /// Waits until this was written after all that was waited for before.
    fn shows(&mut self, words: &str) -> Result<()> {
        let end = Instant::now() + BOUND;
        loop {
            if let Some(at) = self.seen.find(words) {
                self.seen.drain(..at + words.len());
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.pieces.recv_timeout(left) {
                Ok(piece) => self.seen.push_str(&String::from_utf8_lossy(&piece)),
                Err(_) => bail!("{words:?} does not come; seen: {:?}", self.seen),
            }
        }
    }

    /// Waits until all of these were written, in whatever order: what comes with a later look is drawn behind what was there.
    fn shows_all(&mut self, words: &[&str]) -> Result<()> {
        let end = Instant::now() + BOUND;
        while let Some(missing) = words.iter().find(|words| !self.seen.contains(**words)) {
            let left = end.saturating_duration_since(Instant::now());
            match self.pieces.recv_timeout(left) {
                Ok(piece) => self.seen.push_str(&String::from_utf8_lossy(&piece)),
                Err(_) => bail!("{missing:?} does not come; seen: {:?}", self.seen),
            }
        }
        self.seen.clear();
        Ok(())
    }

    fn types(&mut self, keys: &str) -> Result<()> {
        Ok(self.keyboard.write_all(keys.as_bytes())?)
    }

    fn modes(&self) -> Result<Termios> {
        Ok(tcgetattr(&self.slave)?)
    }

    /// Its status, and whether lines and echo are as they were.
    fn ends(&mut self) -> Result<std::process::ExitStatus> {
        let end = Instant::now() + BOUND;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait()? {
                let modes = self.modes()?.local_modes;
                ensure!(modes.contains(LocalModes::ICANON | LocalModes::ECHO), "the terminal is still raw");
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("it does not end")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn story_top_shows_the_cluster_and_gives_the_terminal_back() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    node.json(&["load", "demo", "--stages", "2"])?;
    node.output(&["generate", "--prompt", "What is 17 + 25?"])?;
    let folder = tempfile::tempdir()?;
    let (configuration, rows) = (folder.path().join("rehearsal.yaml"), folder.path().join("train.jsonl"));
    std::fs::write(&configuration, "steps: 100000\nmillis: 20\n")?;
    std::fs::write(&rows, "{\"text\": \"one row\"}\n")?;
    let path = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path in UTF-8");
    let (configuration, rows) = (path(&configuration)?, path(&rows)?);
    node.json(&[
        "jobs",
        "submit",
        &configuration,
        "--kind",
        "rehearsal",
        "--data",
        &rows,
        "--id",
        "endless",
    ])?;
    eventually(BOUND, || {
        let look = node.json(&["top", "--once", "--every", "0.5"])?;
        let job = &look["jobs"][0];
        ensure!(job["id"] == "endless" && job["state"] == "running", "{look}");
        ensure!(job["step"].as_u64() > Some(0) && job["losses"][0]["training"].is_number(), "{look}");
        Ok(())
    })?;

    // For scripts: a look with rates, of both nodes' stages.
    let look = node.json(&["top", "--once", "--every", "0.5"])?;
    let stages = look["deployments"][0]["stages"].as_array().context("stages")?;
    ensure!(stages.len() == 2, "{look}");
    for stage in stages {
        ensure!(stage["figures"]["steps"].as_u64() > Some(0), "{stage}");
        ensure!(stage["figures"]["rates"]["busy"].is_number(), "{stage}");
    }
    let text = node.output(&["top", "--once", "--every", "0.5"])?;
    let text = String::from_utf8(text.stdout)?;
    for words in [
        "NODES",
        "node0",
        "node1",
        "MODELS",
        "demo",
        "JOBS",
        "endless",
        "of 100000",
        "STAGES",
        "compute",
        "wait",
        "send",
    ] {
        ensure!(text.contains(words), "no {words} in {text}");
    }
    let piped = node.output(&["top"])?;
    ensure!(!piped.status.success(), "without a terminal there is nothing to draw on");
    ensure!(String::from_utf8_lossy(&piped.stderr).contains("--once"), "{piped:?}");

    // Keys.
    let mut top = Terminal::start(node, &["top"])?;
    top.shows(TAKEN)?;
    top.shows_all(&["Nodes", "node1", "Models", "demo", "Jobs", "endless", "running", "Stages"])?;
    ensure!(!top.modes()?.local_modes.contains(LocalModes::ICANON), "keys come at once");
    top.types("?")?;
    top.shows("Keys")?;
    top.types("?\ts")?;
    top.shows("▲")?;
    top.types("q")?;
    top.shows(GIVEN_BACK)?;
    ensure!(top.ends()?.success());

    // Signals.
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let mut top = Terminal::start(node, &["top"])?;
        top.shows("Stages")?;
        kill(Pid::from_raw(top.child.id().try_into()?), signal)?;
        top.shows(GIVEN_BACK)?;
        top.ends()?;
    }
    Ok(())
}
