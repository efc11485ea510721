//! Result files: what a finished job made, as files whose ids follow from the job's. They are the job's: nobody uploads or deletes them.

use super::told;
use crate::http::jobs_client;
use crate::http::{ApiError, Caller, ErrorKind, HttpServices};
use crate::jobs::{ContentHash, DownloadPart, FilePiece, JobFiles};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::Checkpoint;
use mlxnode_proto::v1::{Job, JobState};
use serde_json::{Value, json};
use std::sync::Arc;

/// As OpenAI calls what such files are for.
const PURPOSE: &str = "fine-tune-results";
const BEGIN: &str = "file-";

/// A file that jobs make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Made {
    /// The losses by step, thinned like the job's curve.
    Metrics,
    /// The adapter, or the trained tensors of a full fine-tuning.
    Adapter,
    /// All arguments of the training, for whoever loads the adapter.
    Settings,
}

impl Made {
    const ALL: [Self; 3] = [Self::Metrics, Self::Adapter, Self::Settings];

    /// Its part of an id.
    fn word(self) -> &'static str {
        match self {
            Self::Metrics => "metrics",
            Self::Adapter => "adapter",
            Self::Settings => "config",
        }
    }

    fn file_name(self) -> &'static str {
        match self {
            Self::Metrics => "step_metrics.csv",
            Self::Adapter => "adapters.safetensors",
            Self::Settings => "adapter_config.json",
        }
    }

    fn id(self, job: &str) -> String {
        format!("{BEGIN}{}-{job}", self.word())
    }

    /// What an id means, and the job's id. Ids of uploaded files have no second dash.
    fn named(id: &str) -> Option<(Self, &str)> {
        let (word, job) = id.strip_prefix(BEGIN)?.split_once('-')?;
        Some((Self::ALL.into_iter().find(|made| made.word() == word)?, job))
    }

    /// Has this job made it?
    fn is_of(self, job: &Job) -> bool {
        let learned = job.wish.as_ref().is_some_and(|wish| matches!(wish.kind.as_str(), "" | "fine-tuning"));
        let has_result = learned && !job.checkpoints.is_empty();
        job.state() == JobState::Finished && (self == Self::Metrics || has_result)
    }
}

/// Ids of what a job made; none while it is not finished.
pub(in crate::http::openai) fn result_files(job: &Job) -> Vec<String> {
    let id = job.wish.as_ref().map_or("", |wish| &wish.id);
    Made::ALL.into_iter().filter(|made| made.is_of(job)).map(|made| made.id(id)).collect()
}

/// A file that a job made.
pub(super) struct ResultFile {
    id: String,
    made: Made,
    job: Job,
}

