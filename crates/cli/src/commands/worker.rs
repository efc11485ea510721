//! `mlxnode worker` (hidden): one shard in a process of its own. Nodes start it; people do not.

use crate::grammars::ModelGrammars;
use anyhow::Result;
use clap::Args;
use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{Job, JobError};
use mlxnode_engine::{EngineStage, Model, Speculation, StageOptions};
use mlxnode_traces::{Collector, Exporter};
use mlxnode_worker::{
    Guessing, JobSetup, LoadFailure, LoadShard, Others, Rehearsal, RunError, WorkerOptions,
};
use std::process::ExitCode;

/// Run one shard for the node that started this process.
#[derive(Debug, Args)]
pub struct Worker {
    /// Where spans of requests go.
    #[arg(long, value_name = "http://HOST:PORT", requires = "node")]
    otlp_endpoint: Option<String>,
    /// Name of the node, for spans.
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// What this worker holds, for spans.
    #[arg(long, value_name = "WORDS", default_value = "")]
    part: String,
    /// Run a job instead of a shard.
    #[arg(long)]
    job: bool,
}

impl Worker {
    pub fn run(self) -> Result<ExitCode> {
        if self.job {
            return Ok(code(mlxnode_worker::run_job(job)));
        }
        let collector = self.otlp_endpoint.map(|endpoint| Collector {
            endpoint,
            node: self.node.unwrap_or_default(),
            part: self.part,
        });
        // Lives until the worker has ended: what is left is sent then.
        let traces = collector.map(Exporter::start).transpose()?;
        let spans = traces.as_ref().map(Exporter::sink);
        let options = WorkerOptions { spans, ..WorkerOptions::default() };
        Ok(code(mlxnode_worker::run(options, Box::new(load))))
    }
}

fn code(ended: Result<(), RunError>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.exit_code();
            crate::error::report(&error.into());
            ExitCode::from(code)
        }
    }
}

/// Makes the job of this process, on the thread that drives it.
fn job(setup: &JobSetup, others: Others<'_>) -> Result<Box<dyn Job>, JobError> {
    match setup.kind.as_str() {
        "fine-tuning" => crate::training::job::make(setup, others),
        "rehearsal" => {
            let job = Rehearsal::new(&setup.configuration, &setup.inputs, setup.resume.as_deref())?;
            Ok(Box::new(match others.line {
                Some(line) => job.with_stages(line),
                None => job,
            }))
        }
        other => {
            Err(JobError::Refused(format!("this release of mlxnode runs no jobs of the kind {other:?}")))
        }
    }
}

/// Called on the compute thread, which owns the stage from here on.
fn load(
    shard: LoadShard,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Box<dyn mlxnode_compute::Stage>, LoadFailure> {
    let checkpoint = Checkpoint::open(&shard.folder)?;
    let options = StageOptions {
        context_tokens: shard.context_tokens,
        max_sequences: shard.max_sequences,
        ..StageOptions::default()
    };
    let grammars = ModelGrammars::new(shard.folder.clone(), checkpoint.spec().vocabulary);
    let stage = EngineStage::load(&checkpoint, shard.layers, options, progress)?;
    let stage = match &shard.blocks {
        Some(room) => stage.with_blocks(room.memory, Some((&room.folder, room.disk)))?,
        None => stage,
    };
    let stage = match shard.guessing.filter(|_| shard.layers.is_first()) {
        Some(guessing) => stage.with_speculation(speculation(guessing)?)?,
        None => stage,
    };
    Ok(Box::new(stage.with_grammars(Box::new(grammars))))
}

/// Loads the draft model, if there is one.
fn speculation(guessing: Guessing) -> Result<Speculation, LoadFailure> {
    let Guessing { draft, ngram, tokens } = guessing;
    let Some(folder) = draft else { return Ok(Speculation::PromptLookup { ngram, tokens }) };
    let model = Model::load_whole(&Checkpoint::open(&folder)?, &mut |_, _| {})?;
    Ok(Speculation::Draft { model: Box::new(model), tokens })
}
