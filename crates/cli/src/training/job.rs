//! Fine-tuning as a job of the cluster: the same run as `mlxnode lora`, made of what the node laid out on this machine.

use crate::loading;
use mlxnode_compute::{Job, JobError, LayerRange};
use mlxnode_engine::tuning::Tuning;
use mlxnode_training::{Encoder, FineTuning, PrepareError, Sets, Settings, StagedFineTuning, TrainingConfig};
use mlxnode_worker::{JobSetup, Others};
use std::path::Path;

/// A job's configuration, with the places of its files.
///
/// # Errors
/// What is wrong with it, for who submits it.
pub fn configuration(text: &str, model: &str, data: &Path) -> Result<TrainingConfig, String> {
    let mut fixed = Settings::new();
    fixed.set("model", model);
    fixed.set("data", data.display().to_string());
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
    let config = configuration(&setup.configuration, &folder.display().to_string(), &setup.inputs);
    let config = config.map_err(JobError::Refused)?;
    let opened = loading::open(folder).map_err(|error| refused(&error))?;
    let encoder = Encoder::new(opened.tokenizer, opened.template, &config);
    let sets = Sets::read(&config, std::slice::from_ref(&setup.inputs), &encoder, &|_| {});
    let sets = sets.map_err(|error| refused(&error.into()))?;
    let layers = match &setup.stage {
        Some(stage) => stage.layers,
        None => LayerRange::new(0, opened.checkpoint.spec().layer_count()),
    };
    let tuning = Tuning::load(&opened.checkpoint, layers, &mut |_, _| {});
    let tuning = tuning.map_err(|error| refused(&error.into()))?;
    let micro_batches = config.grad_accumulation_steps.max(1);
    let compile = tuning.device().is_gpu();
    let fingerprint = opened.checkpoint.fingerprint();
    if let (Some(link), Some(stage)) = (others.line, &setup.stage) {
        let job = StagedFineTuning::new(tuning, config, sets, fingerprint, compile, link, &stage.folder);
        let mut job = job.map_err(not_prepared)?;
        if let Some(state) = &setup.resume {
            job.resume(state).map_err(not_prepared)?;
        }
        return Ok(Box::new(job));
    }
    let mut job = FineTuning::new(tuning, config, sets, fingerprint, compile)
        .map_err(|error| refused(&error.into()))?;
    if let Some(state) = &setup.resume {
        job.resume(state).map_err(|error| refused(&error.into()))?;
    }
    if let Some(endpoint) = others.group {
        let values = job.trainer().parameters().iter().map(|parameter| parameter.len()).sum();
        let micro_batches = u32::try_from(micro_batches).map_err(|_| {
            JobError::Refused("grad_accumulation_steps is too large for several workers".into())
        })?;
        job = job.with_group(Box::new(endpoint.join(values, micro_batches)));
    }
    Ok(Box::new(job))
}

/// That another stage is lost is not the job's fault.
fn not_prepared(error: PrepareError) -> JobError {
    match error {
        PrepareError::Link(error) => JobError::Failed(error.to_string()),
        error => refused(&error.into()),
    }
}

fn refused(error: &anyhow::Error) -> JobError {
    JobError::Refused(format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_names_another_machines_files_is_refused() {
        let read = |text: &str| configuration(text, "demo", Path::new("rows"));
        let config = read("iters: 7\nmodel: other\ndata: elsewhere\n").unwrap();
        assert_eq!((config.iters, config.model.as_str(), config.data.as_str()), (7, "demo", "rows"));
        assert!(
            read("resume_adapter_file: /adapters.safetensors").unwrap_err().contains("resume_adapter_file")
        );
        assert!(read("hf_dataset:\n  path: a/b\n").unwrap_err().contains("hf_dataset"));
        assert!(read("itres: 7").unwrap_err().contains("itres"));
    }
}
