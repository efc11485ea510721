//! Two nodes with a stage each, every stage on a core of its own, against one node with all layers on one core; in turns.
//!
//! Everything of a node shares its core: the node, its worker, and the clients that ask it, which are real
//! `mlxnode generate` processes. So the figure is what a second machine of the same kind would bring, without a network.
//! Also: what a stage's worker holds in memory, how soon a node is ready, how soon `status` answers.

pub(super) mod cluster;

use super::models::{Dtype, Model, Size};
use super::process::{self, measure};
use super::report::{Report, Row, Target, Unit};
use super::{Limits, binary};
use crate::node::{Cli, Node};
use crate::places::Places;
use crate::{command, setup};
use anyhow::{Context as _, Result, ensure};
use cluster::{Cluster, Load, Stage};
use std::path::{Path, PathBuf};
use std::time::Duration;

const MEBIBYTE: f64 = 1_048_576.0;
/// A stage may hold this much besides weights and KV.
const ALLOWANCE: f64 = 64.0 * MEBIBYTE;
/// Sequences that a deployment reserves memory for.
const SEQUENCES: usize = 4;

/// Measures all.
pub(super) fn run(places: &Places, limits: Limits) -> Result<Report> {
    let binary = binary(places, limits)?;
    let oracle = setup::oracle::ensure(places)?;
    let provide = |size| Model::llama(places, &oracle, size, Dtype::F32);
    let (empty, middle) = (provide(Size::T)?, provide(Size::S)?);
    let large = if limits.quick { provide(Size::S)? } else { provide(Size::L)? };
    let environment = process::environment(&places.cache.join("bench-kernels"))?;
    let pinned = cfg!(target_os = "linux") && command::exists("taskset");
    let on_core = |core: &str| {
        let prefix = ["taskset", "--cpu-list", core];
        Cli::new(&binary).prefixed(if pinned { &prefix } else { &[] }, &environment)
    };
    let cores = [on_core("0"), on_core("1")];
    let folder = Folder::new()?;

    let mut rows = starts(&cores[0], &folder.0, limits)?;
    let one = Cluster::start(&folder.0, "one", &cores[..1])?;
    let two = Cluster::start(&folder.0, "two", &cores)?;
    rows.extend(throughput(&one, &two, &middle, limits)?);
    rows.push(status(&two, limits)?);
    rows.extend(memory(&two, &empty, &large)?);
    one.stop()?;
    two.stop()?;

    let mut notes = vec![
        "Ours: two stages on two nodes; base: one stage on one. A core carries its node, its worker and its clients. Both \
         gave the same tokens."
            .to_owned(),
        "tok/CPU-s: tokens per second of CPU time of the busiest core: what the split would bring if no core ever waited."
            .to_owned(),
        "Peak of a stage: its worker's largest resident size less that of a worker with a model of 0.1 million parameters, \
         against its weights + KV + 64 MiB."
            .to_owned(),
    ];
    if !pinned {
        notes.push(
            "Nothing is pinned to a core here, and CPU time and memory of workers are not known.".to_owned(),
        );
    }
    Ok(Report { bench: "pipeline", ours: "ours", base: "base", notes, rows })
}

/// From the start of the process to the ready line: a new node with a new cluster, and the same node again.
fn starts(cli: &Cli, folder: &Path, limits: Limits) -> Result<Vec<Row>> {
    let (mut new, mut again) = (Vec::new(), Vec::new());
    for run in 0..limits.runs {
        let data_dir = folder.join(format!("start{run}"));
        for times in [&mut new, &mut again] {
            let mut node = Node::start_with(cli, &data_dir, "start", &["--no-discovery"])?;
            times.push(node.ready_after().as_secs_f64() * 1e3);
            node.stop()?;
        }
    }
    let target = Some(Target::AtMost(1000.0));
    Ok(vec![
        Row::alone("node", "start, first", Unit::Milliseconds, &new, target)?,
        Row::alone("node", "start, again", Unit::Milliseconds, &again, target)?,
    ])
}

