//! The command line in one process, with the demo model.
//!
//! - `words`: help, flags, and wishes that cannot be
//! - `models`: what is here and what is supported; folders that are damaged
//! - `answers`: what `generate` says, and what changes it
//! - `conversations`: `chat`, and who leaves in the midst of an answer
//! - `measurements`: `benchmark` and `perplexity`

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are test code, too

mod answers;
mod conversations;
mod measurements;
mod models;
mod words;

use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Ends that the demo model would choose by itself become impossible with this bias.
const NO_END: [&str; 2] = ["--logit-bias", r#"{"2": -10000}"#];

/// A user of whom nothing is known yet.
struct User {
    home: TempDir,
}

impl User {
    fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mlxnode"));
        for name in ["RUST_LOG", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "MLXNODE_DATA_DIR"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.home.path().join("huggingface")).env("HF_HUB_OFFLINE", "1");
        command.args(arguments).arg("--data-dir").arg(self.home.path().join("data"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn run_with_input(&self, arguments: &[&str], input: &str) -> Output {
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// What a successful command printed.
    fn says(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let said = self.says(&[arguments, &["--json"]].concat());
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn demo_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../hub/demo-model/model")
}

/// What to break in a model's folder.
type Damage = fn(&Path);

/// A copy of the demo model in which something is wrong.
fn damaged(damage: impl FnOnce(&Path)) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(demo_folder()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    damage(folder.path());
    let name = folder.path().to_str().unwrap().to_owned();
    (folder, name)
}

fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

fn check_sentence(output: &Output, case: &[&str], named: &str) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{case:?}: {said}");
    assert!(said.starts_with("error: ") && said.trim_end().lines().count() == 1, "{case:?}: {said}");
    assert!(said.contains(named), "{case:?}: no {named:?} in: {said}");
    assert!(output.stdout.is_empty(), "{case:?}");
}

/// Waits for the end, but not for ever.
fn finish(mut child: Child) -> Output {
    let begin = Instant::now();
    // Somebody has to read on, or the process waits in its write.
    let mut stdout = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut rest = Vec::new();
        stdout.as_mut().map(|stdout| stdout.read_to_end(&mut rest));
        rest
    });
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > Duration::from_secs(20) {
            child.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut output = child.wait_with_output().unwrap();
    output.stdout = reader.join().unwrap();
    output
}
