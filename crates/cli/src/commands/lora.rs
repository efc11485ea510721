//! `mlxnode lora`: trains an adapter, or a model's own weights, on this machine.

use crate::arguments::Global;
use crate::interrupts::{self, Interrupts};
use crate::training::{Checkpoints, Figures, Files, data};
use crate::{hub, loading, progress, warnings};
use anyhow::{Context as _, Result, bail};
use clap::Args;
use mlxnode_compute::{Advance, Job as _, LayerRange};
use mlxnode_engine::tuning::Tuning;
use mlxnode_training::{
    ADAPTER_CONFIG, ADAPTER_FILE, AdapterConfig, Encoder, FineTuning, Layers, Sets, Settings, TrainingConfig,
};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Train an adapter for a model (LoRA, DoRA), or its own weights.
///
/// Flags, keys of the configuration file and files are mlx-lm's: mlx-lm loads the adapters, and its own are gone on from. A flag wins
/// over the file. Runs in this process; Ctrl-C saves where it is, and --resume goes on from there bit by bit the same.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode lora --model mlx-community/Qwen3-0.6B-4bit --train --data my-data --iters 600
  mlxnode lora -c lora.yaml --batch-size 2
  mlxnode lora -c lora.yaml --resume
  mlxnode lora -c lora.yaml --test")]
pub struct Lora {
    /// A folder, a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION), or demo.
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Train.
    #[arg(long)]
    train: bool,
    /// A folder with train.jsonl, valid.jsonl and test.jsonl, a file, or a data set of the hub.
    #[arg(long, value_name = "DATA")]
    data: Option<String>,
    /// What is trained.
    #[arg(long, value_name = "TYPE", value_parser = ["lora", "dora", "full"])]
    fine_tune_type: Option<String>,
    /// With what.
    #[arg(long, value_name = "NAME", value_parser = ["adam", "adamw", "muon", "sgd", "adafactor"])]
    optimizer: Option<String>,
    /// Only answers count in the loss, not prompts.
    #[arg(long)]
    mask_prompt: bool,
    /// Blocks that are trained, from the last one on. -1: all. Default: 16.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    num_layers: Option<i64>,
    /// Rows that go through the model together. Default: 4.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    batch_size: Option<i64>,
    /// Batches to train on. Default: 1000.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    iters: Option<i64>,
    /// Batches of a validation. -1: all. Default: 25.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    val_batches: Option<i64>,
    /// What updates are multiplied by. Default: 1e-5.
    #[arg(long, value_name = "RATE", allow_negative_numbers = true)]
    learning_rate: Option<f64>,
    /// Batches between two reports. Default: 10.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    steps_per_report: Option<i64>,
    /// Batches between two validations. Default: 200.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    steps_per_eval: Option<i64>,
    /// Batches of one update. Default: 1.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    grad_accumulation_steps: Option<i64>,
    /// An adapter's file to begin with.
    #[arg(long, value_name = "FILE")]
    resume_adapter_file: Option<String>,
    /// Where the adapter goes. Default: adapters.
    #[arg(long, value_name = "FOLDER")]
    adapter_path: Option<String>,
    /// Batches between two saved adapters. Default: 100.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    save_every: Option<i64>,
    /// Measure on test.jsonl, after training if there is any.
    #[arg(long)]
    test: bool,
    /// Batches of the test. -1: all. Default: 500.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    test_batches: Option<i64>,
    /// Longer rows are cut, in tokens. Default: 2048.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_seq_length: Option<i64>,
    /// A YAML file with any of these, and with what has no flag.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Compute what lies within layers again instead of keeping it: less memory, more time.
    #[arg(long)]
    grad_checkpoint: bool,
    /// Free the allocator's cache after a step when it is larger, such as 2GB.
    #[arg(long, value_name = "BYTES")]
    clear_cache_threshold: Option<String>,
    /// Write figures beside the adapter: jsonl, csv, tensorboard, with commas between.
    #[arg(long, value_name = "NAMES")]
    report_to: Option<String>,
    /// A name for the run in its pictures. Default: that of the adapter's folder.
    #[arg(long, value_name = "NAME")]
    project_name: Option<String>,
    /// Of all randomness. Default: 0.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<i64>,
    /// Do as mlx-lm does to the last detail: mlx-lm.
    #[arg(long, value_name = "WHOM", value_parser = ["mlx-lm"])]
    parity: Option<String>,
    /// Put short rows together, apart in attention.
    #[arg(long)]
    packing: bool,
    /// The most that the gradient's length may be.
    #[arg(long, value_name = "LENGTH", allow_negative_numbers = true)]
    clip_grad_norm: Option<f64>,
    /// Go on from the last checkpoint in the adapter's folder.
    #[arg(long)]
    resume: bool,
    #[arg(long, hide = true)]
    trust_remote_code: bool,
}

