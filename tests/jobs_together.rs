//! A fine-tuning on three nodes: the same adapter as on one, bit by bit, also when a worker is killed on the way.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::jobs;
use mlxnode_testkit::node::NodeProcess;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(180);
const UPDATES: u64 = 40;

/// A data set and a configuration: six micro-batches in an update.
fn write(folder: &Path) -> Result<()> {
    let rows = folder.join("rows");
    jobs::write_rows(&rows, &[("train", 24), ("valid", 4)])?;
    let configuration = format!(
        "model: demo\nnum_layers: 2\nbatch_size: 2\ngrad_accumulation_steps: 6\niters: {}\nlearning_rate: 1e-3\n\
         steps_per_eval: 10000\nval_batches: 1\nlora_parameters: {{rank: 4, dropout: 0.1, scale: 8.0}}\n",
        6 * UPDATES
    );
    std::fs::write(folder.join("lora.yaml"), configuration)?;
    Ok(())
}

fn submit(node: &NodeProcess, folder: &Path, id: &str, workers: &str, more: &[&str]) -> Result<Value> {
    let (configuration, rows) = (folder.join("lora.yaml"), folder.join("rows"));
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path in UTF-8");
    let (configuration, rows) = (text(&configuration)?, text(&rows)?);
    let words = ["jobs", "submit", &configuration, "--data", &rows, "--id", id, "--workers", workers];
    node.json(&[&words[..], more].concat())
}

fn finished(node: &NodeProcess, id: &str) -> Result<Value> {
    jobs::wait_for(node, id, "finished", PATIENCE)
}

fn adapter(node: &NodeProcess, folder: &Path, id: &str) -> Result<Vec<u8>> {
    jobs::result(node, id, folder, "adapters.safetensors")
}

#[test]
fn three_nodes_make_the_adapter_of_one_and_so_do_they_when_one_is_lost() -> Result<()> {
    let folder = tempfile::tempdir()?;
    write(folder.path())?;
    let cluster = LocalCluster::start(3)?;
    let node = cluster.first();
    submit(node, folder.path(), "alone", "1", &[])?;
    finished(node, "alone")?;
    let expected = adapter(node, folder.path(), "alone")?;

    submit(node, folder.path(), "together", "3", &[])?;
    eventually(PATIENCE, || {
        for node in &cluster.nodes {
            ensure!(jobs::processes(node)?.len() == 1, "every node runs a worker");
        }
        let step = jobs::show(node, "together")?["step"].as_u64().unwrap_or_default();
        ensure!(step >= 6, "step {step}");
        Ok(())
    })?;
    // The leading one saves; killing another one costs no more than the update under way.
    let leading = jobs::show(node, "together")?["node"].as_str().context("the node")?.to_owned();
    let other = (0..3).find(|&index| cluster.setup(index).name != leading).context("another node")?;
    for pid in jobs::processes(&cluster.nodes[other])? {
        kill(pid, Signal::SIGKILL)?;
    }
    let seen = finished(node, "together")?;
    assert_eq!(seen["attempts"], 1, "{seen}");
    ensure!(adapter(node, folder.path(), "together")? == expected, "the adapters differ");
    eventually(PATIENCE, || {
        for node in &cluster.nodes {
            ensure!(jobs::processes(node)?.is_empty(), "a worker runs still");
        }
        Ok(())
    })
}

#[test]
fn a_node_that_stops_goes_once_the_job_is_saved_and_the_others_go_on() -> Result<()> {
    let folder = tempfile::tempdir()?;
    write(folder.path())?;
    let mut cluster = LocalCluster::start(3)?;
    submit(cluster.first(), folder.path(), "alone", "1", &[])?;
    finished(cluster.first(), "alone")?;
    let expected = adapter(cluster.first(), folder.path(), "alone")?;

    let unsaved = ["--save-steps", "100000", "--save-time", "1h"];
    submit(cluster.first(), folder.path(), "together", "3", &unsaved)?;
    let mut before = 0;
    eventually(PATIENCE, || {
        for node in &cluster.nodes {
            ensure!(jobs::processes(node)?.len() == 1, "every node runs a worker");
        }
        before = jobs::show(cluster.first(), "together")?["step"].as_u64().unwrap_or_default();
        ensure!(before >= 6, "step {before}");
        Ok(())
    })?;
    let leading = jobs::show(cluster.first(), "together")?["node"].as_str().context("the node")?.to_owned();
    let helper = (1..3).find(|&index| cluster.setup(index).name != leading).context("another node")?;
    cluster.restart(helper)?;
    let seen = jobs::show(cluster.first(), "together")?;
    let saved = seen["checkpoints"][0]["step"].as_u64().context("no checkpoint was saved before it went")?;
    ensure!(saved >= before && saved < 6 * UPDATES, "after step {saved}: {seen}");
    let seen = finished(cluster.first(), "together")?;
    assert_eq!(seen["attempts"], 1, "the others went on: {seen}");
    ensure!(adapter(cluster.first(), folder.path(), "together")? == expected, "the adapters differ");
    Ok(())
}
