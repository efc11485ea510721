//! `cargo xtask lm-eval`: lm-evaluation-harness asks a node through `/v1/completions`, and mlx-lm by itself; both must find the same.
//!
//! The tasks and their data lie in `crates/testkit/evaluation`: choices by log-probability, and answers that are
//! generated. The model is the demo model in two stages, whose weights are in the repository. Not part of `cargo xtask test`: what it
//! installs is large.

use crate::build;
use crate::environment::{Environment, TemporaryFolder};
use crate::node::{Cli, Node};
use crate::places::Places;
use crate::setup;
use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::process::Command;

/// By how much a log-probability may differ: the model computes in single precision, and sums of up to a few dozen tokens are compared.
const TOLERANCE: f64 = 1e-3;

/// What the script prints.
#[derive(Debug, Deserialize)]
struct Found {
    node: Results,
    mlx_lm: Results,
}

/// By task.
type Results = BTreeMap<String, TaskResults>;

#[derive(Debug, Deserialize)]
struct TaskResults {
    /// By measure.
    means: BTreeMap<String, f64>,
    /// By document, and there by choice.
    answers: Vec<Vec<Answer>>,
}

/// What a model was asked for.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Answer {
    /// The log-probability of a text, and is each of its tokens the likeliest one?
    Choice(f64, bool),
    /// A text that was generated.
    Text(String),
}

impl Answer {
    fn agrees_with(&self, other: &Self) -> bool {
        let is_near = |one: &f64, other: &f64| (one - other).abs() <= TOLERANCE;
        match (self, other) {
            (Self::Choice(one, is_first), Self::Choice(other, is_second)) => {
                is_near(one, other) && is_first == is_second
            }
            (Self::Text(one), Self::Text(other)) => one == other,
            _ => false,
        }
    }
}

/// Evaluates and compares.
pub(crate) fn run(places: &Places, release: bool) -> Result<()> {
    let binary = build::binary(places, release)?;
    let python = setup::evaluation::ensure(places)?;
    let folder = TemporaryFolder::new("lm-eval")?;
    let cli = Cli::new(&binary);
    let arguments = ["--no-discovery", "--http", "127.0.0.1:0"];
    let mut node = Node::start_with(&cli, &folder.path().join("node"), "node", &arguments)?;
    let model = places.repository.join("crates/hub/demo-model/model");
    let model = model.to_str().context("the repository's path is UTF-8")?;
    node.ask(&[
        "load", model, "--name", "demo", "--stages", "2", "--node", "node", "--node", "node", "--json",
    ])?;
    let url = node.http().context("the node serves HTTP")?;
    let script = places.repository.join("crates/testkit/evaluation/evaluate.py");
    let mut command = Command::new(&python);
    command.arg(script).args([url, "demo", model]).env("NO_PROXY", "*").env("PYTHONDONTWRITEBYTECODE", "1");
    Environment { oracle: &python, temporary: folder.path(), libraries: &places.wheel_libraries() }
        .apply(&mut command);
    let output = command.output().context("cannot run lm-evaluation-harness")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "lm-evaluation-harness failed ({}): {}\nthe node's log ends with:\n{}",
        output.status,
        crate::command::last_lines(&stderr, 30),
        node.log()
    );
    let found: Found = serde_json::from_slice(&output.stdout).context("the script did not print JSON")?;
    for line in compare(&found)? {
        crate::print(line);
    }
    node.stop()
}

/// A line for each task and measure. Fails where the node's answers are not mlx-lm's.
fn compare(found: &Found) -> Result<Vec<String>> {
    ensure!(!found.node.is_empty(), "no task was run");
    if let Some(task) = found.mlx_lm.keys().find(|task| !found.node.contains_key(*task)) {
        bail!("{task} was not run on the node");
    }
    let mut lines = Vec::new();
    for (task, ours) in &found.node {
        let theirs = found.mlx_lm.get(task).with_context(|| format!("{task} was not run on mlx-lm"))?;
        ensure!(!ours.answers.is_empty(), "{task} has no documents");
        ensure!(
            ours.answers.len() == theirs.answers.len(),
            "{task} has {} documents here and {} on mlx-lm",
            ours.answers.len(),
            theirs.answers.len()
        );
        for (document, (ours, theirs)) in ours.answers.iter().zip(&theirs.answers).enumerate() {
            if ours.len() != theirs.len()
                || !ours.iter().zip(theirs).all(|(one, other)| one.agrees_with(other))
            {
                bail!("{task}, document {document}: the node says {ours:?}, mlx-lm {theirs:?}");
            }
        }
        for (measure, value) in &ours.means {
            let theirs = theirs.means.get(measure).copied().unwrap_or(f64::NAN);
            ensure!(
                (value - theirs).abs() <= TOLERANCE,
                "{task}: {measure} is {value} here and {theirs} on mlx-lm"
            );
            let count: usize = ours.answers.iter().map(Vec::len).sum();
            lines.push(format!(
                "{task:<18} {measure:<24} {value:.6}  mlx-lm {theirs:.6}  ({count} answers agree)"
            ));
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(ours: &str, theirs: &str) -> Found {
        let task =
            |answers: &str| format!(r#"{{"task": {{"means": {{"acc": 0.5}}, "answers": {answers}}}}}"#);
        serde_json::from_str(&format!(r#"{{"node": {}, "mlx_lm": {}}}"#, task(ours), task(theirs))).unwrap()
    }

    #[test]
    fn answers_that_differ_are_found() {
        let same = |ours: &str, theirs: &str| compare(&found(ours, theirs)).is_ok();
        assert!(same("[[[-1.0, true], [-2.0, false]]]", "[[[-1.0005, true], [-2.0, false]]]"));
        assert!(!same("[[[-1.0, true]]]", "[[[-1.0, false]]]"), "what is likeliest");
        assert!(!same("[[[-1.0, true]]]", "[[[-1.1, true]]]"), "a log-probability");
        assert!(!same(r#"[["42"]]"#, r#"[["43"]]"#) && same(r#"[["42"]]"#, r#"[["42"]]"#), "an answer");
        assert!(!same("[[[-1.0, true]]]", "[]") && !same("[]", "[]"), "documents are missing");
    }
}
