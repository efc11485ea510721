//! Jobs, events and checkpoints as OpenAI writes them.

use super::request::{Asked, Method, label};
use super::{Base, TRAINING, VALIDATION};
use crate::http::openai::files::finished;
use crate::http::unix_time;
use crate::jobs::{ContentHash, Examined, InputFile};
use mlxnode_proto::v1::{Job, JobCheckpoint, JobInput, JobLogLine, JobStage, JobState, SubmitJobRequest};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};

/// A job to submit.
pub(super) struct Wish {
    pub(super) id: String,
    pub(super) base: Base,
    pub(super) inputs: Vec<InputFile>,
    pub(super) configuration: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) examined: Examined,
}

pub(super) fn request(wish: Wish, asked: &Asked) -> SubmitJobRequest {
    let input = |input: InputFile| JobInput {
        name: input.name,
        hash: input.hash.as_bytes().to_vec().into(),
        bytes: input.bytes,
    };
    let (publish_model, publish_adapter) = wish.base.publish.unwrap_or_default();
    SubmitJobRequest {
        id: wish.id,
        kind: String::new(),
        model: wish.base.source,
        configuration: wish.configuration,
        inputs: wish.inputs.into_iter().map(input).collect(),
        share_percent: asked.share_percent,
        workers: asked.workers,
        stages: asked.stages,
        save_steps: wish.examined.save_steps.unwrap_or_default(),
        save_seconds: wish.examined.save_seconds.unwrap_or_default(),
        keep_checkpoints: wish.examined.keep_checkpoints,
        publish_model,
        publish_adapter,
        labels: wish.labels.into_iter().collect(),
        ..SubmitJobRequest::default()
    }
}

pub(super) fn id(job: &Job) -> &str {
    job.wish.as_ref().map_or("", |wish| &wish.id)
}

/// A job as OpenAI writes it; what stands behind `user_provided_suffix` is ours.
pub(super) fn shown(job: &Job) -> Value {
    let nothing = SubmitJobRequest::default();
    let wish = job.wish.as_ref().unwrap_or(&nothing);
    let label = |name: &str| wish.labels.get(name).map(String::as_str);
    let status = status(job, wish);
    let method = Method::named(label(label::METHOD).unwrap_or_default());
    let hyperparameters = hyperparameters(&wish.labels, method);
    let has_ended = matches!(status, "succeeded" | "failed" | "cancelled");
    let now = i64::try_from(unix_time()).unwrap_or(i64::MAX);
    json!({
        "object": "fine_tuning.job",
        "id": wish.id,
        "created_at": job.submitted_unix,
        "finished_at": (has_ended && job.ended_unix > 0).then_some(job.ended_unix),
        "model": if wish.publish_model.is_empty() { &wish.model } else { &wish.publish_model },
        "fine_tuned_model": if status == "succeeded" { job.checkpoints.last().and_then(|held| served(job, held)) } else { None },
        "organization_id": "mlxnode",
        "status": status,
        "hyperparameters": hyperparameters,
        "method": {"type": method.name(), method.name(): {"hyperparameters": hyperparameters}},
        "seed": label(label::SEED).and_then(|seed| seed.parse::<u64>().ok()).unwrap_or(0),
        "metadata": metadata(&wish.labels),
        "training_file": label(label::TRAINING_FILE).unwrap_or_default(),
        "validation_file": label(label::VALIDATION_FILE),
        "result_files": finished(job).filter(|_| status == "succeeded").map(|job| job.files()).unwrap_or_default(),
        "trained_tokens": has_ended.then_some(job.trained_tokens),
        "error": (status == "failed").then(|| error(&job.detail)),
        "estimated_finish": (job.seconds_left > 0.0).then(|| now.saturating_add(job.seconds_left.ceil() as i64)),
        "integrations": [],
        "user_provided_suffix": label(label::SUFFIX),
        "detail": job.detail,
        "step": job.step,
        "steps": job.steps,
        "node": job.node,
        "workers": wish.workers,
        "stages": if wish.stages == 0 { json!("auto") } else { json!(wish.stages) },
        "plan": job.stages.iter().map(stage).collect::<Vec<_>>(),
    })
}

/// What a node has of a model that is divided.
fn stage(stage: &JobStage) -> Value {
    json!({"node": stage.node, "first_layer": stage.first, "end_layer": stage.end, "memory_bytes": stage.memory_bytes})
}

