//! What one hop of a decode step costs over the real links, against the round trip of bare TLS: the worker's example `hop`.

use super::process::{self, measure};
use super::report::{Report, Row, Target, Unit};
use super::{Limits, example};
use crate::places::Places;
use anyhow::{Context as _, Result};
use serde::Deserialize;
use std::process::Command;
use std::time::Duration;

/// A run takes a few times the seconds that it is asked for.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the example prints.
#[derive(Debug, Deserialize)]
struct Figures {
    payload_bytes: u64,
    /// From one compute thread to the next.
    hop_us: Quantiles,
    /// A whole step of two stages.
    step_us: Quantiles,
    /// There and back over TCP with TLS.
    raw_us: Quantiles,
    /// Of stages that burn CPU.
    throughput: Throughput,
    /// Of stages that sleep instead, as if a GPU computed: a busy machine changes little.
    overlap: Throughput,
}

#[derive(Debug, Deserialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

/// Tokens per second of stages without a model.
#[derive(Debug, Deserialize)]
struct Throughput {
    one_stage: f64,
    two_stages_2_requests: f64,
    two_stages_4_requests: f64,
}

/// Measures it.
pub(super) fn run(places: &Places, limits: Limits) -> Result<Report> {
    let example = example(places, "mlxnode-worker", "hop", limits)?;
    let environment = process::environment(&places.cache.join("bench-kernels"))?;
    let seconds = if limits.quick { "1" } else { "5" };
    let mut runs = Vec::new();
    for run in 0..limits.runs {
        eprintln!("hop: run {} of {}", run + 1, limits.runs);
        let mut command = Command::new(&example);
        command.arg(seconds).envs(environment.iter().map(|(name, value)| (name, value)));
        let measured = measure(&mut command, PATIENCE).context("the example hop")?;
        let figures: Figures = serde_json::from_str(&measured.stdout)
            .with_context(|| format!("the example hop printed no figures: {}", measured.stdout))?;
        runs.push(figures);
    }
    let subject = runs.first().map(|run| format!("{} KiB", run.payload_bytes / 1024)).unwrap_or_default();
    let row = |subject: &str,
               measure,
               unit,
               ours: &dyn Fn(&Figures) -> f64,
               base: &dyn Fn(&Figures) -> f64,
               target| {
        let values = |value: &dyn Fn(&Figures) -> f64| runs.iter().map(value).collect::<Vec<_>>();
        Row::compared(subject, measure, unit, (&values(ours), &values(base)), target)
    };
    let hop = Some(Target::AtMost(2.0));
    let both = Some(Target::AtLeast(1.7));
    let (micro, tokens) = (Unit::Microseconds, Unit::TokensPerSecond);
    let rows = vec![
        row(&subject, "hop p50, to raw TLS", micro, &|run| run.hop_us.p50, &|run| run.raw_us.p50, hop)?,
        row(&subject, "hop p99, to raw TLS", micro, &|run| run.hop_us.p99, &|run| run.raw_us.p99, hop)?,
        row(
            &subject,
            "whole step p50, to raw TLS",
            micro,
            &|run| run.step_us.p50,
            &|run| run.raw_us.p50,
            None,
        )?,
        row(
            "busy stages",
            "two, 2 requests, to one",
            tokens,
            &|run| run.throughput.two_stages_2_requests,
            &|run| run.throughput.one_stage,
            both,
        )?,
        row(
            "busy stages",
            "two, 4 requests, to one",
            tokens,
            &|run| run.throughput.two_stages_4_requests,
            &|run| run.throughput.one_stage,
            both,
        )?,
        row(
            "waiting stages",
            "two, 2 requests, to one",
            tokens,
            &|run| run.overlap.two_stages_2_requests,
            &|run| run.overlap.one_stage,
            both,
        )?,
        row(
            "waiting stages",
            "two, 4 requests, to one",
            tokens,
            &|run| run.overlap.two_stages_4_requests,
            &|run| run.overlap.one_stage,
            both,
        )?,
    ];
    let notes = vec![
        "A hop: from the end of a step in one compute thread to its start in the next stage's, over gRPC and mutual TLS on \
         the loopback. Raw: the same bytes there and back over TCP and TLS alone. In turns within each run."
            .into(),
        "Busy stages burn about a millisecond of CPU per token in all, waiting ones sleep for 4 ms, instead of a model; nothing \
         is pinned, so the busy ones need two idle cores."
            .into(),
    ];
    Ok(Report { bench: "hop", ours: "links", base: "base", notes, rows })
}
