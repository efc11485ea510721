//! Jobs over a cluster of processes: a rehearsal that is killed at every phase comes to the same result as one that never was, no
//! acknowledged job is lost, and files travel by content. The job table itself is proved in crates/coordinator/tests/jobs.rs.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::jobs;
use mlxnode_testkit::node::NodeProcess;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// A configuration and a row of text.
fn rehearsal(folder: &Path, steps: u32, millis: u32) -> Result<(String, String)> {
    let (configuration, rows) = (folder.join("rehearsal.yaml"), folder.join("train.jsonl"));
    std::fs::write(&configuration, format!("steps: {steps}\nmillis: {millis}\n"))?;
    std::fs::write(&rows, "{\"text\": \"one row\"}\n")?;
    let text = |path: PathBuf| path.to_str().map(str::to_owned).context("a path in UTF-8");
    Ok((text(configuration)?, text(rows)?))
}

fn submit(node: &NodeProcess, id: &str, (configuration, rows): &(String, String)) -> Result<Value> {
    let words = ["jobs", "submit", configuration, "--kind", "rehearsal", "--data", rows, "--id", id];
    node.json(&[&words[..], &["--save-steps", "5"]].concat())
}

fn wait_for(node: &NodeProcess, id: &str, state: &str) -> Result<Value> {
    jobs::wait_for(node, id, state, PATIENCE)
}

fn wait_for_step(node: &NodeProcess, id: &str, step: u64) -> Result<()> {
    jobs::wait_for_checkpoint(node, id, step, PATIENCE).map(drop)
}

/// The text that a job made, downloaded through this node.
fn result(node: &NodeProcess, id: &str, folder: &Path) -> Result<String> {
    Ok(String::from_utf8(jobs::result(node, id, folder, "result.txt")?)?)
}

#[test]
fn a_job_that_is_killed_at_every_phase_comes_to_the_same_result() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut cluster = LocalCluster::start(2)?;
    let undisturbed = rehearsal(folder.path(), 60, 0)?;
    submit(cluster.first(), "undisturbed", &undisturbed)?;
    wait_for(cluster.first(), "undisturbed", "finished")?;
    let expected = result(cluster.first(), "undisturbed", folder.path())?;
    ensure!(expected.ends_with("after 60 steps\n"), "{expected}");

    let slow = rehearsal(folder.path(), 60, 60)?;
    let submitted = submit(&cluster.nodes[1], "disturbed", &slow)?;
    assert_eq!(submitted["id"], "disturbed");
    // The same again is the same; the same id with another content is none.
    submit(cluster.first(), "disturbed", &slow)?;
    let other = rehearsal(folder.path(), 61, 60)?;
    ensure!(submit(cluster.first(), "disturbed", &other).is_err(), "another job of the same id");

    // A worker.
    wait_for_step(cluster.first(), "disturbed", 5)?;
    let workers: Vec<Pid> = cluster
        .nodes
        .iter()
        .map(jobs::processes)
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect();
    ensure!(workers.len() == 1, "one process runs the job: {workers:?}");
    kill(workers[0], Signal::SIGKILL)?;

    // The other node, which may run it and has a copy.
    wait_for_step(cluster.first(), "disturbed", 15)?;
    cluster.nodes[1].signal(Signal::SIGKILL)?;
    wait_for_step(cluster.first(), "disturbed", 25)?;
    cluster.revive(1)?;

    // The coordinator.
    wait_for_step(cluster.first(), "disturbed", 35)?;
    cluster.nodes[0].signal(Signal::SIGKILL)?;
    cluster.revive(0)?;

    // All at once.
    wait_for_step(cluster.first(), "disturbed", 45)?;
    for node in &cluster.nodes {
        node.signal(Signal::SIGKILL)?;
    }
    cluster.revive(0)?;
    cluster.revive(1)?;

    let seen = wait_for(cluster.first(), "disturbed", "finished")?;
    ensure!(seen["attempts"].as_u64() >= Some(3), "{seen}");
    assert_eq!(result(cluster.first(), "disturbed", folder.path())?, expected);
    let curve: Vec<u64> =
        seen["losses"].as_array().context("losses")?.iter().filter_map(|it| it["step"].as_u64()).collect();
    ensure!(curve.is_sorted() && curve.last() == Some(&60), "{curve:?}");
    Ok(())
}

