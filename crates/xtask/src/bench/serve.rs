//! Serving: many clients at a node and at `mlx_lm.server`, over HTTP, with the same weights, the same questions and one generator of load;
//! in turns, on the same cores. And a node under ten times the load that it can bear.
//!
//! The model has 100 million parameters and no token that ends an answer, so that every answer has its full length and both servers do
//! the same work; how many of the answers are the same is told.

mod cancels;
mod client;
mod load;
mod overhead;
mod overload;
mod sides;

use super::models::{Dtype, Model, Size};
use super::pipeline::Folder;
use super::process;
use super::report::{Collected, Report, Row, Target, Unit};
use super::{Limits, binary};
use crate::node::Cli;
use crate::places::Places;
use crate::setup;
use anyhow::{Context as _, Result, ensure};
use client::{Answer, Line, Question, Server, Times};
use load::{closed, millis, quantile};
use sides::{Ours, Theirs};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Seconds of overload.
const OVERLOAD: u64 = 120;

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Seconds of overload
    #[arg(long, value_name = "SECONDS", default_value_t = OVERLOAD)]
    overload: u64,
    /// Without mlx_lm.server: ours alone
    #[arg(long)]
    alone: bool,
    /// The small model of 30 million parameters instead of that of 100
    #[arg(long)]
    small: bool,
    /// How the weights are stored
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
}

impl Options {
    pub(super) fn all() -> Self {
        Self { overload: OVERLOAD, alone: false, small: false, dtype: Dtype::F32 }
    }
}

/// Tokens of a question and of an answer.
const PROMPT: usize = 64;
const ANSWER: usize = 32;
/// Longest sequence, and the long prompt that others see as a pause, by the model. MLX's CPU kernels for 4 bits take minutes for long ones.
fn lengths(model: &Model, limits: Limits) -> (usize, usize) {
    match model.size {
        _ if limits.quick || model.dtype == Dtype::Q4 => (4096, 512),
        Size::S => (4096, 2048),
        _ => (4096 + 2 * ANSWER, 4096),
    }
}

/// Words of the models' tokenizer, which are tokens, others for every `seed`.
fn prompt(length: usize, seed: usize) -> String {
    let mut state = (seed as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let words = (0..length).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        format!("w{}", (state >> 33) % VOCABULARY)
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Of the models of these sizes.
const VOCABULARY: u64 = 8192;

/// A beginning that many requests share.
const PREFIX: usize = 1024;
const CLIENTS: [usize; 4] = [1, 4, 8, 16];

/// The two servers.
struct Sides<'a> {
    ours: Ours<'a>,
    theirs: Option<Theirs>,
}

impl Sides<'_> {
    /// Runs it at each server, ours first in every other turn, so that neither profits from its place.
    fn in_turns<T>(
        &self,
        turns: usize,
        what: &str,
        mut run: impl FnMut(&Server, usize) -> Result<T>,
    ) -> Result<(Vec<T>, Vec<T>)> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for turn in 0..turns {
            eprintln!("serve: {what}, run {} of {turns}", turn + 1);
            let sides =
                [(false, Some(&self.ours.server)), (true, self.theirs.as_ref().map(|side| &side.server))];
            let order = if turn % 2 == 0 { [0, 1] } else { [1, 0] };
            for (is_theirs, server) in order.map(|side| sides[side]) {
                let Some(server) = server else { continue };
                let log = || {
                    if is_theirs {
                        self.theirs.as_ref().map(Theirs::log).unwrap_or_default()
                    } else {
                        String::new()
                    }
                };
                let result = run(server, turn).with_context(|| {
                    format!("{what} at {}\n{}", if is_theirs { "mlx_lm.server" } else { "mlxnode" }, log())
                })?;
                if is_theirs { &mut theirs } else { &mut ours }.push(result);
            }
        }
        Ok((ours, theirs))
    }
}

