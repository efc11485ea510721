//! A job whose model is divided among nodes: the result of one node, also when a stage's process, its node or the leading node is killed.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::jobs;
use mlxnode_testkit::node::NodeProcess;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use std::collections::BTreeMap;
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

/// A data set and a configuration of so many updates.
fn fine_tuning(folder: &Path, updates: u64) -> Result<Vec<String>> {
    let rows = folder.join("rows");
    jobs::write_rows(&rows, &[("train", 24), ("valid", 4)])?;
    let configuration = folder.join("lora.yaml");
    let settings = format!(
        "model: demo\nnum_layers: -1\nbatch_size: 2\ngrad_accumulation_steps: 3\niters: {}\nlearning_rate: 1e-3\n\
         max_seq_length: 64\nsteps_per_eval: 10000\nval_batches: 1\nlora_parameters: {{rank: 4, dropout: 0.1, scale: 8.0}}\n",
        3 * updates
    );
    std::fs::write(&configuration, settings)?;
    let words = ["jobs", "submit", &text(&configuration)?, "--data", &text(&rows)?, "--save-steps", "10"];
    Ok(words.map(str::to_owned).to_vec())
}

/// The numbers of an adapter, by name.
fn numbers(file: &[u8]) -> Result<BTreeMap<String, Vec<f32>>> {
    let length = u64::from_le_bytes(file.get(..8).context("a header")?.try_into()?) as usize;
    let (header, data) = file.get(8..).context("a header")?.split_at_checked(length).context("a header")?;
    let header: BTreeMap<String, Value> = serde_json::from_slice(header)?;
    let mut numbers = BTreeMap::new();
    for (name, tensor) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        ensure!(tensor["dtype"] == "F32", "{name} is {}", tensor["dtype"]);
        let at = |place: usize| tensor["data_offsets"][place].as_u64().context("an offset");
        let bytes = data.get(at(0)? as usize..at(1)? as usize).context("the numbers")?;
        let values = bytes.chunks_exact(4).map(|value| Ok(f32::from_le_bytes(value.try_into()?)));
        numbers.insert(name.clone(), values.collect::<Result<_>>()?);
    }
    Ok(numbers)
}

fn losses(seen: &Value) -> Result<Vec<f64>> {
    let losses = seen["losses"].as_array().context("losses")?;
    Ok(losses.iter().filter_map(|loss| loss["training"].as_f64()).collect())
}

#[test]
fn two_nodes_with_half_of_the_layers_each_train_what_one_trains() -> Result<()> {
    const UPDATES: u64 = 40;
    let folder = tempfile::tempdir()?;
    let mut cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    let words = fine_tuning(folder.path(), UPDATES)?;
    let adapter =
        |node: &NodeProcess, id: &str| jobs::result(node, id, folder.path(), "adapters.safetensors");
    submit(node, &words, "one", "1")?;
    let one = jobs::wait_for(node, "one", "finished", PATIENCE)?;
    let planned = submit(node, &words, "two", "2")?;
    let parts = planned["stages"].as_array().context("stages")?;
    ensure!(
        parts.len() == 2 && parts.iter().all(|part| part["memory_bytes"].as_u64() > Some(0)),
        "{planned}"
    );
    let two = jobs::wait_for(node, "two", "finished", PATIENCE)?;
    let (expected, found) = (losses(&one)?, losses(&two)?);
    ensure!(expected.len() == UPDATES as usize && found.len() == expected.len(), "{two}");
    for (step, (one, two)) in expected.iter().zip(&found).enumerate() {
        ensure!((one - two).abs() <= 1e-3 * one.abs().max(1.0), "loss {step}: {one} and {two}");
    }
    let (expected, undisturbed) = (numbers(&adapter(node, "one")?)?, adapter(node, "two")?);
    let found = numbers(&undisturbed)?;
    ensure!(expected.keys().eq(found.keys()), "other arrays");
    for (name, one) in &expected {
        let two = &found[name];
        let length = one.iter().map(|value| value * value).sum::<f32>().sqrt();
        let apart = one.iter().zip(two).map(|(one, two)| (one - two).powi(2)).sum::<f32>().sqrt();
        ensure!(one.len() == two.len() && apart <= 1e-2 * length.max(1e-3), "{name}: {apart} of {length}");
    }

    // Killed on the way: the process of the second stage, its node, and the node that leads. The same bits.
    submit(node, &words, "disturbed", "2")?;
    jobs::wait_for_checkpoint(node, "disturbed", 10, PATIENCE)?;
    let second = stages(&cluster, 0, "disturbed", 2)?[1];
    for pid in jobs::processes(&cluster.nodes[second])? {
        kill(pid, Signal::SIGKILL)?;
    }
    for (step, stage) in [(20, 1), (30, 0)] {
        jobs::wait_for_checkpoint(cluster.first(), "disturbed", step, PATIENCE)?;
        let killed = stages(&cluster, 0, "disturbed", 2)?[stage];
        cluster.nodes[killed].signal(Signal::SIGKILL)?;
        cluster.revive(killed)?;
        cluster.wait_until_all_alive()?;
    }
    let seen = jobs::wait_for(cluster.first(), "disturbed", "finished", PATIENCE)?;
    ensure!(seen["attempts"].as_u64() >= Some(4), "it was not disturbed: {seen}");
    ensure!(adapter(cluster.first(), "disturbed")? == undisturbed, "the adapters differ");
    nothing_runs(&cluster)
}

