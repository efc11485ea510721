//! `mlxnode jobs`: long computations on the cluster.

mod download;
mod shown;
mod submit;

use crate::arguments::Global;
use crate::connection::Connection;
use crate::{output, progress};
use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use mlxnode_proto::v1::{
    GetJobRequest, Job, JobLogsRequest, JobState, ListJobsRequest, PublishJobRequest, WatchJobsRequest,
};
use serde_json::json;
use std::path::PathBuf;

/// Fine-tune models on the cluster while it goes on answering.
///
/// A job is safe once `submit` has answered: it goes on from its newest checkpoint when a process, a node or the whole cluster was lost.
/// Its files are taken to the nodes that run it, by their content.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode jobs submit lora.yaml --watch
  mlxnode jobs submit lora.yaml --data ./rows --publish demo:poet
  mlxnode jobs submit lora.yaml --stages 2 --watch
  mlxnode jobs list
  mlxnode jobs logs job-1f0a --follow
  mlxnode jobs publish job-1f0a --model demo --name poet
  mlxnode jobs download job-1f0a --to ./adapter")]
pub struct Jobs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Submit(Box<submit::Submit>),
    /// List the jobs that the cluster remembers.
    List,
    /// Show one job.
    Show {
        /// Its id.
        id: String,
        /// Draw the curve of its losses into a file: .svg or .png.
        #[arg(long, value_name = "FILE")]
        plot: Option<PathBuf>,
    },
    /// Follow a job until it is over.
    Watch {
        /// Its id.
        id: String,
    },
    /// Print what happened to a job.
    Logs {
        /// Its id.
        id: String,
        /// Go on until it is over.
        #[arg(short, long)]
        follow: bool,
    },
    /// End a job. What it saved can still be downloaded and published.
    Cancel {
        /// Its id.
        id: String,
    },
    /// Have a job save a checkpoint and stand still; its memory is free then.
    Pause {
        /// Its id.
        id: String,
    },
    /// Have a job go on from its newest checkpoint; one that failed too.
    Resume {
        /// Its id.
        id: String,
    },
    /// Serve what a job made as an adapter of a loaded model, at once.
    Publish {
        /// Its id.
        id: String,
        /// The model, as `mlxnode status` shows it. Default: the only one.
        #[arg(long, value_name = "MODEL")]
        model: Option<String>,
        /// What requests shall call it. Default: the job's id.
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// The checkpoint after so many steps. Default: the newest.
        #[arg(long, value_name = "N")]
        step: Option<u64>,
    },
    Download(download::Download),
}

impl Jobs {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        let mut jobs = connection.jobs();
        match self.action {
            Action::Submit(submit) => submit.run(&connection, global).await,
            Action::Download(download) => download.run(&connection, global).await,
            Action::List => {
                let listed = jobs.list(ListJobsRequest {}).await?.into_inner().jobs;
                shown::list(&listed, global)
            }
            Action::Show { id, plot } => {
                let job = jobs.get(GetJobRequest { id }).await?.into_inner();
                if let Some(file) = plot {
                    shown::plot(&job, &file)?;
                }
                shown::show(&job, global)
            }
            Action::Watch { id } => watch(&connection, &id, global).await,
            Action::Logs { id, follow } => logs(&connection, id, follow, global).await,
            Action::Cancel { id } => {
                let job = jobs.cancel(GetJobRequest { id: id.clone() }).await?.into_inner();
                done(&job, &format!("{id} is cancelled."), global)
            }
            Action::Pause { id } => {
                let job = jobs.pause(GetJobRequest { id: id.clone() }).await?.into_inner();
                done(&job, &format!("{id} saves a checkpoint and stands still."), global)
            }
            Action::Resume { id } => {
                let job = jobs.resume(GetJobRequest { id: id.clone() }).await?.into_inner();
                done(&job, &format!("{id} goes on."), global)
            }
            Action::Publish { id, model, name, step } => {
                let request = PublishJobRequest {
                    id,
                    step: step.unwrap_or_default(),
                    model: model.unwrap_or_default(),
                    adapter: name.unwrap_or_default(),
                };
                let served = jobs.publish(request).await?.into_inner();
                match global.json {
                    true => output::json(&json!({ "id": served.id })),
                    false => output::line(&format!("Ask for it as the model {}.", served.id)),
                }
            }
        }
    }
}

fn done(job: &Job, words: &str, global: &Global) -> Result<()> {
    match global.json {
        true => output::json(&shown::json(job)),
        false => output::line(words),
    }
}

async fn logs(connection: &Connection, id: String, follow: bool, global: &Global) -> Result<()> {
    let mut lines = connection.jobs().logs(JobLogsRequest { id, follow }).await?.into_inner();
    while let Some(line) = lines.message().await? {
        match global.json {
            true => output::json(&json!({ "at_unix": line.at_unix, "text": line.text }))?,
            false => output::line(&format!("{}  {}", shown::time(line.at_unix), line.text))?,
        }
    }
    Ok(())
}

/// Shows a job's progress until it is over; an error when it did not finish.
async fn watch(connection: &Connection, id: &str, global: &Global) -> Result<()> {
    let mut messages = connection.jobs().watch(WatchJobsRequest { id: id.to_owned() }).await?.into_inner();
    let bar = progress::Bar::counting(id, global.quiet || global.json);
    let (mut last, mut state, mut divided) = (None, None, Vec::new());
    while let Some(message) = messages.message().await? {
        let Some(job) = message.jobs.into_iter().next() else { continue };
        if global.json {
            output::json(&shown::json(&Job {
                losses: job.losses.last().copied().into_iter().collect(),
                ..job.clone()
            }))?;
        } else {
            bar.show(job.step, job.steps);
            bar.say(&shown::progress(&job));
            if state != Some(job.state) && !global.quiet {
                crate::warnings::text(&format!("{id} is {}\n", shown::state(&job)));
            }
            if job.stages != divided && !global.quiet {
                shown::plan(&job).into_iter().for_each(|line| crate::warnings::text(&format!("{line}\n")));
            }
            divided.clone_from(&job.stages);
        }
        state = Some(job.state);
        last = Some(job);
    }
    drop(bar);
    let job = last.context("the node said nothing about the job")?;
    match job.state() {
        JobState::Finished => {
            if !global.json {
                shown::show(&job, global)?;
            }
            Ok(())
        }
        JobState::Failed => bail!("{id} has failed: {}", job.detail),
        JobState::Cancelled => bail!("{id} was cancelled"),
        _ => bail!("{id} is {}; the node stopped telling", shown::state(&job)),
    }
}
