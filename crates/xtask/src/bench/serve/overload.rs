//! Ten times the requests that the node can answer.

use super::load::{closed, millis, open, quantile};
use super::sides::Ours;
use super::{ANSWER, CLIENTS, question};
use crate::bench::Limits;
use crate::bench::models::Model;
use crate::bench::report::{Row, Target, Unit};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

/// Sequences that a node opens for each one whose whole context it has room for, when they are short.
const FULL_HOUSE: usize = 4;

/// Goodput, refusals and memory under `seconds` of overload, and how soon all is well again.
pub(super) fn measure(ours: &Ours, model: &Model, seconds: u64, limits: Limits) -> Result<Vec<Row>> {
    let time = Duration::from_secs(if limits.quick { seconds.min(20) } else { seconds });
    let clients = CLIENTS[CLIENTS.len() - 1];
    eprintln!("serve: overload for {} s", time.as_secs());
    let calm = closed(&ours.server, 1, 5, |number| question(20_000 + number, 0))?;
    let best = closed(&ours.server, clients, 3, |number| question(21_000 + number, 0))?;
    let few = ours.memory();
    // As many as are ever open at once may be faster still, and hold more of the memory that was reserved at load.
    let full = closed(&ours.server, FULL_HOUSE * clients, 1, |number| question(22_000 + number, 0))?;
    let at_peak = ours.memory();
    let peak = best.tokens_per_second(ANSWER).max(full.tokens_per_second(ANSWER));
    let round =
        open(&ours.server, 10.0 * peak / ANSWER as f64, time, 11, |number| question(30_000 + number, 0))?;
    ensure!(!round.answers.is_empty(), "nobody was answered under load");
    let after = ours.memory();
    // Back to normal: a first token as soon as before, times two for the noise of a single one.
    let normal = 2.0 * quantile(&calm.first_tokens(), 0.95);
    let hung_up = Instant::now();
    let mut probes = 0;
    while hung_up.elapsed() < Duration::from_secs(60) {
        probes += 1;
        let probe = closed(&ours.server, 1, 1, |_| question(90_000 + probes, 0))?;
        if probe.first_tokens().iter().any(|first| *first <= normal) {
            break;
        }
    }
    let name = model.name();
    let goodput = round.tokens_per_second(ANSWER) / peak;
    let mut rows = vec![
        Row::alone(&name, "10x load, goodput of peak", Unit::Times, &[goodput], Some(Target::AtLeast(0.9)))?,
        Row::alone(
            &name,
            "10x load, asked",
            Unit::Count,
            &[(round.answers.len() + round.refusals.len() + round.hung_up) as f64],
            None,
        )?,
        Row::alone(&name, "10x load, refused", Unit::Count, &[round.refusals.len() as f64], None)?,
        Row::alone(
            &name,
            "10x load, back to normal",
            Unit::Milliseconds,
            &[millis(hung_up.elapsed())],
            Some(Target::AtMost(5000.0)),
        )?,
    ];
    if !round.refusals.is_empty() {
        let refusals: Vec<f64> = round.refusals.iter().copied().map(millis).collect();
        let late = quantile(&refusals, 0.99);
        rows.push(Row::alone(
            &name,
            "10x load, refused after, p99",
            Unit::Milliseconds,
            &[late],
            Some(Target::AtMost(10.0)),
        )?);
    }
    if let (Some(few), Some(at_peak), Some(after)) = (few, at_peak, after) {
        let house = format!("{} clients, memory grows", FULL_HOUSE * clients);
        let row = |measure: &str, from: f64, to: f64, target| {
            Row::alone(&name, measure, Unit::Mebibytes, &[(to - from).max(0.0)], target)
        };
        rows.push(row(&house, few, at_peak, None)?);
        rows.push(row("10x load, memory grows", at_peak, after, Some(Target::AtMost(64.0)))?);
    }
    Ok(rows)
}
