//! `mlxnode top`: the cluster live in the terminal, or its figures for scripts.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::top::{self, Follow};
use crate::{output, wire};
use anyhow::{Context as _, Result, bail};
use clap::Args;
use mlxnode_api::jobs::{JobView, WatchedJobs};
use mlxnode_api::picture::Picture;
use mlxnode_proto::v1::WatchJobsRequest;
use serde::Serialize;
use std::io::IsTerminal as _;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::Streaming;

/// Watch the cluster: nodes, memory, models, jobs, what each stage does.
///
/// Shows how fast tokens come, who waits, and for each stage how long a step computes, waits and sends. Keys: q ends, ? explains.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode top
  mlxnode top --once
  mlxnode top --json | jq --unbuffered .totals.tokens_per_second")]
pub struct Top {
    /// One look as text (with --json: one line), after watching for one period.
    #[arg(long)]
    once: bool,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    every: f64,
}

impl Top {
    pub async fn run(self, global: &Global) -> Result<()> {
        let wants_screen = !self.once && !global.json;
        if wants_screen && !(std::io::stdout().is_terminal() && std::io::stdin().is_terminal()) {
            bail!("`mlxnode top` needs a terminal; for scripts there are --once and --json");
        }
        let connection = Connection::open(global).await?;
        let period = Duration::from_secs_f64(self.every);
        let request = wire::figures_request(period);
        let mut figures = connection.cluster().figures(request).await?.into_inner();
        let (jobs_sender, mut jobs) = watch::channel(None);
        let _watching = AbortOnDropHandle::new(tokio::spawn(watch_jobs(connection.clone(), jobs_sender)));
        if self.once {
            // Rates are means between two looks.
            next(&mut figures).await?;
            let picture = next(&mut figures).await?;
            // Without a coordinator nobody knows of jobs.
            let _ = tokio::time::timeout(JOBS_PATIENCE, jobs.wait_for(Option::is_some)).await;
            let jobs = jobs.borrow().clone().unwrap_or_default();
            if global.json {
                return output::json(&Look { picture: &picture, jobs: &jobs });
            }
            return output::text(&top::text(&Follow { picture, jobs, lost: None }));
        }
        if global.json {
            loop {
                let picture = next(&mut figures).await?;
                let jobs = jobs.borrow().clone().unwrap_or_default();
                output::json(&Look { picture: &picture, jobs: &jobs })?;
            }
        }
        let first = next(&mut figures).await?;
        let now = jobs.borrow().clone().unwrap_or_default();
        let (sender, pictures) = watch::channel(Follow { picture: first, jobs: now, lost: None });
        let stop = CancellationToken::new();
        let screen = tokio::task::spawn_blocking({
            let stop = stop.clone();
            move || top::screen(pictures, &stop)
        });
        tokio::select! {
            shown = screen => return shown.context("the screen ended badly")?,
            () = follow(connection, period, figures, jobs, sender) => {}
            () = told_to_end() => {}
        }
        // A signal: the screen is put back before the process ends.
        stop.cancel();
        while !top::is_restored() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}

/// Passes pictures on, and looks for the node again when it is gone.
async fn follow(
    connection: Connection,
    period: Duration,
    mut figures: Streaming<mlxnode_proto::v1::ClusterFigures>,
    jobs: watch::Receiver<Option<Vec<JobView>>>,
    sender: watch::Sender<Follow>,
) {
    loop {
        let lost = loop {
            match next(&mut figures).await {
                Ok(picture) => {
                    let jobs = jobs.borrow().clone().unwrap_or_default();
                    sender.send_replace(Follow { picture, jobs, lost: None })
                }
                Err(error) => break error,
            };
        };
        sender.send_modify(|follow| follow.lost = Some(format!("{lost:#}")));
        figures = loop {
            tokio::time::sleep(period).await;
            if let Ok(again) = connection.cluster().figures(wire::figures_request(period)).await {
                break again.into_inner();
            }
        };
    }
}

/// A look for programs: the picture's fields, and the jobs.
#[derive(Serialize)]
struct Look<'a> {
    #[serde(flatten)]
    picture: &'a Picture,
    jobs: &'a [JobView],
}

/// How long one look waits for the jobs.
const JOBS_PATIENCE: Duration = Duration::from_secs(3);
/// Before the jobs are asked for again.
const RETRY: Duration = Duration::from_secs(1);

/// Keeps the jobs current, for ever; while nobody tells them they stay as they were.
async fn watch_jobs(connection: Connection, sender: watch::Sender<Option<Vec<JobView>>>) {
    loop {
        if let Ok(messages) = connection.jobs().watch(WatchJobsRequest::default()).await {
            let (mut messages, mut watched) = (messages.into_inner(), WatchedJobs::default());
            while let Ok(Some(message)) = messages.message().await {
                if let Some(jobs) = watched.take(message) {
                    sender.send_replace(Some(jobs.to_vec()));
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn next(figures: &mut Streaming<mlxnode_proto::v1::ClusterFigures>) -> Result<Picture> {
    let figures = figures.message().await?.context("the node ended")?;
    Ok(mlxnode_api::picture::picture(figures))
}

/// SIGTERM, SIGHUP, or Ctrl-C from elsewhere: the terminal itself tells Ctrl-C as a key.
async fn told_to_end() {
    let signals =
        [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()].into_iter().map(signal);
    let waits = signals.flatten().map(|mut signal| {
        Box::pin(async move {
            signal.recv().await;
        })
    });
    let waits: Vec<_> = waits.collect();
    if waits.is_empty() {
        return std::future::pending().await;
    }
    futures::future::select_all(waits).await;
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.5..=60.0).contains(&seconds) => Ok(seconds),
        _ => Err("seconds are 0.5 to 60".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_are_bounded() {
        assert_eq!(seconds("2"), Ok(2.0));
        for text in ["0", "0.1", "61", "NaN", "x", "-1"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
