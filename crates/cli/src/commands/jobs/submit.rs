//! `mlxnode jobs submit`: files to the node, then the job to the cluster.

use crate::arguments::{Global, duration, within};
use crate::connection::Connection;
use crate::{output, progress, training};
use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use mlxnode_api::jobs::demand_to_proto;
use mlxnode_proto::v1::{
    GetJobRequest, Job, JobInput, JobState, SubmitJobRequest, UploadRequest, UploadedRequest,
};
use mlxnode_training::{Settings, TrainingConfig};
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Submit a job: train an adapter as a file with mlx-lm's keys says.
#[derive(Debug, Args)]
pub struct Submit {
    /// The configuration: YAML with mlx-lm's keys.
    configuration: PathBuf,
    /// The model to begin from: a folder that the nodes have, a Hugging Face id, or "demo". Default: the configuration's `model`.
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// A file, or a folder with the data set: its *.jsonl and *.parquet files are taken. Repeatable. Default: the configuration's `data`.
    #[arg(long, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Names the job: submitting the same again with the same id does nothing. Default: a new one.
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Serve the result when it is finished: an adapter of a model that is loaded.
    #[arg(long, value_name = "MODEL:NAME")]
    publish: Option<String>,
    /// Percent of a node's time that the job may take while that answers requests.
    #[arg(long, value_name = "PERCENT", value_parser = within(1..=100), default_value_t = 25)]
    share: u32,
    /// Nodes that compute it together, as far as there are so many. They share an update's micro-batches (grad_accumulation_steps). With
    /// --stages S a multiple of S: each S nodes have the model together, and so many lines of them share the work.
    #[arg(long, visible_alias = "nodes", value_name = "N", value_parser = within(1..=8), default_value_t = 1)]
    workers: u32,
    /// Nodes among which the model's layers are divided, each with some of them: 1 to 8, or "auto": as many as it takes, one when that has the
    /// memory. The plan is shown before the start.
    #[arg(long, value_name = "N|auto", value_parser = stages, default_value = "auto")]
    stages: Stages,
    /// Memory that it takes of its node, or of each when it is divided, in bytes. Default: estimated from the model.
    #[arg(long, value_name = "BYTES")]
    memory: Option<u64>,
    /// Save a checkpoint after so many batches. Default: the configuration's `checkpoint_steps` (in updates) or `save_every`, or 100.
    #[arg(long, value_name = "N", value_parser = within(1..=1_000_000))]
    save_steps: Option<u32>,
    /// Save a checkpoint after so long, or later where saving would take more than 2% of the time. Default: the configuration's
    /// `checkpoint_minutes`, or 1m.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    save_time: Option<Duration>,
    /// Keep so many of the newest checkpoints. Default: the configuration's `keep_checkpoints`, or 3.
    #[arg(long, value_name = "N", value_parser = within(1..=32))]
    keep: Option<u32>,
    /// What it computes: fine-tuning, or a rehearsal, which learns nothing (`steps: 100`, `millis: 50`) and shows how the cluster runs jobs.
    #[arg(long, value_name = "KIND", default_value = "fine-tuning", value_parser = ["fine-tuning", "rehearsal"])]
    kind: String,
    /// Follow it until it is over.
    #[arg(long)]
    watch: bool,
}

/// Among how many nodes the layers are divided; 0: as many as it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stages(u32);

fn stages(text: &str) -> Result<Stages, String> {
    match text.parse() {
        _ if text == "auto" => Ok(Stages(0)),
        Ok(count @ 1..=8) => Ok(Stages(count)),
        _ => Err("it must be 1 to 8, or auto".to_owned()),
    }
}

/// For the plan of a job that may be divided: reading a model's index takes moments.
const PLANNING: Duration = Duration::from_secs(10);
/// Between two looks for it.
const LOOK: Duration = Duration::from_millis(300);

/// Files of a data set.
const DATA_ENDINGS: [&str; 2] = ["jsonl", "parquet"];
const PIECE: usize = 1 << 20;