fn throughput(one: &Cluster, two: &Cluster, model: &Model, limits: Limits) -> Result<Vec<Row>> {
    let wish = |stages| Load { folder: &model.folder, stages, context: 512, sequences: SEQUENCES };
    let deployed = [one.load(&wish(1))?, two.load(&wish(2))?];
    let new_tokens = if limits.quick { 20 } else { 100 };
    let mut rows = Vec::new();
    for requests in [2, 3, 4] {
        let mut rates = [Vec::new(), Vec::new()];
        let mut rates_by_cpu = [Vec::new(), Vec::new()];
        for turn in 0..=limits.runs {
            eprintln!("pipeline: {requests} in flight, run {turn} of {}", limits.runs);
            let mut answers = Vec::new();
            for (side, cluster) in [one, two].into_iter().enumerate() {
                let round = cluster.round(&deployed[side], requests, new_tokens)?;
                if turn > 0 {
                    rates[side].push(round.tokens() / round.wall.as_secs_f64()); // the first one warms up
                    rates_by_cpu[side].extend(round.busiest.map(|cpu| round.tokens() / cpu.as_secs_f64()));
                }
                answers.push(round.answers);
            }
            ensure!(answers[0] == answers[1], "one stage and two give different tokens for {}", model.name());
        }
        let [one, two] = &rates;
        let target = Some(Target::AtLeast(1.7));
        let measure = format!("{requests} in flight");
        rows.push(Row::compared(&model.name(), &measure, Unit::TokensPerSecond, (two, one), target)?);
        let [one, two] = &rates_by_cpu;
        if !one.is_empty() {
            let measure = format!("{requests} in flight, CPU");
            rows.push(Row::compared(&model.name(), &measure, Unit::TokensPerCpuSecond, (two, one), None)?);
        }
    }
    one.unload()?;
    two.unload()?;
    Ok(rows)
}

/// The command `mlxnode status --json`, from outside.
fn status(cluster: &Cluster, limits: Limits) -> Result<Row> {
    let mut times = Vec::new();
    for _ in 0..limits.runs.max(10) {
        let measured =
            measure(&mut cluster.first()?.command(&["status", "--json"]), Duration::from_secs(30))?;
        times.push(measured.wall.as_secs_f64() * 1e3);
    }
    Row::alone("node", "status", Unit::Milliseconds, &times, Some(Target::AtMost(50.0)))
}

/// The most that each stage of a model held, over what a worker with next to no model held.
fn memory(cluster: &Cluster, empty: &Model, model: &Model) -> Result<Vec<Row>> {
    // KV caches grow by 256 tokens, so with this context what is reserved is what is used.
    let wish = |model| Load { folder: model, stages: 2, context: 256, sequences: SEQUENCES };
    let mut peaks = Vec::new();
    for model in [empty, model] {
        eprintln!("pipeline: memory of {}", model.name());
        let stages = cluster.load(&wish(&model.folder))?;
        cluster.round(&stages, SEQUENCES, 12)?;
        let peak = |stage: Stage| Some((stage.peak_memory()?, stage));
        peaks.push(stages.into_iter().filter_map(peak).collect::<Vec<_>>());
        cluster.unload()?;
    }
    let [empty, full] = peaks.as_slice() else { return Ok(Vec::new()) };
    let mut rows = Vec::new();
    for ((floor, _), (peak, stage)) in empty.iter().zip(full) {
        let over = (*peak as f64 - *floor as f64) / MEBIBYTE;
        let allowed = (stage.weight_bytes as f64 + stage.kv_bytes as f64 + ALLOWANCE) / MEBIBYTE;
        let subject = format!("{} {}", model.name(), stage.layers());
        let target = Some(Target::AtMost(1.15));
        rows.push(Row::compared(
            &subject,
            "peak of a stage",
            Unit::Mebibytes,
            (&[over], &[allowed]),
            target,
        )?);
    }
    Ok(rows)
}

/// For data directories; removed at the end.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn new() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("mlxnode-bench-{}", std::process::id()));
        setup::wheel::remove(&folder)?;
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = setup::wheel::remove(&self.0) {
            eprintln!("{error:#}");
        }
    }
}
