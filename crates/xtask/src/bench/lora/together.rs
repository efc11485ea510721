//! Jobs of real nodes: two on two cores against one on one, what a checkpoint takes, and how soon a killed job goes on.

use super::material::Material;
use super::survival::{self, Times};
use super::text;
use crate::bench::models::Model;
use crate::bench::pipeline::cluster::Cluster;
use crate::bench::report::{Row, Target, Unit};
use crate::bench::statistics::Spread;
use crate::bench::{Limits, process};
use crate::command;
use crate::node::{Cli, Node};
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Micro-batches of an update, which workers share.
const MICRO_BATCHES: usize = 4;
/// Updates before the measured ones: until both workers take part.
const WARM: u64 = 4;
/// A kill every half hour.
const BETWEEN_KILLS: f64 = 1800.0;
/// Longest that a job may take to show something new.
const PATIENCE: Duration = Duration::from_secs(300);

/// All rows.
pub(super) fn rows(
    binary: &Path,
    environment: &[(&'static str, OsString)],
    folder: &Path,
    model: &Model,
    limits: Limits,
) -> Result<Vec<Row>> {
    let pinned = cfg!(target_os = "linux") && command::exists("taskset");
    let on_core = |core: &str| {
        let prefix = ["taskset", "--cpu-list", core];
        Cli::new(binary).prefixed(if pinned { &prefix } else { &[] }, environment)
    };
    let cores = [on_core("0"), on_core("1")];
    let updates = if limits.quick { 40 } else { 10 };
    // Rows of one length: an update is like any other.
    let material = Material::of(&folder.join("jobs"), model, &[WORDS; 64])?;
    let job = Job { material: &material, folder, updates };
    let one = Cluster::start(folder, "lone", &cores[..1])?;
    let two = Cluster::start(folder, "pair", &cores)?;
    let mut rates = [Vec::new(), Vec::new()];
    let mut times = Vec::new();
    for turn in 0..=limits.runs {
        eprintln!("lora: jobs, run {turn} of {}", limits.runs);
        let mut adapters = Vec::new();
        for (side, cluster) in [&one, &two].into_iter().enumerate() {
            let id = format!("speed{turn}");
            let seconds = job.speed(cluster.first()?, &id, side + 1)?;
            adapters.push(job.adapter(cluster.first()?, &format!("{id}-{side}"), &id)?);
            if turn > 0 {
                rates[side].push(UPDATE as f64 / seconds); // the first one warms up
            }
        }
        ensure!(adapters[0] == adapters[1], "one worker and two make different adapters of {}", model.name());
        let step = job.interrupted(one.first()?, &format!("killed{turn}"))?;
        if turn > 0 {
            times.push(step);
        }
    }
    one.stop()?;
    two.stop()?;
    let name = model.name();
    let [lone, pair] = &rates;
    let of = |part: fn(&Times) -> f64| times.iter().map(part).collect::<Vec<f64>>();
    let median = |part: fn(&Times) -> f64| Spread::of(&of(part)).map(|spread| spread.median);
    let middle =
        Times { step: median(|it| it.step)?, save: median(|it| it.save)?, restart: median(|it| it.restart)? };
    let each =
        |value: &dyn Fn(Times) -> f64| times.iter().map(|times| 100.0 * value(*times)).collect::<Vec<_>>();
    // Large models have long steps, long checkpoints and long loads; the cadence has to do for them too.
    let large = Times { step: 20.0, save: 3.0, restart: 60.0 };
    let (least, most) = (Some(Target::AtLeast(95.0)), Some(Target::AtMost(2.0)));
    let two_for_one = pinned.then_some(Target::AtLeast(1.7));
    let half_hour = |times| survival::effective(times, BETWEEN_KILLS);
    Ok(vec![
        Row::compared(&name, "two nodes to one, training", Unit::TokensPerSecond, (pair, lone), two_for_one)?,
        Row::alone(&name, "step of a job", Unit::Milliseconds, &[middle.step * 1e3], None)?,
        Row::alone(&name, "checkpoint of a job", Unit::Milliseconds, &of(|it| it.save * 1e3), None)?,
        Row::alone(&name, "from a kill to the next step", Unit::Seconds, &of(|it| it.restart), None)?,
        Row::alone(&name, "checkpoints, of the time", Unit::Percent, &each(&survival::pause_share), most)?,
        Row::alone(&name, "training, a kill every 30 min", Unit::Percent, &each(&half_hour), least)?,
        Row::alone(
            "20 s a step, 3 s a checkpoint, 60 s a start",
            "training, a kill every 30 min",
            Unit::Percent,
            &[100.0 * half_hour(large)],
            None,
        )?,
    ])
}

/// Rows of a micro-batch, and tokens of a row.
const ROWS: usize = 2;
const WORDS: usize = 128;
/// Tokens of an update.
const UPDATE: usize = MICRO_BATCHES * ROWS * WORDS;

struct Job<'a> {
    material: &'a Material,
    folder: &'a Path,
    /// Measured ones.
    updates: u64,
}

impl Job<'_> {
    fn submit(&self, node: &Node, id: &str, workers: usize, updates: u64, more: &[&str]) -> Result<()> {
        let configuration = format!(
            "model: {}\nnum_layers: -1\nbatch_size: {ROWS}\ngrad_accumulation_steps: {MICRO_BATCHES}\niters: {}\n\
             learning_rate: 1e-4\nsteps_per_eval: 1000000\n",
            self.material.model.display(),
            updates * MICRO_BATCHES as u64
        );
        let file = self.folder.join(format!("{id}.yaml"));
        std::fs::write(&file, configuration)?;
        let (file, data, workers) = (text(file)?, text(self.material.data.clone())?, workers.to_string());
        let words = ["jobs", "submit", &file, "--data", &data, "--id", id, "--workers", &workers, "--json"];
        node.ask(&[&words[..], more].concat()).map(drop)
    }

    /// Seconds of an update.
    fn speed(&self, node: &Node, id: &str, workers: usize) -> Result<f64> {
        self.submit(node, id, workers, WARM + self.updates, &[])?;
        let mut seen: Vec<(u64, Instant)> = Vec::new();
        follow(node, id, |job| {
            let update = step(job) / MICRO_BATCHES as u64;
            if update >= WARM && seen.last().is_none_or(|(last, _)| *last < update) {
                seen.push((update, Instant::now()));
            }
            Ok(job["state"] == "finished")
        })?;
        let (Some((first, begin)), Some((last, end))) = (seen.first(), seen.last()) else {
            anyhow::bail!("the job {id} showed no updates");
        };
        ensure!(last > first, "the job {id} went by too fast to be measured");
        Ok(end.duration_since(*begin).as_secs_f64() / (last - first) as f64)
    }

    fn adapter(&self, node: &Node, name: &str, id: &str) -> Result<Vec<u8>> {
        let to = self.folder.join(name);
        node.ask(&["jobs", "download", id, "--to", &text(to.clone())?, "--json"])?;
        Ok(std::fs::read(to.join("adapters.safetensors"))?)
    }

    /// Times of a job whose process is killed once.
    fn interrupted(&self, node: &Node, id: &str) -> Result<Times> {
        let group = MICRO_BATCHES as u64;
        self.submit(node, id, 1, WARM + self.updates, &["--save-steps", &(2 * group).to_string()])?;
        let mut killed: Option<(Instant, u64)> = None;
        let (mut restart, mut last) = (None, Value::Null);
        follow(node, id, |job| {
            let attempts = job["attempts"].as_u64().unwrap_or_default();
            last = job.clone();
            match killed {
                None if job["checkpoints"].as_array().is_some_and(|all| !all.is_empty()) => {
                    let process = job_process(node)?;
                    kill(process, Signal::SIGKILL)?;
                    killed = Some((Instant::now(), attempts));
                }
                Some((at, before)) if restart.is_none() && attempts > before => {
                    let kept = job["checkpoints"].as_array().and_then(|all| all.last()?["step"].as_u64());
                    let is_running = job["state"] == "running" && step(job) > kept.unwrap_or_default();
                    // Or even through with what was left.
                    if is_running || job["state"] == "finished" {
                        restart = Some(at.elapsed().as_secs_f64());
                    }
                }
                _ => {}
            }
            Ok(job["state"] == "finished")
        })?;
        let saves = logged_saves(node, id)?;
        Ok(Times {
            step: last["tokens_per_second"]
                .as_f64()
                .filter(|it| *it > 0.0)
                .map(|speed| UPDATE as f64 / speed)
                .context("a job tells how fast it is")?,
            save: Spread::of(&saves)?.median,
            restart: restart.with_context(|| format!("the killed job {id} was not seen going on"))?,
        })
    }
}

