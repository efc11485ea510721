//! A fine-tuning whose processes are killed at moments that a seed chooses ends in the adapter of a run that nobody disturbed, bit by bit;
//! no job that was acknowledged is lost, and nothing is served that is not that adapter.
//!
//! A few runs here; `cargo xtask soak jobs --runs 50 --seed 7` does as many as one likes. What failed is done again by its seed.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::jobs;
use mlxnode_testkit::node::NodeProcess;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(240);
/// For the moment of a blow to come. What does not come any more, because the job is through, is no blow.
const MOMENT: Duration = Duration::from_secs(60);
/// Micro-batches of the run, of an update, and between checkpoints.
const ITERATIONS: u64 = 60;
const GROUP: u64 = 2;
const SAVED_EVERY: u64 = 4;
const RUNS: u64 = 3;
/// Runs on one cluster.
const ON_A_CLUSTER: u64 = 10;
const PROMPT: &str = "What is 17 + 2?";

/// Numbers that look like chance: SplitMix64 (Steele et al. 2014).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let number = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (number ^ (number >> 31)) % bound
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    /// A process that computes.
    Worker,
    /// The node that leads the job.
    Leader,
    /// The node that decides, and keeps the table of jobs.
    Coordinator,
    /// Every node.
    Everything,
}

/// When.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// So many milliseconds after the submission: files and model are fetched.
    Fetching(u64),
    /// A node has taken the job.
    Begun,
    /// After this iteration.
    Computing(u64),
    /// A checkpoint is being written.
    Saving,
    /// The job is finished and becomes an adapter of a deployment.
    Publishing,
}

#[derive(Clone, Copy, Debug)]
struct Blow {
    victim: Victim,
    phase: Phase,
}

fn blows(chance: &mut Chance) -> Vec<Blow> {
    let count = 1 + chance.below(3);
    let mut blows: Vec<Blow> = (0..count)
        .map(|_| {
            let phase = match chance.below(5) {
                0 => Phase::Fetching(chance.below(400)),
                1 => Phase::Begun,
                2 => Phase::Computing(1 + chance.below(ITERATIONS - 1)),
                3 => Phase::Saving,
                _ => Phase::Publishing,
            };
            let victims = [Victim::Worker, Victim::Leader, Victim::Coordinator, Victim::Everything];
            Blow { victim: chance.one_of(&victims), phase }
        })
        .collect();
    // In the order in which their moments come.
    blows.sort_by_key(|blow| match blow.phase {
        Phase::Fetching(after) => (0, after),
        Phase::Begun => (1, 0),
        Phase::Saving => (2, 0),
        Phase::Computing(iteration) => (3, iteration),
        Phase::Publishing => (4, 0),
    });
    blows
}

/// Rows and a configuration.
fn write(folder: &Path) -> Result<()> {
    jobs::write_rows(&folder.join("rows"), &[("train", 24)])?;
    let configuration = format!(
        "model: demo\nnum_layers: 2\nbatch_size: 2\ngrad_accumulation_steps: {GROUP}\niters: {ITERATIONS}\nlearning_rate: 1e-3\n\
         lora_parameters: {{rank: 4, dropout: 0.1, scale: 8.0}}\n"
    );
    fs::write(folder.join("lora.yaml"), configuration)?;
    Ok(())
}

fn utf8(path: PathBuf) -> Result<String> {
    path.to_str().map(str::to_owned).context("a path in UTF-8")
}

fn submit(node: &NodeProcess, folder: &Path, id: &str, workers: u64) -> Result<()> {
    let (file, rows) = (utf8(folder.join("lora.yaml"))?, utf8(folder.join("rows"))?);
    let (workers, every, name) = (workers.to_string(), SAVED_EVERY.to_string(), format!("demo:{id}"));
    let words = ["jobs", "submit", &file, "--data", &rows, "--id", id, "--workers", &workers];
    node.json(&[&words[..], &["--save-steps", &every, "--publish", &name]].concat()).map(drop)
}

fn job(node: &NodeProcess, id: &str) -> Result<Value> {
    node.json(&["jobs", "show", id])
}

/// Processes of jobs, of all nodes.
fn workers(cluster: &LocalCluster) -> Result<Vec<Pid>> {
    let listed = Command::new("ps").args(["-axo", "pid=,ppid=,args="]).output()?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let nodes: Vec<String> = cluster.nodes.iter().map(|node| node.pid().to_string()).collect();
    let found = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (pid, parent) = (words.next()?, words.next()?);
        let is_ours = nodes.iter().any(|node| node == parent) && line.contains("worker --job");
        is_ours.then(|| pid.parse().ok().map(Pid::from_raw))?
    });
    Ok(found.collect())
}