/// A job that is done runs until its result is served (or it is known why not): then it can be asked for at once.
fn status(job: &Job, wish: &SubmitJobRequest) -> &'static str {
    match job.state() {
        JobState::Preparing => "validating_files",
        JobState::Queued | JobState::WaitingForNodes | JobState::Unspecified => "queued",
        JobState::Running => "running",
        JobState::Paused => "paused",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
        JobState::Finished => {
            let is_told = |it: &mlxnode_proto::v1::JobPublication| {
                it.model == wish.publish_model && it.adapter == wish.publish_adapter
            };
            let waits = !wish.publish_model.is_empty() && !job.publications.iter().any(is_told);
            if waits { "running" } else { "succeeded" }
        }
    }
}

fn error(detail: &str) -> Value {
    let is_in = |file: &str| detail.contains(&format!("{file} line "));
    let (code, param) = match () {
        () if is_in(TRAINING) => ("invalid_training_file", Some("training_file")),
        () if is_in(VALIDATION) => ("invalid_validation_file", Some("validation_file")),
        () => ("job_failed", None),
    };
    json!({"code": code, "message": detail, "param": param})
}

fn hyperparameters(labels: &HashMap<String, String>, method: Method) -> Value {
    let number = |name: &str| match labels.get(name).and_then(|text| text.parse::<serde_json::Number>().ok())
    {
        Some(number) => Value::Number(number),
        None => json!("auto"),
    };
    let mut all = Map::from_iter([
        ("n_epochs".to_owned(), number(label::EPOCHS)),
        ("batch_size".to_owned(), number(label::BATCH)),
        ("learning_rate_multiplier".to_owned(), number(label::MULTIPLIER)),
    ]);
    if method == Method::Dpo {
        all.insert("beta".to_owned(), number(label::BETA));
    }
    Value::Object(all)
}

fn metadata(labels: &HashMap<String, String>) -> Value {
    let own = labels.iter().filter_map(|(name, text)| Some((name.strip_prefix(label::METADATA)?, text)));
    let own: BTreeMap<&str, &String> = own.collect();
    if own.is_empty() { Value::Null } else { json!(own) }
}

/// What requests write into `model` for a checkpoint.
fn served(job: &Job, held: &JobCheckpoint) -> Option<String> {
    let mut newest_first = job.publications.iter().rev();
    let publication = newest_first.find(|it| it.hash == held.hash && it.problem.is_empty())?;
    Some(format!("{}:{}", publication.model, publication.adapter))
}

/// What happened and what was measured, the newest first. When a step was measured is not kept: its time is put between the job's
/// begin and end, as if all steps took the same.
pub(super) fn events(job: &Job, log: &[JobLogLine]) -> Vec<Value> {
    let mut known: HashMap<(i64, &str), usize> = HashMap::new();
    let mut events: Vec<(i64, Value)> = Vec::new();
    for line in log {
        let number = known.entry((line.at_unix, &line.text)).or_default();
        let name = format!("{}\0{}\0{}\0{number}", id(job), line.at_unix, line.text);
        *number += 1;
        let name = ContentHash::of(name.as_bytes()).to_string();
        let level = if line.text.starts_with("failed") { "error" } else { "info" };
        let event = json!({
            "object": "fine_tuning.job.event", "id": format!("ftevent-{}", name.get(..24).unwrap_or(&name)),
            "created_at": line.at_unix, "level": level, "message": line.text, "type": "message", "data": null,
        });
        events.push((line.at_unix, event));
    }
    let now = i64::try_from(unix_time()).unwrap_or(i64::MAX);
    let end = if job.ended_unix > 0 { job.ended_unix } else { now };
    let last = job.losses.last().map_or(1, |loss| loss.step.max(1));
    for loss in &job.losses {
        let share = loss.step as f64 / last as f64;
        let at = job.started_unix + ((end - job.started_unix).max(0) as f64 * share) as i64;
        let told = |name: &str, value: Option<f64>| value.map(|value| format!(", {name} loss {value:.4}"));
        let words = [told("training", loss.training), told("validation", loss.validation)];
        let event = json!({
            "object": "fine_tuning.job.event", "id": format!("ftevent-{}-{}", id(job), loss.step), "created_at": at,
            "level": "info",
            "message": format!("step {} of {}{}", loss.step, job.steps, words.into_iter().flatten().collect::<String>()),
            "type": "metrics",
            "data": {"step": loss.step, "total_steps": job.steps, "train_loss": loss.training, "valid_loss": loss.validation},
        });
        events.push((at, event));
    }
    events.sort_by_key(|(at, _)| *at);
    events.into_iter().rev().map(|(_, event)| event).collect()
}

