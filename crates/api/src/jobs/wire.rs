//! `Jobs` messages to the coordinator's types and back.

use super::view::{CheckpointView, JobView as Shown, LossPoint};
use mlxnode_cluster::NodeId;
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::jobs::{
    ContentHash, InputFile, JobKind, JobSpec, JobState, JobView, LogLine, PublishWish, SavePolicy,
    TrainedPart, TrainingDemand,
};
use mlxnode_proto::v1;
use tonic::Status;

/// Rows, tokens of a row, or micro-batches of an update, for the estimate of memory.
const MOST_DEMANDED: usize = 1 << 20;
/// Highest rank, likewise.
const MOST_RANK: u64 = 1 << 16;

/// What a client wishes for.
pub(super) fn spec(request: v1::SubmitJobRequest, owner: String) -> Result<JobSpec, Status> {
    let kind = JobKind::named(&request.kind).map_err(|error| Status::invalid_argument(error.to_string()))?;
    let inputs = request.inputs.into_iter().enumerate().map(|(place, input)| {
        let hash = hash(&input.hash, &format!("inputs[{place}].hash"))?;
        Ok(InputFile { name: input.name, hash, bytes: input.bytes })
    });
    let or = |number: u32, usual: u64| if number == 0 { usual } else { u64::from(number) };
    let usual = SavePolicy::default();
    let publish = match (request.publish_model.is_empty(), request.publish_adapter.is_empty()) {
        (true, true) => None,
        (false, false) => {
            Some(PublishWish { deployment: request.publish_model, adapter: request.publish_adapter })
        }
        _ => {
            return Err(Status::invalid_argument(
                "publish_model and publish_adapter belong together: give both or none",
            ));
        }
    };
    Ok(JobSpec {
        id: request.id,
        kind,
        model: request.model,
        configuration: request.configuration,
        inputs: inputs.collect::<Result<_, Status>>()?,
        memory: Some(request.memory_bytes).filter(|bytes| *bytes > 0).map(ByteCount),
        share: match request.share_percent {
            0 => JobSpec::DEFAULT_SHARE,
            share => share,
        },
        workers: request.workers.max(1),
        stages: request.stages,
        demand: request.demand.map(demand),
        saves: SavePolicy {
            every_steps: or(request.save_steps, usual.every_steps),
            every_seconds: or(request.save_seconds, usual.every_seconds),
            keep: match request.keep_checkpoints {
                0 => usual.keep,
                keep => keep,
            },
        },
        publish,
        owner,
        labels: request.labels.into_iter().collect(),
    })
}

/// What a run takes of memory.
fn demand(demand: v1::TrainingDemand) -> TrainingDemand {
    let size = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    TrainingDemand {
        part: match demand.full {
            true => TrainedPart::Full,
            false => TrainedPart::LowRank {
                rank: demand.rank.min(MOST_RANK),
                magnitudes: demand.magnitudes,
                tables: demand.tables,
            },
        },
        last_layers: Some(size(demand.last_layers)).filter(|count| *count > 0),
        // Whatever is said, the arithmetic over it stays within its numbers.
        rows: size(demand.rows).clamp(1, MOST_DEMANDED),
        row_tokens: size(demand.row_tokens).clamp(1, MOST_DEMANDED),
        micro_batches: demand.micro_batches.clamp(1, MOST_DEMANDED as u64),
        memories: demand.memories.min(8),
        checkpointing: demand.checkpointing,
        reference: demand.reference,
        // The plan says.
        exchanging: false,
    }
}

/// What a run takes of memory, for the wire.
pub fn demand_to_proto(demand: &TrainingDemand) -> v1::TrainingDemand {
    let (full, rank, magnitudes, tables) = match demand.part {
        TrainedPart::Full => (true, 0, false, false),
        TrainedPart::LowRank { rank, magnitudes, tables } => (false, rank, magnitudes, tables),
    };
    v1::TrainingDemand {
        full,
        rank,
        magnitudes,
        tables,
        last_layers: demand.last_layers.unwrap_or_default() as u64,
        rows: demand.rows as u64,
        row_tokens: demand.row_tokens as u64,
        micro_batches: demand.micro_batches,
        memories: demand.memories,
        checkpointing: demand.checkpointing,
        reference: demand.reference,
    }
}

