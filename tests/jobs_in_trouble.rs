//! Fine-tuning jobs to which something happens that is nobody's crash: a disk that is full, a loss that is not finite.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::NodeProcess;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(180);

/// Twelve rows, and a configuration with these lines more.
fn write(folder: &Path, more: &str) -> Result<()> {
    let row = |at: usize| json!({"prompt": format!("What is {at} + 2?"), "completion": (at + 2).to_string()});
    let rows = (0..12).map(|at| row(at).to_string()).collect::<Vec<_>>().join("\n");
    fs::create_dir_all(folder.join("rows"))?;
    fs::write(folder.join("rows/train.jsonl"), rows)?;
    let configuration = format!("model: demo\nnum_layers: 2\nbatch_size: 2\n{more}");
    fs::write(folder.join("lora.yaml"), configuration)?;
    Ok(())
}

fn submit(node: &NodeProcess, folder: &Path, id: &str, save_steps: &str) -> Result<()> {
    let (file, rows) = (folder.join("lora.yaml"), folder.join("rows"));
    let (file, rows) = (file.to_str().context("utf-8")?, rows.to_str().context("utf-8")?);
    node.json(&["jobs", "submit", file, "--data", rows, "--id", id, "--save-steps", save_steps]).map(drop)
}

fn wait_for(node: &NodeProcess, id: &str, state: &str) -> Result<Value> {
    let mut seen = Value::Null;
    eventually(PATIENCE, || {
        seen = node.json(&["jobs", "show", id])?;
        ensure!(seen["state"] == state, "{id} is {} ({})", seen["state"], seen["detail"]);
        Ok(())
    })?;
    Ok(seen)
}

#[test]
fn a_loss_that_is_not_finite_ends_the_job_with_the_step_and_the_rows_and_keeps_what_was_good() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    // The rate jumps at the fifth update, to where nothing is finite any more.
    write(
        folder.path(),
        "iters: 40\noptimizer: sgd\nlr_schedule: {name: step_decay, arguments: [1e-5, 1e30, 4]}\n",
    )?;
    submit(node, folder.path(), "steep", "1")?;
    let failed = wait_for(node, "steep", "failed")?;
    let detail = failed["detail"].as_str().context("a detail")?;
    for word in ["not finite", "rows", "step"] {
        ensure!(detail.contains(word), "{word} is not in: {detail}");
    }
    let checkpoints = failed["checkpoints"].as_array().context("checkpoints")?;
    let last = checkpoints.last().context("the last good checkpoint is kept")?["step"].as_u64();
    ensure!(last >= Some(4) && last < Some(40), "{failed}");
    let losses = failed["losses"].as_array().context("losses")?;
    let is_finite = |loss: &Value| loss["training"].as_f64().is_some_and(f64::is_finite);
    ensure!(!losses.is_empty() && losses.iter().all(is_finite), "{losses:?}");
    // What was good can be had.
    let to = folder.path().join("adapter");
    node.json(&["jobs", "download", "steep", "--to", to.to_str().context("utf-8")?])?;
    ensure!(to.join("adapters.safetensors").is_file(), "no adapter");
    Ok(())
}

/// The node's folder for jobs is a disk of its own, a little larger than what a node leaves free: a user that is root in a namespace of
/// its own may mount one.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_holds_a_job_up_until_there_is_room() -> Result<()> {
    use mlxnode_testkit::node::NodeSetup;
    use std::io::Write as _;

    let folder = tempfile::tempdir()?;
    write(folder.path(), "iters: 200\nlearning_rate: 1e-4\n")?;
    let undisturbed = LocalCluster::start(1)?;
    submit(undisturbed.first(), folder.path(), "held", "10")?;
    wait_for(undisturbed.first(), "held", "finished")?;
    let adapter = |node: &NodeProcess, name: &str| -> Result<Vec<u8>> {
        let to = folder.path().join(name);
        node.json(&["jobs", "download", "held", "--to", to.to_str().context("utf-8")?])?;
        Ok(fs::read(to.join("adapters.safetensors"))?)
    };
    let expected = adapter(undisturbed.first(), "expected")?;
    drop(undisturbed);

    let data_dir = folder.path().join("node");
    let jobs = data_dir.join("jobs");
    fs::create_dir_all(&jobs)?;
    let mount = format!("mount -t tmpfs -o size=1100m none '{}' && exec \"$@\"", jobs.display());
    let words = ["unshare", "--user", "--map-root-user", "--mount", "--", "sh", "-c", &mount, "sh"];
    let setup =
        NodeSetup { name: "small".into(), prefix: words.map(str::to_owned).into(), ..NodeSetup::default() };
    let node = NodeProcess::start(&data_dir, &setup)?;
    // As the node sees it.
    let seen_by_node =
        Path::new("/proc").join(node.pid().to_string()).join("root").join(jobs.strip_prefix("/")?);
    submit(&node, folder.path(), "held", "10")?;
    let filler = seen_by_node.join("filler");
    let mut file = fs::File::create(&filler)?;
    let block = vec![1; 1 << 20];
    while file.write_all(&block).is_ok() {}
    drop(file);
    let held = wait_for(&node, "held", "paused")?;
    ensure!(held["detail"].as_str().context("a detail")?.contains("no room on the disk"), "{held}");
    let own = seen_by_node.join("held/checkpoints");
    let whole = |entry: fs::DirEntry| entry.path().join("manifest.json").is_file();
    ensure!(
        fs::read_dir(&own).into_iter().flatten().flatten().all(whole),
        "something half-written has a name"
    );
    fs::remove_file(filler)?;
    wait_for(&node, "held", "finished")?;
    ensure!(adapter(&node, "made")? == expected, "another adapter");
    Ok(())
}
