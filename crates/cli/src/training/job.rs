//! Fine-tuning as a job of the cluster: the same run as `mlxnode lora`, made of what the node laid out on this machine.

use crate::loading;
use mlxnode_compute::{Job, JobError, LayerRange};
use mlxnode_engine::tuning::Tuning;
use mlxnode_training::{
    Encoder, FineTuning, PrepareError, RecordOptions, RecordedJob, Sets, Settings, StagedFineTuning,
    TrainingConfig,
};
use mlxnode_worker::{JobSetup, Others};

/// What a job's rows are called where its configuration is told: they lie elsewhere on every node.
const ROWS: &str = "data";

/// A job's configuration, with its model's name. All of it is told in the adapter's configuration, so it names no file of this machine.
///
/// # Errors
/// What is wrong with it, for who submits it.
pub fn configuration(text: &str, model: &str) -> Result<TrainingConfig, String> {
    let mut fixed = Settings::new();
    fixed.set("model", model);
    fixed.set("data", ROWS);
    fixed.set("train", true);
    let file = Settings::from_yaml(text, "the configuration").map_err(|error| error.to_string())?;
    let config = TrainingConfig::resolve(fixed, file).map_err(|error| error.to_string())?;
    if !config.hf_dataset.is_empty() {
        return Err(
            "hf_dataset: a job's rows travel with it; download the data set and submit it with --data"
                .to_owned(),
        );
    }
    if let Some(file) = &config.resume_adapter_file {
        return Err(format!(
            "resume_adapter_file: a job cannot begin with {}, a file of another machine",
            file.display()
        ));
    }
    Ok(config)
}

/// Makes the job, on the thread that drives it; with `others`, one worker of several.
///
/// # Errors
/// [`JobError::Refused`] for what is wrong with the configuration, the rows or the model.
pub fn make(setup: &JobSetup, others: Others<'_>) -> Result<Box<dyn Job>, JobError> {
    let folder = setup.model.as_deref();
    let folder = folder.ok_or_else(|| JobError::Refused("fine-tuning needs a model".to_owned()))?;
    let refused = |error: anyhow::Error| JobError::Refused(told(setup, &format!("{error:#}")));
    let config = configuration(&setup.configuration, &setup.model_name).map_err(JobError::Refused)?;
    let opened = loading::open(folder).map_err(refused)?;
    let encoder = Encoder::new(opened.tokenizer, opened.template, &config);
    let sets = Sets::read(&config, std::slice::from_ref(&setup.inputs), &encoder, &|_| {});
    let sets = sets.map_err(|error| refused(error.into()))?;
    let layers = match &setup.stage {
        Some(stage) => stage.layers,
        None => LayerRange::new(0, opened.checkpoint.spec().layer_count()),
    };
    let tuning = Tuning::load(&opened.checkpoint, layers, &mut |_, _| {});
    let tuning = tuning.map_err(|error| refused(error.into()))?;
    let micro_batches = config.grad_accumulation_steps.max(1);
    let record = RecordedJob::options(&config);
    let compile = tuning.device().is_gpu();
    let fingerprint = opened.checkpoint.fingerprint();
    if let (Some(link), Some(stage)) = (others.line, &setup.stage) {
        // That another stage is lost is not the job's fault.
        let not_prepared = |error: PrepareError| match error {
            PrepareError::Link(error) => error.into(),
            error => refused(error.into()),
        };
        let job = StagedFineTuning::new(tuning, config, sets, fingerprint, compile, link, &stage.folder);
        let mut job = job.map_err(not_prepared)?;
        if let Some(endpoint) = others.group {
            let group = Box::new(endpoint.join(job.values(), shared(micro_batches)?));
            job = job.with_replicas(group).map_err(not_prepared)?;
        }
        if let Some(state) = &setup.resume {
            job.resume(state).map_err(not_prepared)?;
        }
        // Only the first stage of the first line has anything to report.
        let is_first = stage.stage == 0 && stage.replica == 0;
        return recorded(Box::new(job), record.filter(|_| is_first), setup);
    }
    let mut job =
        FineTuning::new(tuning, config, sets, fingerprint, compile).map_err(|error| refused(error.into()))?;
    if let Some(state) = &setup.resume {
        job.resume(state).map_err(|error| refused(error.into()))?;
    }
    if let Some(endpoint) = others.group {
        let values = job.trainer().parameters().iter().map(|parameter| parameter.len()).sum();
        let group = Box::new(endpoint.join(values, shared(micro_batches)?));
        job = job.with_group(group).map_err(|error| refused(error.into()))?;
    }
    recorded(Box::new(job), record, setup)
}

