//! What adding up a gradient of 100 MB costs between two processes, against bare TCP and TLS: the worker's example `reduce`.

use super::process::{self, measure};
use super::report::{Report, Row, Target, Unit};
use super::{Limits, example};
use crate::places::Places;
use anyhow::{Context as _, Result};
use serde::Deserialize;
use std::process::Command;
use std::time::Duration;

/// All turns together.
const PATIENCE: Duration = Duration::from_secs(300);
/// Size of the gradient.
const MEGABYTES: usize = 100;
const QUICK_MEGABYTES: usize = 8;

/// What the example prints: seconds of each turn.
#[derive(Debug, Deserialize)]
struct Figures {
    bytes: usize,
    reduce_s: Vec<f64>,
    tcp_s: Vec<f64>,
    tls_s: Vec<f64>,
}

/// Measures it.
pub(super) fn run(places: &Places, limits: Limits) -> Result<Report> {
    let example = example(places, "mlxnode-worker", "reduce", limits)?;
    let environment = process::environment(&places.cache.join("bench-kernels"))?;
    let megabytes = if limits.quick { QUICK_MEGABYTES } else { MEGABYTES };
    let mut command = Command::new(&example);
    command.args([limits.runs.to_string(), megabytes.to_string()]);
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    let measured = measure(&mut command, PATIENCE).context("the example reduce")?;
    let figures: Figures = serde_json::from_str(&measured.stdout)
        .with_context(|| format!("the example reduce printed no figures: {}", measured.stdout))?;
    // As rates, so that a greater ratio is better: what each process sends, in its time.
    let rates = |seconds: &[f64]| {
        seconds.iter().map(|seconds| figures.bytes as f64 / 1e6 / seconds).collect::<Vec<_>>()
    };
    let (reduce, tcp, tls) = (rates(&figures.reduce_s), rates(&figures.tcp_s), rates(&figures.tls_s));
    let subject = format!("{megabytes} MB");
    let half = Some(Target::AtLeast(0.5));
    let unit = Unit::MegabytesPerSecond;
    let rows = vec![
        Row::compared(&subject, "sum, to raw TCP", unit, (&reduce, &tcp), half)?,
        Row::compared(&subject, "sum, to raw TLS", unit, (&reduce, &tls), None)?,
        Row::compared(&subject, "raw TLS, to raw TCP", unit, (&tls, &tcp), None)?,
    ];
    let notes = vec![
        "Two processes on the loopback, in turns. A sum of two gradients: each sends as many bytes as one gradient has, over gRPC \
         and mutual TLS, and adds half of them. Raw: each sends as many bytes to the other at the same time."
            .into(),
    ];
    Ok(Report { bench: "reduce", ours: "sum", base: "base", notes, rows })
}
