//! Result files: what a finished job made, as files whose ids follow from the job's. They are the job's: nobody uploads or deletes them.

use super::told;
use super::wire::{FinishedJob, Loss, finished};
use crate::http::jobs_client;
use crate::http::{ApiError, Caller, ErrorKind, HttpServices};
use crate::jobs::{DownloadPart, FilePiece, JobFiles};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use mlxnode_coordinator::Error;
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
    fn is_of(self, job: &FinishedJob) -> bool {
        self == Self::Metrics || job.result.is_some()
    }
}

impl FinishedJob {
    /// Ids of what it made.
    pub(in crate::http::openai) fn files(&self) -> Vec<String> {
        Made::ALL.into_iter().filter(|made| made.is_of(self)).map(|made| made.id(&self.id)).collect()
    }
}

/// A file that a job made.
pub(super) struct ResultFile {
    id: String,
    made: Made,
    job: FinishedJob,
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
            Ok(job) => {
                let job = finished(&job).filter(|job| made.is_of(job));
                Ok(job.map(|job| ResultFile { id: id.to_owned(), made, job }))
            }
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
        let result = self.job.result.clone().ok_or_else(missing)?;
        let mut pieces = files.download(self.job.id.clone(), result, DownloadPart::One(name.to_owned()));
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
        let job = &self.job.id;
        let message =
            format!("this file is what the job {job} made, and stays as long as the job is remembered");
        ApiError::new(ErrorKind::Conflict, message)
    }
}

/// Lines of step, training loss and validation loss; a figure that was not measured is empty.
fn metrics(job: &FinishedJob) -> String {
    let figure = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    let line = |loss: &Loss| format!("{},{},{}\n", loss.step, figure(loss.training), figure(loss.validation));
    std::iter::once("step,train_loss,valid_loss\n".to_owned()).chain(job.losses.iter().map(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::ContentHash;
    use mlxnode_coordinator::jobs::Checkpoint;

    fn job(result: Option<Checkpoint>) -> FinishedJob {
        let losses = vec![
            Loss { step: 1, training: Some(2.5), validation: None },
            Loss { step: 2, training: Some(1.0), validation: Some(0.125) },
        ];
        FinishedJob { id: "ftjob-1_a".to_owned(), ended_unix: 7, result, losses }
    }

    #[test]
    fn a_job_without_a_result_has_its_figures_only() {
        let all = ["file-metrics-ftjob-1_a", "file-adapter-ftjob-1_a", "file-config-ftjob-1_a"];
        let result = Checkpoint { step: 2, hash: ContentHash::of(b"x"), bytes: 1 };
        assert_eq!(job(Some(result)).files(), all);
        assert_eq!(job(None).files(), all[..1]);
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
        assert_eq!(metrics(&job(None)), "step,train_loss,valid_loss\n1,2.5,\n2,1,0.125\n");
    }
}