/// The micro-batches of an update that several workers share.
fn shared(micro_batches: u64) -> Result<u32, JobError> {
    let refused = |_| JobError::Refused("grad_accumulation_steps is too large for several workers".into());
    u32::try_from(micro_batches).map_err(refused)
}

/// With the records that the configuration asks for.
fn recorded(
    job: Box<dyn Job>,
    record: Option<RecordOptions>,
    setup: &JobSetup,
) -> Result<Box<dyn Job>, JobError> {
    let Some(record) = record else { return Ok(job) };
    let recorded = RecordedJob::new(job, record, setup.resume.as_deref());
    let refused = |error| JobError::Refused(told(setup, &format!("{:#}", anyhow::Error::from(error))));
    Ok(Box::new(recorded.map_err(refused)?))
}

/// A message without the places of this machine: whoever reads it knows the model, the rows and the checkpoints by other names.
fn told(setup: &JobSetup, message: &str) -> String {
    let places = [
        (Some(&setup.inputs), ROWS),
        (setup.resume.as_ref(), "checkpoint"),
        (setup.model.as_ref(), &setup.model_name),
    ];
    let mut text = message.to_owned();
    for (place, name) in places {
        if let Some(place) = place.map(|place| place.display().to_string()).filter(|place| !place.is_empty())
        {
            text = text.replace(&place, name);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_names_another_machines_files_is_refused() {
        let read = |text: &str| configuration(text, "demo");
        let config = read("iters: 7\nmodel: other\ndata: elsewhere\n").unwrap();
        assert_eq!((config.iters, config.model.as_str(), config.data.as_str()), (7, "demo", "data"));
        assert!(
            read("resume_adapter_file: /adapters.safetensors").unwrap_err().contains("resume_adapter_file")
        );
        assert!(read("hf_dataset:\n  path: a/b\n").unwrap_err().contains("hf_dataset"));
        assert!(read("itres: 7").unwrap_err().contains("itres"));
    }

    #[test]
    fn messages_do_not_name_this_machines_places() {
        let place = |name: &str| std::path::PathBuf::from(format!("/var/lib/node/{name}"));
        let mut setup = JobSetup {
            kind: "fine-tuning".into(),
            model: Some(place("models/demo")),
            model_name: "mlx-community/Demo".into(),
            configuration: "iters: 2\n".into(),
            inputs: place("jobs/job-1/inputs"),
            resume: Some(place("jobs/job-1/checkpoints/abc/state")),
            stage: None,
        };
        for (message, expected) in [
            (
                "/var/lib/node/jobs/job-1/inputs/train.jsonl line 3: no JSON",
                "data/train.jsonl line 3: no JSON",
            ),
            (
                "/var/lib/node/jobs/job-1/checkpoints/abc/state/cursor.json cannot be read",
                "checkpoint/cursor.json cannot be read",
            ),
            ("/var/lib/node/models/demo has no config.json", "mlx-community/Demo has no config.json"),
        ] {
            assert_eq!(told(&setup, message), expected);
        }
        // The rows are what the job fails at first here: the model is there.
        setup.resume = None;
        let folder = tempfile::tempdir().unwrap();
        setup.model = Some(folder.path().to_owned());
        let error = make(&setup, Others::default()).err().unwrap().to_string();
        assert!(!error.contains(&folder.path().display().to_string()), "{error}");
        assert!(error.contains("mlx-community/Demo"), "{error}");
    }
}
