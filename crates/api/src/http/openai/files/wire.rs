//! What of a job's message its result files are made of.

use crate::jobs::ContentHash;
use mlxnode_coordinator::jobs::Checkpoint;
use mlxnode_proto::v1::{Job, JobState};

/// A job that is through.
#[derive(Clone, Debug)]
pub(in crate::http::openai) struct FinishedJob {
    pub(super) id: String,
    /// In seconds since 1970.
    pub(super) ended_unix: i64,
    /// What it learned; none of a rehearsal.
    pub(super) result: Option<Checkpoint>,
    /// Its curve.
    pub(super) losses: Vec<Loss>,
}

/// A point of a curve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loss {
    pub(super) step: u64,
    pub(super) training: Option<f64>,
    pub(super) validation: Option<f64>,
}

/// The job, if it finished.
pub(in crate::http::openai) fn finished(job: &Job) -> Option<FinishedJob> {
    let wish = job.wish.as_ref().filter(|_| job.state() == JobState::Finished)?;
    // Of a job that is finished the last one is its result.
    let last = job.checkpoints.last().filter(|_| matches!(wish.kind.as_str(), "" | "fine-tuning"));
    let result = last.and_then(|held| {
        let hash = ContentHash::try_from(held.hash.as_ref()).ok()?;
        Some(Checkpoint { step: held.step, hash, bytes: held.bytes })
    });
    let losses = job.losses.iter().map(|loss| {
        let (training, validation) = (loss.training, loss.validation);
        Loss { step: loss.step, training, validation }
    });
    Some(FinishedJob { id: wish.id.clone(), ended_unix: job.ended_unix, result, losses: losses.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_proto::v1::{JobCheckpoint, JobLoss, SubmitJobRequest};

    fn job(state: JobState, kind: &str) -> Job {
        Job {
            wish: Some(SubmitJobRequest { id: "ftjob-1_a".into(), kind: kind.into(), ..Default::default() }),
            state: state.into(),
            losses: vec![JobLoss { step: 1, training: Some(2.5), validation: None }],
            checkpoints: vec![JobCheckpoint { step: 2, hash: vec![1; 32].into(), ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn only_a_finished_job_made_something() {
        let made =
            |job: &Job| finished(job).map(|job| (job.result.map(|result| result.step), job.losses.len()));
        assert_eq!(made(&job(JobState::Finished, "fine-tuning")), Some((Some(2), 1)));
        assert_eq!(made(&job(JobState::Finished, "")), Some((Some(2), 1)));
        assert_eq!(made(&job(JobState::Finished, "rehearsal")), Some((None, 1)));
        let bare = Job { checkpoints: Vec::new(), ..job(JobState::Finished, "fine-tuning") };
        assert_eq!(made(&bare), Some((None, 1)));
        for state in [JobState::Running, JobState::Failed, JobState::Cancelled, JobState::Paused] {
            assert_eq!(made(&job(state, "fine-tuning")), None, "{state:?}");
        }
    }
}