impl Submit {
    pub async fn run(self, connection: &Connection, global: &Global) -> Result<()> {
        let shown = self.configuration.display();
        let configuration =
            fs::read_to_string(&self.configuration).with_context(|| format!("cannot read {shown}"))?;
        let (mut model, mut data) = (self.model.unwrap_or_default(), self.data);
        let (mut saves, mut demand) = (SavePolicy::default(), None);
        if self.kind == "fine-tuning" {
            let asked = configured(&configuration, &shown.to_string(), &model)?;
            model = asked.model.clone();
            if data.is_empty() {
                // As mlx-lm has it: seen from where the command runs.
                data.push(PathBuf::from(&asked.data));
            }
            saves = SavePolicy::of(&asked);
            demand = Some(demand_to_proto(&asked.demand()));
        }
        let mut inputs = Vec::new();
        for path in files_of(&data)? {
            inputs.push(upload(connection, &path, global).await?);
        }
        let (publish_model, publish_adapter) = match &self.publish {
            None => Default::default(),
            Some(name) => match name.rsplit_once(':') {
                Some((model, adapter)) if !model.is_empty() && !adapter.is_empty() => {
                    (model.to_owned(), adapter.to_owned())
                }
                _ => bail!("--publish is {name:?}, but must be MODEL:NAME"),
            },
        };
        let id = self.id.unwrap_or_else(|| format!("job-{:012x}", rand::random::<u64>() >> 16));
        let request = SubmitJobRequest {
            id: id.clone(),
            kind: self.kind,
            model: absolute(&model),
            configuration,
            inputs,
            memory_bytes: self.memory.unwrap_or_default(),
            share_percent: self.share,
            workers: self.workers,
            stages: self.stages.0,
            demand,
            save_steps: self.save_steps.unwrap_or(saves.steps),
            save_seconds: self.save_time.map_or(saves.seconds, |time| training::narrow(time.as_secs())),
            keep_checkpoints: self.keep.unwrap_or(saves.keep),
            publish_model,
            publish_adapter,
            ..SubmitJobRequest::default()
        };
        let job = connection.jobs().submit(request).await?.into_inner();
        if self.watch {
            return super::watch(connection, &id, global).await;
        }
        let job = match self.stages.0 {
            1 => job,
            _ => planned(connection, job).await?,
        };
        match global.json {
            true => output::json(&super::shown::json(&job)),
            false => {
                output::line(&format!("{id} is {}.", super::shown::state(&job)))?;
                super::shown::stages(&job)
            }
        }
    }
}

/// The job once it is known which node has what of it, or that none has.
async fn planned(connection: &Connection, mut job: Job) -> Result<Job> {
    let until = Instant::now() + PLANNING;
    let is_open = |job: &Job| {
        let is_early = matches!(job.state(), JobState::Queued | JobState::Preparing);
        is_early && job.node.is_empty() && job.stages.is_empty()
    };
    while is_open(&job) && Instant::now() < until {
        tokio::time::sleep(LOOK).await;
        let id = job.wish.unwrap_or_default().id;
        job = connection.jobs().get(GetJobRequest { id }).await?.into_inner();
    }
    Ok(job)
}

/// What the configuration says of saving; 0: nothing.
#[derive(Default)]
struct SavePolicy {
    steps: u32,
    seconds: u32,
    keep: u32,
}

impl SavePolicy {
    fn of(config: &TrainingConfig) -> Self {
        Self {
            // The runner counts batches, as the progress that it tells.
            steps: config.checkpoint_every().map(training::narrow).unwrap_or_default(),
            seconds: training::seconds_of_saves(config).unwrap_or_default(),
            keep: config.keep_checkpoints.min(32) as u32,
        }
    }
}

/// The configuration as the trainer will read it: what is wrong with it shows here and not on a node.
fn configured(text: &str, origin: &str, model: &str) -> Result<TrainingConfig> {
    let mut flags = Settings::new();
    if !model.is_empty() {
        flags.set("model", model);
    }
    flags.set("train", true);
    let asked = TrainingConfig::resolve(flags, Settings::from_yaml(text, origin)?)?;
    if let Err(wrong) = training::job::configuration(text, &asked.model) {
        bail!("{origin}: {wrong}");
    }
    Ok(asked)
}

/// A folder is made absolute: other processes read it.
fn absolute(model: &str) -> String {
    match Path::new(model).is_dir() {
        true => std::path::absolute(model).map_or(model.to_owned(), |path| path.display().to_string()),
        false => model.to_owned(),
    }
}