/// Measures all.
pub(super) fn run(places: &Places, options: &Options, limits: Limits) -> Result<Report> {
    let binary = binary(places, limits)?;
    let oracle = setup::oracle::ensure(places)?;
    let size = if options.small || limits.quick { Size::S } else { Size::M };
    let model = Model::llama(places, &oracle, size, options.dtype)?;
    let environment = process::environment(&places.cache.join("bench-kernels"))?;
    let cli = Cli::new(&binary).prefixed(&[], &environment);
    let folder = Folder::new()?;
    // The generator and both servers share the cores: what counts is the comparison.
    let sequences = CLIENTS[CLIENTS.len() - 1];
    let (context, long) = lengths(&model, limits);
    let sides = Sides {
        ours: Ours::start(&cli, folder.path(), &model.folder, context, sequences)?,
        theirs: match options.alone {
            true => None,
            false => Some(Theirs::start(&oracle, folder.path(), &model.folder, &environment)?),
        },
    };
    let mut rows = Collected::new("mlxnode", "mlx_lm.server");
    rows.add(throughput(&sides, &model, limits)?);
    rows.add(pauses(&sides, &model, long, limits)?);
    rows.add(warm_prefix(&sides, &model, limits)?);
    if let Some(ours) = sides.ours.peak_memory() {
        rows.add(vec![match sides.theirs.as_ref().and_then(Theirs::peak_memory) {
            Some(theirs) => {
                Row::compared(&model.name(), "peak memory", Unit::Mebibytes, (&[ours], &[theirs]), None)?
            }
            None => Row::alone(&model.name(), "peak memory", Unit::Mebibytes, &[ours], None)?,
        }]);
    }
    let Sides { ours, theirs } = sides;
    drop(theirs); // the overload is ours alone
    rows.add(overhead::measure(&ours, &model, limits)?);
    rows.add(overload::measure(&ours, &model, options.overload, limits)?);
    rows.add(cancels::measure(&ours, &model, limits)?);
    ours.stop()?;
    let notes = vec![
            format!(
                "Questions of {PROMPT} tokens, each another one, answers of {ANSWER}, greedy, streamed over HTTP. Clients, generator and servers \
                 share the cores; the servers are measured in turns."
            ),
            format!("Pause: the 99th percentile of the times between two tokens of four answers while a prompt of {long} tokens is computed."),
            "Overload: a Poisson process of ten times the requests that were answered at the peak; then all hang up. Memory grows from what the \
             peak's clients left."
                .to_owned(),
            "Front: CPU time of the node's process, which serves HTTP and gRPC and schedules; the model runs in another one.".to_owned(),
            "Cancels: clients that hang up at any moment of their request, 16 at a time.".to_owned(),
    ];
    Ok(rows.into_report("serve", notes))
}

/// A question of its own for each number and run: no answer is there already.
fn question(number: usize, turn: usize) -> Question {
    Question { prompt: prompt(PROMPT, number * 17 + turn * 1009 + 1), max_tokens: ANSWER }
}

/// Tokens per second and times to the first token, by the number of clients.
fn throughput(sides: &Sides, model: &Model, limits: Limits) -> Result<Vec<Row>> {
    let each = if limits.quick { 1 } else { 3 };
    let mut rows = Vec::new();
    for clients in CLIENTS {
        // The first run warms up.
        let (ours, theirs) =
            sides.in_turns(limits.runs + 1, &format!("{clients} clients"), |server, turn| {
                let round = closed(server, clients, each, |number| question(number + clients * 100, turn))?;
                ensure!(
                    round.refusals.is_empty(),
                    "{} of {clients} clients were refused",
                    round.refusals.len()
                );
                Ok(round)
            })?;
        if let (Some(ours), Some(theirs)) = (ours.last(), theirs.last()) {
            let same = [agreement(ours, theirs)];
            rows.push(Row::alone(
                &model.name(),
                &format!("{clients} clients, same answers"),
                Unit::Times,
                &same,
                None,
            )?);
        }
        let rates = |rounds: &[load::Round]| -> Vec<f64> {
            rounds.iter().skip(1).map(|round| round.tokens_per_second(ANSWER)).collect()
        };
        let target = match clients {
            1 => Some(Target::AtLeast(1.0)),
            8 | 16 => Some(Target::AtLeast(1.3)),
            _ => None,
        };
        let named = format!("{clients} clients");
        rows.push(row(model, &named, Unit::TokensPerSecond, &rates(&ours), &rates(&theirs), target)?);
        for (part, name) in [(0.5, "p50"), (0.95, "p95")] {
            let firsts = |rounds: &[load::Round]| -> Vec<f64> {
                rounds.iter().skip(1).map(|round| quantile(&round.first_tokens(), part)).collect()
            };
            let target = (clients == 8).then_some(Target::AtMost(0.7));
            let named = format!("{clients} clients, first token {name}");
            rows.push(row(model, &named, Unit::Milliseconds, &firsts(&ours), &firsts(&theirs), target)?);
        }
    }
    Ok(rows)
}

/// The part of the answers that both gave. Sums of single-precision numbers in another order can turn a near tie.
fn agreement(ours: &load::Round, theirs: &load::Round) -> f64 {
    let texts = |round: &load::Round| {
        let text = |times: &Times| times.text.split_whitespace().collect::<String>();
        round.answers.iter().map(text).collect::<std::collections::BTreeSet<_>>()
    };
    let (ours, theirs) = (texts(ours), texts(theirs));
    ours.intersection(&theirs).count() as f64 / ours.len().max(1) as f64
}

/// What others notice of a long prompt.
fn pauses(sides: &Sides, model: &Model, long: usize, limits: Limits) -> Result<Vec<Row>> {
    let (ours, theirs) =
        sides.in_turns(limits.runs.min(3), "a long prompt", |server, turn| pause(server, long, turn))?;
    let part =
        |runs: &[(f64, f64)], which: fn(&(f64, f64)) -> f64| runs.iter().map(which).collect::<Vec<_>>();
    let (pause, without) = (|run: &(f64, f64)| run.0, |run: &(f64, f64)| run.0 / run.1);
    Ok(vec![
        row(
            model,
            &format!("pause by a prompt of {long}"),
            Unit::Milliseconds,
            &part(&ours, pause),
            &part(&theirs, pause),
            Some(Target::AtMost(0.5)),
        )?,
        // The median of the gaps before the long prompt came is what "without" means.
        Row::alone(&model.name(), "pause, times without", Unit::Times, &part(&ours, without), None)?,
    ])
}