impl Lora {
    pub fn run(self, global: &Global) -> Result<ExitCode> {
        let config = self.configuration()?;
        let mut checkpoints = Checkpoints::new(&config);
        let newest = if self.resume { checkpoints.newest()? } else { None };
        if self.resume && newest.is_none() {
            bail!("there is no checkpoint in {}; leave --resume out to begin", config.adapter_path.display());
        }
        let folder = hub::folder(&config.model, global.quiet)?;
        let opened = loading::open(&folder)?;
        let config = if config.train { config } else { tested(config)? };
        let folders = data::folders(&config, global.quiet)?;
        let encoder = Encoder::new(opened.tokenizer, opened.template, &config);
        let bar = progress::Bar::counting("rows", global.quiet);
        let sets = Sets::read(&config, &folders, &encoder, &|rows| bar.show(rows, rows))?;
        drop(bar);
        data::say_what_was_cut(&sets, &config, global.quiet);
        let bar = progress::Bar::new("loading", global.quiet);
        let layers = LayerRange::new(0, opened.checkpoint.spec().layer_count());
        let tuning = Tuning::load(&opened.checkpoint, layers, &mut |done, total| bar.show(done, total))
            .with_context(|| format!("cannot use the model in {}", folder.display()))?;
        drop(bar);
        warnings::notes(opened.checkpoint.notes(), global.quiet);
        let weights = tuning.parameters();
        let compile = tuning.device().is_gpu();
        let fingerprint = opened.checkpoint.fingerprint();
        let mut job = FineTuning::new(tuning, config.clone(), sets, fingerprint, compile)?;
        let mut figures = Figures::new(&config, global);
        figures.begins(&job, weights)?;
        let files = Files::new(&config.adapter_path);
        if let Some(newest) = &newest {
            job.resume(newest).with_context(|| format!("cannot go on from {}", newest.display()))?;
            checkpoints.goes_on(job.iteration());
            figures.resumed(&job)?;
        } else if config.train
            && let Some(place) = checkpoints.set_aside()?
            && !global.quiet
        {
            warnings::text(&format!(
                "note: this run begins anew (without --resume); the checkpoints of the one before are in {} now\n",
                place.display()
            ));
        }
        if config.train {
            files.prepare(&config)?;
        }
        figures.record(&job)?;
        let interrupts = Interrupts::listen()?;
        let running = interrupts.answer();
        loop {
            if running.pressed() {
                if config.train {
                    let place = match checkpoints.saved(job.iteration()) {
                        Some(place) => place,
                        None => checkpoints.save(&mut job)?,
                    };
                    figures.interrupted(&job, &place)?;
                }
                return Ok(interrupts::exit_code(true));
            }
            let advance = job.advance();
            if let Err(error) = &advance
                && config.train
                && let Some(place) = checkpoints.newest()?
            {
                return Err(anyhow::Error::new(error.clone())
                    .context(format!("stopped; the last checkpoint is {}", place.display())));
            }
            let advance = advance?;
            figures.advanced(&job, &advance)?;
            match advance {
                Advance::Finished => break,
                Advance::Step(report) => {
                    let group = config.grad_accumulation_steps.max(1);
                    // The iterations of this update were these; one of them may be due.
                    let before = report.step - 1 - (report.step - 1) % group;
                    if report.step / config.save_every > before / config.save_every {
                        figures.saved(&files.save(&mut job, report.step)?)?;
                    }
                    if checkpoints.is_due(job.iteration()) {
                        let place = checkpoints.save(&mut job)?;
                        figures.checkpointed(&job, &place, checkpoints.pause())?;
                    }
                }
                _ => {}
            }
        }
        if config.train {
            files.finish(&mut job)?;
            if checkpoints.saved(job.iteration()).is_none() {
                let place = checkpoints.save(&mut job)?;
                figures.checkpointed(&job, &place, checkpoints.pause())?;
            }
            figures.finished(&files)?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Flags over the file over defaults.
    fn configuration(&self) -> Result<TrainingConfig> {
        let mut flags = Settings::new();
        for (key, given) in [
            ("train", self.train),
            ("mask_prompt", self.mask_prompt),
            ("test", self.test),
            ("grad_checkpoint", self.grad_checkpoint),
            ("packing", self.packing),
        ] {
            if given {
                flags.set(key, true);
            }
        }
        for (key, text) in [
            ("model", &self.model),
            ("data", &self.data),
            ("fine_tune_type", &self.fine_tune_type),
            ("optimizer", &self.optimizer),
            ("resume_adapter_file", &self.resume_adapter_file),
            ("adapter_path", &self.adapter_path),
            ("clear_cache_threshold", &self.clear_cache_threshold),
            ("report_to", &self.report_to),
            ("project_name", &self.project_name),
            ("parity", &self.parity),
        ] {
            if let Some(text) = text {
                flags.set(key, text.clone());
            }
        }
        for (key, number) in [
            ("num_layers", self.num_layers),
            ("batch_size", self.batch_size),
            ("iters", self.iters),
            ("val_batches", self.val_batches),
            ("steps_per_report", self.steps_per_report),
            ("steps_per_eval", self.steps_per_eval),
            ("grad_accumulation_steps", self.grad_accumulation_steps),
            ("save_every", self.save_every),
            ("test_batches", self.test_batches),
            ("max_seq_length", self.max_seq_length),
            ("seed", self.seed),
        ] {
            if let Some(number) = number {
                flags.set(key, number);
            }
        }
        for (key, number) in [("learning_rate", self.learning_rate), ("clip_grad_norm", self.clip_grad_norm)]
        {
            if let Some(number) = number {
                flags.set(key, number);
            }
        }
        if self.resume {
            flags.set("train", true);
        }
        let file = match &self.config {
            None => Settings::new(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the configuration {}", path.display()))?;
                Settings::from_yaml(&text, &path.display().to_string())?
            }
        };
        Ok(TrainingConfig::resolve(flags, file)?)
    }
}

/// Without training the adapter that is there is measured: what it changes is what its configuration says. An empty path is the model
/// by itself.
fn tested(mut config: TrainingConfig) -> Result<TrainingConfig> {
    if config.adapter_path.as_os_str().is_empty() {
        config.resume_adapter_file = None;
        config.layers = Layers::All;
        return Ok(config);
    }
    let path = config.adapter_path.join(ADAPTER_CONFIG);
    let text = std::fs::read_to_string(&path).with_context(|| {
        format!(
            "cannot read {}; name the adapter's folder with --adapter-path, or give \"\" to measure the model by itself",
            path.display()
        )
    })?;
    let adapter = AdapterConfig::from_json(&text, &path.display().to_string())?;
    config.fine_tune_type = adapter.fine_tune_type;
    config.layers = match adapter.num_layers.and_then(|count| usize::try_from(count).ok()) {
        Some(count) if count > 0 => Layers::Last(count),
        _ => Layers::All,
    };
    if let Some(lora) = adapter.lora {
        config.lora = lora;
    }
    config.resume_adapter_file = Some(file_of(&config.adapter_path));
    Ok(config)
}

fn file_of(folder: &Path) -> PathBuf {
    folder.join(ADAPTER_FILE)
}