impl HttpServices {
    /// The file of this id that a job made which the caller may see.
    pub(super) async fn result_file(
        &self,
        caller: &Caller,
        id: &str,
    ) -> Result<Option<ResultFile>, ApiError> {
        let Some((made, job)) = Made::named(id) else { return Ok(None) };
        match jobs_client::get(self.jobs_service()?, caller, job).await {
            Ok(job) => Ok(made.is_of(&job).then(|| ResultFile { id: id.to_owned(), made, job })),
            Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl ResultFile {
    /// As OpenAI writes it.
    pub(super) async fn shown(&self, files: &Arc<dyn JobFiles>) -> Result<Value, ApiError> {
        let (bytes, _) = self.open(files).await?;
        Ok(json!({
            "id": self.id, "object": "file", "bytes": bytes, "created_at": self.job.ended_unix, "expires_at": null,
            "filename": self.made.file_name(), "purpose": PURPOSE, "status": "processed", "status_details": null,
        }))
    }

    /// How much it holds, and what.
    pub(super) async fn open(
        &self,
        files: &Arc<dyn JobFiles>,
    ) -> Result<(u64, BoxStream<'static, Result<Bytes, Error>>), ApiError> {
        let name = self.made.file_name();
        if self.made == Made::Metrics {
            let text = Bytes::from(metrics(&self.job));
            return Ok((text.len() as u64, futures::stream::iter([Ok(text)]).boxed()));
        }
        let missing = || ApiError::new(ErrorKind::NotFound, format!("the job made no {name}"));
        let wish = self.job.wish.as_ref().ok_or_else(missing)?;
        // Of a job that is finished the last one is its result.
        let held = self.job.checkpoints.last().ok_or_else(missing)?;
        let hash = ContentHash::try_from(held.hash.as_ref()).map_err(|_| missing())?;
        let checkpoint = Checkpoint { step: held.step, hash, bytes: held.bytes };
        let mut pieces = files.download(wish.id.clone(), checkpoint, DownloadPart::One(name.to_owned()));
        let Some(FilePiece::File { bytes, .. }) = pieces.next().await.transpose().map_err(told)? else {
            return Err(missing());
        };
        let data = pieces.try_filter_map(|piece| async move {
            match piece {
                FilePiece::Data(data) => Ok(Some(data)),
                FilePiece::File { .. } => Ok(None),
            }
        });
        Ok((bytes, data.boxed()))
    }

    /// Why it cannot be deleted.
    pub(super) fn stays(&self) -> ApiError {
        let job = self.job.wish.as_ref().map_or("", |wish| &wish.id);
        let message =
            format!("this file is what the job {job} made, and stays as long as the job is remembered");
        ApiError::new(ErrorKind::Conflict, message)
    }
}

/// Lines of step, training loss and validation loss; a figure that was not measured is empty.
fn metrics(job: &Job) -> String {
    let figure = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    let line = |loss: &mlxnode_proto::v1::JobLoss| {
        format!("{},{},{}\n", loss.step, figure(loss.training), figure(loss.validation))
    };
    std::iter::once("step,train_loss,valid_loss\n".to_owned()).chain(job.losses.iter().map(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_proto::v1::{JobCheckpoint, JobLoss, SubmitJobRequest};

    fn job(state: JobState, kind: &str) -> Job {
        Job {
            wish: Some(SubmitJobRequest { id: "ftjob-1_a".into(), kind: kind.into(), ..Default::default() }),
            state: state.into(),
            losses: vec![
                JobLoss { step: 1, training: Some(2.5), validation: None },
                JobLoss { step: 2, training: Some(1.0), validation: Some(0.125) },
            ],
            checkpoints: vec![JobCheckpoint { step: 2, hash: vec![1; 32].into(), ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn only_a_finished_job_has_result_files() {
        let all = ["file-metrics-ftjob-1_a", "file-adapter-ftjob-1_a", "file-config-ftjob-1_a"];
        assert_eq!(result_files(&job(JobState::Finished, "fine-tuning")), all);
        assert_eq!(result_files(&job(JobState::Finished, "rehearsal")), all[..1]);
        let bare = Job { checkpoints: Vec::new(), ..job(JobState::Finished, "fine-tuning") };
        assert_eq!(result_files(&bare), all[..1]);
        for state in [JobState::Running, JobState::Failed, JobState::Cancelled, JobState::Paused] {
            assert_eq!(result_files(&job(state, "fine-tuning")), [""; 0], "{state:?}");
        }
    }

    #[test]
    fn an_id_means_a_file_of_a_job_or_nothing() {
        for made in Made::ALL {
            assert_eq!(Made::named(&made.id("ftjob-1-x")), Some((made, "ftjob-1-x")));
        }
        for id in ["file-0123456789abcdefghijklmn", "file-metrics", "metrics-a", "file-rows-a", "", "file-"] {
            assert_eq!(Made::named(id), None, "{id}");
        }
    }

    #[test]
    fn figures_are_lines_of_step_and_losses() {
        let job = job(JobState::Finished, "fine-tuning");
        assert_eq!(metrics(&job), "step,train_loss,valid_loss\n1,2.5,\n2,1,0.125\n");
    }
}
