//! Clients that hang up: nothing of them may stay.

use super::client::{Line, Question};
use super::load::closed;
use super::sides::Ours;
use super::{prompt, question};
use crate::bench::Limits;
use crate::bench::models::Model;
use crate::bench::report::{Row, Target, Unit};
use anyhow::{Result, anyhow, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Requests that are given up.
const CANCELS: usize = 10_000;
/// At a time: as many as the node computes at once, and as many again that wait.
const CLIENTS: usize = 32;
/// Longest time after which a client hangs up: some wait, some have their prompt computed, some have tokens.
const PATIENCE: Duration = Duration::from_millis(250);
/// All of them must be gone by then.
const GONE: Duration = Duration::from_secs(10);

/// Gives up requests, and looks for what is left of them.
pub(super) fn measure(ours: &Ours, model: &Model, limits: Limits) -> Result<Vec<Row>> {
    let cancels = if limits.quick { CANCELS / 20 } else { CANCELS };
    // What caches hold comes and goes; a tenth of the cancels fills them.
    hang_up(ours, cancels / 10, 0)?;
    settle(ours)?;
    let before = ours.memory();
    eprintln!("serve: {cancels} cancels");
    hang_up(ours, cancels, cancels)?;
    let left = settle(ours)?;
    let after = ours.memory();
    let round = closed(&ours.server, 1, 1, |_| question(95_000, 0))?;
    ensure!(round.answers.len() == 1, "the node does not answer after {cancels} cancels");
    let name = model.name();
    let of = format!("{cancels} cancels");
    let none = Some(Target::AtMost(0.0));
    let mut rows = vec![Row::alone(&name, &format!("{of}, requests left"), Unit::Count, &[left], none)?];
    if let (Some(before), Some(after)) = (before, after) {
        let grown = (after - before).max(0.0);
        let target = Some(Target::AtMost(64.0));
        rows.push(Row::alone(&name, &format!("{of}, memory grows"), Unit::Mebibytes, &[grown], target)?);
    }
    Ok(rows)
}

/// So many clients ask and hang up, each at another moment.
fn hang_up(ours: &Ours, count: usize, seed: usize) -> Result<()> {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let client = || -> Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return Ok(());
                }
                give_up(ours, seed + number)?;
            }
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        for client in clients {
            client.join().map_err(|_| anyhow!("a client panicked"))??;
        }
        Ok(())
    })
}

fn give_up(ours: &Ours, number: usize) -> Result<()> {
    let line = Arc::new(Line::default());
    // Multiples of an irrational number are spread evenly (Weyl): the same moments in every run.
    let moment = PATIENCE.mul_f64((number as f64 * 0.618_033_988_749_895).fract());
    let asked = Question { prompt: prompt(24, 200_000 + number), max_tokens: 1000 };
    std::thread::scope(|scope| {
        let watched = line.clone();
        let answer = scope.spawn(move || ours.server.ask(&asked, &watched));
        std::thread::sleep(moment);
        line.hang_up();
        answer.join().map_err(|_| anyhow!("a client panicked"))?.map(drop)
    })
}

/// Waits until no request is left, and says how many are after all.
fn settle(ours: &Ours) -> Result<f64> {
    let begun = Instant::now();
    loop {
        let left = ours.server.requests()?;
        if left == 0.0 || begun.elapsed() > GONE {
            return Ok(left);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
