//! `examples/` in a small version: two nodes teach the demo model the skill of `successor`, and numbers that it never saw are right then.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::NodeProcess;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(400);
/// Held-back questions that are asked before and after.
const ASKED: usize = 10;

/// How many of the held-back questions are answered right.
fn score(node: &NodeProcess, examples: &Path, adapter: &[&str]) -> Result<usize> {
    let questions = fs::read_to_string(examples.join("test.jsonl"))?;
    let mut right = 0;
    for line in questions.lines().take(ASKED) {
        let question: Value = serde_json::from_str(line)?;
        let prompt = question["prompt"].as_str().context("a prompt")?;
        let words = ["generate", "--model", "demo", "--max-tokens", "8", "--temp", "0", "--prompt", prompt];
        let answer = node.json(&[&words[..], adapter].concat())?;
        let text = answer["text"].as_str().context("a text")?.trim();
        right += usize::from(question["completion"] == text);
    }
    Ok(right)
}

#[test]
fn two_nodes_learn_what_comes_after_a_number() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/successor");
    let configuration = fs::read_to_string(examples.join("lora.yaml"))?;
    // A quarter of the work, in updates that two can share.
    let mut small = configuration.clone();
    for (whole, part) in [
        ("batch_size: 16", "batch_size: 8\ngrad_accumulation_steps: 2"),
        ("iters: 200", "iters: 100"),
        ("learning_rate: 3e-4", "learning_rate: 1e-3"),
        ("arguments: [3e-4, 200, 1e-6]", "arguments: [1e-3, 50, 1e-5]"),
        ("warmup: 20", "warmup: 5"),
        ("val_batches: -1", "val_batches: 1"),
        ("test: true", "test: false"),
    ] {
        ensure!(small.contains(whole), "lora.yaml has no line {whole:?} any more");
        small = small.replace(whole, part);
    }
    let file = folder.path().join("lora.yaml");
    fs::write(&file, small)?;
    let cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    node.json(&["load", "demo"])?;
    let before = score(node, &examples, &[])?;

    let (file, rows) = (file.to_str().context("utf-8")?, examples.to_str().context("utf-8")?);
    let words = ["jobs", "submit", file, "--data", rows, "--id", "successor", "--workers", "2"];
    node.json(&[&words[..], &["--publish", "demo:successor"]].concat())?;
    let mut helped = false;
    let mut seen = Value::Null;
    eventually(PATIENCE, || {
        seen = node.json(&["jobs", "show", "successor"])?;
        helped |= cluster.nodes.iter().all(|node| runs_a_job(node).unwrap_or(false));
        ensure!(seen["state"] == "finished", "it is {} ({})", seen["state"], seen["detail"]);
        ensure!(seen["publications"][0]["problem"] == "", "it is not served: {seen}");
        Ok(())
    })?;
    ensure!(helped, "one of the nodes took no part");
    let after = score(&cluster.nodes[1], &examples, &["--adapter", "successor"])?;
    ensure!(before <= 1, "{before} of {ASKED} were right before: that is nothing to learn");
    ensure!(after >= 8, "{after} of {ASKED} are right, {before} were before");
    Ok(())
}

/// Does a process of a job run on this node?
fn runs_a_job(node: &NodeProcess) -> Result<bool> {
    let listed = std::process::Command::new("ps").args(["-axo", "ppid=,args="]).output()?;
    let own = node.pid().to_string();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(text.lines().any(|line| line.split_whitespace().next() == Some(&own) && line.contains("worker --job")))
}
