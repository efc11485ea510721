//! What serving costs beside the model: CPU time of the node's own process for each token.

use super::client::Question;
use super::load::closed;
use super::prompt;
use super::sides::Ours;
use crate::bench::Limits;
use crate::bench::models::Model;
use crate::bench::report::{Row, Target, Unit};
use anyhow::{Context as _, Result, ensure};
use std::process::Stdio;
use std::time::Duration;

/// Clients at once, and tokens of each answer: enough that hundredths of a second, in which systems count, do not matter.
const CLIENTS: usize = 4;
const TOKENS: usize = 512;
const PROMPT: usize = 8;

/// Microseconds of CPU for a token over HTTP and over gRPC; none where the system does not tell.
pub(super) fn measure(ours: &Ours, model: &Model, limits: Limits) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, ask) in [("HTTP", over_http as fn(&Ours, usize) -> Result<()>), ("gRPC", over_grpc)] {
        let mut found = Vec::new();
        // The first run warms up.
        for run in 0..=limits.runs {
            eprintln!("serve: CPU of the front over {name}, run {run} of {}", limits.runs);
            let before = ours.front_cpu();
            ask(ours, run)?;
            if let (Some(before), Some(after), 1..) = (before, ours.front_cpu(), run) {
                found.push(per_token(after.saturating_sub(before)));
            }
        }
        if !found.is_empty() {
            let target = Some(Target::AtMost(100.0));
            let measure = format!("front, CPU a token, {name}");
            rows.push(Row::alone(&model.name(), &measure, Unit::Microseconds, &found, target)?);
        }
    }
    Ok(rows)
}

fn per_token(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6 / (CLIENTS * TOKENS) as f64
}

fn seed(run: usize, client: usize) -> usize {
    70_000 + run * CLIENTS + client
}

fn over_http(ours: &Ours, run: usize) -> Result<()> {
    let question = |client: usize| Question { prompt: prompt(PROMPT, seed(run, client)), max_tokens: TOKENS };
    let round = closed(&ours.server, CLIENTS, 1, question)?;
    ensure!(round.answers.len() == CLIENTS, "{} of {CLIENTS} were answered", round.answers.len());
    let pieces: usize = round.answers.iter().map(|times| times.pieces.len()).sum();
    ensure!(pieces > CLIENTS * TOKENS / 2, "only {pieces} pieces of text came");
    Ok(())
}

/// The command line speaks gRPC with the node.
fn over_grpc(ours: &Ours, run: usize) -> Result<()> {
    let mut clients = Vec::new();
    for client in 0..CLIENTS {
        let mut command = ours.command(&["generate", "--json", "--ignore-chat-template", "--model", "bench"]);
        command.arg("--max-tokens").arg(TOKENS.to_string());
        command.arg("--prompt").arg(prompt(PROMPT, 5000 + seed(run, client)));
        clients.push(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
    }
    for client in clients {
        let output = client.wait_with_output().context("a client over gRPC")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "a client over gRPC ended with {}: {said}", output.status);
    }
    Ok(())
}