/// The 99th percentile of the gaps of four answers while a long prompt is computed, and the median gap before; in milliseconds.
fn pause(server: &Server, long: usize, turn: usize) -> Result<(f64, f64)> {
    const ANSWERS: usize = 4;
    let lines: Vec<Arc<Line>> = (0..ANSWERS).map(|_| Arc::new(Line::default())).collect();
    std::thread::scope(|scope| {
        let answers: Vec<_> = lines
            .iter()
            .enumerate()
            .map(|(number, line)| {
                // Long enough for the whole of the prompt; hung up when that is through.
                let question = Question { max_tokens: 4000, ..question(500 + number, turn) };
                scope.spawn(move || read_until_hung_up(server, &question, line))
            })
            .collect();
        let deadline = Instant::now() + Duration::from_secs(60);
        while lines.iter().any(|line| line.pieces() < 12) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let begins = Instant::now();
        let long = Question { prompt: prompt(long, 900 + turn), max_tokens: 1 };
        let asked = server.ask(&long, &Line::default());
        let ends = Instant::now();
        lines.iter().for_each(|line| line.hang_up());
        let (mut gaps, mut before) = (Vec::new(), Vec::new());
        for answer in answers {
            let stamps = answer.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            for pair in stamps.windows(2).filter(|pair| pair[0] < ends) {
                let gap = millis(pair[1].min(ends) - pair[0]);
                if pair[1] > begins { &mut gaps } else { &mut before }.push(gap);
            }
            // The one that never came while the prompt was computed is a gap too.
            if let Some(last) = stamps.last().filter(|last| **last < ends) {
                gaps.push(millis(ends - (*last).max(begins)));
            }
        }
        ensure!(matches!(asked?, Some(Answer::Whole(_))), "the long prompt was refused");
        ensure!(!gaps.is_empty() && !before.is_empty(), "the answers did not begin");
        Ok((quantile(&gaps, 0.99), quantile(&before, 0.5)))
    })
}

/// When pieces came, until somebody hangs up.
fn read_until_hung_up(server: &Server, question: &Question, line: &Arc<Line>) -> Vec<Instant> {
    let mut stamps = Vec::new();
    let watching = line.clone();
    std::thread::scope(|scope| {
        let asked = scope.spawn(move || server.ask(question, &watching));
        let mut seen = 0;
        while !asked.is_finished() {
            let pieces = line.pieces();
            if pieces > seen {
                stamps.push(Instant::now());
                seen = pieces;
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    });
    stamps
}

/// The time to the first token of a prompt whose beginning was there before, over the time without.
fn warm_prefix(sides: &Sides, model: &Model, limits: Limits) -> Result<Vec<Row>> {
    let (ours, theirs) =
        sides.in_turns(limits.runs, "a prompt that begins as one before", |server, turn| {
            let beginning = prompt(PREFIX, 3000 + turn);
            let first = |end: usize| -> Result<Times> {
                let asked = Question { prompt: format!("{beginning} {}", prompt(8, end)), max_tokens: 1 };
                match server.ask(&asked, &Line::default())? {
                    Some(Answer::Whole(times)) => Ok(times),
                    other => anyhow::bail!("no answer: {other:?}"),
                }
            };
            let cold = first(5000 + turn)?;
            let warm = first(6000 + turn)?;
            Ok((millis(warm.first()) / millis(cold.first()), warm.cached_tokens as f64))
        })?;
    let (ratios, cached): (Vec<f64>, Vec<f64>) = ours.into_iter().unzip();
    let theirs: Vec<f64> = theirs.into_iter().map(|(ratio, _)| ratio).collect();
    let name = model.name();
    let mut rows = vec![
        Row::alone(&name, "warm prefix, of cold", Unit::Times, &ratios, Some(Target::AtMost(0.2)))?,
        Row::alone(&name, "warm prefix, tokens that were there", Unit::Count, &cached, None)?,
    ];
    if !theirs.is_empty() {
        rows.push(Row::alone(&name, "warm prefix, of cold, mlx_lm.server", Unit::Times, &theirs, None)?);
    }
    Ok(rows)
}

fn row(
    model: &Model,
    measure: &str,
    unit: Unit,
    ours: &[f64],
    theirs: &[f64],
    target: Option<Target>,
) -> Result<Row> {
    match theirs.is_empty() {
        true => Row::alone(&model.name(), measure, unit, ours, None),
        false => Row::compared(&model.name(), measure, unit, (ours, theirs), target),
    }
}
