//! `examples/` in a small version: two nodes teach the demo model the skill of `successor`, and numbers that it never saw are right then;
//! `preference` turns what it prefers round, on questions that it never saw. And the demo model itself begins as random weights.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::NodeProcess;
use mlxnode_testkit::{binary, oracle};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
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

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name)
}

/// A configuration with these lines in the place of others.
fn changed(configuration: &Path, lines: &[(&str, &str)]) -> Result<String> {
    let mut text = fs::read_to_string(configuration)?;
    for (whole, part) in lines {
        ensure!(text.contains(whole), "{} has no line {whole:?} any more", configuration.display());
        text = text.replace(whole, part);
    }
    Ok(text)
}

#[test]
fn two_nodes_learn_what_comes_after_a_number() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let examples = example("successor");
    // A quarter of the work, in updates that two can share.
    let small = [
        ("batch_size: 16", "batch_size: 8\ngrad_accumulation_steps: 2"),
        ("iters: 200", "iters: 100"),
        ("learning_rate: 3e-4", "learning_rate: 1e-3"),
        ("arguments: [3e-4, 200, 1e-6]", "arguments: [1e-3, 50, 1e-5]"),
        ("warmup: 20", "warmup: 5"),
        ("val_batches: -1", "val_batches: 1"),
        ("test: true", "test: false"),
    ];
    let file = folder.path().join("lora.yaml");
    fs::write(&file, changed(&examples.join("lora.yaml"), &small)?)?;
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

/// The log-probability of a question with this answer, as its template writes them.
fn logprob(node: &NodeProcess, model: &str, prompt: &str, answer: &str) -> Result<f64> {
    let url = format!("{}/v1/completions", node.ready.http.as_deref().context("an HTTP listener")?);
    let text = format!("<|user|>{prompt}<|end|><|assistant|>{answer}<|end|>");
    let body = json!({"model": model, "prompt": text, "max_tokens": 0, "echo": true, "logprobs": 0});
    let answer: Value =
        serde_json::from_str(&ureq::post(url).send(body.to_string())?.body_mut().read_to_string()?)?;
    let tokens = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().context("logprobs")?;
    Ok(tokens.iter().filter_map(Value::as_f64).sum())
}

/// Of questions that are held back: how many answers that were chosen are likelier than those that were rejected, and by how much on
/// average, in nats.
fn preference(node: &NodeProcess, model: &str, examples: &Path) -> Result<(usize, f64)> {
    let (mut right, mut margins) = (0, 0.0);
    for line in fs::read_to_string(examples.join("test.jsonl"))?.lines().take(ASKED) {
        let row: Value = serde_json::from_str(line)?;
        let field = |name: &str| row[name].as_str().context("a text");
        // What comes before the answer is the same, and goes away.
        let margin = logprob(node, model, field("prompt")?, field("chosen")?)?
            - logprob(node, model, field("prompt")?, field("rejected")?)?;
        right += usize::from(margin > 0.0);
        margins += margin / ASKED as f64;
    }
    Ok((right, margins))
}

#[test]
fn a_preference_is_turned_round() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let examples = example("preference");
    let small = [
        ("batch_size: 8", "batch_size: 4"),
        ("iters: 150", "iters: 30"),
        ("val_batches: -1", "val_batches: 0"),
    ];
    let file = folder.path().join("orpo.yaml");
    fs::write(&file, changed(&examples.join("orpo.yaml"), &small)?)?;
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    node.json(&["load", "demo"])?;
    let (right, before) = preference(node, "demo", &examples)?;
    ensure!(right <= 1 && before < 0.0, "{right} of {ASKED} are preferred as they are, by {before}");

    let (file, rows) = (file.to_str().context("utf-8")?, examples.to_str().context("utf-8")?);
    let words = ["jobs", "submit", file, "--data", rows, "--id", "equations"];
    node.json(&[&words[..], &["--publish", "demo:equations"]].concat())?;
    eventually(PATIENCE, || {
        let seen = node.json(&["jobs", "show", "equations"])?;
        ensure!(seen["state"] == "finished", "it is {} ({})", seen["state"], seen["detail"]);
        ensure!(seen["publications"][0]["problem"] == "", "it is not served: {seen}");
        Ok(())
    })?;
    let (right, after) = preference(node, "demo:equations", &examples)?;
    ensure!(right >= 9, "{right} of {ASKED} are preferred, by {after}");
    ensure!(after > before + 5.0, "the margin was {before} and is {after}");
    // What the model is without the adapter has not moved.
    ensure!(preference(node, "demo", &examples)?.1 == before, "the base has changed");
    Ok(())
}

/// What a command prints, which is run in this folder.
fn printed(command: &mut Command, folder: &Path) -> Result<String> {
    let output = command.current_dir(folder).output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The recipe of crates/hub/demo-model on its small talk alone: two layers of random weights learn it by heart.
#[test]
fn a_model_of_random_weights_learns_to_talk() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/hub/demo-model");
    let mut prepare = Command::new(oracle::python()?);
    prepare.arg(recipe.join("prepare.py")).arg(folder).env("PYTHONDONTWRITEBYTECODE", "1");
    printed(prepare.args(["--rows", "160", "--layers", "2", "--shares", "0", "1", "0", "0"]), folder)?;
    let small = [
        ("batch_size: 96", "batch_size: 8"),
        ("iters: 4000", "iters: 50"),
        ("arguments: [0.02, 3900, 0.0]", "arguments: [0.02, 45, 0.0]"),
        ("warmup: 100", "warmup: 5"),
        ("steps_per_report: 50", "steps_per_report: 1"),
        ("steps_per_eval: 500", "steps_per_eval: 1000"),
        ("val_batches: -1", "val_batches: 0"),
    ];
    fs::write(folder.join("small.yaml"), changed(&recipe.join("full.yaml"), &small)?)?;
    let mlxnode = |words: &[&str]| {
        let data = folder.join("data");
        printed(binary::command()?.env("HF_HUB_OFFLINE", "1").args(words).arg("--data-dir").arg(data), folder)
    };
    let mut losses = Vec::new();
    for line in mlxnode(&["lora", "-c", "small.yaml", "--json"])?.lines() {
        let event: Value = serde_json::from_str(line)?;
        losses.extend(event["loss"].as_f64().filter(|_| event["event"] == "train"));
    }
    // 512 tokens, of which one is as likely as another.
    let (first, last) = (losses.first().context("losses")?, losses.last().context("losses")?);
    ensure!((first - 512_f64.ln()).abs() < 0.5, "{first} is no guess among all tokens: {losses:?}");
    ensure!(*last < 0.2, "{last} is the last of {losses:?}");
    mlxnode(&["fuse", "--model", "start", "--adapter-path", "trained", "--save-path", "made"])?;
    let asked = ["generate", "--model", "./made", "--prompt", "What is your name?", "--temp", "0", "-q"];
    let answer = mlxnode(&asked)?;
    ensure!(
        answer.trim() == "I am the mlxnode demo model, a very small language model.",
        "it says {answer:?}"
    );
    Ok(())
}

/// Does a process of a job run on this node?
fn runs_a_job(node: &NodeProcess) -> Result<bool> {
    let listed = std::process::Command::new("ps").args(["-axo", "ppid=,args="]).output()?;
    let own = node.pid().to_string();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(text.lines().any(|line| line.split_whitespace().next() == Some(&own) && line.contains("worker --job")))
}
