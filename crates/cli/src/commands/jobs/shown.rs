//! Jobs as text and as JSON.

use crate::arguments::Global;
use crate::output;
use anyhow::{Context as _, Result, bail};
use mlxnode_api::jobs::shown;
use mlxnode_compute::ByteCount;
use mlxnode_proto::v1::{Job, JobCheckpoint, JobLoss, JobPublication, JobStage, JobState};
use mlxnode_training::Curve;
use serde_json::{Value, json};
use std::path::Path;

/// A job as JSON.
pub fn json(job: &Job) -> Value {
    let mut value = serde_json::to_value(shown(job.clone())).unwrap_or_default();
    let checkpoint = |it: &JobCheckpoint| json!({ "step": it.step, "hash": hex(&it.hash), "bytes": it.bytes, "saved_unix": it.saved_unix, "nodes": it.nodes });
    let stage = |it: &JobStage| json!({ "node": it.node, "first_layer": it.first, "end_layer": it.end, "memory_bytes": it.memory_bytes, "replica": it.replica });
    let publication = |it: &JobPublication| json!({ "model": it.model, "adapter": it.adapter, "hash": hex(&it.hash), "problem": it.problem });
    let more = json!({
        "submitted_unix": job.submitted_unix, "started_unix": job.started_unix, "ended_unix": job.ended_unix,
        "attempts": job.attempts, "owner": job.owner, "learning_rate": job.learning_rate,
        "peak_memory_bytes": job.peak_memory_bytes,
        "stages": job.stages.iter().map(stage).collect::<Vec<_>>(),
        "checkpoints": job.checkpoints.iter().map(checkpoint).collect::<Vec<_>>(),
        "publications": job.publications.iter().map(publication).collect::<Vec<_>>(),
    });
    if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
        value.extend(more);
    }
    value
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn state(job: &Job) -> String {
    let name = shown(job.clone()).state;
    match job.detail.is_empty() {
        true => name,
        false => format!("{name}: {}", job.detail),
    }
}

/// How far, how fast, how long still.
pub fn progress(job: &Job) -> String {
    let mut words = Vec::new();
    if let Some(loss) = job.losses.iter().rev().find_map(|loss| loss.training) {
        words.push(format!("loss {loss:.3}"));
    }
    if job.tokens_per_second > 0.0 && job.state() == JobState::Running {
        words.push(format!("{:.0} tokens/s", job.tokens_per_second));
    }
    if job.seconds_left > 0.0 {
        words.push(format!("{} left", duration(job.seconds_left)));
    }
    words.join(", ")
}

/// "12 s", "3 min", "2 h 05 min".
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A time of day in UTC, for logs.
pub fn time(at_unix: i64) -> String {
    let seconds = at_unix.rem_euclid(86_400);
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds % 3600 / 60, seconds % 60)
}

pub fn list(jobs: &[Job], global: &Global) -> Result<()> {
    if global.json {
        return output::json(&json!({ "jobs": jobs.iter().map(json).collect::<Vec<_>>() }));
    }
    if jobs.is_empty() {
        return output::line("There is no job. `mlxnode jobs submit lora.yaml` submits one.");
    }
    let row = |job: &Job| {
        let wish = job.wish.clone().unwrap_or_default();
        let steps = if job.steps > 0 { format!("{}/{}", job.step, job.steps) } else { job.step.to_string() };
        let model = if wish.model.is_empty() { wish.kind } else { wish.model };
        vec![wish.id, model, state(job), steps, job.node.clone()]
    };
    output::table(&["job", "model", "state", "steps", "node"], &jobs.iter().map(row).collect::<Vec<_>>())
}

