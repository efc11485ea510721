//! A fine-tuning that a node runs: a model's folder, a configuration and files in, an adapter out.

use crate::loading;
use anyhow::{Context as _, Result, bail};
use mlxnode_compute::{Job, JobError, LayerRange};
use mlxnode_engine::tuning::Tuning;
use mlxnode_training::{Encoder, FineTuning, Sets, Settings, TrainingConfig};
use mlxnode_worker::{CollectiveEndpoint, JobSetup};
use std::path::Path;

/// Makes the job on the thread that then drives it; with `group`, one worker of several.
///
/// # Errors
///
/// [`JobError::Refused`] when model, configuration and files do not make a training.
pub fn fine_tuning(setup: &JobSetup, group: Option<&CollectiveEndpoint>) -> Result<Box<dyn Job>, JobError> {
    let job = prepared(setup, group).map_err(|error| JobError::Refused(format!("{error:#}")))?;
    Ok(Box::new(job))
}

fn prepared(setup: &JobSetup, group: Option<&CollectiveEndpoint>) -> Result<FineTuning> {
    let folder = setup.model.as_deref().context("a fine-tuning begins from a model: name one")?;
    let config = configuration(setup)?;
    let opened = loading::open(folder)?;
    let encoder = Encoder::new(opened.tokenizer, opened.template, &config);
    let sets = Sets::read(&config, std::slice::from_ref(&setup.inputs), &encoder, &|_| ())?;
    let layers = LayerRange::new(0, opened.checkpoint.spec().layer_count());
    let tuning = Tuning::load(&opened.checkpoint, layers, &mut |_, _| ())
        .with_context(|| format!("cannot use the model in {}", folder.display()))?;
    let compile = tuning.device().is_gpu();
    let micro_batches = config.grad_accumulation_steps.max(1);
    let mut job = FineTuning::new(tuning, config, sets, opened.checkpoint.fingerprint(), compile)?;
    if let Some(saved) = &setup.resume {
        job.resume(saved).with_context(|| format!("cannot go on from {}", saved.display()))?;
    }
    if let Some(endpoint) = group {
        let values = job.trainer().parameters().iter().map(|parameter| parameter.len()).sum();
        let micro_batches = u32::try_from(micro_batches).context("grad_accumulation_steps is too large")?;
        job = job.with_group(Box::new(endpoint.join(values, micro_batches)));
    }
    Ok(job)
}

/// The configuration, with the submitter's paths replaced by the job's files.
fn configuration(setup: &JobSetup) -> Result<TrainingConfig> {
    let mut flags = Settings::new();
    flags.set("train", true);
    let file = Settings::from_yaml(&setup.configuration, "the job's configuration")?;
    let mut config = TrainingConfig::resolve(flags, file)?;
    if !config.hf_dataset.is_empty() {
        bail!(
            "a job reads the files that were submitted with it: leave hf_dataset out, and submit the files"
        );
    }
    if let Some(named) = &config.resume_adapter_file {
        let name = named.file_name().map(Path::new).context("resume_adapter_file names no file")?;
        let path = setup.inputs.join(name);
        if !path.is_file() {
            bail!("resume_adapter_file is {}, which was not submitted with the job", named.display());
        }
        config.resume_adapter_file = Some(path);
    }
    Ok(config)
}