fn files_of(data: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in data {
        let unreadable = || format!("cannot read {}", path.display());
        if !path.is_dir() {
            ensure!(path.exists(), "there is no {}", path.display());
            files.push(path.clone());
            continue;
        }
        let mut found = Vec::new();
        for entry in fs::read_dir(path).with_context(unreadable)? {
            let file = entry.with_context(unreadable)?.path();
            let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
            if file.is_file() && DATA_ENDINGS.contains(&ending) {
                found.push(file);
            }
        }
        ensure!(!found.is_empty(), "{} has no *.jsonl and no *.parquet file", path.display());
        found.sort();
        files.extend(found);
    }
    Ok(files)
}

/// Takes a file to the node, unless it has it, from where an earlier upload broke.
async fn upload(connection: &Connection, path: &Path, global: &Global) -> Result<JobInput> {
    let unreadable = || format!("cannot read {}", path.display());
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} has no usable name", path.display()))?.to_owned();
    let mut file = File::open(path).with_context(unreadable)?;
    let mut hasher = blake3::Hasher::new();
    let bytes = std::io::copy(&mut file, &mut hasher).with_context(unreadable)?;
    let hash = bytes::Bytes::copy_from_slice(hasher.finalize().as_bytes());
    let named = UploadedRequest { hash: hash.clone(), bytes };
    let here = connection.jobs().uploaded(named.clone()).await?.into_inner();
    let input = JobInput { name: name.clone(), hash, bytes };
    if here.complete {
        return Ok(input);
    }
    let offset = here.received.min(bytes);
    file.seek(SeekFrom::Start(offset)).with_context(unreadable)?;
    let bar = progress::Bar::new(&name, global.quiet || global.json);
    let (sender, pieces) = mpsc::channel(4);
    let owned = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || -> Result<()> {
        let mut first = Some(named);
        let mut done = offset;
        loop {
            let mut data = Vec::with_capacity(PIECE);
            (&mut file)
                .take(PIECE as u64)
                .read_to_end(&mut data)
                .with_context(|| format!("cannot read {}", owned.display()))?;
            if data.is_empty() && first.is_none() {
                return Ok(());
            }
            done += data.len() as u64;
            let piece = UploadRequest { offset, file: first.take(), data: data.into() };
            bar.show(done, bytes);
            // Nobody takes it any more: the call has failed, and says why.
            if sender.blocking_send(piece).is_err() {
                return Ok(());
            }
        }
    });
    let received = connection.jobs().upload(ReceiverStream::new(pieces)).await?.into_inner();
    reading.await.context("reading the file broke")??;
    ensure!(received.complete, "the node has {} of {bytes} bytes of {name}: submit again", received.received);
    Ok(input)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_read_before_anything_is_sent() {
        let asked = configured("model: demo\ndata: ./rows\ncheckpoint_steps: 7\n", "lora.yaml", "").unwrap();
        assert_eq!((asked.model.as_str(), asked.data.as_str()), ("demo", "./rows"));
        assert_eq!(SavePolicy::of(&asked).steps, 7);
        // Updates in the configuration, batches in the job.
        for (text, steps) in [
            ("checkpoint_steps: 7\ngrad_accumulation_steps: 4\n", 28),
            ("save_every: 30\ngrad_accumulation_steps: 4\n", 30),
            ("checkpoint_minutes: 5\n", 0),
        ] {
            assert_eq!(
                SavePolicy::of(&configured(text, "lora.yaml", "demo").unwrap()).steps,
                steps,
                "{text}"
            );
        }
        assert_eq!(configured("model: demo", "lora.yaml", "other").unwrap().model, "other");
        let error = configured("itres: 7", "lora.yaml", "").unwrap_err().to_string();
        assert!(error.contains("itres") && error.contains("lora.yaml"), "{error}");
    }

    #[test]
    fn stages_are_a_number_or_as_many_as_it_takes() {
        assert_eq!((stages("auto"), stages("8"), stages("1")), (Ok(Stages(0)), Ok(Stages(8)), Ok(Stages(1))));
        for wrong in ["0", "9", "two", "", "-1"] {
            assert!(stages(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_folder_stands_for_its_rows() {
        let folder = tempfile::tempdir().unwrap();
        assert!(files_of(&[folder.path().to_owned()]).is_err());
        for name in ["train.jsonl", "valid.jsonl", "README.md"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let files = files_of(&[folder.path().to_owned()]).unwrap();
        assert_eq!(files, [folder.path().join("train.jsonl"), folder.path().join("valid.jsonl")]);
        assert!(files_of(&[folder.path().join("nothing")]).is_err());
    }
}
