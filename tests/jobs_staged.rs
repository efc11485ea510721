//! A job whose model is divided among nodes: the result of one node, also when a stage's process, its node or the leading node is killed.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::jobs;
use mlxnode_testkit::node::NodeProcess;
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(180);

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).context("a path in UTF-8")
}

/// A rehearsal over three files, so that every stage has some.
fn rehearsal(folder: &Path, steps: u32, millis: u32) -> Result<Vec<String>> {
    let configuration = folder.join(format!("rehearsal-{millis}.yaml"));
    std::fs::write(&configuration, format!("steps: {steps}\nmillis: {millis}\n"))?;
    let mut words = vec!["jobs".to_owned(), "submit".to_owned(), text(&configuration)?];
    for name in ["a.jsonl", "b.jsonl", "c.jsonl"] {
        let file = folder.join(name);
        std::fs::write(&file, format!("{{\"text\": \"the row of {name}\"}}\n"))?;
        words.extend(["--data".to_owned(), text(&file)?]);
    }
    words.extend(["--kind", "rehearsal", "--save-steps", "5"].map(str::to_owned));
    Ok(words)
}

fn submit(node: &NodeProcess, words: &[String], id: &str, stages: &str) -> Result<Value> {
    let words: Vec<&str> = words.iter().map(String::as_str).chain(["--id", id, "--stages", stages]).collect();
    node.json(&words)
}

/// The numbers of the nodes that have the stages of a job, once all of them compute.
fn stages(cluster: &LocalCluster, by: usize, id: &str, count: usize) -> Result<Vec<usize>> {
    let mut found = Vec::new();
    eventually(PATIENCE, || {
        let seen = jobs::show(&cluster.nodes[by], id)?;
        let stages = seen["stages"].as_array().context("stages")?;
        ensure!(seen["state"] == "running" && stages.len() == count, "{seen}");
        found = stages
            .iter()
            .map(|stage| (0..cluster.nodes.len()).find(|index| stage["node"] == cluster.setup(*index).name))
            .collect::<Option<_>>()
            .context("a node of the cluster")?;
        for index in &found {
            ensure!(jobs::processes(&cluster.nodes[*index])?.len() == 1, "{index} runs a stage");
        }
        Ok(())
    })?;
    Ok(found)
}

fn nothing_runs(cluster: &LocalCluster) -> Result<()> {
    eventually(PATIENCE, || {
        for node in &cluster.nodes {
            ensure!(jobs::processes(node)?.is_empty(), "a stage runs still");
        }
        Ok(())
    })
}

#[test]
fn a_divided_job_whose_stages_are_killed_comes_to_the_result_of_one_process() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut cluster = LocalCluster::start(2)?;
    let result = |node: &NodeProcess, id: &str| jobs::result(node, id, folder.path(), "result.txt");
    submit(cluster.first(), &rehearsal(folder.path(), 60, 0)?, "whole", "1")?;
    jobs::wait_for(cluster.first(), "whole", "finished", PATIENCE)?;
    let expected = result(cluster.first(), "whole")?;

    // Three nodes are not there: it waits, and says for what.
    let slow = rehearsal(folder.path(), 60, 60)?;
    submit(cluster.first(), &slow, "divided", "3")?;
    let waiting = jobs::wait_for(cluster.first(), "divided", "waiting for nodes", PATIENCE)?;
    let detail = waiting["detail"].as_str().context("detail")?;
    ensure!(detail.contains("waiting for 1 more node"), "{detail}");
    cluster.add()?;
    cluster.wait_until_all_alive()?;

    // The process of a stage.
    let parts = stages(&cluster, 0, "divided", 3)?;
    jobs::wait_for_checkpoint(cluster.first(), "divided", 5, PATIENCE)?;
    for pid in jobs::processes(&cluster.nodes[parts[1]])? {
        kill(pid, Signal::SIGKILL)?;
    }
    // The node of another one.
    jobs::wait_for_checkpoint(cluster.first(), "divided", 15, PATIENCE)?;
    let parts = stages(&cluster, 0, "divided", 3)?;
    let helper = *parts.iter().skip(1).find(|index| **index != 0).context("a stage on another node")?;
    cluster.nodes[helper].signal(Signal::SIGKILL)?;
    let waiting = jobs::wait_for(cluster.first(), "divided", "waiting for nodes", PATIENCE)?;
    ensure!(waiting["detail"].as_str().context("detail")?.contains("1 more node"), "{waiting}");
    cluster.revive(helper)?;
    // The node that leads.
    jobs::wait_for_checkpoint(cluster.first(), "divided", 25, PATIENCE)?;
    let leading = stages(&cluster, 0, "divided", 3)?[0];
    cluster.nodes[leading].signal(Signal::SIGKILL)?;
    cluster.revive(leading)?;
    cluster.wait_until_all_alive()?;

    let seen = jobs::wait_for(cluster.first(), "divided", "finished", PATIENCE)?;
    ensure!(seen["attempts"].as_u64() >= Some(4), "{seen}");
    ensure!(result(cluster.first(), "divided")? == expected, "another result");
    nothing_runs(&cluster)
}

#[test]
fn what_does_not_go_together_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start(1)?;
    let words = rehearsal(folder.path(), 5, 0)?;
    let both: Vec<String> = words.iter().cloned().chain(["--workers", "2"].map(str::to_owned)).collect();
    let refused = submit(cluster.first(), &both, "both", "2").unwrap_err().to_string();
    ensure!(refused.contains("workers"), "{refused}");
    let refused = submit(cluster.first(), &words, "nine", "9").unwrap_err().to_string();
    ensure!(refused.contains("1 to 8"), "{refused}");
    Ok(())
}