#[test]
fn a_job_stands_still_goes_on_and_ends_as_it_is_told() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    let slow = rehearsal(folder.path(), 30, 100)?;
    submit(node, "one", &slow)?;
    wait_for(node, "one", "running")?;
    node.json(&["jobs", "pause", "one"])?;
    eventually(PATIENCE, || {
        let seen = jobs::show(node, "one")?;
        ensure!(seen["node"] == "", "it runs still: {seen}");
        Ok(())
    })?;
    let paused = jobs::show(node, "one")?;
    assert_eq!(paused["state"], "paused");
    ensure!(!paused["checkpoints"].as_array().context("checkpoints")?.is_empty(), "it saved: {paused}");
    ensure!(jobs::processes(node)?.is_empty(), "its process is gone");
    node.json(&["jobs", "resume", "one"])?;
    wait_for(node, "one", "finished")?;
    let expected = rehearsal(folder.path(), 30, 0)?;
    submit(node, "two", &expected)?;
    wait_for(node, "two", "finished")?;
    assert_eq!(result(node, "one", folder.path())?, result(node, "two", folder.path())?);

    let endless = rehearsal(folder.path(), 3000, 100)?;
    submit(node, "three", &endless)?;
    wait_for(node, "three", "running")?;
    assert_eq!(node.json(&["jobs", "cancel", "three"])?["state"], "cancelled");
    eventually(PATIENCE, || {
        ensure!(jobs::processes(node)?.is_empty(), "its process runs still");
        Ok(())
    })?;
    ensure!(node.json(&["jobs", "resume", "three"]).is_err(), "what was cancelled stays so");
    let wrong = rehearsal(folder.path(), 1, 1)?;
    std::fs::write(&wrong.0, "iters: 3\n")?;
    submit(node, "four", &wrong)?;
    let failed = wait_for(node, "four", "failed")?;
    ensure!(failed["detail"].as_str().context("detail")?.contains("iters"), "{failed}");
    let listed = node.json(&["jobs", "list"])?;
    let ids: Vec<&str> =
        listed["jobs"].as_array().context("jobs")?.iter().filter_map(|job| job["id"].as_str()).collect();
    assert_eq!(ids, ["four", "three", "two", "one"]);
    Ok(())
}

#[test]
fn an_adapter_is_trained_by_the_cluster_and_asked_for_at_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    node.json(&["load", "demo"])?;
    let rows: String = (10..26).map(|a| format!("{{\"text\": \"What is {a} + 2? {}\"}}\n", a + 2)).collect();
    for name in ["train.jsonl", "valid.jsonl"] {
        std::fs::write(folder.path().join(name), &rows)?;
    }
    let configuration = folder.path().join("lora.yaml");
    let text = format!(
        "model: demo\ndata: {}\niters: 8\nbatch_size: 2\nnum_layers: 2\nlearning_rate: 1e-3\nsteps_per_eval: 4\nval_batches: 1\n\
         checkpoint_steps: 2\n",
        folder.path().display()
    );
    std::fs::write(&configuration, &text)?;
    let configuration = configuration.to_str().context("utf-8")?;
    // Submitted elsewhere than where the coordinator is: the files travel from there.
    let words = ["jobs", "submit", configuration, "--id", "poet", "--publish", "demo:poet"];
    cluster.nodes[1].json(&words)?;
    let seen = wait_for(node, "poet", "finished")?;
    let losses = seen["losses"].as_array().context("losses")?;
    ensure!(losses.iter().filter(|it| it["training"].is_f64()).count() == 8, "{seen}");
    ensure!(losses.iter().any(|it| it["validation"].is_f64()), "{seen}");
    let mut published = Value::Null;
    eventually(PATIENCE, || {
        published = jobs::show(node, "poet")?;
        ensure!(published["publications"][0]["problem"] == "", "it is not served: {published}");
        Ok(())
    })?;
    assert_eq!(published["served_as"][0], "demo:poet");
    let checkpoint = published["checkpoints"].as_array().and_then(|all| all.last()).context("checkpoints")?;
    assert_eq!(published["publications"][0]["hash"], checkpoint["hash"]);
    let words = ["generate", "--model", "demo", "--adapter", "poet", "--prompt", "What is 17 + 2?"];
    node.json(&[&words[..], &["--max-tokens", "4"]].concat())?;

    // What was downloaded is an adapter as mlx-lm has them, and a picture of its losses can be drawn.
    let to = folder.path().join("adapter");
    node.json(&["jobs", "download", "poet", "--to", to.to_str().context("utf-8")?])?;
    ensure!(to.join("adapters.safetensors").is_file() && to.join("adapter_config.json").is_file(), "{to:?}");
    let picture = folder.path().join("losses.svg");
    node.json(&["jobs", "show", "poet", "--plot", picture.to_str().context("utf-8")?])?;
    ensure!(std::fs::read_to_string(&picture)?.starts_with("<svg"), "a picture");

    // What is wrong with a configuration shows before anything is sent.
    std::fs::write(folder.path().join("wrong.yaml"), text.replace("iters", "itres"))?;
    let wrong = folder.path().join("wrong.yaml");
    let refused = node.json(&["jobs", "submit", wrong.to_str().context("utf-8")?]);
    ensure!(refused.is_err_and(|error| error.to_string().contains("itres")), "an unknown key");
    Ok(())
}