#[test]
fn a_node_that_stops_goes_once_what_its_stage_did_is_saved() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut cluster = LocalCluster::start(3)?;
    let unsaved = |words: Vec<String>| -> Vec<String> {
        let others = words.into_iter().filter(|word| word != "--save-steps" && word != "5");
        others.chain(["--save-steps", "100000", "--save-time", "1h"].map(str::to_owned)).collect()
    };
    submit(cluster.first(), &rehearsal(folder.path(), 80, 0)?, "whole", "1")?;
    jobs::wait_for(cluster.first(), "whole", "finished", PATIENCE)?;
    let words = unsaved(rehearsal(folder.path(), 80, 100)?);
    submit(cluster.first(), &words, "divided", "3")?;
    let parts = stages(&cluster, 0, "divided", 3)?;
    let helper = *parts.iter().skip(1).find(|index| **index != 0).context("a stage on another node")?;
    let mut before = 0;
    eventually(PATIENCE, || {
        before = jobs::show(cluster.first(), "divided")?["step"].as_u64().unwrap_or_default();
        ensure!(before >= 5, "step {before}");
        Ok(())
    })?;
    cluster.restart(helper)?;
    let seen = jobs::show(cluster.first(), "divided")?;
    let saved = seen["checkpoints"][0]["step"].as_u64().context("no checkpoint was saved before it went")?;
    ensure!(saved >= before && saved < 80, "after step {saved}: {seen}");
    let seen = jobs::wait_for(cluster.first(), "divided", "finished", PATIENCE)?;
    ensure!(seen["attempts"].as_u64() >= Some(2), "{seen}");
    let log = String::from_utf8(cluster.first().output(&["jobs", "logs", "divided"])?.stdout)?;
    ensure!(log.contains(&format!("computes from step {saved}")), "{log}");
    let result = |id: &str| jobs::result(cluster.first(), id, folder.path(), "result.txt");
    ensure!(result("divided")? == result("whole")?, "another result");
    nothing_runs(&cluster)
}

#[test]
fn two_lines_of_two_stages_train_what_one_line_trains() -> Result<()> {
    const UPDATES: u64 = 24;
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start(4)?;
    let node = cluster.first();
    // Three micro-batches in an update: the lines have two and one of them.
    let words = fine_tuning(folder.path(), UPDATES)?;
    let adapter = |id: &str| jobs::result(node, id, folder.path(), "adapters.safetensors");
    submit(node, &words, "line", "2")?;
    let line = jobs::wait_for(node, "line", "finished", PATIENCE)?;

    let four: Vec<String> = words.into_iter().chain(["--workers", "4"].map(str::to_owned)).collect();
    let planned = submit(node, &four, "lines", "2")?;
    let parts = planned["stages"].as_array().context("stages")?;
    let of = |key: &str| parts.iter().map(|part| part[key].as_u64()).collect::<Vec<_>>();
    ensure!(of("replica") == [0, 0, 1, 1].map(Some), "{planned}");
    let firsts = of("first_layer");
    ensure!(firsts[0] == firsts[2] && firsts[1] == firsts[3] && firsts[0] == Some(0), "{planned}");
    // A process of the second line is killed on the way: then all is planned anew.
    jobs::wait_for_checkpoint(node, "lines", 10, PATIENCE)?;
    let parts = stages(&cluster, 0, "lines", 4)?;
    for pid in jobs::processes(&cluster.nodes[parts[3]])? {
        kill(pid, Signal::SIGKILL)?;
    }
    let lines = jobs::wait_for(node, "lines", "finished", PATIENCE)?;
    ensure!(lines["attempts"].as_u64() >= Some(2), "it was not disturbed: {lines}");
    let (expected, found) = (losses(&line)?, losses(&lines)?);
    ensure!(expected.len() == UPDATES as usize && found.len() == expected.len(), "{lines}");
    for (step, (one, two)) in expected.iter().zip(&found).enumerate() {
        ensure!((one - two).abs() <= 1e-6 * one.abs().max(1.0), "loss {step}: {one} and {two}");
    }
    ensure!(adapter("lines")? == adapter("line")?, "the adapters differ");
    nothing_runs(&cluster)
}