pub fn show(job: &Job, global: &Global) -> Result<()> {
    if global.json {
        return output::json(&json(job));
    }
    let wish = job.wish.clone().unwrap_or_default();
    output::line(&format!(
        "{} ({}{}{})",
        wish.id,
        wish.kind,
        if wish.model.is_empty() { "" } else { " of " },
        wish.model
    ))?;
    output::line(&format!("  is {}", state(job)))?;
    if job.steps > 0 {
        output::line(&format!(
            "  {} of {} steps{}",
            job.step,
            job.steps,
            match progress(job) {
                words if words.is_empty() => words,
                words => format!(", {words}"),
            }
        ))?;
    }
    if !job.node.is_empty() {
        output::line(&format!("  on {}, attempt {}", job.node, job.attempts))?;
    }
    stages(job)?;
    if let Some(loss) = job.losses.iter().rev().find_map(|loss| Some((loss.step, loss.validation?))) {
        output::line(&format!("  validation loss {:.3} after step {}", loss.1, loss.0))?;
    }
    if job.peak_memory_bytes > 0 {
        output::line(&format!("  at most {} of memory", ByteCount(job.peak_memory_bytes)))?;
    }
    for checkpoint in &job.checkpoints {
        let size = ByteCount(checkpoint.bytes);
        let nodes = checkpoint.nodes.join(", ");
        output::line(&format!("  checkpoint after step {}: {size} on {nodes}", checkpoint.step))?;
    }
    for publication in &job.publications {
        let name = format!("{}:{}", publication.model, publication.adapter);
        output::line(&match publication.problem.is_empty() {
            true => format!("  served as {name}"),
            false => format!("  not served as {name}: {}", publication.problem),
        })?;
    }
    Ok(())
}

/// Which node has what of a model that is divided, as planned.
pub fn stages(job: &Job) -> Result<()> {
    plan(job).iter().try_for_each(|line| output::line(line))
}

/// The same as lines.
pub fn plan(job: &Job) -> Vec<String> {
    let lines = job.stages.iter().map(|stage| stage.replica as usize + 1).max().unwrap_or(1);
    let length = (job.stages.len() / lines).max(1);
    let stages = job.stages.iter().enumerate();
    stages.map(|(number, stage)| format!("  {}", words(number % length, stage, lines > 1))).collect()
}

fn words(number: usize, stage: &JobStage, is_replicated: bool) -> String {
    let (last, memory) = (stage.end.saturating_sub(1), ByteCount(stage.memory_bytes));
    let of = if is_replicated { format!("replica {}, ", stage.replica) } else { String::new() };
    format!("{of}stage {number} on {}: layers {} to {last}, {memory} planned", stage.node, stage.first)
}

/// The curve of a job's losses as a picture; the ending says which kind.
pub fn plot(job: &Job, file: &Path) -> Result<()> {
    let losses = |of: fn(&JobLoss) -> Option<f64>| {
        job.losses.iter().filter_map(|loss| Some((loss.step, of(loss)?))).collect()
    };
    let curve = Curve { train: losses(|loss| loss.training), valid: losses(|loss| loss.validation) };
    let title = job.wish.clone().unwrap_or_default().id;
    let bytes = match file.extension().and_then(|ending| ending.to_str()) {
        Some("svg") => curve.svg(&title)?.into_bytes(),
        Some("png") => curve.png(&title)?,
        _ => bail!("{} has to end in .svg or .png", file.display()),
    };
    std::fs::write(file, bytes).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_say_them() {
        for (seconds, words) in [(0.2, "0 s"), (59.0, "59 s"), (61.0, "2 min"), (7500.0, "2 h 05 min")] {
            assert_eq!(duration(seconds), words);
        }
        assert_eq!(time(86_400 + 3661), "01:01:01");
    }

    #[test]
    fn a_stage_has_its_node_its_layers_and_its_memory() {
        let memory_bytes = 12_000_000_000;
        let stage = JobStage { node: "studio".into(), first: 16, end: 32, memory_bytes, replica: 0 };
        assert_eq!(words(1, &stage, false), "stage 1 on studio: layers 16 to 31, 12.0 GB planned");
        let first = JobStage { first: 0, end: 16, ..stage.clone() };
        let again = [0, 1].map(|replica| [&first, &stage].map(|stage| JobStage { replica, ..stage.clone() }));
        let job = Job { stages: again.concat(), ..Job::default() };
        assert_eq!(plan(&job)[2], "  replica 1, stage 0 on studio: layers 0 to 15, 12.0 GB planned");
    }

    #[test]
    fn a_job_as_json_has_what_the_page_has_and_more() {
        let job = Job {
            state: JobState::Paused.into(),
            detail: "by a person".into(),
            checkpoints: vec![JobCheckpoint { step: 3, hash: vec![1, 255].into(), ..Default::default() }],
            ..Job::default()
        };
        let value = json(&job);
        assert_eq!((&value["state"], &value["checkpoints"][0]["hash"]), (&"paused".into(), &"01ff".into()));
        assert_eq!(state(&job), "paused: by a person");
    }
}