/// Kills nodes and starts them again, the first one first.
fn strike_nodes(cluster: &mut LocalCluster, indices: &[usize]) -> Result<()> {
    for index in indices {
        cluster.nodes[*index].signal(Signal::SIGKILL)?;
    }
    for index in indices {
        let setup = cluster.setup(*index);
        let killed = cluster.nodes.remove(*index);
        let data_dir = killed.data_dir().to_owned();
        drop(killed);
        cluster.nodes.insert(*index, NodeProcess::start(&data_dir, &setup)?);
    }
    Ok(())
}

/// Is a checkpoint of the job being written on some node?
fn is_saving(cluster: &LocalCluster, id: &str) -> bool {
    cluster.nodes.iter().any(|node| {
        let entries = fs::read_dir(node.data_dir().join("jobs").join(id)).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("new-"))
    })
}

/// Waits for the moment; false when it cannot come any more.
fn wait(cluster: &LocalCluster, id: &str, phase: Phase, submitted: Instant) -> Result<bool> {
    if let Phase::Fetching(after) = phase {
        std::thread::sleep(Duration::from_millis(after).saturating_sub(submitted.elapsed()));
        return Ok(true);
    }
    let deadline = Instant::now() + MOMENT;
    let mut asked = Instant::now();
    let mut seen = Value::Null;
    while Instant::now() < deadline {
        if phase == Phase::Saving && is_saving(cluster, id) {
            return Ok(true);
        }
        // A checkpoint takes milliseconds: in between the disk is watched, and nobody asked.
        if phase != Phase::Saving || asked.elapsed() > Duration::from_secs(1) {
            // A node that was just killed may not answer yet.
            seen = job(cluster.first(), id).unwrap_or_default();
            asked = Instant::now();
        }
        let (state, step) =
            (seen["state"].as_str().unwrap_or_default(), seen["step"].as_u64().unwrap_or_default());
        ensure!(!["failed", "cancelled"].contains(&state), "{id} is {state}: {}", seen["detail"]);
        let has_come = match phase {
            Phase::Begun => ["preparing", "running"].contains(&state),
            Phase::Computing(iteration) => state == "running" && step >= iteration,
            Phase::Publishing => state == "finished",
            Phase::Fetching(_) | Phase::Saving => false,
        };
        if has_come || state == "finished" {
            return Ok(has_come);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    anyhow::bail!("the moment {phase:?} did not come: {seen}")
}

fn strike(cluster: &mut LocalCluster, id: &str, victim: Victim) -> Result<()> {
    match victim {
        Victim::Worker => {
            for process in workers(cluster)? {
                // It may just have ended by itself.
                let _ = kill(process, Signal::SIGKILL);
            }
            Ok(())
        }
        Victim::Leader => {
            let leader = job(cluster.first(), id)?["node"].as_str().unwrap_or_default().to_owned();
            let index = (0..cluster.nodes.len()).find(|index| cluster.setup(*index).name == leader);
            strike_nodes(cluster, &[index.unwrap_or(1)])
        }
        Victim::Coordinator => strike_nodes(cluster, &[0]),
        Victim::Everything => strike_nodes(cluster, &(0..cluster.nodes.len()).collect::<Vec<_>>()),
    }
}

/// What is under its own name on the disk is whole.
fn check_disks(cluster: &LocalCluster, id: &str) -> Result<()> {
    for node in &cluster.nodes {
        let all = node.data_dir().join("jobs").join(id).join("checkpoints");
        for entry in fs::read_dir(&all).into_iter().flatten() {
            let folder = entry?.path();
            let named = folder.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned();
            let manifest = fs::read(folder.join("manifest.json")).with_context(|| format!("{folder:?}"))?;
            ensure!(
                blake3::hash(&manifest).to_hex().as_str() == named,
                "{folder:?} is not what it is called"
            );
            let manifest: Value = serde_json::from_slice(&manifest)?;
            for file in manifest["files"].as_array().context("files")? {
                let name = file["name"].as_str().context("a name")?;
                let bytes = fs::read(folder.join(name)).with_context(|| format!("{name} in {folder:?}"))?;
                let hash = blake3::hash(&bytes).to_hex().to_string();
                ensure!(file["hash"] == *hash, "{name} in {folder:?} is not whole");
            }
        }
    }
    Ok(())
}

/// What a run comes to: the adapter, and what the model answers with it.
#[derive(PartialEq)]
struct Outcome {
    adapter: Vec<u8>,
    /// What those who load the adapter go by. Where the job's files lay is another thing in every job.
    configuration: Vec<Value>,
    answer: Value,
}

/// Waits for the end; what every node serves is one and the same.
fn outcome(cluster: &LocalCluster, folder: &Path, id: &str) -> Result<Outcome> {
    let mut seen = Value::Null;
    eventually(PATIENCE, || {
        seen = job(cluster.first(), id)?;
        ensure!(seen["state"] == "finished", "{id} is {} ({})", seen["state"], seen["detail"]);
        ensure!(seen["publications"][0]["problem"] == "", "{id} is not served: {seen}");
        Ok(())
    })?;
    let last = seen["checkpoints"].as_array().and_then(|all| all.last()).context("a checkpoint")?;
    ensure!(last["step"] == ITERATIONS, "the last checkpoint is another one: {seen}");
    ensure!(seen["publications"][0]["hash"] == last["hash"], "another adapter is served: {seen}");
    // What is not kept is being removed while this looks.
    eventually(Duration::from_secs(20), || check_disks(cluster, id))?;
    let mut outcomes = Vec::new();
    for (index, node) in cluster.nodes.iter().enumerate() {
        let to = folder.join(format!("{id}-{index}"));
        eventually(PATIENCE, || {
            let _ = fs::remove_dir_all(&to);
            node.json(&["jobs", "download", id, "--to", &utf8(to.clone())?]).map(drop)
        })?;
        let ask = ["generate", "--model", "demo", "--adapter", id, "--prompt", PROMPT, "--max-tokens", "6"];
        let mut answer = Value::Null;
        // The deployment may still be forming again after a blow.
        eventually(PATIENCE, || {
            answer = node.json(&ask)?["token_ids"].clone();
            Ok(())
        })?;
        let configuration: Value = serde_json::from_slice(&fs::read(to.join("adapter_config.json"))?)?;
        outcomes.push(Outcome {
            adapter: fs::read(to.join("adapters.safetensors"))?,
            configuration: ["fine_tune_type", "num_layers", "lora_parameters", "iters", "seed"]
                .map(|key| configuration[key].clone())
                .to_vec(),
            answer,
        });
    }
    let outcome = outcomes.pop().context("a node")?;
    ensure!(outcomes.iter().all(|other| *other == outcome), "nodes serve different adapters of {id}");
    Ok(outcome)
}

fn disturbed(
    cluster: &mut LocalCluster,
    folder: &Path,
    id: &str,
    chance: &mut Chance,
    expected: &Outcome,
) -> Result<usize> {
    let (blows, workers) = (blows(chance), 1 + chance.below(2));
    eprintln!("{id}: {blows:?} for {workers} workers on {} nodes", cluster.nodes.len());
    let front = chance.below(cluster.nodes.len() as u64) as usize;
    submit(&cluster.nodes[front], folder, id, workers)?;
    let submitted = Instant::now();
    let mut hits = 0;
    for blow in &blows {
        if wait(cluster, id, blow.phase, submitted)? {
            strike(cluster, id, blow.victim)?;
            hits += 1;
        }
    }
    let found = outcome(cluster, folder, id)?;
    ensure!(found.configuration == expected.configuration, "another configuration");
    ensure!(found.adapter == expected.adapter, "another adapter");
    ensure!(found.answer == expected.answer, "another answer");
    Ok(hits)
}

fn number(name: &str, usual: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is {text:?}, but must be a number")),
        Err(_) => Ok(usual),
    }
}

#[test]
fn whatever_is_killed_and_when_the_adapter_is_the_same() -> Result<()> {
    let (runs, seed) = (number("MLXNODE_SOAK_RUNS", RUNS)?, number("MLXNODE_SOAK_SEED", 1)?);
    let folder = tempfile::tempdir()?;
    write(folder.path())?;
    let mut expected = None;
    let mut cluster: Option<LocalCluster> = None;
    let mut hits = 0;
    for run in 0..runs {
        let mut chance = Chance(seed.wrapping_add(run).wrapping_mul(0x1000_0001));
        if run % ON_A_CLUSTER == 0 {
            drop(cluster.take());
            let new = LocalCluster::start(2 + (run / ON_A_CLUSTER % 2) as usize)?;
            new.first().json(&["load", "demo"])?;
            cluster = Some(new);
        }
        let cluster = cluster.as_mut().context("a cluster")?;
        let expected = match &mut expected {
            Some(expected) => &*expected,
            none => {
                submit(cluster.first(), folder.path(), "undisturbed", 1)?;
                &*none.insert(outcome(cluster, folder.path(), "undisturbed")?)
            }
        };
        let begun = Instant::now();
        let id = format!("run-{}", seed.wrapping_add(run));
        let hit = disturbed(cluster, folder.path(), &id, &mut chance, expected).with_context(|| {
            format!("{id}; again: cargo xtask soak jobs --runs 1 --seed {}", seed.wrapping_add(run))
        })?;
        eprintln!("{id}: {hit} blows hit, {:.0} s", begun.elapsed().as_secs_f64());
        hits += hit;
    }
    ensure!(
        hits as u64 >= runs.div_ceil(2),
        "only {hits} blows in {runs} runs: the job is too fast for them"
    );
    Ok(())
}