pub(super) fn hash(bytes: &[u8], field: &str) -> Result<ContentHash, Status> {
    ContentHash::try_from(bytes).map_err(|_| {
        Status::invalid_argument(format!("{field} has {} bytes, but must have 32 (BLAKE3)", bytes.len()))
    })
}

fn wish(spec: &JobSpec) -> v1::SubmitJobRequest {
    let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let input = |input: &InputFile| v1::JobInput {
        name: input.name.clone(),
        hash: input.hash.as_bytes().to_vec().into(),
        bytes: input.bytes,
    };
    let (publish_model, publish_adapter) = match &spec.publish {
        Some(publish) => (publish.deployment.clone(), publish.adapter.clone()),
        None => Default::default(),
    };
    v1::SubmitJobRequest {
        id: spec.id.clone(),
        kind: spec.kind.name().to_owned(),
        model: spec.model.clone(),
        configuration: spec.configuration.clone(),
        inputs: spec.inputs.iter().map(input).collect(),
        memory_bytes: spec.memory.unwrap_or_default().0,
        share_percent: spec.share,
        workers: spec.workers,
        stages: spec.stages,
        demand: spec.demand.as_ref().map(demand_to_proto),
        save_steps: narrow(spec.saves.every_steps),
        save_seconds: narrow(spec.saves.every_seconds),
        keep_checkpoints: spec.saves.keep,
        publish_model,
        publish_adapter,
        labels: spec.labels.clone().into_iter().collect(),
    }
}

/// A job with all that is known. `name`: what people call a node.
pub fn job_to_wire(view: &JobView, name: &dyn Fn(NodeId) -> String) -> v1::Job {
    let unix = |at: u64| i64::try_from(at).unwrap_or(i64::MAX);
    let state = match view.state {
        JobState::Queued => v1::JobState::Queued,
        JobState::Preparing => v1::JobState::Preparing,
        JobState::Running => v1::JobState::Running,
        JobState::Paused => v1::JobState::Paused,
        JobState::WaitingForNodes => v1::JobState::WaitingForNodes,
        JobState::Finished => v1::JobState::Finished,
        JobState::Failed => v1::JobState::Failed,
        JobState::Cancelled => v1::JobState::Cancelled,
    };
    let is_running = view.state == JobState::Running;
    let progress = &view.progress;
    v1::Job {
        wish: Some(wish(&view.spec)),
        state: state.into(),
        detail: view.detail.clone(),
        submitted_unix: unix(view.submitted_at),
        started_unix: unix(view.started_at.unwrap_or_default()),
        ended_unix: unix(view.ended_at.unwrap_or_default()),
        attempts: view.attempts,
        node: view.node.map(name).unwrap_or_default(),
        step: progress.step,
        steps: progress.steps,
        tokens_per_second: progress.tokens_per_second,
        learning_rate: progress.learning_rate,
        gradient_norm: progress.gradient_norm.unwrap_or_default(),
        peak_memory_bytes: progress.peak_memory,
        seconds_left: progress.seconds_left().filter(|_| is_running).unwrap_or_default(),
        losses: view
            .curve
            .iter()
            .map(|point| v1::JobLoss {
                step: point.step,
                training: point.training,
                validation: point.validation,
            })
            .collect(),
        checkpoints: view
            .checkpoints
            .iter()
            .map(|held| v1::JobCheckpoint {
                step: held.checkpoint.step,
                hash: held.checkpoint.hash.as_bytes().to_vec().into(),
                bytes: held.checkpoint.bytes,
                saved_unix: unix(held.at),
                nodes: held.holders.iter().map(|node| name(*node)).collect(),
            })
            .collect(),
        publications: view
            .publications
            .iter()
            .map(|publication| v1::JobPublication {
                model: publication.deployment.clone(),
                adapter: publication.adapter.clone(),
                hash: publication.hash.as_bytes().to_vec().into(),
                problem: publication.problem.clone().unwrap_or_default(),
            })
            .collect(),
        owner: view.spec.owner.clone(),
        trained_tokens: progress.trained_tokens,
        stages: view
            .stages
            .iter()
            .filter(|_| view.stages.len() > 1)
            .map(|stage| v1::JobStage {
                node: name(stage.node),
                first: stage.layers.start as u64,
                end: stage.layers.end as u64,
                memory_bytes: stage.memory.0,
                replica: stage.replica,
            })
            .collect(),
    }
}

