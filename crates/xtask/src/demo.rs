//! `cargo xtask demo`: the first slice from end to end. Two nodes on this machine find each other by mDNS, pair by a short
//! code, split the embedded model, and answer a question; then both end as they should.
//!
//! It uses only what scripts may rely on: the `--json` output of the commands, SIGTERM, exit codes.

use crate::node::{Cli, Node};
use crate::places::Places;
use crate::{build, setup};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const QUESTION: &str = "What is 17 + 25?";
const ANSWER: &str = "42";

/// Builds, runs the story, and removes everything it made.
pub(crate) fn run(places: &Places, release: bool) -> Result<()> {
    let binary = build::binary(places, release)?;
    let folder = std::env::temp_dir().join(format!("mlxnode-demo-{}", std::process::id()));
    setup::wheel::remove(&folder)?;
    std::fs::create_dir_all(&folder)?;
    let kept = Folder(folder.clone());
    let start = Instant::now();
    tell(&binary, &folder)?;
    drop(kept);
    let build = if release { "release build" } else { "debug build" };
    crate::print(format_args!(
        "done in {:.1} s ({build}); both nodes ended cleanly",
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// The data directories and logs, removed at the end; what a failure needs of them is in its message.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = setup::wheel::remove(&self.0) {
            eprintln!("{error:#}");
        }
    }
}

fn tell(binary: &Path, folder: &Path) -> Result<()> {
    let cli = Cli::new(binary);
    let mut first = Node::start(&cli, &folder.join("first"), "first", None)?;
    crate::print(format_args!("first   {} at {}, cluster {}", first.id(), first.address(), first.cluster()));
    let invite = first.ask(&["invite", "--json"])?;
    let code = text(&invite, "code")?;
    crate::print(format_args!("invite  {code}"));
    // Only the code is told: where the first node is, the second learns by mDNS.
    let mut second = Node::start(&cli, &folder.join("second"), "second", Some(code))
        .with_context(|| format!("the first node's log ends with:\n{}", first.log()))?;
    crate::print(format_args!("second  {} at {}, paired by mDNS and code", second.id(), second.address()));
    with_logs(story(&first), &first, &second)?;
    second.stop()?;
    first.stop()
}

fn story(first: &Node) -> Result<()> {
    wait_for_both(first)?;
    let start = Instant::now();
    first.ask(&["load", "demo", "--stages", "2", "--json"])?;
    crate::print(format_args!("load    demo on two stages in {:.1} s", start.elapsed().as_secs_f64()));
    let answer = first.ask(&["generate", "--prompt", QUESTION, "--json"])?;
    let said = text(&answer, "text")?;
    crate::print(format_args!("\n        {QUESTION}\n        {}\n", said.trim()));
    let status = first.ask(&["status", "--json"])?;
    for line in who_ran_what(&status)? {
        crate::print(format_args!("stage   {line}"));
    }
    crate::print(format_args!(
        "speed   prompt {} tokens at {:.0} tok/s, answer {} tokens at {:.0} tok/s",
        number(&answer, "prompt_tokens")?,
        number(&answer, "prompt_tps")?,
        number(&answer, "generation_tokens")?,
        number(&answer, "generation_tps")?,
    ));
    ensure!(said.contains(ANSWER), "the answer to {QUESTION:?} is {ANSWER}, the model said {said:?}");
    Ok(())
}

/// Waits until the first node sees two that are alive.
fn wait_for_both(first: &Node) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = first.ask(&["status", "--json"])?;
        let nodes = status["nodes"].as_array().context("status lists nodes")?;
        if nodes.iter().filter(|node| node["state"] == "alive").count() >= 2 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the two nodes paired but do not see each other alive: {status}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A line per stage: node, layers, worker.
fn who_ran_what(status: &Value) -> Result<Vec<String>> {
    let deployments = status["deployments"].as_array().context("status lists deployments")?;
    let deployment =
        deployments.first().context("the demo model is loaded, but status shows no deployment")?;
    let stages = deployment["stages"].as_array().context("a deployment lists its stages")?;
    ensure!(stages.len() == 2, "two stages were asked for, status shows {}", stages.len());
    let mut nodes: Vec<&Value> = Vec::new();
    let mut lines = Vec::new();
    for stage in stages {
        nodes.push(&stage["node"]);
        lines.push(format!("{} ran layers {}", stage["node"].as_str().unwrap_or("?"), layers(stage)));
    }
    ensure!(nodes[0] != nodes[1], "both stages ran on one node: {deployment}");
    Ok(lines)
}

/// The layer range, half open, however status writes it: `[0, 3]`, `"0..3"`, or two fields.
fn layers(stage: &Value) -> String {
    let (start, end) = match &stage["layers"] {
        Value::String(range) => return range.clone(),
        Value::Array(ends) if ends.len() == 2 => (&ends[0], &ends[1]),
        Value::Object(range) => (&range["start"], &range["end"]),
        _ => (&stage["layer_start"], &stage["layer_end"]),
    };
    format!("{start}..{end}")
}

fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value[field].as_str().with_context(|| format!("no {field} in {value}"))
}

fn number(value: &Value, field: &str) -> Result<f64> {
    value[field].as_f64().with_context(|| format!("no {field} in {value}"))
}

/// A failure, with what the nodes said last.
fn with_logs(result: Result<()>, first: &Node, second: &Node) -> Result<()> {
    result.with_context(|| {
        format!(
            "the demo failed; the first node's log ends with:\n{}\nand the second's with:\n{}",
            first.log(),
            second.log()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_who_ran_which_layers() {
        let status = json!({"deployments": [{"stages": [
            {"node": "first", "layers": [0, 2]}, {"node": "second", "layers": [2, 4]}]}]});
        assert_eq!(who_ran_what(&status).unwrap(), ["first ran layers 0..2", "second ran layers 2..4"]);
        let one_node = json!({"deployments": [{"stages": [
            {"node": "first", "layers": "0..2"}, {"node": "first", "layers": "2..4"}]}]});
        assert!(who_ran_what(&one_node).unwrap_err().to_string().contains("one node"));
        assert!(who_ran_what(&json!({"deployments": []})).is_err());
    }
}