fn step(job: &Value) -> u64 {
    job["step"].as_u64().unwrap_or_default()
}

/// Follows a job until `until` says so.
fn follow(node: &Node, id: &str, mut until: impl FnMut(&Value) -> Result<bool>) -> Result<()> {
    let mut command = node.command(&["jobs", "watch", id, "--json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let output = child.stdout.take().context("stdout is piped")?;
    let (sender, lines) = std::sync::mpsc::sync_channel(64);
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let followed = loop {
        let Ok(line) = lines.recv_timeout(PATIENCE) else {
            break Err(anyhow::anyhow!(
                "the job {id} told nothing for {} s: {}",
                PATIENCE.as_secs(),
                node.log()
            ));
        };
        let job: Value = match serde_json::from_str(&line) {
            Ok(job) => job,
            Err(error) => break Err(error.into()),
        };
        if ["failed", "cancelled"].iter().any(|state| job["state"] == *state) {
            break Err(anyhow::anyhow!("the job {id} is {}: {}", job["state"], job["detail"]));
        }
        match until(&job) {
            Ok(false) => {}
            Ok(true) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    drop(lines);
    let _ = child.kill(); // it may just have ended
    let _ = child.wait();
    let _ = reader.join();
    followed
}

/// The process of the only job that a node runs.
fn job_process(node: &Node) -> Result<Pid> {
    let listed = Command::new("ps").args(["-axo", "pid=,ppid=,args="]).output()?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let own = node.process_id().to_string();
    let found = listed.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (process, parent) = (words.next()?, words.next()?);
        (parent == own && line.contains("worker --job")).then(|| process.parse().ok())?
    });
    found.map(Pid::from_raw).context("the node runs no job's process")
}

/// Seconds of each checkpoint, as the job's log tells.
fn logged_saves(node: &Node, id: &str) -> Result<Vec<f64>> {
    let mut command = node.command(&["jobs", "logs", id]);
    let logs = process::measure(&mut command, Duration::from_secs(30))?.stdout;
    let seconds = |line: &str| {
        let (_, rest) = line.split_once("checkpoint after step ")?;
        rest.split_once(": ")?.1.strip_suffix(" s")?.parse().ok()
    };
    Ok(logs.lines().filter_map(seconds).collect())
}