/// The newest first.
pub(super) fn checkpoints(job: &Job) -> Vec<Value> {
    let entry = |held: &JobCheckpoint| {
        let last = |of: fn(&mlxnode_proto::v1::JobLoss) -> Option<f64>| {
            job.losses.iter().rev().filter(|loss| loss.step <= held.step).find_map(of)
        };
        let hash = ContentHash::try_from(held.hash.as_ref()).map(|hash| hash.to_string()).unwrap_or_default();
        json!({
            "object": "fine_tuning.job.checkpoint",
            "id": format!("ftckpt-{}", hash.get(..24).unwrap_or_default()),
            "created_at": held.saved_unix,
            "fine_tuned_model_checkpoint": served(job, held),
            "fine_tuning_job_id": id(job),
            "step_number": held.step,
            "metrics": {"step": held.step, "train_loss": last(|loss| loss.training), "valid_loss": last(|loss| loss.validation)},
        })
    };
    job.checkpoints.iter().rev().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_proto::v1::{JobLoss, JobPublication};

    fn job(state: JobState) -> Job {
        let label = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        Job {
            wish: Some(SubmitJobRequest {
                id: "ftjob-1".into(),
                model: "folder".into(),
                publish_model: "demo".into(),
                publish_adapter: "poet".into(),
                labels: [
                    label(label::TRAINING_FILE, "file-1"),
                    label(label::EPOCHS, "3"),
                    label("metadata.who", "ann"),
                ]
                .into(),
                ..Default::default()
            }),
            state: state.into(),
            started_unix: 100,
            ended_unix: 200,
            steps: 10,
            losses: [(5, 2.0), (10, 1.0)]
                .map(|(step, loss)| JobLoss { step, training: Some(loss), validation: None })
                .to_vec(),
            checkpoints: vec![
                JobCheckpoint { step: 5, hash: vec![5; 32].into(), ..Default::default() },
                JobCheckpoint { step: 10, hash: vec![10; 32].into(), ..Default::default() },
            ],
            ..Default::default()
        }
    }

    #[test]
    fn a_job_has_succeeded_when_its_result_can_be_asked() {
        let mut finished = job(JobState::Finished);
        let told = shown(&finished);
        assert_eq!((&told["status"], &told["fine_tuned_model"]), (&json!("running"), &Value::Null));
        let publication = |problem: &str| JobPublication {
            model: "demo".into(),
            adapter: "poet".into(),
            hash: vec![10; 32].into(),
            problem: problem.into(),
        };
        finished.publications = vec![publication("demo is not loaded")];
        assert_eq!(shown(&finished)["status"], "succeeded");
        assert_eq!(shown(&finished)["fine_tuned_model"], Value::Null);
        finished.publications = vec![publication("")];
        let told = shown(&finished);
        assert_eq!(told["fine_tuned_model"], "demo:poet");
        assert_eq!((&told["model"], &told["training_file"]), (&json!("demo"), &json!("file-1")));
        assert_eq!(
            told["hyperparameters"],
            json!({"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"})
        );
        assert_eq!(told["metadata"], json!({"who": "ann"}));
        let checkpoints = checkpoints(&finished);
        assert_eq!(checkpoints[0]["fine_tuned_model_checkpoint"], "demo:poet");
        assert_eq!(
            (&checkpoints[1]["step_number"], &checkpoints[1]["metrics"]["train_loss"]),
            (&json!(5), &json!(2.0))
        );
    }

    #[test]
    fn a_row_that_broke_a_job_is_the_files_fault() {
        let mut failed = job(JobState::Failed);
        for (detail, code) in [
            ("train.jsonl line 3: it cannot be made into tokens", "invalid_training_file"),
            ("valid.jsonl line 3: it cannot be made into tokens", "invalid_validation_file"),
            ("the loss is not finite", "job_failed"),
        ] {
            failed.detail = detail.into();
            assert_eq!(shown(&failed)["error"]["code"], code);
        }
    }

    #[test]
    fn events_are_in_order_and_keep_their_names() {
        let line = |at_unix, text: &str| JobLogLine { at_unix, text: text.into() };
        let log = [line(99, "submitted"), line(160, "again"), line(160, "again"), line(200, "finished")];
        let job = job(JobState::Finished);
        let all = events(&job, &log);
        let words: Vec<&str> = all.iter().filter_map(|event| event["message"].as_str()).collect();
        assert_eq!(
            words,
            [
                "step 10 of 10, training loss 1.0000",
                "finished",
                "again",
                "again",
                "step 5 of 10, training loss 2.0000",
                "submitted"
            ]
        );
        let ids = |events: &[Value]| {
            events.iter().map(|event| event["id"].to_string()).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(ids(&all).len(), all.len());
        assert!(ids(&events(&job, &log[1..])).is_subset(&ids(&all)), "a log that lost its beginning");
    }
}
