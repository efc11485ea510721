//! Every family says truly whether it can be fine-tuned: each of its layers has something that low-rank changes can be learned for.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use mlxnode_checkpoint::architectures;
use mlxnode_mlx::Device;
use mlxnode_training::parameters;
use mlxnode_training::trainer::{Trainer, TrainerOptions};
use std::collections::BTreeSet;
use std::path::Path;
use support::*;

const YAML: &str = "num_layers: -1\nlora_parameters: {rank: 2, scale: 4.0, dropout: 0.0}\n";

/// What is learned from a batch, or why nothing is.
fn learned(device: &Device, model: &Path) -> Result<(), String> {
    let config = training(YAML);
    let tuning = tuning(model);
    // Some families go through their layers twice.
    let spec = tuning.spec();
    let layers: BTreeSet<usize> = (0..spec.layer_count()).map(|layer| spec.stored_layer(layer)).collect();
    let plan = parameters::plan(&tuning, &config).map_err(|error| error.to_string())?;
    let tuner = tuning.tune(plan).map_err(|error| error.to_string())?;
    let mut begun = parameters::begin(&tuner, 3).unwrap();
    // As after a first update: with zeros there the other half has no gradient.
    for (trained, array) in tuner.trained().iter().zip(&mut begun.arrays) {
        if trained.name.ends_with(".lora_b") {
            let little = mlxnode_mlx::Array::scalar(0.01, mlxnode_mlx::Dtype::F32).unwrap();
            *array = device.add(array, &little).unwrap();
        }
    }
    let options = TrainerOptions {
        optimizer: config.optimizer,
        clip: None,
        parity: false,
        preference: None,
        seed: 0,
        compile: false,
    };
    let mut trainer = Trainer::new(tuner.clone(), begun, options).map_err(|error| error.to_string())?;
    let rows = batch(&[(row(12, 1), 0), (row(9, 2), 0)], 12);
    let made = trainer.gradients(&rows, 1).map_err(|error| error.to_string())?;
    let mut learning = BTreeSet::new();
    for (trained, gradient) in tuner.trained().iter().zip(&made.gradients) {
        let values = numbers(device, gradient);
        if !values.iter().all(|value| value.is_finite()) {
            return Err(format!("the gradient of {} is not finite", trained.name));
        }
        if values.iter().any(|value| *value != 0.0) {
            learning.extend(trained.name.split('.').nth(2).map(str::to_owned));
        }
    }
    match learning.len() == layers.len() {
        true => Ok(()),
        false => Err(format!("of the layers {layers:?} only {learning:?} learn")),
    }
}

#[test]
fn capabilities_to_learn_are_true() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::open().unwrap();
    let mut wrong = Vec::new();
    for known in architectures::known() {
        let model = folder.path().join(known.name);
        write(&model, &parity_config(known.name), 3);
        let learned = learned(&device, &model);
        if learned.is_ok() != known.capabilities.lora {
            wrong.push(format!("{}: {learned:?}", known.name));
        }
        std::fs::remove_dir_all(&model).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
