//! Jobs of a cluster, as its command line shows them.

use crate::eventually::eventually;
use crate::node::NodeProcess;
use anyhow::{Context as _, Result, ensure};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Writes `NAME.jsonl` with so many rows to learn from into a folder, which is made.
pub fn write_rows(folder: &Path, sets: &[(&str, usize)]) -> Result<()> {
    const WORDS: [&str; 6] = ["red", "green", "blue", "cat", "dog", "sun"];
    std::fs::create_dir_all(folder)?;
    for (name, count) in sets {
        let row = |at: usize| {
            let (word, other) = (WORDS[at % WORDS.len()], WORDS[at / 2 % WORDS.len()]);
            json!({"prompt": format!("Say {word} twice."), "completion": format!("{word} {word} {other}")})
                .to_string()
        };
        let rows = (0..*count).map(row).collect::<Vec<_>>().join("\n");
        std::fs::write(folder.join(format!("{name}.jsonl")), rows)?;
    }
    Ok(())
}

/// All that is known about a job.
pub fn show(node: &NodeProcess, id: &str) -> Result<Value> {
    node.json(&["jobs", "show", id])
}

/// Waits until a job is in this state.
pub fn wait_for(node: &NodeProcess, id: &str, state: &str, patience: Duration) -> Result<Value> {
    let mut seen = Value::Null;
    eventually(patience, || {
        seen = show(node, id)?;
        ensure!(seen["state"] == state, "{id} is {} ({})", seen["state"], seen["detail"]);
        Ok(())
    })?;
    Ok(seen)
}

/// Waits until a job has a checkpoint after so many steps, or is finished.
pub fn wait_for_checkpoint(node: &NodeProcess, id: &str, step: u64, patience: Duration) -> Result<Value> {
    let mut seen = Value::Null;
    eventually(patience, || {
        seen = show(node, id)?;
        let checkpoints = seen["checkpoints"].as_array().context("checkpoints")?;
        let is_there = checkpoints.iter().any(|it| it["step"].as_u64() >= Some(step));
        ensure!(is_there || seen["state"] == "finished", "no checkpoint after step {step} yet: {seen}");
        Ok(())
    })?;
    Ok(seen)
}

/// A file of what a job made, downloaded through this node.
pub fn result(node: &NodeProcess, id: &str, folder: &Path, file: &str) -> Result<Vec<u8>> {
    let to = folder.join(format!("{id}-{}", node.pid()));
    node.json(&["jobs", "download", id, "--to", to.to_str().context("utf-8")?])?;
    Ok(std::fs::read(to.join(file))?)
}

/// Processes of jobs that this node has started.
pub fn processes(node: &NodeProcess) -> Result<Vec<Pid>> {
    let listed = Command::new("ps").args(["-axo", "pid=,ppid=,args="]).output()?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let own = node.pid().to_string();
    let found = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (pid, parent) = (words.next()?, words.next()?);
        (parent == own && line.contains("worker --job")).then(|| pid.parse().ok().map(Pid::from_raw))?
    });
    Ok(found.collect())
}
