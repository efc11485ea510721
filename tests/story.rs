//! The story of the first slice: nodes pair, split a model, answer; workers die and come back; nodes leave.
//!
//! Real processes on the loopback, asked through the command line as a person or a script would.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::{NodeProcess, NodeSetup};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::time::Duration;

const QUESTION: [&str; 3] = ["generate", "--prompt", "What is 17 + 25?"];

fn ready_deployment(node: &NodeProcess) -> Result<Value> {
    let status = node.json(&["status"])?;
    let deployment = status["deployments"][0].clone();
    ensure!(deployment["state"] == "ready", "not ready: {status}");
    Ok(deployment)
}

fn stage_names(deployment: &Value) -> Vec<String> {
    let stages = deployment["stages"].as_array().expect("stages");
    stages.iter().map(|stage| stage["node"].as_str().expect("a stage names its node").to_owned()).collect()
}

#[test]
fn story_two_nodes_split_the_demo_model_and_answer_from_either_node() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    let loaded = cluster.first().json(&["load", "demo", "--stages", "2"])?;
    ensure!(loaded["state"] == "ready", "{loaded}");
    let deployment = ready_deployment(cluster.first())?;
    let mut names = stage_names(&deployment);
    names.sort();
    assert_eq!(names, ["node0", "node1"]);
    for node in &cluster.nodes {
        let answer = node.json(&QUESTION)?;
        assert!(answer["text"].as_str().context("text")?.contains("42"), "{answer}");
        assert_eq!(answer["finish_reason"], "stop");
        assert_eq!(
            answer["generation_tokens"].as_u64().context("generation_tokens")?,
            answer["token_ids"].as_array().context("token_ids")?.len() as u64
        );
    }
    cluster.first().json(&["unload", "demo"])?;
    let status = cluster.first().json(&["status"])?;
    assert_eq!(status["deployments"].as_array().map(Vec::len), Some(0), "{status}");
    for node in cluster.nodes {
        node.stop(Duration::from_secs(10))?;
    }
    Ok(())
}

#[test]
fn story_one_two_and_three_stages_give_the_same_tokens_greedy_and_seeded() -> Result<()> {
    let cluster = LocalCluster::start(3)?;
    let node = cluster.first();
    let mut seen: Vec<(Value, Value)> = Vec::new();
    for stages in ["1", "2", "3"] {
        node.json(&["load", "demo", "--stages", stages])?;
        assert_eq!(stage_names(&ready_deployment(node)?).len().to_string(), stages);
        let greedy = node.json(&QUESTION)?;
        let seeded = node.json(&[
            "generate",
            "--prompt",
            "Sort 31, 4, 15",
            "--temp",
            "1.5",
            "--top-p",
            "0.95",
            "--seed",
            "7",
            "--max-tokens",
            "40",
        ])?;
        seen.push((greedy["token_ids"].clone(), seeded["token_ids"].clone()));
        node.json(&["unload", "demo"])?;
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
    Ok(())
}

#[test]
fn story_a_killed_worker_is_noticed_at_once_and_started_again() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    node.json(&["load", "demo", "--stages", "2"])?;
    let before = ready_deployment(node)?;
    let pid = before["stages"][1]["worker_pid"].as_u64().context("worker_pid")?;
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL)?;
    let epoch = before["epoch"].as_u64().context("epoch")?;
    eventually(Duration::from_secs(20), || {
        let deployment = ready_deployment(node)?;
        ensure!(deployment["epoch"].as_u64() > Some(epoch), "still the old epoch: {deployment}");
        Ok(())
    })?;
    let answer = node.json(&QUESTION)?;
    assert!(answer["text"].as_str().context("text")?.contains("42"), "{answer}");
    Ok(())
}

#[test]
fn story_a_dead_node_is_noticed_and_its_model_reports_an_error_not_a_hang() -> Result<()> {
    let mut cluster = LocalCluster::start(2)?;
    cluster.first().json(&["load", "demo", "--stages", "2"])?;
    drop(cluster.nodes.remove(1)); // SIGKILL
    let node = cluster.first();
    eventually(Duration::from_secs(15), || {
        let status = node.json(&["status"])?;
        let dead = status["nodes"].as_array().context("nodes")?.iter().any(|entry| entry["state"] == "dead");
        ensure!(dead, "nobody is dead yet: {status}");
        Ok(())
    })?;
    let started = std::time::Instant::now();
    let output = node.output(&QUESTION)?;
    assert!(started.elapsed() < Duration::from_secs(15), "an answer or an error, but soon");
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("demo"), "the error names the model: {text}");
    }
    Ok(())
}

#[test]
fn story_a_node_leaves_and_another_is_forgotten() -> Result<()> {
    let mut cluster = LocalCluster::start(3)?;
    let leaving = cluster.nodes.remove(2);
    leaving.json(&["leave"])?;
    let names = |node: &NodeProcess| -> Result<Vec<String>> {
        let status = node.json(&["status"])?;
        let nodes = status["nodes"].as_array().context("nodes")?.clone();
        Ok(nodes.iter().map(|entry| entry["name"].as_str().unwrap_or_default().to_owned()).collect())
    };
    eventually(Duration::from_secs(5), || {
        let names = names(cluster.first())?;
        ensure!(names == ["node0", "node1"], "{names:?}");
        Ok(())
    })?;
    cluster.first().json(&["forget", "node1"])?;
    eventually(Duration::from_secs(5), || {
        let names = names(cluster.first())?;
        ensure!(names == ["node0"], "{names:?}");
        Ok(())
    })?;
    // The forgotten one hears of it and ends: nothing of its cluster goes on there.
    let forgotten = &cluster.nodes[1];
    eventually(Duration::from_secs(15), || {
        let output = forgotten.output(&["status"])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && text.contains("no node runs"), "still there: {text}");
        Ok(())
    })
}

#[test]
fn story_a_node_that_was_forgotten_while_it_was_off_can_leave() -> Result<()> {
    let mut cluster = LocalCluster::start(2)?;
    let off = cluster.nodes.remove(1);
    let data_dir = off.data_dir().to_owned();
    off.stop(Duration::from_secs(15))?;
    cluster.first().json(&["forget", "node1"])?;
    // It knows nothing of its fate, and nobody lets it in who could tell.
    let forgotten = NodeProcess::start(&data_dir, &NodeSetup::default())?;
    let left = forgotten.json(&["leave"])?;
    ensure!(left["left"] == true && left["untold_coordinator"] == "node0", "{left}");
    Ok(())
}

#[test]
fn story_nodes_that_restart_elsewhere_find_each_other_without_mdns_and_the_model_comes_back() -> Result<()> {
    let mut cluster = LocalCluster::start_with(2, &["--no-discovery"])?;
    cluster.first().json(&["load", "demo", "--stages", "2"])?;
    // The second one first: the coordinator learns of its new port, then restarts itself on another one.
    for index in [1, 0] {
        cluster.restart(index)?;
        cluster.wait_until_all_alive()?;
    }
    let node = cluster.first();
    eventually(Duration::from_secs(30), || ready_deployment(node))?;
    let answer = cluster.nodes[1].json(&QUESTION)?;
    assert!(answer["text"].as_str().context("text")?.contains("42"), "{answer}");
    Ok(())
}