/// A job in a list, without what makes lists long.
pub(super) fn in_brief(mut job: v1::Job) -> v1::Job {
    if let Some(wish) = &mut job.wish {
        wish.configuration.clear();
        wish.labels.clear();
    }
    job
}

pub(super) fn line_to_proto(line: LogLine) -> v1::JobLogLine {
    v1::JobLogLine { at_unix: i64::try_from(line.at).unwrap_or(i64::MAX), text: line.text }
}

/// As the API spells a state.
pub(crate) fn state_name(state: i32) -> &'static str {
    match v1::JobState::try_from(state) {
        Ok(v1::JobState::Queued) => "queued",
        Ok(v1::JobState::Preparing) => "preparing",
        Ok(v1::JobState::Running) => "running",
        Ok(v1::JobState::Paused) => "paused",
        Ok(v1::JobState::WaitingForNodes) => "waiting for nodes",
        Ok(v1::JobState::Finished) => "finished",
        Ok(v1::JobState::Failed) => "failed",
        Ok(v1::JobState::Cancelled) => "cancelled",
        Ok(v1::JobState::Unspecified) | Err(_) => "unknown",
    }
}

/// A job as it is shown.
pub fn shown(job: v1::Job) -> Shown {
    let wish = job.wish.unwrap_or_default();
    let loss = |loss: v1::JobLoss| LossPoint {
        step: loss.step,
        training: loss.training,
        validation: loss.validation,
    };
    let checkpoint = |held: &v1::JobCheckpoint| CheckpointView {
        step: held.step,
        bytes: held.bytes,
        saved_unix: held.saved_unix,
    };
    let served = job.publications.iter().filter(|it| it.problem.is_empty());
    Shown {
        id: wish.id,
        kind: wish.kind,
        model: wish.model,
        state: state_name(job.state).to_owned(),
        detail: job.detail,
        node: job.node,
        step: job.step,
        steps: job.steps,
        tokens_per_second: job.tokens_per_second,
        seconds_left: Some(job.seconds_left).filter(|seconds| *seconds > 0.0),
        served_as: served.map(|it| format!("{}:{}", it.model, it.adapter)).collect(),
        losses: job.losses.into_iter().map(loss).collect(),
        checkpoints: job.checkpoints.iter().map(checkpoint).collect(),
        owner: job.owner,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_survives_the_way_to_the_table_and_back() {
        let asked = v1::SubmitJobRequest {
            id: "job-1".into(),
            kind: "fine-tuning".into(),
            model: "demo".into(),
            configuration: "iters: 3".into(),
            inputs: vec![v1::JobInput {
                name: "train.jsonl".into(),
                hash: ContentHash::of(b"x").as_bytes().to_vec().into(),
                bytes: 1,
            }],
            memory_bytes: 7,
            share_percent: 30,
            workers: 1,
            stages: 3,
            demand: Some(v1::TrainingDemand {
                rank: 8,
                magnitudes: true,
                last_layers: 4,
                rows: 2,
                row_tokens: 64,
                micro_batches: 6,
                memories: 2,
                checkpointing: true,
                ..Default::default()
            }),
            save_steps: 10,
            save_seconds: 60,
            keep_checkpoints: 2,
            publish_model: "demo".into(),
            publish_adapter: "poet".into(),
            labels: [("who".to_owned(), "ann".to_owned())].into(),
        };
        let read = spec(asked.clone(), "ann".into()).unwrap();
        assert_eq!(read.check(), Ok(()));
        assert_eq!(wish(&read), asked);
        let usual =
            spec(v1::SubmitJobRequest { id: "a".into(), ..Default::default() }, String::new()).unwrap();
        assert_eq!((usual.share, usual.saves), (JobSpec::DEFAULT_SHARE, SavePolicy::default()));
        for wrong in [
            v1::SubmitJobRequest { kind: "x".into(), ..asked.clone() },
            v1::SubmitJobRequest { publish_model: String::new(), ..asked.clone() },
            v1::SubmitJobRequest {
                inputs: vec![v1::JobInput { hash: vec![1; 31].into(), ..Default::default() }],
                ..asked
            },
        ] {
            assert!(spec(wrong, String::new()).is_err());
        }
    }
}
