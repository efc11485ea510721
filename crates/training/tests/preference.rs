//! Losses on pairs of answers are those of the papers, and training on them teaches which answer is better.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use mlxnode_compute::{Advance, Job as _};
use mlxnode_mlx::{Array, Device, TensorFile};
use mlxnode_training::parameters::{self, Beginning};
use mlxnode_training::trainer::{Trainer, TrainerOptions};
use mlxnode_training::{BatchRow, Dataset, FineTuning, MicroBatch, Row, Sequence, Sets};
use serde_json::json;
use std::sync::Arc;
use support::*;

const YAML: &str = "num_layers: 2\nseed: 3\nlora_parameters: {rank: 4, scale: 10.0, dropout: 0.0}\n";

fn pairs() -> Vec<(Vec<u32>, Vec<u32>)> {
    (0..6)
        .map(|index| {
            let prompt = row(4, 50 + index);
            let answer = |seed| [prompt.clone(), row(3 + index as usize % 4, seed)].concat();
            (answer(100 + index), answer(200 + index))
        })
        .collect()
}

fn counted(tokens: &[u32]) -> Vec<std::ops::Range<u32>> {
    std::iter::once(4..tokens.len() as u32).collect()
}

fn micro_batch() -> MicroBatch {
    let of = |tokens: Vec<u32>| BatchRow {
        counted: counted(&tokens),
        segments: vec![tokens.len() as u32],
        tokens,
        numbers: vec![0],
    };
    let (chosen, rejected): (Vec<_>, Vec<_>) = pairs().into_iter().take(3).unzip();
    MicroBatch { rows: chosen.into_iter().chain(rejected).map(of).collect(), width: 33, is_preference: true }
}

#[test]
fn losses_and_gradients_are_the_papers() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write(&model, &config("llama", json!({})), 5);
    let batch = micro_batch();
    let mask: Vec<Vec<f32>> = batch.mask().chunks(batch.width - 1).map(<[f32]>::to_vec).collect();
    let losses = [("dpo", 0.3), ("orpo", 0.7)];
    let file = |loss: &str| folder.path().join(format!("{loss}.safetensors"));
    let requests = losses.map(|(loss, beta)| {
        json!({"kind": "preference", "model": model, "layers": 2, "parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0},
            "seed": 3, "loss": loss, "beta": beta, "batch": padded(&batch), "mask": mask, "file": file(loss)})
    });
    let answers = ask(folder.path(), &requests);
    let device = Device::open().unwrap();
    for ((loss, beta), answer) in losses.into_iter().zip(answers) {
        let config = training(&format!("{YAML}preference: {loss}\nbeta: {beta}\n"));
        let tuning = tuning(&model);
        let plan = parameters::plan(&tuning, &config).unwrap();
        let tuner = tuning.tune(plan).unwrap();
        let begun = parameters::begin(&tuner, 3).unwrap();
        let mut tensors = TensorFile::open(&device, &file(loss)).unwrap();
        let mut taken = |kind: &str| -> Vec<Array> {
            let names = tuner.trained().iter().map(|trained| format!("{kind}.{}", trained.name));
            names.map(|name| tensors.take(&name).unwrap()).collect()
        };
        let (arrays, expected) = (taken("p"), taken("g"));
        let options = TrainerOptions {
            optimizer: config.optimizer,
            clip: None,
            parity: false,
            preference: config.preference,
            seed: 0,
            compile: true,
        };
        let beginning = Beginning { arrays, reference: begun.reference };
        let mut trainer = Trainer::new(tuner.clone(), beginning, options).unwrap();
        let made = trainer.gradients(&batch, 1).unwrap();
        let value = answer["loss"].as_f64().unwrap();
        assert!((made.loss - value).abs() < 1e-4 * value.abs(), "{loss}: {} and {value}", made.loss);
        assert_eq!(made.tokens, 3, "pairs");
        for ((trained, ours), theirs) in tuner.trained().iter().zip(&made.gradients).zip(&expected) {
            let apart = distance(&numbers(&device, ours), &numbers(&device, theirs));
            assert!(apart < 5e-4, "{loss}: gradient of {} is {apart} away", trained.name);
        }
    }
}

#[test]
fn what_was_chosen_becomes_likelier() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write(&model, &config("llama", json!({})), 5);
    let mut dataset = Dataset::default();
    for (chosen, rejected) in pairs() {
        let sequence = |tokens: Vec<u32>| Sequence { counted: counted(&tokens), tokens };
        dataset.push(Row::Pair { chosen: sequence(chosen), rejected: sequence(rejected) }, 3, 64);
    }
    for (loss, beta) in [("dpo", 0.3), ("orpo", 0.7)] {
        let sets = Sets { train: Arc::new(dataset.clone()), ..Sets::default() };
        let yaml = format!(
            "{YAML}preference: {loss}\nbeta: {beta}\niters: 30\nbatch_size: 3\nlearning_rate: 1e-3\n"
        );
        let mut job = FineTuning::new(tuning(&model), training(&yaml), sets, [1; 32], false).unwrap();
        let mut losses = Vec::new();
        loop {
            match job.advance().unwrap() {
                Advance::Step(report) => losses.push(report.loss),
                Advance::Finished => break,
                _ => {}
            }
        }
        if loss == "dpo" {
            assert!((losses[0] - 2.0_f64.ln()).abs() < 1e-4, "nothing is preferred at first: {losses:?}");
        }
        assert!(losses[29] < 0.5 * losses[0], "{loss}: {losses:?}");
    }
}
